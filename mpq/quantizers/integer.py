"""Quantize, dequantize and fake-quantize tensors: integer formats with scales, float formats by casting."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.ranges import find_range, quantize_dequantize_, scale_and_zero

FLOAT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes with what is needed to read them.

    Attributes:
        codes: Smallest integers that hold the format's levels, ``[blocks, elements]``; with groups the last block of a
            channel may hold padding.
        scale: ``[blocks, 1]``.
        zero_point: ``[blocks, 1]``, all zero for symmetric formats.
        fmt: The integer format.
        shape: Shape of the original tensor.
        channel_axis: Its output-channel axis.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    fmt: NumberFormat
    shape: tuple[int, ...]
    channel_axis: int


def to_blocks(x: Tensor, fmt: NumberFormat, channel_axis: int = 0) -> Tensor:
    """Arrange a tensor as ``[blocks, elements]``, one block per scale; short last groups repeat their last value."""
    if fmt.granularity == "tensor" or x.dim() == 0:
        return x.reshape(1, -1)
    rows = x.movedim(channel_axis, 0).reshape(x.shape[channel_axis], -1)
    if fmt.group_size is None:
        return rows
    padding = -rows.shape[1] % fmt.group_size
    if padding:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, padding)], 1)
    return rows.reshape(-1, fmt.group_size)


def from_blocks(blocks: Tensor, shape: tuple[int, ...], channel_axis: int = 0) -> Tensor:
    """Inverse of `to_blocks`: drop the padding and restore the shape."""
    numel = math.prod(shape)
    if blocks.numel() == numel and (channel_axis == 0 or len(blocks) == 1):
        return blocks.reshape(shape)
    channels = shape[channel_axis]
    rows = blocks.reshape(channels, -1)[:, : numel // channels]
    rest = [n for i, n in enumerate(shape) if i != channel_axis]
    return rows.reshape(channels, *rest).movedim(0, channel_axis).contiguous()


def _scales(x: Tensor, fmt: NumberFormat, channel_axis: int, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks, and the scale and zero point of each; padding has no say in the ranges."""
    x = x.detach().to(_work_dtype(x))
    blocks = to_blocks(x, fmt, channel_axis)
    if blocks.numel() == x.numel():
        return (blocks, *scale_and_zero(*find_range(blocks, fmt, method), fmt))
    rows = to_blocks(x, replace(fmt, granularity="channel"), channel_axis)
    size = fmt.group_size or 1
    whole = rows.shape[1] // size * size
    parts = [p for p in (rows[:, :whole].reshape(-1, size), rows[:, whole:]) if p.numel()]
    ends = zip(*(find_range(p, fmt, method) for p in parts), strict=True)
    lo, hi = (torch.cat([e.reshape(len(rows), -1) for e in end], 1).reshape(-1, 1) for end in ends)
    return (blocks, *scale_and_zero(lo, hi, fmt))


def _check(x: Tensor, fmt: NumberFormat) -> None:
    if fmt.family != "int":
        raise FormatError(f"{fmt.name} has no integer codes")
    if not x.is_floating_point():
        raise FormatError(f"only floating-point tensors can be quantized, not {x.dtype}")


def quantize(x: Tensor, fmt: NumberFormat, channel_axis: int = 0, method: str = "mse") -> QuantizedTensor:
    """Integer codes, scales and zero points of a tensor, rounded to nearest (ties to even).

    Args:
        x: Floating-point tensor of any shape.
        fmt: An integer format.
        channel_axis: The output-channel axis of ``x``.
        method: Range rule, see `find_range`.

    Raises:
        FormatError: If the format has no integer codes, the tensor is not floating point, or the range rule
            is unknown.
    """
    _check(x, fmt)
    blocks, scale, zero = _scales(x, fmt, channel_axis, method)
    qmin, qmax = fmt.levels
    if fmt.symmetric and fmt.bits == 1:
        codes = torch.where(blocks >= 0, 0, -1)  # code 0 is +scale, code -1 is -scale
    else:
        codes = ((blocks / scale).round_() + zero).clamp_(qmin, qmax)
    return QuantizedTensor(codes.to(_code_dtype(qmin, qmax)), scale, zero, fmt, tuple(x.shape), channel_axis)


def _code_dtype(qmin: int, qmax: int) -> torch.dtype:
    fits = (
        t for t in (torch.int8, torch.uint8, torch.int16) if torch.iinfo(t).min <= qmin <= qmax <= torch.iinfo(t).max
    )
    return next(fits, torch.int32)


def dequantize(q: QuantizedTensor) -> Tensor:
    """The values that the codes stand for, in the original shape and the dtype of the scales."""
    bipolar = q.fmt.symmetric and q.fmt.bits == 1
    units = q.codes.to(q.scale.dtype)
    units = units.mul_(2).add_(1) if bipolar else units.sub_(q.zero_point)
    return from_blocks(units.mul_(q.scale), q.shape, q.channel_axis)


def fake_quantize(x: Tensor, fmt: NumberFormat, channel_axis: int = 0, method: str = "mse") -> Tensor:
    """Round a tensor to a format and return it in its own dtype; equals ``dequantize(quantize(x))``.

    Args:
        x: Floating-point tensor of any shape.
        fmt: Any format.
        channel_axis: The output-channel axis of ``x``.
        method: Range rule of integer formats, see `find_range`.

    Raises:
        FormatError: See `quantize`.
    """
    if fmt.family == "float":
        return x.detach().to(FLOAT_DTYPES[fmt.name]).to(x.dtype)
    _check(x, fmt)
    blocks, scale, zero = _scales(x, fmt, channel_axis, method)
    rounded = quantize_dequantize_(blocks.clone(), scale, zero, fmt)
    return from_blocks(rounded, tuple(x.shape), channel_axis).to(x.dtype)


def fake_quantize_static(x: Tensor, fmt: NumberFormat, lo: float, hi: float) -> Tensor:
    """Round an activation tensor to a format with a range known beforehand.

    Args:
        x: Floating-point tensor of any shape.
        fmt: A float format, or a per-tensor integer format.
        lo: Lower end of the calibrated range, at most 0.
        hi: Upper end, at least 0.
    """
    if fmt.family == "float":
        return x.to(FLOAT_DTYPES[fmt.name]).to(x.dtype)
    ends = torch.tensor([lo, hi], dtype=_work_dtype(x), device=x.device)
    scale, zero = scale_and_zero(ends[0], ends[1], fmt)
    return quantize_dequantize_(x.to(ends.dtype, copy=True), scale, zero, fmt).to(x.dtype)


def _work_dtype(x: Tensor) -> torch.dtype:
    """Half precision is rounded in float32: its own spacing is coarser than 8-bit steps."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
