"""Codebooks: levels of each block's own, by weighted k-means in one dimension (SqueezeLLM).

Kim et al., "SqueezeLLM: Dense-and-Sparse Quantization" (2024): the weights of the squared errors are the
diagonal of the Fisher information, here ``importance``; by the recipe ``weighted`` mean squares of inputs. In one
dimension clusters are intervals of the sorted values, so that every step works on prefix sums, for all blocks at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpq.quantizers.blocks import BUFFERED, from_blocks, tiles, weighted_blocks
from mpq.quantizers.float16 import to_float16
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.sorted_sums import SortedBlocks
from mpq.quantizers.tensors import QuantizedTensor

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
    step = max(1, BUFFERED // blocks.shape[1])
    for r in range(0, len(blocks), step):
        found = fit_codebook(blocks[r : r + step], levels, None if weights is None else weights[r : r + step])
        codebook[r : r + step] = to_float16(found, f"a level of {fmt.name}").to(blocks.dtype)
    for tile in tiles(blocks.shape):
        codes[tile] = nearest_level(blocks[tile], codebook[tile[0]])
    scale = blocks.new_ones(len(blocks), 1)
    shape = tuple(x.shape)
    return QuantizedTensor(codes, scale, torch.zeros_like(scale), fmt, shape, channel_axis, codebook=codebook)


def dequantize(q: QuantizedTensor) -> Tensor:
    """As `mpq.quantizers.tensors.dequantize`."""
    assert q.codebook is not None
    values = q.codebook.new_empty(q.codes.shape)
    for tile in tiles(q.codes.shape):
        values[tile] = q.codebook[tile[0]].gather(1, q.codes[tile].long())
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
    ordered = SortedBlocks(blocks, weights)
    if levels <= _MOST_SEARCHED:
        cuts = _best_cuts(ordered.even_cuts(levels * _CUTS), ordered, levels)
    else:
        cuts = ordered.even_cuts(levels)
    return _lloyd(ordered, cuts).to(blocks.dtype)


def _best_cuts(cuts: Tensor, ordered: SortedBlocks, levels: int) -> Tensor:
    """The ``levels`` intervals between candidate cuts with the least squared error: ``[blocks, levels + 1]``."""
    step = max(1, BUFFERED // cuts.shape[1] ** 2)
    at = ordered.before(cuts)
    found = [_best_of(cuts[r : r + step], at[:, r : r + step], levels) for r in range(0, len(cuts), step)]
    return torch.cat(found)


def _best_of(cuts: Tensor, at: Tensor, levels: int) -> Tensor:
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


def _lloyd(ordered: SortedBlocks, cuts: Tensor) -> Tensor:
    """Means of intervals, whose ends move to the middles between the means until nothing changes."""
    values = ordered.values
    centers = values.gather(1, cuts[:, :-1].clamp(max=values.shape[1] - 1)).double()
    for _ in range(_STEPS):
        weight, first, _ = ordered.before(cuts).diff(dim=2).unbind()
        centers = torch.where(weight > 0, first / weight, centers).sort(dim=1).values
        middle = ((centers[:, 1:] + centers[:, :-1]) / 2).to(values.dtype)
        moved = torch.cat([cuts[:, :1], torch.searchsorted(values, middle, right=True), cuts[:, -1:]], 1)
        if torch.equal(moved, cuts):
            break
        cuts = moved
    return centers
