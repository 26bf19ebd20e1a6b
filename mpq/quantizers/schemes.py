"""Schemes: what one layer is stored and computed in.

A scheme joins a weight format and an activation format: ``W4A8``, ``W4`` (weights only, activations stay
float), ``W4:g128A16``, ``W8:asymA8``, ``Wfp8_e4m3A8:token``. A bare number below 16 is an integer format; 16 and 32 are
``fp16`` and ``fp32``, as the field writes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import takewhile

from mpq.errors import FormatError
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.legality import fitted

_SCHEME = re.compile(r"W(?P<weight>[^A-Z]+)(?:A(?P<activation>[^A-Z]+))?")
_GRANULARITIES = {"tensor", "channel", "token", "cross", "g", "b", "raw"}
_DEFAULT_OPTIONS = {"W": ("channel", "sym"), "A": ("tensor", "asym")}


def _names_granularity(options: Iterable[str]) -> bool:
    return any(option.rstrip("0123456789x") in _GRANULARITIES for option in options)


def _role_format(text: str, role: str) -> NumberFormat:
    """Parse the part after W or A, where a bare number is short for the role's usual format."""
    base, *options = text.split(":")
    if base in ("16", "32"):
        base = f"fp{base}"
    if base.isdigit() or base.startswith("int"):
        bits = base.removeprefix("int")
        granularity, sign = _DEFAULT_OPTIONS[role]
        # Cross is symmetric; the sign of progressive integers is known.
        usual = [] if _names_granularity(options) else [granularity]
        if not {"sym", "asym", "cross"}.intersection(options):
            usual.append(sign)
        return NumberFormat.parse(":".join([f"int{bits}", *usual, *options]))
    if role == "A" and NumberFormat.parse(base).granularity == "channel" and not _names_granularity(options):
        options = ["tensor", *options]
    return NumberFormat.parse(":".join([base, *options]))


def _role_name(fmt: NumberFormat, role: str) -> str:
    """Inverse of `_role_format`, as short as possible; the steps of activations are those of their weight."""
    fmt = replace(fmt, recipe=()) if role == "A" else fmt
    base, *options = fmt.name.split(":")
    if fmt.plain_float:
        return fmt.name.removeprefix("fp")
    usual_granularity, usual_sym = _DEFAULT_OPTIONS[role]
    if role == "A" and (fmt.granularity == "tensor" or (fmt.granularity == "channel")):
        options = [o for o in options if o != "tensor"]
        options = options if fmt.granularity == usual_granularity else ["channel", *options]
    if fmt.family != "int":
        return ":".join([base, *options])
    options = [o for o in options if o != "asym"]
    if fmt.symmetric != (usual_sym == "sym") and fmt.variant != "progressive" and fmt.granularity != "cross":
        options.append("sym" if fmt.symmetric else "asym")
    bits = f"int{fmt.bits}" if fmt.bits == 16 else str(fmt.bits)
    return ":".join([bits, *options])


@dataclass(frozen=True, repr=False)
class Scheme:
    """One choice for one layer: its weight format and its activation format.

    Attributes:
        weight: Format of the weight.
        activation: Format of the layer's input, or None where it stays as the model computes it. Where the weight is
            smoothed or rotated first (``W8:smoothA8``), so are inputs, and the activation's format has these steps.

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
        if self.weight.granularity == "token":
            raise FormatError(f"weights have no tokens to scale by: {self.weight.name!r}")
        if self.weight.family == "log2":
            raise FormatError(f"{self.weight.name!r} has no negative numbers: it is for outputs of a softmax")
        act = self.activation
        if act is None:
            return
        first = () if act.plain_float else self._input_steps()
        if act.granularity == "channel" or (act.block is not None and act.block[0] > 1) or fitted(act):
            raise FormatError(
                f"activations are quantized per tensor, token or group of features; {act.name!r} is not supported"
            )
        if act.recipe not in ((), first):
            raise FormatError(f"{', '.join(act.recipe)} is for weights, not for activations ({act.name!r})")
        object.__setattr__(self, "activation", replace(act, recipe=first))

    def _input_steps(self) -> tuple[str, ...]:
        """First steps of the weight's recipe that inputs go through as well before they are rounded."""
        recipe = self.weight.recipe
        first = tuple(takewhile(("smooth", "hadamard").__contains__, recipe))
        if {"smooth", "hadamard", "awq"}.intersection(recipe[len(first) :]):
            raise FormatError(
                f"{self.weight.name!r} changes what inputs are rounded to: where they are quantized, smooth and "
                "hadamard come first, and awq is for inputs that stay float"
            )
        return first

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
    unknown = next((p for p in parts if not isinstance(p, str | Scheme)), None)
    if unknown is not None:
        raise FormatError(f"{unknown!r} is no scheme; write its name, such as 'W4A8'")
    found = dict.fromkeys(p if isinstance(p, Scheme) else Scheme.parse(p) for p in parts if p != "")
    if not found:
        raise FormatError("no schemes given; name at least one, such as 'W4A8,W8A8'")
    return tuple(found)
