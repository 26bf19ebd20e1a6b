"""Scalar formats element by element: the scale of each weight, and the two values between which it lies."""

from __future__ import annotations

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.blocks import from_blocks
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.grids import FloatGrid, IntGrid, TableGrid, grid_of
from mpq.quantizers.tensors import CODERS, QuantizedTensor, quantize


def element_scales(
    weight: Tensor, fmt: NumberFormat, method: str = "mse", nearest: QuantizedTensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each element of a weight ``[out, in]``, as nearest rounding has them.

    Args:
        weight: In the dtype to work in.
        fmt: A scalar format, without recipe.
        method: Range rule, see `find_range`.
        nearest: The weight rounded to nearest, if it is at hand.

    Returns:
        Both ``[out, in]``; None for the zero point of a symmetric format.

    Raises:
        FormatError: If the format has no grid and scales of its own.
    """
    if fmt.plain_float or {fmt.family, fmt.variant, fmt.granularity} & CODERS.keys():
        raise FormatError(f"{fmt.name} is no grid times a scale: it can only be rounded to nearest")
    grid_of(fmt)
    if fmt.granularity == "none":
        return torch.ones_like(weight), None
    q = quantize(weight, fmt, 0, method) if nearest is None else nearest

    def spread(x: Tensor) -> Tensor:
        return from_blocks(x.expand(q.codes.shape).contiguous(), q.shape, 0, *(fmt.block or (1, 0)))

    return spread(q.scale), None if fmt.symmetric else spread(q.zero_point)


def neighbours(x: Tensor, scale: Tensor, zero: Tensor | None, fmt: NumberFormat) -> tuple[Tensor, Tensor]:
    """The values of a format below and above each element, in its own units; beyond the ends both are the end."""
    grid, units = grid_of(fmt), x * (1 / scale)
    if isinstance(grid, IntGrid):
        offset = torch.zeros_like(units) if zero is None else zero
        ends = grid.first - offset, grid.last - offset
        low, high = (torch.clamp(v, *ends) for v in (units.floor(), units.floor() + 1))
    else:
        assert isinstance(grid, TableGrid | FloatGrid)
        levels = torch.tensor(grid.values, dtype=x.dtype, device=x.device)
        above = torch.bucketize(units, levels, right=True)
        low, high = levels[(above - 1).clamp(min=0)], levels[above.clamp(max=len(levels) - 1)]
    return low * scale, high * scale


def stochastic(
    weight: Tensor, fmt: NumberFormat, method: str = "mse", seed: int = 0, nearest: QuantizedTensor | None = None
) -> Tensor:
    """Round to one of the two values around each element, at random, without bias (Gupta et al., 2015).

    Costs no forward pass. Values beyond the format's ends get the ends.

    Args:
        weight: ``[out, in]``.
        fmt: A scalar format.
        method: Range rule.
        seed: Of the draws.
        nearest: As for `element_scales`.

    Raises:
        FormatError: If the format is not scalar.
    """
    low, high = neighbours(weight, *element_scales(weight, fmt, method, nearest), fmt)
    drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=weight.dtype)
    return torch.where(weight - low > drawn.to(weight.device) * (high - low), high, low)
