"""Nested integers: one stored tensor of 8 bits serves every width (Double Rounding).

Huang et al., "Nearly Lossless Adaptive Bit Switching" (2025): codes of b bits are the 8-bit codes over ``2**(8 - b)``,
rounded a second time and clamped, so that no float weights are kept; each width has scales of its own. There they are
learnt, here they are the ones with the least squared error against the 8-bit tensor, which alone they are found from.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.blocks import padding_mask
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.grids import grid_of
from mpq.quantizers.kernels import chunks
from mpq.quantizers.scales import refuse_beyond, stored_scale
from mpq.quantizers.tensors import QuantizedTensor, scaled_levels
from mpq.quantizers.tensors import quantize as quantize_plainly


def quantize(
    x: Tensor, fmt: NumberFormat, channel_axis: int = 0, method: str = "mse", importance: Tensor | None = None
) -> QuantizedTensor:
    """As `mpq.quantizers.tensors.quantize`: to 8 bits by the range rule, then to the format by `narrow`."""
    eight = quantize_plainly(x, replace(fmt, bits=8, variant=""), channel_axis, method, importance)
    return narrow(eight, fmt.bits)


def dequantize(q: QuantizedTensor) -> Tensor:
    """As `mpq.quantizers.tensors.dequantize`."""
    return scaled_levels(q)


def narrow(eight: QuantizedTensor, bits: int) -> QuantizedTensor:
    """The tensor of fewer bits that an 8-bit one holds.

    Args:
        eight: Symmetric integers of 8 bits, plain or nested.
        bits: 1 to 8; one bit is the sign.

    Raises:
        FormatError: If the tensor is not of that kind, or a scale is beyond its type.
    """
    fmt = eight.fmt
    if fmt.family != "int" or fmt.bits != 8 or not fmt.symmetric or fmt.variant not in ("", "nested"):
        raise FormatError(f"only symmetric 8-bit integers hold narrower ones, not {fmt.name}")
    narrower = replace(fmt, bits=bits, variant="nested")
    if bits == 8:
        return replace(eight, fmt=narrower)
    grid, shift = grid_of(narrower), 8 - bits
    own = padding_mask(eight.shape, fmt, eight.channel_axis, eight.codes.device)
    codes = grid.encode(eight.scale.new_empty(0)).new_empty(eight.codes.shape)
    ratio = torch.empty_like(eight.scale)
    for rows, part in chunks(eight.codes, 1):
        wide = part.int()
        if bits == 1:
            units = torch.where(wide < 0, -1.0, 1.0)
        else:  # halves go up
            units = ((wide + (1 << (shift - 1))) >> shift).clamp(int(grid.low), int(grid.high)).float()
        units = units.to(eight.scale.dtype)
        counted = units if own is None else units * own[rows]
        ratio[rows] = (counted * wide).sum(1, keepdim=True) / counted.square().sum(1, keepdim=True).clamp(min=1)
        codes[rows] = grid.encode(units)
    needed = eight.scale * ratio
    refuse_beyond(needed, narrower)
    return replace(eight, codes=codes, scale=stored_scale(needed, narrower), fmt=narrower)
