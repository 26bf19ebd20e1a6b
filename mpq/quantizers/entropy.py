"""The range whose rounding changes a histogram least, as TensorRT calibrates activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq.quantizers.blocks import BUFFERED
from mpq.quantizers.clips import Ends, least_share
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.grids import Grid, IntGrid, grid_of
from mpq.quantizers.scales import scale_and_zero

_BINS = 2048
_CANDIDATES = 80
_LEAST_SHARE = 1e-10
_VECTOR = 16  # numbers in the widest vectors of a CPU


def entropy_range(
    blocks: Tensor, ends: Ends, fmt: NumberFormat, importance: Tensor | None = None, outer: Tensor | None = None
) -> Ends:
    """Range with the least KL divergence of the clipped histogram from the rounded one, among 80 clips.

    TensorRT's calibration (Migacz, GTC 2017) for all blocks at once and any grid: a histogram of 2048 bins over the
    whole range; what lies beyond a clip counts in the last bins inside (the reference), while the bins inside share
    what falls on the same level, evenly among those that hold anything (the rounded histogram). It wants many
    elements in a block: a histogram of 128 weights says little.

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
        counts, centres = _histogram(blocks[rows], lo[rows], hi[rows], None if importance is None else importance[rows])
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
    histogram = _Histogram.of(counts, centres)
    for ratio in ratios:
        scale, zero = scale_and_zero(lo * ratio, hi * ratio, fmt, outer)
        changed = _divergence(histogram, scale, grid_of(fmt), None if fmt.symmetric else zero)
        better = changed < best
        found, best = torch.where(better, ratio, found), torch.where(better, changed, best)
    return found


@dataclass(frozen=True)
class _Histogram:
    """Histograms and where they hold anything.

    Attributes:
        counts: ``[blocks, bins]``.
        centres: Same shape, rising.
        below: Counts of all bins before each, and of all, ``[blocks, bins + 1]``.
        above: Counts of each bin and all after it, and zero, alike.
        filled: Bins that hold anything in rising order, repeating the last of all bins, ``[blocks, filled]``.
    """

    counts: Tensor
    centres: Tensor
    below: Tensor
    above: Tensor
    filled: Tensor

    @classmethod
    def of(cls, counts: Tensor, centres: Tensor) -> _Histogram:
        bins = counts.shape[1]
        full = counts > 0
        rank = full.cumsum(1)
        # Together with the outermost bins whole vectors, so that all logarithms come from the same code.
        most = -(-(int(rank[:, -1:].max()) + 2) // _VECTOR) * _VECTOR - 2
        filled = rank.new_full((len(counts), most + 1), bins - 1)
        filled.scatter_(1, torch.where(full, rank - 1, most), torch.arange(bins, device=counts.device).expand_as(rank))
        below, above = F.pad(counts.cumsum(1), (1, 0)), F.pad(counts.flip(1).cumsum(1).flip(1), (0, 1))
        return cls(counts, centres, below, above, filled[:, :-1].contiguous())


def _histogram(blocks: Tensor, lo: Tensor, hi: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Counts ``[blocks, bins]`` and the middles of the bins."""
    width = ((hi - lo) / _BINS).clamp(min=torch.finfo(torch.float32).tiny)
    # From 2**24 on float32 does not count by ones.
    counts = lo.new_zeros(len(blocks), _BINS, dtype=torch.float64 if blocks.shape[1] > 2**24 else lo.dtype)
    for start in range(0, blocks.shape[1], BUFFERED):
        part = blocks[:, start : start + BUFFERED].to(lo.dtype)
        w = torch.ones_like(part) if weights is None else weights[:, start : start + BUFFERED].to(lo.dtype)
        index = ((part - lo) / width).nan_to_num(0.0).clamp_(0, _BINS - 1).long()
        counts.scatter_add_(1, index, w.to(counts.dtype))
    return counts.to(lo.dtype), lo + (torch.arange(_BINS, dtype=lo.dtype, device=lo.device) + 0.5) * width


def _divergence(histogram: _Histogram, scale: Tensor, grid: Grid, zero: Tensor | None) -> Tensor:
    """KL divergence ``[blocks, 1]`` of clipped histograms from rounded ones.

    Bins that hold nothing add nothing, but for the outermost ones inside, which may get what lies beyond them: these
    two and the filled ones between them are worked on. Sums are of all bins all the same, in their order: rounded as
    if all were worked on, which tells equals apart.
    """
    counts, filled = histogram.counts, histogram.filled
    units = histogram.centres / scale
    low, high = torch.full_like(scale, grid.low), torch.full_like(scale, grid.high)
    if isinstance(grid, IntGrid) and zero is not None:
        low, high = low - zero, high - zero
    first, last = torch.searchsorted(units, low), torch.searchsorted(units, high, right=True) - 1
    beyond = histogram.below.gather(1, first), histogram.above.gather(1, last + 1)
    none = first > last
    first, last = first.masked_fill(none, 0), last.masked_fill(none, units.shape[1] - 1)

    places = torch.cat([first, filled, last], 1)
    kept = counts.gather(1, places) * ~none
    kept[:, 1:-1] *= (filled > first) & (filled < last)
    kept[:, -1:] *= first < last
    reference = kept.clone()
    reference[:, :1] += beyond[0]
    # One bin alone is the first and the last.
    reference[:, :1] += beyond[1] * (first == last)
    reference[:, -1:] += beyond[1] * (first < last)

    levels = units.gather(1, torch.minimum(torch.maximum(places, first), last))
    levels = grid.round_(levels, zero)
    run = torch.zeros_like(places)
    torch.cumsum(levels[:, 1:] != levels[:, :-1], 1, out=run[:, 1:])
    held = (reference > 0).to(counts.dtype)
    sums = torch.zeros_like(kept).scatter_add_(1, run, kept)
    sharers = torch.zeros_like(kept).scatter_add_(1, run, held)
    rounded = (sums / sharers.clamp_(min=1)).gather(1, run) * held

    def total(x: Tensor) -> Tensor:
        return torch.zeros_like(counts).scatter_add_(1, places, x).sum(1, keepdim=True)

    p = reference / total(reference).clamp(min=_LEAST_SHARE)
    q = rounded / total(rounded).clamp(min=_LEAST_SHARE)
    return total(torch.xlogy(p, p / q.clamp(min=_LEAST_SHARE)))
