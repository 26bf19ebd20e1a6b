"""Scales of rows and columns: ``rows ** a * columns ** (1 - a)`` (CrossQuant).

Liu et al., "CrossQuant: A Post-Training Quantization Method with Smaller Quantization Kernel" (2024): t_i is
the largest magnitude of a row (a token, or an output channel), c_j that of a column, and the scale of an element is
``t_i ** 0.15 * c_j ** 0.85`` over the largest code. Nothing clips, and fewer small elements become zero than with
scales of rows alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpq.quantizers.blocks import from_blocks, weighted_blocks
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.grids import grid_of
from mpq.quantizers.kernels import chunks
from mpq.quantizers.scales import refuse_beyond, stored_scale
from mpq.quantizers.tensors import QuantizedTensor

ALPHA = 0.15


def quantize(
    x: Tensor, fmt: NumberFormat, channel_axis: int = 0, method: str = "mse", importance: Tensor | None = None
) -> QuantizedTensor:
    """As `mpq.quantizers.tensors.quantize`; the columns' factors are in ``outer``. It is always by min-max."""
    blocks, _ = weighted_blocks(x, fmt, channel_axis, None)
    grid = grid_of(fmt)
    scale = _factors(_largest(blocks, 1).pow(ALPHA) / grid.high, fmt)
    outer = _factors(_largest(blocks, 0).pow(1 - ALPHA), fmt)
    finite = bool(scale.isfinite().all())
    codes = grid.encode(scale.new_empty(0)).new_empty(blocks.shape)
    for rows, part in chunks(blocks, 1):
        units = part / (scale[rows] * outer)
        codes[rows] = grid.encode(grid.round_(units if finite else units.nan_to_num_(0.0)))
    return QuantizedTensor(codes, scale, torch.zeros_like(scale), fmt, tuple(x.shape), channel_axis, outer)


def dequantize(q: QuantizedTensor) -> Tensor:
    """As `mpq.quantizers.tensors.dequantize`."""
    assert q.outer is not None
    units = grid_of(q.fmt).decode(q.codes, q.scale.dtype)
    for rows, part in chunks(units, 1):
        part.mul_(q.scale[rows] * q.outer)
    return from_blocks(units, q.shape, q.channel_axis)


def _largest(blocks: Tensor, axis: int) -> Tensor:
    """Largest magnitudes along an axis, without a copy of the tensor."""
    return torch.maximum(blocks.amax(axis, keepdim=True), -blocks.amin(axis, keepdim=True))


def _factors(needed: Tensor, fmt: NumberFormat) -> Tensor:
    """Factors as they are stored; NaN for rows and columns that are not finite."""
    refuse_beyond(needed, fmt)
    return torch.where(needed.isfinite(), stored_scale(needed, fmt), torch.nan)
