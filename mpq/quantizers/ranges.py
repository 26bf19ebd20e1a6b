"""Ranges: where to clip before rounding. Every rule works on all blocks (rows) at once.

A block is the set of elements that share one scale; tensors arrive as ``[blocks, elements]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.formats import NumberFormat

# Elements of the [candidates, blocks, elements] work buffer: 2 MiB of float32, so that it stays in cache.
_BUFFER_ELEMENTS = 2**19
_COARSE, _FINE = 16, 8
_COARSE_SMALL, _SMALL_BLOCK = 96, 64


def minmax_range(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest element of each block, both ``[blocks, 1]``; the range always holds zero."""
    lo, hi = blocks.aminmax(dim=1, keepdim=True)
    return lo.clamp(max=0), hi.clamp(min=0)


def percentile_range(blocks: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Range between the two-sided percentiles ``100 - p`` and ``p`` of each block, both ``[blocks, 1]``.

    The element at the nearest rank is taken (no interpolation), so the range is attained by the data.
    """
    n = blocks.shape[1]
    rank = min(n, max(1, round(percentile / 100 * n)))
    hi = blocks.kthvalue(rank, dim=1, keepdim=True).values
    lo = blocks.kthvalue(n + 1 - rank, dim=1, keepdim=True).values
    return lo.clamp(max=0), hi.clamp(min=0)


def scale_and_zero(lo: Tensor, hi: Tensor, fmt: NumberFormat) -> tuple[Tensor, Tensor]:
    """Scale and zero point that make an integer format cover ``[lo, hi]``.

    Args:
        lo: Lower ends, at most 0, any shape.
        hi: Upper ends, at least 0, same shape.
        fmt: An integer format.

    Returns:
        Scale (positive) and zero point (whole numbers in floating point), same shape as ``lo``. Scales are
        rounded to the dtype they are stored in.
    """
    qmin, qmax = fmt.levels
    if not fmt.symmetric:
        scale = (hi - lo) / (qmax - qmin)
    elif fmt.bits == 1:
        scale = torch.maximum(hi, -lo)
    else:
        scale = torch.maximum(hi / qmax, lo / qmin)
    if fmt.scale_bits == 16:
        limits = torch.finfo(torch.float16)
        scale = scale.clamp(limits.smallest_normal, limits.max).to(torch.float16).to(lo.dtype)
    else:
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    zero = torch.zeros_like(scale) if fmt.symmetric else (-lo / scale).round_().clamp_(qmin, qmax)
    return scale, zero


def quantize_dequantize_(x: Tensor, scale: Tensor, zero: Tensor, fmt: NumberFormat) -> Tensor:
    """Round ``x`` to the nearest value of an integer format, in place; scale and zero broadcast to it."""
    if fmt.symmetric and fmt.bits == 1:
        return x.copy_(torch.where(x >= 0, scale, -scale))
    qmin, qmax = fmt.levels
    x.div_(scale).round_()
    if fmt.symmetric:
        return x.clamp_(qmin, qmax).mul_(scale)
    return x.add_(zero).clamp_(qmin, qmax).sub_(zero).mul_(scale)


def _errors(blocks: Tensor, lo: Tensor, hi: Tensor, ratios: Tensor, fmt: NumberFormat) -> Tensor:
    """Squared error of each clip candidate: ratios ``[K, blocks]`` -> ``[K, blocks]``."""
    rows, cols = blocks.shape
    errors = torch.empty_like(ratios)
    row_step = max(1, min(rows, _BUFFER_ELEMENTS // cols))
    k_step = max(1, _BUFFER_ELEMENTS // (row_step * cols))
    for r in range(0, rows, row_step):
        part = blocks[r : r + row_step]
        for k in range(0, len(ratios), k_step):
            ratio = ratios[k : k + k_step, r : r + row_step, None]
            scale, zero = scale_and_zero(lo[r : r + row_step] * ratio, hi[r : r + row_step] * ratio, fmt)
            rounded = part.expand(len(ratio), -1, -1).clone()
            quantize_dequantize_(rounded, scale, zero, fmt).sub_(part)
            errors[k : k + k_step, r : r + row_step] = rounded.square_().sum(-1)
    return errors


def mse_range(blocks: Tensor, fmt: NumberFormat) -> tuple[Tensor, Tensor]:
    """Range with the least squared rounding error, found by shrinking the min-max range.

    16 ratios over all sensible clips (96 for small blocks, whose error is a rough function of the clip), then 8
    around each block's best, for all blocks at once. The min-max range itself is a candidate, so the result is never
    worse than `minmax_range`.

    Returns:
        Lower and upper ends, both ``[blocks, 1]``.
    """
    lo, hi = minmax_range(blocks)
    rows = torch.arange(len(blocks), device=blocks.device)
    # Low widths clip most of a bell curve (about 1/4 of its maximum at 2 bits), high ones nearly nothing.
    smallest = {1: 0.02, 2: 0.1, 3: 0.2, 4: 0.3}.get(fmt.bits, 0.5)
    count = _COARSE_SMALL if blocks.shape[1] <= _SMALL_BLOCK else _COARSE
    coarse = torch.linspace(smallest, 1.0, count, dtype=blocks.dtype, device=blocks.device)
    ratios = coarse[:, None].expand(-1, len(blocks))
    errors = _errors(blocks, lo, hi, ratios, fmt)
    best = errors.argmin(0)
    best_ratio, best_error = ratios[best, rows], errors[best, rows]

    step = (1.0 - smallest) / (count - 1)
    offsets = torch.linspace(-step, step, _FINE + 2, dtype=blocks.dtype, device=blocks.device)[1:-1]
    fine = (best_ratio + offsets[:, None]).clamp(smallest / 2, 1.0)
    errors = _errors(blocks, lo, hi, fine, fmt)
    best = errors.argmin(0)
    ratio = torch.where(errors[best, rows] < best_error, fine[best, rows], best_ratio)[:, None]
    return lo * ratio, hi * ratio


def find_range(blocks: Tensor, fmt: NumberFormat, method: str = "mse") -> tuple[Tensor, Tensor]:
    """Range of each block by a named rule.

    Args:
        blocks: ``[blocks, elements]``.
        fmt: An integer format.
        method: ``mse``, ``minmax`` or ``percentile:P`` with 50 < P <= 100.

    Returns:
        Lower and upper ends, both ``[blocks, 1]``.

    Raises:
        FormatError: If the method is unknown.
    """
    if method == "mse":
        return mse_range(blocks, fmt)
    if method == "minmax":
        return minmax_range(blocks)
    return percentile_range(blocks, parse_percentile(method))


def parse_percentile(method: str) -> float:
    """The P of ``percentile:P``.

    Raises:
        FormatError: If this is not such a method, or P is out of range.
    """
    name, _, value = method.partition(":")
    try:
        percentile = float(value) if name == "percentile" else float("nan")
    except ValueError:
        percentile = float("nan")
    if not 50 < percentile <= 100:
        raise FormatError(f"unknown range method {method!r}; use mse, minmax or percentile:P with 50 < P <= 100")
    return percentile
