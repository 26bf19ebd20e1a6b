"""Codebooks: levels of each block's own, by weighted k-means in one dimension (SqueezeLLM).

Kim et al., "SqueezeLLM: Dense-and-Sparse Quantization" (2024): the weights of the squared errors are the
diagonal of the Fisher information, here ``importance``; by the recipe ``weighted`` mean squares of inputs. In one
dimension clusters are intervals of the sorted values, so that every step works on prefix sums, for all blocks at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpq.quantizers.blocks import from_blocks, weighted_blocks
from mpq.quantizers.float16 import to_float16
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.tensors import QuantizedTensor

_BUFFER_ELEMENTS = 2**20  # of the sorted blocks and of the table of interval costs at a time
_STEPS = 100
# Up to this many levels the start is the best of all choices among _CUTS cuts a level; more levels differ by little.
_MOST_SEARCHED, _CUTS = 16, 4


def quantize(
    x: Tensor, fmt: NumberFormat, channel_axis: int = 0, method: str = "mse", importance: Tensor | None = None
) -> QuantizedTensor:
    """As `mpq.quantizers.tensors.quantize`; the codebook is in float16, in rising order. The range rule has no say.

    Raises:
        FormatError: If a level is beyond float16's ends.
    """
    blocks, weights = weighted_blocks(x, fmt, channel_axis, importance)
    levels = 2**fmt.bits
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=x.device)
    codebook = blocks.new_empty(len(blocks), levels)
    step = max(1, _BUFFER_ELEMENTS // blocks.shape[1])
    for r in range(0, len(blocks), step):
        part = blocks[r : r + step]
        found = fit_codebook(part, levels, None if weights is None else weights[r : r + step])
        found = to_float16(found, f"a level of {fmt.name}").to(blocks.dtype)
        codebook[r : r + step] = found
        codes[r : r + step] = nearest_level(part, found)
    scale = blocks.new_ones(len(blocks), 1)
    shape = tuple(x.shape)
    return QuantizedTensor(codes, scale, torch.zeros_like(scale), fmt, shape, channel_axis, codebook=codebook)


def dequantize(q: QuantizedTensor) -> Tensor:
    """As `mpq.quantizers.tensors.dequantize`."""
    assert q.codebook is not None
    values = q.codebook.gather(1, q.codes.long())
    return from_blocks(values, q.shape, q.channel_axis, *(q.fmt.block or (1, 0)))


def nearest_level(blocks: Tensor, codebook: Tensor) -> Tensor:
    """Which of its rising levels ``[blocks, levels]`` each element ``[blocks, elements]`` is nearest to; ties down."""
    middle = (codebook[:, 1:] + codebook[:, :-1]) / 2
    return torch.searchsorted(middle, blocks.contiguous(), out_int32=True).to(torch.uint8)


def fit_codebook(blocks: Tensor, levels: int, weights: Tensor | None = None) -> Tensor:
    """Levels with the least weighted squared error of each block.

    Lloyd's iterations from a good start: the best choice among candidate cuts, by dynamic programming, which is the
    optimum for blocks with at most four distinct values a level; above 16 levels the cuts at even steps of the third
    root of the density (Panter and Dite, 1951).

    Args:
        blocks: ``[blocks, elements]``.
        levels: How many.
        weights: Non-negative, ``[blocks, elements]``; None: all alike. A block without any weight counts all alike.

    Returns:
        ``[blocks, levels]`` in rising order; levels that no element needs repeat others.
    """
    values, order = blocks.sort(dim=1)
    w = torch.ones_like(values) if weights is None else weights.gather(1, order)
    w = torch.where(w.sum(1, keepdim=True) > 0, w, 1.0)
    sums = torch.stack([w.double(), w.double() * values, w.double() * values.double().square()])
    sums = torch.nn.functional.pad(sums.cumsum(2), (1, 0))  # [weight; first; second moment, blocks, elements + 1]
    searched = levels <= _MOST_SEARCHED
    cuts = _candidate_cuts(values, w, levels * _CUTS if searched else levels)
    if searched:
        cuts = _best_cuts(cuts, sums, levels)
    return _lloyd(values, sums, cuts).to(blocks.dtype)


def _candidate_cuts(values: Tensor, w: Tensor, count: int) -> Tensor:
    """Ends ``[blocks, count + 1]`` of intervals of sorted values, from 0 to their number, for a good start.

    Blocks with at most ``count`` distinct values have one interval for each of them.
    """
    rows, n = values.shape
    gaps = values.diff(dim=1).double()
    new = gaps > 0
    # Bennett: the density of the best levels is that of the values to the third; a gap d with weight w stands for w/d.
    mass = torch.where(new, gaps.square() * (w[:, 1:] + w[:, :-1]), 0.0).pow_(1 / 3).cumsum(1)
    rank = new.cumsum(1)
    few = rank[:, -1:] < count if n > 1 else torch.ones(rows, 1, dtype=torch.bool, device=values.device)
    along = torch.where(few, rank.double(), mass)
    steps = torch.arange(1, count, dtype=torch.float64, device=values.device).expand(rows, -1)
    total = along[:, -1:] if n > 1 else steps[:, :1]
    steps = torch.where(few, steps, steps * (total / count))
    inner = (torch.searchsorted(along.contiguous(), steps.contiguous()) + 1).clamp_(max=n)
    # Several steps may end in one wide gap: no interval of many values stays empty.
    place = torch.arange(1, count, device=values.device)
    apart = ((inner - place).cummax(1).values + place).minimum(n - count + place)
    inner = torch.where(few, inner, apart)
    return torch.cat([torch.zeros_like(inner[:, :1]), inner, torch.full_like(inner[:, :1], n)], 1)


def _best_cuts(cuts: Tensor, sums: Tensor, levels: int) -> Tensor:
    """The ``levels`` intervals between candidate cuts with the least squared error: ``[blocks, levels + 1]``."""
    step = max(1, _BUFFER_ELEMENTS // cuts.shape[1] ** 2)
    found = [_best_of(cuts[r : r + step], sums[:, r : r + step], levels) for r in range(0, len(cuts), step)]
    return torch.cat(found)


def _best_of(cuts: Tensor, sums: Tensor, levels: int) -> Tensor:
    at = sums.gather(2, cuts.expand(3, -1, -1))
    weight, first, second = (at[:, :, None, :] - at[:, :, :, None]).unbind()  # of the interval from i to j
    cost = second - first.square() / weight.clamp(min=torch.finfo(torch.float64).tiny)
    backward = torch.ones_like(cost[0], dtype=torch.bool).tril(-1)
    cost = cost.clamp_(min=0).masked_fill_(backward, torch.inf)
    best, origins = cost[:, 0], []
    for _ in range(levels - 1):
        best, origin = (best[:, :, None] + cost).min(1)
        origins.append(origin)
    ends = [torch.full_like(cuts[:, :1], cuts.shape[1] - 1)]
    for origin in reversed(origins):
        ends.append(origin.gather(1, ends[-1]))
    ends.append(torch.zeros_like(ends[0]))
    return cuts.gather(1, torch.cat(ends[::-1], 1))


def _lloyd(values: Tensor, sums: Tensor, cuts: Tensor) -> Tensor:
    """Means of intervals, whose ends move to the middles between the means until nothing changes."""
    centers = values.double().gather(1, cuts[:, :-1].clamp(max=values.shape[1] - 1))
    for _ in range(_STEPS):
        weight, first, _ = sums.gather(2, cuts.expand(3, -1, -1)).diff(dim=2).unbind()
        centers = torch.where(weight > 0, first / weight, centers).sort(dim=1).values
        middle = ((centers[:, 1:] + centers[:, :-1]) / 2).to(values.dtype)
        moved = torch.cat([cuts[:, :1], torch.searchsorted(values, middle, right=True), cuts[:, -1:]], 1)
        if torch.equal(moved, cuts):
            break
        cuts = moved
    return centers
