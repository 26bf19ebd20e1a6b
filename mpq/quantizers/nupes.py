"""Power functions: levels ``sign(k) * (|k| / K) ** (1 / a)``, one exponent a for a tensor (PowerQuant, NUPES).

Yvinec et al., "PowerQuant" and "NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search" (2023): power
functions are the maps that keep products, so that codes can be multiplied as they are. The exponent is the one with the
least squared error, as in PowerQuant; values are rounded to the nearest level rather than after the power. As with
integers, negative codes go one further than positive ones; the papers leave that code unused.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mpq.quantizers.blocks import BUFFERED, from_blocks, tiles, weighted_blocks
from mpq.quantizers.clips import error_unit
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.ranges import find_range, minmax_range
from mpq.quantizers.scales import refuse_beyond, stored_scale
from mpq.quantizers.tensors import QuantizedTensor

_SAMPLED = 2**16  # elements that the exponent is searched on
_EXPONENTS, _REFINED = (0.2, 1.8), 4
_RATIOS = 17  # of scales to the largest magnitude


def quantize(
    x: Tensor, fmt: NumberFormat, channel_axis: int = 0, method: str = "mse", importance: Tensor | None = None
) -> QuantizedTensor:
    """As `mpq.quantizers.tensors.quantize`; the exponent, a float32 number, is in ``outer``. Zero stays zero."""
    blocks, weights = weighted_blocks(x, fmt, channel_axis, importance)
    exponent = _find_exponent(blocks, fmt, method, weights)
    needed, _ = _find_scale(_with_ends(blocks, fmt, method, weights), fmt, exponent)
    refuse_beyond(needed, fmt)
    scale = stored_scale(needed, fmt)
    codes = torch.empty(blocks.shape, dtype=torch.int8, device=x.device)
    for tile in tiles(blocks.shape):
        codes[tile] = _nearest(blocks[tile] / scale[tile[0]], fmt.bits, exponent)
    zero = torch.zeros_like(scale)
    return QuantizedTensor(codes, scale, zero, fmt, tuple(x.shape), channel_axis, exponent.reshape(1, 1))


def dequantize(q: QuantizedTensor) -> Tensor:
    """As `mpq.quantizers.tensors.dequantize`."""
    assert q.outer is not None
    values = q.scale.new_empty(q.codes.shape)
    for tile in tiles(q.codes.shape):
        values[tile] = _levels_at(q.codes[tile], q.fmt.bits, q.outer.reshape(())).mul_(q.scale[tile[0]])
    return from_blocks(values, q.shape, q.channel_axis, *(q.fmt.block or (1, 0)))


def power_levels(bits: int, exponent: Tensor) -> Tensor:
    """The ``2**bits`` levels from just below -1 to 1 in rising order; exponents below 1 crowd them at zero."""
    most = 2 ** (bits - 1) - 1
    sizes = (torch.arange(1, most + 2, dtype=exponent.dtype, device=exponent.device) / most).pow(1 / exponent)
    return torch.cat([-sizes.flip(0), sizes.new_zeros(1), sizes[:-1]])


def _nearest(units: Tensor, bits: int, exponent: Tensor) -> Tensor:
    """Signed codes of the nearest levels, in the dtype of the units; ties to zero."""
    most = 2 ** (bits - 1) - 1
    sizes = -power_levels(bits, exponent)[: most + 2].flip(0)
    middle = torch.cat([(sizes[1:] + sizes[:-1]) / 2, sizes.new_full((1,), torch.inf)])
    size = units.abs()
    below = size.pow(exponent).mul_(most).floor_().clamp_(max=most + 1)
    up = size > middle.index_select(0, below.flatten().int()).view_as(below)
    return below.add_(up).copysign_(units).clamp_(max=most)


def _levels_at(codes: Tensor, bits: int, exponent: Tensor) -> Tensor:
    levels = power_levels(bits, exponent)
    return levels.index_select(0, codes.flatten().int() + len(levels) // 2).view(codes.shape)


def _largest_scale(lo: Tensor, hi: Tensor, bits: int, exponent: Tensor) -> Tensor:
    """The scale that clips nothing."""
    return torch.maximum(hi, lo / power_levels(bits, exponent)[0])


def _find_exponent(blocks: Tensor, fmt: NumberFormat, method: str, weights: Tensor | None) -> Tensor:
    """The exponent with the least error on an even sample: coarse steps, then halved ones around the best."""
    # An odd stride meets all columns of a weight; a few blocks are taken before any block is thinned.
    columns = -(-blocks.shape[1] // _SAMPLED) | 1
    rows = max(1, len(blocks) * (blocks.shape[1] // columns) // _SAMPLED) | 1
    w = None if weights is None else weights[::rows, ::columns]
    part = _with_ends(blocks[::rows, ::columns], fmt, method, w)

    def error(exponent: float) -> float:
        return _find_scale(part, fmt, blocks.new_tensor(exponent))[1]

    low, high = _EXPONENTS
    step = (high - low) / 8
    errors = {low + i * step: 0.0 for i in range(9)}
    errors = {a: error(a) for a in errors}
    for _ in range(_REFINED):
        step /= 2
        best = min(errors, key=errors.__getitem__)
        for a in (best - step, best + step):
            if low <= a <= high and a not in errors:
                errors[a] = error(a)
    return blocks.new_tensor(min(errors, key=errors.__getitem__)).float().to(blocks.dtype)


class _Blocks(NamedTuple):
    """Blocks and what does not depend on the exponent.

    Attributes:
        values: ``[blocks, elements]``.
        weights: Of their errors; None: all alike.
        lo: Lower ends that scales are to cover, ``[blocks, 1]``.
        hi: Upper ends.
        unit: What errors are counted in, see `error_unit`.
        ratios: Of scales tried to those that cover the ends, ``[K, 1, 1]``.
    """

    values: Tensor
    weights: Tensor | None
    lo: Tensor
    hi: Tensor
    unit: Tensor | None
    ratios: Tensor


def _with_ends(blocks: Tensor, fmt: NumberFormat, method: str, weights: Tensor | None) -> _Blocks:
    ends = minmax_range(blocks)
    lo, hi = ends if method == "mse" else find_range(blocks, fmt, method, weights)
    smallest = 0.1 if fmt.bits == 2 else 0.25  # as for integers: two bits clip most of a bell curve
    count = _RATIOS if method == "mse" else 1
    ratios = torch.linspace(1, smallest, count, dtype=blocks.dtype, device=blocks.device)[:, None, None]
    return _Blocks(blocks, weights, lo, hi, error_unit(ends), ratios)


def _find_scale(own: _Blocks, fmt: NumberFormat, exponent: Tensor) -> tuple[Tensor, float]:
    """Scale ``[blocks, 1]`` before it is stored, and the error of all; by ``mse`` the best of the ratios."""
    needed = _largest_scale(own.lo, own.hi, fmt.bits, exponent) * own.ratios
    tried = stored_scale(needed, fmt)
    errors = torch.zeros_like(tried)
    for tile in tiles(own.values.shape):
        r, part = tile[0], own.values[tile]
        step = max(1, BUFFERED // part.numel())
        for k in range(0, len(tried), step):
            scale = tried[k : k + step, r]
            lost = _levels_at(_nearest(part / scale, fmt.bits, exponent), fmt.bits, exponent).mul_(scale).sub_(part)
            if own.unit is not None:
                lost.mul_(own.unit[r])
            lost.square_()
            if own.weights is not None:
                lost.mul_(own.weights[tile])
            errors[k : k + step, r] += lost.sum(2, keepdim=True)
    least, best = errors.min(0)
    return needed.gather(0, best[None])[0], _total(least, own.unit)


def _total(errors: Tensor, unit: Tensor | None) -> float:
    """The sum of errors that are each in the square of a unit; rounded alike in any."""
    if unit is None:
        return errors.sum().item()
    # Squares of float32's powers of two are numbers in double precision.
    true = errors.double() / unit.double().clamp(2.0**-500, 2.0**500).square()
    largest = math.ldexp(1.0, math.frexp(true.max().item())[1])
    return (true / largest).to(errors.dtype).sum().item() * largest
