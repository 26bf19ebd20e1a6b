"""Energy of one multiplication and one addition, by family of number formats, in picojoules of a 45 nm process.

Measured values are Horowitz's (2014, figure 1.1.9); between them, integers follow the polynomials of QKeras
(Coelho et al., 2021, ``qtools``), which meet his 8 and 32 bits. Multiplier-free formats cost what replaces the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from mpq.errors import BudgetError
from mpq.quantizers.formats import NumberFormat

# Floats that Horowitz measured: bits -> (exponent, mantissa, multiplication, addition).
_FLOATS = {16: (5, 10, 1.1, 0.4), 32: (8, 23, 3.7, 0.9)}
# A 2:1 multiplexer has about a third of the gates of a full adder: an estimate for barrel shifters.
_SHIFT_PER_ADDER = 1 / 3
_FP16 = NumberFormat.parse("fp16")


class Number(Protocol):
    """What costs depend on; `NumberFormat` has it."""

    @property
    def family(self) -> str:
        """``int``, ``float``, ``pow2``, ..."""

    @property
    def bits(self) -> int:
        """Bits of one element."""

    @property
    def exponent(self) -> int:
        """Exponent bits of a float."""

    @property
    def mantissa(self) -> int:
        """Mantissa bits of a float."""


def int_add(bits: float) -> float:
    """Addition of integers: ``0.003125 b`` pJ, 0.1 pJ at 32 bits."""
    return 0.003125 * bits


def int_multiply(bits: float) -> float:
    """Product of integers of at most ``bits``: 0.2 pJ at 8 bits, 3.1 pJ at 32."""
    return 0.002994791667 * bits**2 + 0.001041666667 * bits


def float_multiply(exponent: int, mantissa: int) -> float:
    """Product of floats: mantissas multiplied, exponents added, the result normalized and rounded.

    Normalizing is the quadratic in the significand's width through what is left of Horowitz's fp16 (1.1 pJ) and fp32
    (3.7 pJ) after the first two, as QKeras does it for integers; for minifloats this extrapolates. It makes an fp8
    product dearer than an int8 one, as synthesis does (van Baalen et al., 2023).
    """
    return _significand(exponent, mantissa) + _through(
        *((m + 1, product - _significand(e, m)) for e, m, product, _ in _FLOATS.values()), at=mantissa + 1
    )


def float_add(bits: int) -> float:
    """Addition of floats: the quadratic through Horowitz's fp16 (0.4 pJ) and fp32 (0.9 pJ)."""
    return _through(*((b, add) for b, (_, _, _, add) in _FLOATS.items()), at=bits)


def shift(bits: int, positions: int) -> float:
    """A barrel shifter of ``bits`` by one of ``positions``: one row of multiplexers for each bit of the amount."""
    return _SHIFT_PER_ADDER * int_add(bits) * max(positions - 1, 0).bit_length()


def multiply(weight: Number, activation: Number) -> float:
    """Product of a weight and an activation, by the family of the one that is not plain (see `PRODUCTS`).

    Raises:
        BudgetError: If a family has no energy.
    """
    _check(weight, activation)
    plain = "int", "float"
    if weight.family in plain and activation.family not in plain:
        weight, activation = activation, weight
    return PRODUCTS[weight.family](_read(weight), _read(activation))


def accumulate(weight: Number, activation: Number, depth: float) -> float:
    """Adding one product to a sum of ``depth``.

    Integers: as many bits as the sum needs, 32 at most. Floats: in fp16 for formats under 16 bits, else in fp32.

    Raises:
        BudgetError: If a family has no energy.
    """
    _check(weight, activation)
    weight, activation = _read(weight), _read(activation)
    if _is_float(weight, activation):
        widest = max(x.bits for x in (weight, activation) if x.exponent)
        return float_add(16 if widest < 16 else 32)
    grown = (max(int(depth), 1) - 1).bit_length()
    return int_add(min(32, weight.bits + activation.bits + grown))


def _check(*numbers: Number) -> None:
    for x in numbers:
        if x.family not in PRODUCTS:
            raise BudgetError(f"no energy for products of {x.family!r} numbers; known: {', '.join(PRODUCTS)}")


def _read(x: Number) -> Number:
    """What multiplies: levels of tables are looked up as fp16, which costs nothing beside the product."""
    return _FP16 if x.family in _TABLES else x


def _product(weight: Number, activation: Number) -> float:
    """A multiplier: an integer operand of a float product is widened to the other's format."""
    floats = [x for x in (weight, activation) if x.exponent]
    if floats:
        return float_multiply(max(x.exponent for x in floats), max(x.mantissa for x in floats))
    return int_multiply(max(weight.bits, activation.bits))


def _block_scaled(weight: Number, activation: Number) -> float:
    """A product, and the 8-bit exponents of blocks of 32 (OCP MX) added once for each block."""
    return _product(weight, activation) + int_add(8) / 32


def _nvfp(weight: Number, activation: Number) -> float:
    """A product, and the 8-bit float scales of blocks of 16 multiplied once for each block (NVFP4)."""
    return _product(weight, activation) + float_multiply(4, 3) / 16


def _pow2(weight: Number, activation: Number) -> float:
    """A shift by the exponent; the sign takes one bit of the weight. A float activation has its exponent added to."""
    if activation.exponent:
        return int_add(activation.exponent)
    return shift(activation.bits, 2 ** (weight.bits - 1))


def _half_powers(weight: Number, activation: Number) -> float:
    """Powers of the square root of two: shifts by half of the exponent.

    Products of odd exponents have a sum of their own, which is multiplied by the root at the end (POST).
    """
    if activation.exponent:
        return int_add(activation.exponent)
    return shift(activation.bits, 2 ** max(weight.bits - 2, 0))


def _log2(weight: Number, activation: Number) -> float:
    """As `_pow2`, but no bit is a sign (softmax outputs: RepQuant, Li et al., 2023)."""
    if activation.exponent:
        return int_add(activation.exponent)
    return shift(activation.bits, 2**weight.bits)


def _additive_pow2(weight: Number, activation: Number) -> float:
    """Two powers of two of half the bits each (APoT, Li et al., 2020): two shifts and an addition."""
    terms = 2 * shift(activation.bits, 2 ** max((weight.bits - 1) // 2, 1))
    return terms + int_add(weight.bits + activation.bits)


def _sign(weight: Number, activation: Number) -> float:
    """Plus, minus or nothing: the adder that accumulates subtracts instead, so the product is part of it."""
    return 0.0


def _shift_add(weight: Number, activation: Number) -> float:
    """MixPE (Zhang et al., 2024): each bit of the weight adds the activation, shifted by wires."""
    if activation.exponent:
        raise BudgetError("shift-and-add multiplies whole numbers; give the activations an integer format")
    return weight.bits * int_add(activation.bits)


def _l_mul(weight: Number, activation: Number) -> float:
    """L-Mul (Luo & Sun, 2024): exponents and mantissas are added as one integer, a constant with them."""
    return int_add(max(weight.bits, activation.bits))


# Families whose codes stand for levels of a table, one for all, for a tensor or for a channel.
_TABLES = ("table", "kmeans", "nupes", "codebook")
# Family of a format -> energy of its product with another operand. `shift_add` and `l_mul` are ways to multiply
# integers and floats; the others are how tensors are stored.
PRODUCTS: dict[str, Callable[[Number, Number], float]] = {
    "int": _product,
    "float": _product,
    **dict.fromkeys(_TABLES, _product),
    "pvq": _product,  # points of a pyramid have whole numbers for coordinates
    "mx": _block_scaled,
    "nvfp": _nvfp,
    "pow2": _pow2,
    "post": _half_powers,
    "log2": _log2,
    "apot": _additive_pow2,
    "ternary": _sign,
    "binary": _sign,
    "shift_add": _shift_add,
    "l_mul": _l_mul,
}


def _is_float(weight: Number, activation: Number) -> bool:
    return bool(weight.exponent or activation.exponent)


def _significand(exponent: int, mantissa: int) -> float:
    return int_multiply(mantissa + 1) + int_add(exponent + 1)


def _through(first: tuple[float, float], second: tuple[float, float], *, at: float) -> float:
    """The quadratic without constant through two points."""
    (x, y), (u, v) = first, second
    a = (v / u - y / x) / (u - x)
    return a * at**2 + (y / x - a * x) * at
