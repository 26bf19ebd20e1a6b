"""Grids: the values that a scalar format can express in units of its scale, and rounding to the nearest of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Protocol

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.blocks import CACHED, scratch
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.lookup import nearest, nearest_by_tables

# QLoRA (Dettmers et al., 2023): quantiles of the normal distribution, as bitsandbytes has them.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# bitsandbytes' fp4: codes 0 to 7 in units of 1/12; the sign is the fourth bit.
_FP4_BNB = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


# Integers as wide as a float, its exponent field in them, bits of its mantissa.
_FIELDS = {torch.float32: (torch.int32, 0x7F800000, 23), torch.float64: (torch.int64, 0x7FF0000000000000, 52)}

# Fewer elements are as quick without tables.
_WORTH_TABLES = 4096


class Grid(Protocol):
    """What every scalar format is, in units of its scale."""

    @property
    def low(self) -> float:
        """Smallest value."""

    @property
    def high(self) -> float:
        """Largest value."""

    def round_(self, x: Tensor, zero: Tensor | None = None, *, clip: bool = True) -> Tensor:
        """Round to the nearest value, in place; beyond the ends to the ends, which needs no care without ``clip``."""

    def encode(self, values: Tensor, zero: Tensor | None = None) -> Tensor:
        """Codes of values that `round_` returned; tables take those that it takes as well."""

    def decode(self, codes: Tensor, dtype: torch.dtype, zero: Tensor | None = None) -> Tensor:
        """Values of codes."""


@dataclass(frozen=True)
class IntGrid:
    """Whole numbers; with a zero point that of the unsigned codes is taken off."""

    first: int
    last: int

    @property
    def low(self) -> float:
        """See `Grid`."""
        return float(self.first)

    @property
    def high(self) -> float:
        """See `Grid`."""
        return float(self.last)

    def round_(self, x: Tensor, zero: Tensor | None = None, *, clip: bool = True) -> Tensor:
        """See `Grid`; ties to even."""
        if zero is None:
            return x.round_().clamp_(self.first, self.last) if clip else x.round_()
        return x.round_().add_(zero).clamp_(self.first, self.last).sub_(zero)

    def encode(self, values: Tensor, zero: Tensor | None = None) -> Tensor:
        """See `Grid`."""
        codes = values if zero is None else values + zero
        return codes.to(_code_dtype(self.first, self.last))

    def decode(self, codes: Tensor, dtype: torch.dtype, zero: Tensor | None = None) -> Tensor:
        """See `Grid`."""
        values = codes.to(dtype)
        return values if zero is None else values.sub_(zero)


def _quick(x: Tensor) -> bool:
    """Whether tables are the quicker way: not for few elements, and not where gradients flow."""
    return x.device.type == "cpu" and x.numel() >= _WORTH_TABLES and x.is_contiguous() and not x.requires_grad


def _looked_up(by_code: Tensor, codes: Tensor) -> Tensor:
    """Values of codes, a few at a time: fresh memory for wider indices takes several times as long."""
    by_code, whole = by_code.to(codes.device), torch.empty(0, dtype=torch.int32, device=codes.device)
    found = torch.empty(codes.shape, dtype=by_code.dtype, device=codes.device)
    for piece, out in zip(torch.split(codes.reshape(-1), CACHED), torch.split(found.view(-1), CACHED), strict=True):
        torch.index_select(by_code, 0, scratch("codes", piece.numel(), whole).copy_(piece), out=out)
    return found


@dataclass(frozen=True)
class TableGrid:
    """Any sorted levels, whose codes are given.

    Attributes:
        values: Levels in rising order.
        codes: The code of each.
    """

    values: tuple[float, ...]
    codes: tuple[int, ...]

    @property
    def low(self) -> float:
        """See `Grid`."""
        return self.values[0]

    @property
    def high(self) -> float:
        """See `Grid`."""
        return self.values[-1]

    def round_(self, x: Tensor, zero: Tensor | None = None, *, clip: bool = True) -> Tensor:
        """See `Grid`; ties to the lower level."""
        if _quick(x):
            return nearest_by_tables(x, self.values, self.values, out=x)
        return x.copy_(nearest(x, self.values, self.values))

    def encode(self, values: Tensor, zero: Tensor | None = None) -> Tensor:
        """See `Grid`."""
        if _quick(values):
            return nearest_by_tables(values, self.values, self.codes, out=torch.empty_like(values)).to(torch.uint8)
        return nearest(values, self.values, self.codes).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype, zero: Tensor | None = None) -> Tensor:
        """See `Grid`."""
        return _looked_up(torch.tensor(self._by_code, dtype=dtype), codes)

    @cached_property
    def _by_code(self) -> list[float]:
        found = [0.0] * (max(self.codes) + 1)
        for code, value in zip(self.codes, self.values, strict=True):
            found[code] = value
        return found


@dataclass(frozen=True)
class FixedGrid(TableGrid):
    """Whole multiples of one over a power of two.

    Attributes:
        steps: Levels between one and two.
    """

    steps: int = 1

    def round_(self, x: Tensor, zero: Tensor | None = None, *, clip: bool = True) -> Tensor:
        """See `Grid`; ties to even."""
        return x.mul_(self.steps).round_().mul_(1 / self.steps).clamp_(self.low, self.high)

    def encode(self, values: Tensor, zero: Tensor | None = None) -> Tensor:
        """See `Grid`; two's complement, rounded as `round_` does."""
        return self.round_(values.clone()).mul_(self.steps).to(torch.int8).view(torch.uint8)


@dataclass(frozen=True)
class FloatGrid:
    """A minifloat, rounded to nearest by arithmetic, with ties to even; without mantissa bits upwards.

    All codes are numbers but the last ones of OCP's two 8-bit formats (NaN and infinity) and, with 8 exponent bits,
    those of the last exponent, where bfloat16 and float32 have no numbers either.

    Attributes:
        exponent: Exponent bits.
        mantissa: Mantissa bits.
    """

    exponent: int
    mantissa: int

    @cached_property
    def last(self) -> int:
        """Code of the largest value; the same with a sign is that of the smallest one."""
        reserved = {(4, 3): 1, (5, 2): 4}.get((self.exponent, self.mantissa), 0)
        return self._sign - 1 - (1 << self.mantissa if self.exponent == 8 else reserved)

    @cached_property
    def values(self) -> tuple[float, ...]:
        """All values in rising order."""
        rising = self._by_code[: self.last + 1]
        return tuple(torch.cat([-rising[1:].flip(0), rising]).tolist())

    @property
    def low(self) -> float:
        """See `Grid`."""
        return -self.high

    @cached_property
    def high(self) -> float:
        """See `Grid`."""
        field, fraction = divmod(self.last, 1 << self.mantissa)
        return math.ldexp(fraction + (1 << self.mantissa) * (field > 0), max(field, 1) - self._bias - self.mantissa)

    def round_(self, x: Tensor, zero: Tensor | None = None, *, clip: bool = True) -> Tensor:
        """See `Grid`; ties to even."""
        if clip:
            x.clamp_(self.low, self.high)
        whole, mask, stored = _FIELDS[x.dtype]
        # What gradients flow through is not written to in parts.
        pieces = torch.split(x.view(-1), CACHED) if x.is_contiguous() and not x.requires_grad else (x,)
        for piece in pieces:
            # Adding and taking off 1.5 * 2**(stored - mantissa) times a number's power of two leaves its mantissa bits.
            power = scratch("powers", piece.numel(), x).view(piece.shape)
            torch.bitwise_and(piece.view(whole), mask, out=power.view(whole))
            power.clamp_(min=2.0 ** (1 - self._bias))
            if self._overflows(x):
                # Not by the step itself: it may be subnormal, which a process may flush to zero.
                piece.div_(power).mul_(2.0**self.mantissa).round_().mul_(2.0**-self.mantissa).mul_(power)
            else:
                times = 1.5 * 2.0 ** (stored - self.mantissa)
                piece.add_(power, alpha=times).sub_(power, alpha=times)
        return x

    def rounded(self, x: Tensor) -> Tensor:
        """As `round_`, into a new tensor and without buffers, for compilers; not with as wide a range as float32's."""
        whole, mask, stored = _FIELDS[x.dtype]
        x = x.clamp(self.low, self.high)
        power = (x.view(whole) & mask).view(x.dtype).clamp(min=2.0 ** (1 - self._bias))
        power = power * (1.5 * 2.0 ** (stored - self.mantissa))
        return (x + power) - power

    def encode(self, values: Tensor, zero: Tensor | None = None) -> Tensor:
        """See `Grid`."""
        whole, _, stored = _FIELDS[values.dtype]
        least, offset = 2.0 ** (1 - self._bias), self._wider_bias(values.dtype) - self._bias
        codes = torch.empty(values.shape, dtype=_code_dtype(0, max(255, 2 * self._sign - 1)), device=values.device)
        pieces = torch.split(values.detach().reshape(-1), CACHED)
        for piece, out in zip(pieces, torch.split(codes.view(-1), CACHED), strict=True):
            # But for the field's offset, our code is the leading bits of a normal number, and of the sum of a subnormal
            # one with the least normal one, less one exponent; each time these are the larger bits of the two. No
            # number is subnormal in the wider float, which a process may flush to zero.
            size = piece.abs()
            bits = (size + least).view(whole).sub_(1 << stored)
            torch.maximum(bits, size.view(whole), out=bits)
            bits.sub_(offset << stored).bitwise_right_shift_(stored - self.mantissa)
            sign = piece.view(whole).bitwise_right_shift(8 * whole.itemsize - 1).bitwise_and_(self._sign)
            out.copy_(bits.bitwise_or_(sign))
        return codes

    def decode(self, codes: Tensor, dtype: torch.dtype, zero: Tensor | None = None) -> Tensor:
        """See `Grid`; zero with a sign is zero."""
        return _looked_up(self._by_code.to(dtype), codes)

    @cached_property
    def _by_code(self) -> Tensor:
        """Values of all codes; in float64 none is subnormal, which a process may flush to zero."""
        code = torch.arange(self._sign, device="cpu")
        field, fraction = code >> self.mantissa, code & ((1 << self.mantissa) - 1)
        exponent = field.clamp(min=1) - (self._bias + self.mantissa)
        power = ((exponent + self._wider_bias(torch.float64)) << _FIELDS[torch.float64][2]).view(torch.float64)
        rising = (fraction + ((field > 0).long() << self.mantissa)) * power
        return torch.cat([rising, 0.0 - rising])

    @property
    def _bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def _sign(self) -> int:
        return 1 << (self.exponent + self.mantissa)

    @staticmethod
    def _wider_bias(dtype: torch.dtype) -> int:
        return 1023 if dtype == torch.float64 else 127

    def _overflows(self, x: Tensor) -> bool:
        """Whether sums with multiples of a power of two may, which are quicker than quotients."""
        return self.exponent == 8 and x.dtype == torch.float32


def _sorted(by_code: dict[int, float]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    codes = tuple(sorted(by_code, key=lambda c: by_code[c]))
    return tuple(by_code[c] for c in codes), codes


def _powers(base: float, bits: int) -> TableGrid:
    """Zero, and ``+-base**-k``; the sign takes one bit, and one magnitude is zero.

    Powers of two: Zhou et al., "Incremental Network Quantization" (2017); of its square root, POST: Zhou et al.,
    "Precision Neural Network Quantization via Learnable Adaptive Modules" (2025).
    """
    half = 2 ** (bits - 1)
    magnitudes = [0.0, *(base**-k for k in reversed(range(half - 1)))]
    found = dict(enumerate(magnitudes)) | {half + i: -m for i, m in enumerate(magnitudes) if m}
    return TableGrid(*_sorted(found))


def _halvings(bits: int) -> TableGrid:
    """Codes k stand for ``2**-k``, the last one for zero: outputs of a softmax, between 0 and 1.

    Li et al., "RepQuant" (2024), where zero is a level more than the bits allow, and the nearest exponent is taken;
    here it is the nearest value.
    """
    last = 2**bits - 1
    return TableGrid((0.0, *(2.0**-k for k in reversed(range(last)))), tuple(reversed(range(last + 1))))


@cache
def grid_of(fmt: NumberFormat) -> Grid:
    """The grid of a scalar format.

    Raises:
        FormatError: If the format rounds vectors, has levels that depend on the tensor, or is a plain cast.
    """
    if fmt.plain_float:
        raise FormatError(f"{fmt.name} is a cast of whole tensors: its numbers are too many to list")
    if fmt.family == "int":
        if fmt.variant == "bipolar" or (fmt.bits == 1 and fmt.symmetric):
            return _evenly(range(1 - 2**fmt.bits, 2**fmt.bits, 2), 0.5 if fmt.bits > 1 else 1.0)
        return IntGrid(*fmt.levels)
    if fmt.family in ("float", "mx", "nvfp") and fmt.exponent:
        return FloatGrid(fmt.exponent, fmt.mantissa)
    if fmt.family == "mx":  # mxint8 has 6 bits after the point; OCP lets -2 be left out
        return FixedGrid(tuple(k / 64 for k in range(-127, 128)), tuple(k % 256 for k in range(-127, 128)), 64)
    if fmt.family == "table":
        if fmt.variant == "nf4":
            return TableGrid(_NF4, tuple(range(16)))
        codes = {c: v / 12 for c, v in enumerate(_FP4_BNB)} | {8 + c: -v / 12 for c, v in enumerate(_FP4_BNB) if v}
        return TableGrid(*_sorted(codes))
    if fmt.family in ("pow2", "post"):
        return _powers(2.0 if fmt.family == "pow2" else math.sqrt(2.0), fmt.bits)
    if fmt.family == "log2":
        return _halvings(fmt.bits)
    if fmt.family in ("ternary", "binary"):
        step = 1 if fmt.family == "ternary" else 2
        return _evenly(range(-1, 2, step), 1.0)
    raise FormatError(f"{fmt.base} has no levels of its own: they depend on the tensor")


def _evenly(steps: range, unit: float) -> TableGrid:
    return TableGrid(tuple(unit * k for k in steps), tuple(range(len(steps))))


def _code_dtype(first: int, last: int) -> torch.dtype:
    fits = (
        t for t in (torch.int8, torch.uint8, torch.int16) if torch.iinfo(t).min <= first <= last <= torch.iinfo(t).max
    )
    return next(fits, torch.int32)
