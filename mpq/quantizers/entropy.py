"""The range whose rounding changes a histogram least, as TensorRT calibrates activations."""

from __future__ import annotations

import torch
from torch import Tensor

from mpq.quantizers.blocks import BUFFERED
from mpq.quantizers.clips import Ends, least_share
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.grids import Grid, IntGrid, grid_of
from mpq.quantizers.scales import scale_and_zero

_BINS = 2048
_CANDIDATES = 80
_LEAST_SHARE = 1e-10


def entropy_range(
    blocks: Tensor, ends: Ends, fmt: NumberFormat, importance: Tensor | None = None, outer: Tensor | None = None
) -> Ends:
    """Range with the least KL divergence of the clipped histogram from the rounded one, among 80 clips.

    TensorRT's calibration (Migacz, GTC 2017) for all blocks at once and any grid: a histogram of 2048 bins over the
    whole range; what lies beyond a clip counts in the last bins inside (the reference), while the bins inside share
    what falls on the same level, evenly among those that hold anything (the rounded histogram). It wants many
    elements in a block: a histogram of 128 weights says little, and costs as much as one of 2048.

    Args:
        blocks: ``[blocks, elements]``.
        ends: Smallest and largest element of each, see `minmax_range`.
        fmt: A format with scales.
        importance: How much each element counts; None: one.
        outer: The factor in all scales.

    Returns:
        Lower and upper ends, both ``[blocks, 1]``.
    """
    lo, hi = ends
    ratios = torch.linspace(1.0, least_share(fmt), _CANDIDATES, dtype=lo.dtype, device=lo.device)
    found = torch.ones_like(lo)
    step = max(1, BUFFERED // max(_BINS, blocks.shape[1]))
    for rows in (slice(i, i + step) for i in range(0, len(blocks), step)):
        part = blocks[rows].to(lo.dtype)
        weights = torch.ones_like(part) if importance is None else importance[rows].to(lo.dtype)
        counts, centres = _histogram(part, lo[rows], hi[rows], weights)
        found[rows] = best_share(counts, centres, (lo[rows], hi[rows]), fmt, ratios, outer)
    return lo * found, hi * found


def best_share(
    counts: Tensor, centres: Tensor, ends: Ends, fmt: NumberFormat, ratios: Tensor, outer: Tensor | None = None
) -> Tensor:
    """The share of their ranges, out of some, whose rounding changes histograms least: ``[blocks, 1]``.

    Args:
        counts: ``[blocks, bins]``.
        centres: Middles of the bins, in rising order, same shape.
        ends: Both ``[blocks, 1]``.
        fmt: A format with scales.
        ratios: Shares to try; the first of equals wins.
        outer: The factor in all scales.
    """
    lo, hi = ends
    found, best = torch.ones_like(lo), torch.full_like(lo, torch.inf, dtype=counts.dtype)
    for ratio in ratios:
        scale, zero = scale_and_zero(lo * ratio, hi * ratio, fmt, outer)
        changed = _divergence(counts, centres / scale, grid_of(fmt), None if fmt.symmetric else zero)
        better = changed < best
        found, best = torch.where(better, ratio, found), torch.where(better, changed, best)
    return found


def _histogram(blocks: Tensor, lo: Tensor, hi: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Counts ``[blocks, bins]`` and the middles of the bins."""
    width = ((hi - lo) / _BINS).clamp(min=torch.finfo(torch.float32).tiny)
    index = ((blocks - lo) / width).nan_to_num(0.0).clamp_(0, _BINS - 1).long()
    counts = blocks.new_zeros(len(blocks), _BINS).scatter_add_(1, index, weights)
    return counts, lo + (torch.arange(_BINS, dtype=lo.dtype, device=lo.device) + 0.5) * width


def _divergence(counts: Tensor, units: Tensor, grid: Grid, zero: Tensor | None) -> Tensor:
    """KL divergence ``[blocks, 1]`` of histograms whose bins lie at these places of a grid."""
    low, high = torch.full_like(units[:, :1], grid.low), torch.full_like(units[:, :1], grid.high)
    if isinstance(grid, IntGrid) and zero is not None:
        low, high = low - zero, high - zero
    left, right = units < low, units > high
    inside = ~(left | right)
    kept = counts * inside
    reference = kept.clone()
    first = inside.int().argmax(1, keepdim=True)
    last = inside.shape[1] - 1 - inside.flip(1).int().argmax(1, keepdim=True)
    reference.scatter_add_(1, first, (counts * left).sum(1, keepdim=True))
    reference.scatter_add_(1, last, (counts * right).sum(1, keepdim=True))

    levels = grid.round_(units.clone(), zero)
    run = torch.zeros_like(levels, dtype=torch.int64)
    run[:, 1:] = (levels[:, 1:] != levels[:, :-1]).cumsum(1)
    filled = (reference > 0).to(counts.dtype)
    sums = torch.zeros_like(counts).scatter_add_(1, run, kept)
    sharers = torch.zeros_like(counts).scatter_add_(1, run, filled)
    rounded = (sums / sharers.clamp(min=1)).gather(1, run) * filled

    p = reference / reference.sum(1, keepdim=True).clamp(min=_LEAST_SHARE)
    q = rounded / rounded.sum(1, keepdim=True).clamp(min=_LEAST_SHARE)
    return torch.xlogy(p, p / q.clamp(min=_LEAST_SHARE)).sum(1, keepdim=True)
