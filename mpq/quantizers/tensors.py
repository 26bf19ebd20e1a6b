"""Quantize, dequantize and fake-quantize tensors in any number format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.blocks import all_finite, from_blocks, work_dtype
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.grids import grid_of
from mpq.quantizers.kernels import FLOAT_DTYPES, fake_quantize_compiled, fake_quantize_into, quantize_rows
from mpq.quantizers.scales import scale_and_zero

# Formats that are more than a scale times a grid: family, variant or granularity -> the module with their `quantize`
# and `dequantize`, of the same arguments as those here.
CODERS: dict[str, str] = {
    name: f"mpq.quantizers.{name}" for name in ("kmeans", "nupes", "pvq", "cross", "nested", "progressive")
}


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes with what is needed to read them.

    Attributes:
        codes: Smallest integers that hold the format's codes, ``[blocks, elements]``; with groups the last block of a
            channel may hold padding.
        scale: ``[blocks, 1]``: what a unit of the grid stands for.
        zero_point: ``[blocks, 1]``, all zero for symmetric formats.
        fmt: The format.
        shape: Shape of the original tensor.
        channel_axis: Its output-channel axis; 0 by ``token``.
        outer: What is stored beside the scales: of NVFP4 the factor that is in all of them, ``[1, 1]``; of ``cross``
            the factors of the columns, ``[1, elements]``; of ``progressive`` those of the channels, ``[channels, 1]``;
            of ``nupes`` the exponent, ``[1, 1]``; else None.
        codebook: Levels ``[blocks, levels]`` of formats that learn them; else None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    fmt: NumberFormat
    shape: tuple[int, ...]
    channel_axis: int
    outer: Tensor | None = None
    codebook: Tensor | None = None


def check_scaled(fmt: NumberFormat) -> None:
    """Refuse formats that are no scale times a grid.

    Raises:
        FormatError: If so.
    """
    if fmt.granularity == "none" or coder_of(fmt) is not None:
        raise FormatError(f"{fmt.name} is no scale times a grid")


def block_axis(fmt: NumberFormat, channel_axis: int) -> int:
    """The axis that blocks are arranged by: rows of tokens lie as they are stored, whatever the output channels."""
    return 0 if fmt.granularity == "token" else channel_axis


def coder_of(fmt: NumberFormat) -> Any:
    """Module of a format with its own way; None for a scale times a grid."""
    for key in (fmt.family, fmt.variant, fmt.granularity):
        if key in CODERS:
            return import_module(CODERS[key])
    return None


def _check(x: Tensor) -> None:
    if not all_finite(x):
        raise FormatError(f"the tensor {list(x.shape)} holds NaN or infinity")


def _check_plain(fmt: NumberFormat) -> None:
    """A recipe left out without a word would pass plain rounding off as something better."""
    if fmt.recipe:
        raise FormatError(f"{fmt.name} has a recipe ({':'.join(fmt.recipe)}): use apply_recipe, which follows it")


def _check_codes(x: Tensor, fmt: NumberFormat) -> None:
    _check_plain(fmt)
    if not x.is_floating_point():
        raise FormatError(f"only floating-point tensors can be quantized, not {x.dtype}")
    if fmt.plain_float:
        raise FormatError(f"{fmt.name} has no integer codes")


def _check_out(x: Tensor, out: Tensor) -> None:
    if not x.is_floating_point():
        raise FormatError(f"only floating-point tensors can be quantized, not {x.dtype}")
    if (out.shape, out.dtype) != (x.shape, x.dtype):
        raise FormatError(f"out is {list(out.shape)} of {out.dtype}, the tensor {list(x.shape)} of {x.dtype}")


def quantize(
    x: Tensor, fmt: NumberFormat, channel_axis: int = 0, method: str = "mse", importance: Tensor | None = None
) -> QuantizedTensor:
    """Codes, scales and zero points of a tensor, rounded to nearest (ties to even).

    Args:
        x: Floating-point tensor of any shape.
        fmt: Any format without a recipe but a plain cast.
        channel_axis: The output-channel axis of ``x``; tokens are the rows along its last axis whatever this is.
        method: Range rule, see `find_range`.
        importance: Non-negative weights of the elements' squared errors, broadcast to ``x``; None: all alike.

    Raises:
        FormatError: If the format has no codes or has a recipe, the tensor is not floating point, holds NaN or infinity
            or is too large for the type of the scales, or the range rule is unknown.
    """
    return quantize_all(x, [fmt], channel_axis, method, importance)[fmt]


def dequantize(q: QuantizedTensor) -> Tensor:
    """The values that the codes stand for, in the original shape and the dtype of the scales."""
    if 0 in q.shape:
        return q.scale.new_zeros(q.shape)
    if (coder := coder_of(q.fmt)) is not None:
        values: Tensor = coder.dequantize(q)
        return values
    return scaled_levels(q)


def scaled_levels(q: QuantizedTensor) -> Tensor:
    """The values of a format that is a scale times a grid."""
    units = grid_of(q.fmt).decode(q.codes, q.scale.dtype, None if q.fmt.symmetric else q.zero_point)
    return from_blocks(units.mul_(q.scale), q.shape, q.channel_axis, *(q.fmt.block or (1, 0)))


def fake_quantize(
    x: Tensor,
    fmt: NumberFormat,
    channel_axis: int = 0,
    method: str = "mse",
    importance: Tensor | None = None,
    out: Tensor | None = None,
    *,
    compile: bool = False,
) -> Tensor:
    """Round a tensor to a format and return it in its own dtype; equals ``dequantize(quantize(x))``.

    Args:
        x: Floating-point tensor of any shape.
        fmt: Any format without a recipe; with one see `mpq.quantizers.apply_recipe`.
        channel_axis: The output-channel axis of ``x``.
        method: Range rule, see `find_range`.
        importance: As for `quantize`.
        out: Where to; ``x`` itself for rounding in place. None: a new tensor.
        compile: With min-max ranges, round by a loop that ``torch.compile`` makes once for each format, where it can:
            faster after first calls of seconds to a minute, with the same result. It needs a C++ compiler.

    Returns:
        ``out``.

    Raises:
        FormatError: See `quantize`; or ``out`` has another shape or dtype, or a cast would make infinities. Where the
            tensor is refused for what it holds, ``out`` may be half written.
    """
    _check_plain(fmt)
    if compile and method == "minmax" and coder_of(fmt) is None:
        out = torch.empty_like(x, requires_grad=False) if out is None else out
        _check_out(x, out)
        if fake_quantize_compiled(out, x, fmt, channel_axis):
            return out
    return _rounded(x, fmt, channel_axis, method, importance, out, finite=True)


def _rounded(
    x: Tensor,
    fmt: NumberFormat,
    channel_axis: int,
    method: str,
    importance: Tensor | None = None,
    out: Tensor | None = None,
    *,
    finite: bool,
) -> Tensor:
    """As `fake_quantize`; without ``finite`` a block with NaN or infinity becomes NaN instead of being refused."""
    _check_out(x, x if out is None else out)
    if (coder := coder_of(fmt)) is not None and x.numel():
        if finite:
            _check(x)
        with torch.no_grad():
            values: Tensor = coder.dequantize(coder.quantize(x, fmt, channel_axis, method, importance))
            if out is None and values.dtype == x.dtype and x.is_contiguous():
                return values
            return (torch.empty_like(x, requires_grad=False) if out is None else out).copy_(values)
    out = torch.empty_like(x, requires_grad=False) if out is None else out
    fake_quantize_into([out], x, [fmt], channel_axis, method, importance, finite=finite)
    return out


def fake_quantize_all(
    x: Tensor,
    formats: Iterable[NumberFormat],
    channel_axis: int = 0,
    method: str = "mse",
    importance: Tensor | None = None,
    outs: Sequence[Tensor] | None = None,
) -> dict[NumberFormat, Tensor]:
    """As `fake_quantize` in each of some formats, reading the tensor once; the results are the same.

    Args:
        x: Floating-point tensor of any shape.
        formats: Any formats without recipes.
        channel_axis: The output-channel axis of ``x``.
        method: Range rule, see `find_range`.
        importance: As for `quantize`.
        outs: Where to, one for each format. None: new tensors.

    Raises:
        FormatError: See `fake_quantize`.
    """
    chosen = tuple(dict.fromkeys(formats))
    targets = [torch.empty_like(x, requires_grad=False) for _ in chosen] if outs is None else list(outs)
    if len(targets) != len(chosen):
        raise FormatError(f"there are {len(chosen)} formats, but {len(targets)} tensors to write to")
    together = []
    for fmt, out in zip(chosen, targets, strict=True):
        _check_plain(fmt)
        _check_out(x, out)
        if coder_of(fmt) is None:
            together.append((fmt, out))
        else:
            fake_quantize(x, fmt, channel_axis, method, importance, out)
    fake_quantize_into([o for _, o in together], x, [f for f, _ in together], channel_axis, method, importance)
    return dict(zip(chosen, targets, strict=True))


def quantize_all(
    x: Tensor,
    formats: Iterable[NumberFormat],
    channel_axis: int = 0,
    method: str = "mse",
    importance: Tensor | None = None,
) -> dict[NumberFormat, QuantizedTensor]:
    """As `quantize` in each of some formats, reading the tensor once; the results are the same.

    Raises:
        FormatError: See `quantize`.
    """
    chosen = tuple(dict.fromkeys(formats))
    for fmt in chosen:
        _check_codes(x, fmt)
    together = [fmt for fmt in chosen if coder_of(fmt) is None]
    found = {}
    for fmt, parts in zip(together, quantize_rows(x, together, channel_axis, method, importance), strict=True):
        codes, scale, zero, outer = parts
        axis = block_axis(fmt, channel_axis)
        found[fmt] = QuantizedTensor(codes, scale, zero, fmt, tuple(x.shape), axis, outer)
    for fmt in chosen:
        if fmt not in found:
            _check(x)
            coded = coder_of(fmt).quantize(x, fmt, channel_axis, method, importance) if x.numel() else _empty(x, fmt)
            found[fmt] = coded
    return {fmt: found[fmt] for fmt in chosen}


def _empty(x: Tensor, fmt: NumberFormat) -> QuantizedTensor:
    none = torch.empty(0, 1, dtype=work_dtype(x), device=x.device)
    codebook = none.expand(0, 2**fmt.bits) if fmt.family == "kmeans" else None
    return QuantizedTensor(none.to(torch.uint8), none, none, fmt, tuple(x.shape), 0, codebook=codebook)


def round_elements(x: Tensor, scale: Tensor, zero: Tensor | None, fmt: NumberFormat) -> Tensor:
    """The nearest values of a format whose scale and zero point, if it has one, are known; both broadcast to ``x``."""
    return grid_of(fmt).round_(x * (1 / scale), None if fmt.symmetric else zero).mul_(scale)


def cast(x: Tensor, fmt: NumberFormat) -> Tensor:
    """Round to a float format without scales; beyond its ends minifloats give the ends."""
    if fmt.plain_float:
        return x.to(FLOAT_DTYPES[fmt.name]).to(x.dtype)
    return grid_of(fmt).round_(x.to(work_dtype(x), copy=True)).to(x.dtype)


def fake_quantize_static(x: Tensor, fmt: NumberFormat, lo: float, hi: float) -> Tensor:
    """Round an activation tensor to a format with a range known beforehand; NaN stays, infinity becomes an end.

    Args:
        x: Floating-point tensor of any shape.
        fmt: A float format without scales, or a per-tensor format; its recipe is the basis that ``x`` is in already.
        lo: Lower end of the calibrated range, at most 0.
        hi: Upper end, at least 0.

    Raises:
        FormatError: If the format is no scale times a grid or has several scales, or the range does not hold zero.
    """
    if fmt.granularity == "none":
        return cast(x, fmt)
    check_scaled(fmt)
    if fmt.granularity != "tensor":
        raise FormatError(f"{fmt.name} has no single scale: only per-tensor formats have a range known beforehand")
    if not lo <= 0 <= hi:
        raise FormatError(f"a range must hold zero, unlike {lo} to {hi}")
    ends = torch.tensor([lo, hi], dtype=work_dtype(x), device=x.device)
    scale, zero = scale_and_zero(ends[0], ends[1], fmt)
    return round_elements(x.to(ends.dtype), scale, zero, fmt).to(x.dtype)


def fake_quantize_dynamic(x: Tensor, fmt: NumberFormat, feature_axis: int = -1) -> Tensor:
    """Round an activation tensor with scales of its own, by min-max.

    One per row, one per group of features in a row, or one per row and one per feature.

    What is not finite is not refused here, in the middle of a forward pass: its row, or group, becomes NaN;
    by ``cross`` its row and its column, and of nvfp4, whose scales share a factor, everything.

    Args:
        x: Floating-point tensor of any shape.
        fmt: A format by ``token``, ``group:G`` or ``cross``; its recipe is the basis that ``x`` is in already.
        feature_axis: Axis of the features: the last for tokens, the second for images.
    """
    if x.dim() == 0:
        return fake_quantize_dynamic(x[None], fmt)[0]
    rows = x.movedim(feature_axis, -1)
    flat = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
    return _rounded(flat, fmt, 0, "minmax", finite=False).reshape(rows.shape).movedim(-1, feature_axis)
