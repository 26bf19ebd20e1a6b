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
from mpq.quantizers.scales import stored_scale
from mpq.quantizers.tensors import QuantizedTensor

ALPHA = 0.15


def quantize(
    x: Tensor, fmt: NumberFormat, channel_axis: int = 0, method: str = "mse", importance: Tensor | None = None
) -> QuantizedTensor:
    """As `mpq.quantizers.tensors.quantize`; the columns' factors are in ``outer``. It is always by min-max."""
    rows, _ = weighted_blocks(x, fmt, channel_axis, None)
    grid = grid_of(fmt)
    largest = rows.abs()
    scale = stored_scale(largest.amax(1, keepdim=True).pow(ALPHA) / grid.high, fmt)
    outer = stored_scale(largest.amax(0, keepdim=True).pow(1 - ALPHA), fmt)
    codes = grid.encode(grid.round_(rows / (scale * outer)))
    return QuantizedTensor(codes, scale, torch.zeros_like(scale), fmt, tuple(x.shape), channel_axis, outer)


def dequantize(q: QuantizedTensor) -> Tensor:
    """As `mpq.quantizers.tensors.dequantize`."""
    assert q.outer is not None
    units = grid_of(q.fmt).decode(q.codes, q.scale.dtype)
    return from_blocks(units.mul_(q.scale * q.outer), q.shape, q.channel_axis)
