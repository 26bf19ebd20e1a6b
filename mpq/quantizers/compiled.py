"""Min-max rounding as one loop made by ``torch.compile``: optional, for processes that round a lot."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from mpq.quantizers.blocks import work_dtype
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.grids import FloatGrid, Grid, IntGrid, TableGrid, grid_of
from mpq.quantizers.ranges import minmax_range
from mpq.quantizers.scales import scale_and_zero

Rounding = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# Tables are chains of comparisons here: sixteen levels are one pass over memory, hundreds are not.
_MOST_LEVELS = 32


@lru_cache(64)
def compiled(fmt: NumberFormat) -> Rounding | None:
    """A function that rounds blocks ``[blocks, elements]`` to another tensor and returns their ends; None: no gain.

    It gives the same bits as `mpq.quantizers.kernels`. Its first calls take torch from seconds to a minute, and a C++
    compiler; torch keeps on disk what it compiled.

    Args:
        fmt: A format that is a scale times a grid, with scales in float32 or float16.
    """
    grid = grid_of(fmt)
    many = isinstance(grid, TableGrid) and len(grid.values) > _MOST_LEVELS
    if many or fmt.scale not in ("fp32", "fp16"):
        return None
    middles = {dtype: _middles(grid, dtype) for dtype in (torch.float32, torch.float64)}

    def rounding(blocks: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        lo, hi = minmax_range(blocks)
        scale, zero = scale_and_zero(lo, hi, fmt, None, grid)
        units = blocks * (1 / scale)
        if isinstance(grid, IntGrid):
            units = units.round().clamp(grid.first - zero, grid.last - zero)
        elif isinstance(grid, FloatGrid):
            units = grid.rounded(units)
        elif isinstance(grid, TableGrid):
            units = _chained(units, grid.values, middles[units.dtype])
        out.copy_(units * scale)
        return lo, hi

    # Without emulation, float16 scales would be kept in float32.
    made: Rounding = torch.compile(rounding, options={"emulate_precision_casts": True})
    return made


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
