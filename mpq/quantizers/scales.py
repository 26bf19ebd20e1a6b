"""Scales: from the range of a block to the scale and zero point that are stored for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.blocks import work_dtype
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.grids import FloatGrid, grid_of

_E4M3_MAX = 448.0  # the largest finite number of the fp8 that NVFP4's scales are stored in
_FLOAT32_MAX = torch.finfo(torch.float32).max
# The largest scale of each type; in e4m3 there is a float32 factor besides.
_MOST = {"fp32": _FLOAT32_MAX, "fp16": 65504.0, "e8m0": 2.0**127, "e4m3": _E4M3_MAX * _FLOAT32_MAX}


def outer_scale(x: Tensor, fmt: NumberFormat) -> Tensor | None:
    """The factor ``[1, 1]`` of a tensor's 8-bit float scales (NVFP4): the largest of them becomes 448; else None.

    NVIDIA, "Pretraining Large Language Models with NVFP4" (2025): the second, float32 level of its two scales, by which
    the scale of the block with the tensor's largest magnitude is the largest number of fp8 e4m3.
    """
    if fmt.scale != "e4m3":
        return None
    largest = (torch.maximum(x.amax(), -x.amin()) if x.numel() else x.new_zeros(())).to(work_dtype(x))
    outer = (largest / (grid_of(fmt).high * _E4M3_MAX)).to(torch.float32).to(largest.dtype)
    return torch.where(outer > 0, outer, 1.0).reshape(1, 1)


def scale_and_zero(lo: Tensor, hi: Tensor, fmt: NumberFormat, outer: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point that make a format cover ``[lo, hi]``.

    Args:
        lo: Lower ends, at most 0, any shape.
        hi: Upper ends, at least 0, same shape.
        fmt: A format with scales.
        outer: What `outer_scale` gave.

    Returns:
        Scale (positive) and zero point (whole numbers in floating point), same shape as ``lo``. Scales are
        rounded to what they are stored in.
    """
    zero = torch.zeros_like(lo)
    if fmt.family == "mx":
        return _microscale(torch.maximum(hi, -lo), fmt), zero
    if not fmt.symmetric:
        first, last = fmt.levels
        # Halves, as the whole may overflow.
        scale = stored_scale(torch.sub(hi * 0.5, lo, alpha=0.5) / ((last - first) / 2), fmt, outer)
        return scale, (-lo / scale).round_().clamp_(first, last)
    grid = grid_of(fmt)
    # A grid without negative values (log2) covers what is positive.
    scale = hi / grid.high if grid.low >= 0 else torch.maximum(hi / grid.high, lo / grid.low)
    return stored_scale(scale, fmt, outer), zero


def stored_scale(scale: Tensor, fmt: NumberFormat, outer: Tensor | None = None) -> Tensor:
    """A scale as it is stored, in the dtype it has; never zero.

    Powers of two, and float16 under its normal numbers, are rounded up, so that nothing clips.
    """
    if fmt.scale == "e8m0":
        fraction, power = torch.frexp(scale.clamp(2.0**-126, 2.0**127))
        return torch.ldexp(torch.ones_like(scale), power - (fraction == 0.5).int())  # a power of two stays
    if fmt.scale == "fp16":
        limits = torch.finfo(torch.float16)
        # Under the normal numbers the spacing is coarse: upwards, so that nothing is clipped.
        unit = limits.smallest_normal * limits.eps
        scale = torch.where(scale < limits.smallest_normal, (scale / unit).ceil().clamp_(min=1) * unit, scale)
        return scale.clamp(max=limits.max).to(torch.float16).to(scale.dtype)
    if fmt.scale == "e4m3" and outer is not None:
        least = 2.0**-9  # the smallest positive number
        return _E4M3.round_((scale / outer).clamp_(least, _E4M3_MAX)) * outer
    limits = torch.finfo(torch.float32)
    return scale.clamp(limits.tiny, limits.max).to(torch.float32).to(scale.dtype)


def refuse_larger(scale: Tensor, ends: tuple[Tensor, Tensor], fmt: NumberFormat) -> None:
    """Refuse ranges that need larger scales than the format stores; those that it stores are of `scale_and_zero`.

    Raises:
        FormatError: Naming the type of the scales.
    """
    as_wide = scale.dtype == torch.float32 and (fmt.scale in ("fp32", "e4m3") or fmt.family == "mx")
    if as_wide or not scale.numel() or not float(scale.amax()) >= _MOST[fmt.scale]:
        return
    (lo, hi), grid = (end.double() for end in ends), grid_of(fmt)
    if not fmt.symmetric:
        needed = (hi - lo) / (fmt.levels[1] - fmt.levels[0])
    elif fmt.family == "mx":  # between the largest code and the next power of two it clips
        needed = torch.maximum(hi, -lo) / 2.0 ** math.frexp(grid.high)[1]
    else:
        needed = hi / grid.high if grid.low >= 0 else torch.maximum(hi / grid.high, lo / grid.low)
    refuse_beyond(needed, fmt)


def refuse_beyond(needed: Tensor, fmt: NumberFormat) -> None:
    """Refuse scales that become other numbers by more than rounding where they are stored.

    Raises:
        FormatError: Naming the type of the scales.
    """
    most = _MOST[fmt.scale]
    # From 65520 on float16 has infinity instead of 65504.
    beyond = needed[(needed >= most * (1 + 2.0**-12)) & needed.isfinite()]
    if beyond.numel():
        ends = f"{fmt.scale}, which ends at {most:.6g}"
        raise FormatError(f"scales of {fmt.name} are stored in {ends}, but {float(beyond.max()):.6g} is needed")


def _microscale(largest: Tensor, fmt: NumberFormat) -> Tensor:
    """Shared scale of an OCP MX block: the power of two of its largest element over that of the largest code.

    OCP Microscaling Formats (MX) Specification v1.0, section 6.3.
    """
    highest = grid_of(fmt).high
    power = torch.frexp(torch.full_like(largest, highest))[1] - 1
    found = torch.frexp(largest)[1] - 1 - power
    found = torch.where(largest > 0, found, -127).clamp(-127, 127)
    return torch.ldexp(torch.ones_like(largest), found)


_E4M3 = grid_of(NumberFormat.parse("fp8_e4m3"))
assert isinstance(_E4M3, FloatGrid)
