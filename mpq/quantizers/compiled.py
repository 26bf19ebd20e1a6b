"""Min-max rounding by loops that ``torch.compile`` makes: optional, for processes that round a lot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mpq.quantizers.blocks import work_dtype
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.grids import FloatGrid, Grid, IntGrid, TableGrid, grid_of
from mpq.quantizers.ranges import minmax_range

# Tables are chains of comparisons here: sixteen levels are one pass over memory, hundreds are not.
_MOST_LEVELS = 32


@dataclass(frozen=True)
class Loops:
    """What is compiled for a format: two loops, as one would make a block's scale again for every vector of it.

    Attributes:
        ends: `minmax_range` of blocks ``[blocks, elements]``.
        rounding: Rounds blocks, by their scales, the inverses of these and zero points ``[blocks, 1]``, to a tensor.
    """

    ends: Callable[[Tensor], tuple[Tensor, Tensor]]
    rounding: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


@lru_cache(64)
def compiled(fmt: NumberFormat) -> Loops | None:
    """Loops that give the same bits as `mpq.quantizers.kernels`; None: no gain.

    Their first calls take torch from seconds to a minute, and a C++ compiler; torch keeps on disk what it compiled.

    Args:
        fmt: A format that is a scale times a grid.
    """
    grid = grid_of(fmt)
    if isinstance(grid, TableGrid) and len(grid.values) > _MOST_LEVELS:
        return None
    if isinstance(grid, FloatGrid) and grid.exponent == 8:
        return None  # beyond what `FloatGrid.rounded` can
    middles = {dtype: _middles(grid, dtype) for dtype in (torch.float32, torch.float64)}

    def ends(blocks: Tensor) -> tuple[Tensor, Tensor]:
        return minmax_range(blocks)

    def rounding(blocks: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, out: Tensor) -> None:
        units = blocks * inverse
        if isinstance(grid, IntGrid):
            limits = (grid.first, grid.last) if fmt.symmetric else (grid.first - zero, grid.last - zero)
            units = units.round().clamp(*limits)
        elif isinstance(grid, FloatGrid):
            units = grid.rounded(units)
        elif isinstance(grid, TableGrid):
            units = _chained(units, grid.values, middles[units.dtype])
        out.copy_(units * scale)

    for loop in (ends, rounding):
        # What torch compiled is kept by name, and only so many shapes of each: formats must not share one.
        loop.__code__ = loop.__code__.replace(co_name=f"{loop.__name__} {fmt.name}")
    return Loops(torch.compile(ends), torch.compile(rounding))


def blocks_alike(x: Tensor, out: Tensor, fmt: NumberFormat) -> tuple[Tensor, Tensor] | None:
    """Blocks of two tensors with channels first, as views; None where they would have to be copied."""
    if fmt.granularity in ("tensor", "none", "token") or x.dim() == 0 or not x.numel() or x.dtype != work_dtype(x):
        return None
    width = x.numel() // len(x)
    height, own = fmt.block or (1, width)
    if height > 1 or width % own or not (x.is_contiguous() and out.is_contiguous()):
        return None
    return x.view(-1, own), out.view(-1, own)


def _middles(grid: Grid, dtype: torch.dtype) -> list[float]:
    if not isinstance(grid, TableGrid):
        return []
    levels = torch.tensor(grid.values, dtype=dtype)
    middles: list[float] = ((levels[1:] + levels[:-1]) / 2).tolist()
    return middles


def _chained(units: Tensor, levels: tuple[float, ...], middles: list[float]) -> Tensor:
    """Nearest level by comparing with every midpoint."""
    found = torch.full_like(units, levels[0])
    for middle, level in zip(middles, levels[1:], strict=True):
        found = torch.where(units > middle, level, found)
    return found
