"""Number formats and schemes: what one tensor, and one layer, is stored and computed in.

Names are compact and parse back::

    int4          4-bit signed integers, symmetric, one scale per output channel
    int4:tensor   one scale for the whole tensor
    int4:g128     one scale per 128 consecutive weights of an output channel
    int8:tensor:asym   unsigned codes with a zero point
    fp32 fp16 bf16     floating point, no scales

A scheme joins a weight format and an activation format: ``W4A8``, ``W4`` (weights only, activations stay
float), ``W4:g128A16``, ``W8:asymA8``. A bare number below 16 is an integer format; 16 and 32 are ``fp16``
and ``fp32``, as the field writes them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mpq.errors import FormatError

_FLOATS = {"fp32": (32, 8, 23), "fp16": (16, 5, 10), "bf16": (16, 8, 7)}
_NAME = re.compile(r"(?P<base>[a-z]+[a-z0-9_]*?)(?P<options>(?::[a-z0-9]+)*)")
_SCHEME = re.compile(r"W(?P<weight>[^A-Z]+)(?:A(?P<activation>[^A-Z]+))?")


@dataclass(frozen=True, repr=False)
class NumberFormat:
    """How one tensor is stored.

    Attributes:
        family: ``int`` or ``float``.
        bits: Bits of one element, without scales.
        granularity: What shares a scale: ``tensor``, ``channel`` (one per output channel) or ``group:G``
            (G consecutive elements of an output channel; a last, shorter group has its own scale).
        symmetric: Signed codes without zero point (True) or unsigned codes with one (False).
        exponent: Exponent bits of a float format.
        mantissa: Mantissa bits of a float format.

    Symmetric integers use the codes ``-2**(bits-1) .. 2**(bits-1)-1``; one bit means the two levels
    ``-scale, +scale``. Scales are stored as float16 for groups (the convention of weight-only kernels) and
    as float32 otherwise; a zero point takes as many bits as an element.

    Example:
        >>> f = NumberFormat.parse("int4:g128")
        >>> f.name, f.bits_per_element((64, 256))
        ('int4:g128', 4.125)
        >>> NumberFormat.parse("int8:tensor:asym").storage_bits((10,))  # 10 codes, 1 scale, 1 zero point
        120
    """

    family: str
    bits: int
    granularity: str = "channel"
    symmetric: bool = True
    exponent: int = 0
    mantissa: int = 0

    def __post_init__(self) -> None:
        if self.family == "int" and not 1 <= self.bits <= 16:
            raise FormatError(f"integer formats have 1 to 16 bits, not {self.bits}")
        if self.family == "float":
            object.__setattr__(self, "granularity", "tensor")  # floats have no scales to place
            object.__setattr__(self, "symmetric", True)
            if (self.bits, self.exponent, self.mantissa) not in _FLOATS.values():
                raise FormatError(f"no {self.bits}-bit float with these parts; known: {', '.join(_FLOATS)}")
        if self.family not in ("int", "float"):
            raise FormatError(f"unknown number family {self.family!r}; known: int, float")
        if self.granularity not in ("tensor", "channel") and self.group_size is None:
            raise FormatError(f"granularity is tensor, channel or group:G with G >= 1, not {self.granularity!r}")

    @cached_property
    def group_size(self) -> int | None:
        """Elements per scale for ``group:G``, else None."""
        match = re.fullmatch(r"group:([1-9]\d*)", self.granularity)
        return int(match[1]) if match else None

    @property
    def name(self) -> str:
        """Compact name; ``NumberFormat.parse(f.name) == f``."""
        if self.family == "float":
            return next(n for n, spec in _FLOATS.items() if spec == (self.bits, self.exponent, self.mantissa))
        options = {"channel": "", "tensor": ":tensor"}.get(self.granularity, f":g{self.group_size}")
        return f"int{self.bits}{options}{'' if self.symmetric else ':asym'}"

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"NumberFormat({self.name!r})"

    @property
    def levels(self) -> tuple[int, int]:
        """Smallest and largest integer code."""
        if self.symmetric:
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    @property
    def scale_bits(self) -> int:
        """Bits of one stored scale."""
        if self.family == "float":
            return 0
        return 32 if self.group_size is None else 16

    def num_scales(self, shape: Sequence[int], channel_axis: int = 0) -> int:
        """How many scales a tensor of this shape needs."""
        numel = math.prod(shape)
        if self.family == "float" or numel == 0:
            return 0
        if self.granularity == "tensor":
            return 1
        channels = shape[channel_axis] if shape else 1
        return channels * math.ceil(numel / channels / (self.group_size or numel))

    def storage_bits(self, shape: Sequence[int], channel_axis: int = 0) -> int:
        """Exact bits of a tensor of this shape: elements, scales and zero points."""
        overhead = self.scale_bits + (0 if self.symmetric else self.bits)
        return self.bits * math.prod(shape) + overhead * self.num_scales(shape, channel_axis)

    def bits_per_element(self, shape: Sequence[int], channel_axis: int = 0) -> float:
        """Storage bits divided by the number of elements."""
        return self.storage_bits(shape, channel_axis) / math.prod(shape)

    @classmethod
    def parse(cls, name: str) -> NumberFormat:
        """Read a compact name.

        Raises:
            FormatError: If the name is not a known format.
        """
        match = _NAME.fullmatch(name.strip())
        base, options = (match["base"], match["options"].split(":")[1:]) if match else (name, [])
        if base in _FLOATS and not options:
            bits, exponent, mantissa = _FLOATS[base]
            return cls("float", bits, "tensor", True, exponent, mantissa)
        digits = re.fullmatch(r"int(\d+)", base)
        if not digits:
            raise FormatError(
                f"unknown number format {name!r}; known: int1 to int16 with :tensor, :g<size>, :sym or :asym, "
                f"and {', '.join(_FLOATS)}"
            )
        return _with_options(cls("int", int(digits[1])), options, name)


def _with_options(fmt: NumberFormat, options: Iterable[str], name: str) -> NumberFormat:
    for option in options:
        if option in ("tensor", "channel"):
            fmt = replace(fmt, granularity=option)
        elif re.fullmatch(r"g[1-9]\d*", option):
            fmt = replace(fmt, granularity=f"group:{option[1:]}")
        elif option in ("sym", "asym"):
            fmt = replace(fmt, symmetric=option == "sym")
        else:
            raise FormatError(f"unknown option {option!r} in {name!r}; use tensor, channel, g<size>, sym or asym")
    return fmt


_DEFAULT_OPTIONS = {"W": ("channel", "sym"), "A": ("tensor", "asym")}


def _role_format(text: str, role: str) -> NumberFormat:
    """Parse the part after W or A, where a bare number is short for the role's usual format."""
    base, *options = text.split(":")
    if base in ("16", "32"):
        base = f"fp{base}"
    if base.isdigit() or base.startswith("int"):
        bits = base.removeprefix("int")
        return NumberFormat.parse(":".join([f"int{bits}", *_DEFAULT_OPTIONS[role], *options]))
    return NumberFormat.parse(text if options else base)


def _role_name(fmt: NumberFormat, role: str) -> str:
    """Inverse of `_role_format`, as short as possible."""
    if fmt.family == "float":
        return fmt.name.removeprefix("fp")
    default_granularity, default_sym = _DEFAULT_OPTIONS[role]
    options = []
    if fmt.granularity != default_granularity:
        options.append(fmt.granularity.replace("group:", "g"))
    if fmt.symmetric != (default_sym == "sym"):
        options.append("sym" if fmt.symmetric else "asym")
    bits = f"int{fmt.bits}" if fmt.bits == 16 else str(fmt.bits)
    return ":".join([bits, *options])


@dataclass(frozen=True, repr=False)
class Scheme:
    """One choice for one layer: its weight format and its activation format.

    Attributes:
        weight: Format of the weight.
        activation: Format of the layer's input, or None where it stays as the model computes it.

    Example:
        >>> s = Scheme.parse("W4A8")
        >>> s.weight.name, s.activation.name, str(s)
        ('int4', 'int8:tensor:asym', 'W4A8')
        >>> str(Scheme.parse("W4:g128A16")), str(Scheme.parse("W3"))
        ('W4:g128A16', 'W3')
    """

    weight: NumberFormat
    activation: NumberFormat | None = None

    def __post_init__(self) -> None:
        act = self.activation
        if act is not None and act.family == "int" and act.granularity != "tensor":
            raise FormatError(f"activations are quantized per tensor; {act.name!r} is not supported")

    def __str__(self) -> str:
        act = "" if self.activation is None else f"A{_role_name(self.activation, 'A')}"
        return f"W{_role_name(self.weight, 'W')}{act}"

    def __repr__(self) -> str:
        return f"Scheme({str(self)!r})"

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a scheme name such as ``W4A8``.

        Raises:
            FormatError: If the text is not a scheme.
        """
        match = _SCHEME.fullmatch(text.strip())
        if not match:
            raise FormatError(f"{text!r} is not a scheme; write it like W4A8, W4, W4:g128A16 or W8:asymA8")
        weight = _role_format(match["weight"], "W")
        return cls(weight, _role_format(match["activation"], "A") if match["activation"] else None)


def parse_schemes(schemes: str | Iterable[str | Scheme]) -> tuple[Scheme, ...]:
    """Read ``"W2A8,W4A8"`` or any iterable of names and schemes; duplicates are dropped, order is kept.

    Raises:
        FormatError: If there is no scheme, or one does not parse.
    """
    parts = schemes.split(",") if isinstance(schemes, str) else list(schemes)
    found = dict.fromkeys(p if isinstance(p, Scheme) else Scheme.parse(p) for p in parts if p != "")
    if not found:
        raise FormatError("no schemes given; name at least one, such as 'W4A8,W8A8'")
    return tuple(found)
