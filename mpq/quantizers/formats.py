"""Number formats: how one tensor is stored, under a compact name that parses back.

Examples of names::

    int4               4-bit signed integers, symmetric, one scale per output channel
    int4:tensor        one scale for the whole tensor
    int4:g128          one scale per 128 consecutive weights of an output channel
    int8:b128x128      one scale per block of 128 output channels x 128 weights
    int8:tensor:asym   unsigned codes with a zero point
    int4:g16:p2        scales are powers of two (block floating point; ``bfp4`` for short)
    int4:bipolar       odd multiples of half a step: no zero, no wasted code
    int4:nested        read off 8-bit codes that serve every width
    int4:g128:progressive   4 bits on top of 8 (QServe)
    int8:cross         a factor for each row and for each column (CrossQuant)
    int8:token         activations: one scale per row, found at run time
    fp8_e4m3 fp6_e3m2 fp4_e2m1 fp12_e5m6    minifloats of 3 to 16 bits with a scale; ``:raw`` casts without one, as do
                       those of 8 exponent bits (fp12_e8m3), which have the range of fp32
    mxfp4 mxfp6_e3m2 mxfp8_e4m3 mxint8 nvfp4     OCP microscaling and NVIDIA's blocks of 16
    nf4 fp4_bnb        tables of levels (QLoRA, bitsandbytes)
    pow2_4 post_4      zero and signed powers of two, of the square root of two
    log2_4             zero and powers of one half, unsigned: outputs of a softmax
    ternary binary     {-1, 0, 1} and {-1, 1} times a scale
    nupes_4 kmeans_4   a power function with a searched exponent, a codebook for each output channel
    pvq_2:g16          points of a pyramid of 16 dimensions, 2 bits for each of them
    fp32 fp16 bf16     floating point as frameworks have it, without scales

Options after a colon may also name recipes, what is done to a weight before or while it is rounded
(`mpq.quantizers.recipes` has all): ``int4:gptq``, ``int3:g64:hadamard:gptq``, ``nf4:lorc8``, ``int4:awq:adaround``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mpq.errors import FormatError
from mpq.quantizers.legality import MX, ROUNDINGS, SCALE_BITS, VARIANTS, WIDTHS, check_format
from mpq.quantizers.recipe_storage import axis_of, kept_bytes, matrix_of, recipe_layout, split_step

_FLOATS = {"fp32": (32, 8, 23), "fp16": (16, 5, 10), "bf16": (16, 8, 7)}
_KINDS = {"granularity": "granularities", "scale": "types of scales", "symmetric": "signs", "variant": "variants"}
# Names that a number of bits comes after -> family.
_WITH_BITS = {"int": "int"} | {f"{family}_": family for family in ("pow2", "post", "log2", "nupes", "kmeans", "pvq")}
_TABLES = {"nf4": 4, "fp4_bnb": 4, "ternary": 2, "binary": 1}
_NUMBERED = "svd|lorc|qera|split|ocs|sparse"
_RECIPE = re.compile(rf"{'|'.join(ROUNDINGS)}|hadamard|smooth|awq|rsq|weighted|({_NUMBERED})[1-9]\d*")
_WITH_DATA = {"adaround", "flexround", "adaquant", "gptq", "smooth", "awq", "rsq", "weighted", "qera"}
_NAME = re.compile(r"(?P<base>[a-z]+[a-z0-9_]*?)(?P<options>(?::[a-z0-9]+)*)")
TRITS_PER_BYTE = 5


@dataclass(frozen=True, repr=False)
class NumberFormat:
    """How one tensor is stored.

    Attributes:
        family: ``int``, ``float``, ``mx``, ``nvfp``, ``table``, ``pow2``, ``post``, ``log2``, ``nupes``, ``kmeans``,
            ``ternary``, ``binary`` or ``pvq``.
        bits: Bits of one element's code, without scales.
        granularity: What shares a scale: ``none`` (there is no scale), ``tensor``, ``channel`` (one per output
            channel), ``group:G`` (G consecutive elements of an output channel; a last, shorter group has its own
            scale), ``block:RxC`` (R output channels x C elements), ``token`` (one per row of an activation, found at
            run time) or ``cross`` (one per row and one per column: CrossQuant).
        symmetric: Signed codes without zero point (True) or unsigned codes with one (False).
        exponent: Exponent bits of a float format.
        mantissa: Mantissa bits of a float format.
        scale: What scales are stored in: ``fp32``, ``fp16``, ``e8m0`` (powers of two), ``e4m3`` or ``none``; empty for
            the usual one: float16 for groups and blocks (the convention of weight-only kernels), else float32.
        variant: What sets a format apart from others of its family: the name of a table; of integers ``bipolar``
            (the levels of a mid-rise quantizer), ``nested`` (from 8-bit codes that serve every width) or
            ``progressive`` (4 bits on top of 8, with a zero point).
        recipe: What is done to a weight before or while it is rounded.

    Symmetric integers use the codes ``-2**(bits-1) .. 2**(bits-1)-1``; one bit means the two levels
    ``-scale, +scale``. A zero point takes as many bits as an element.

    Example:
        >>> f = NumberFormat.parse("int4:g128")
        >>> f.name, f.bits_per_element((64, 256))
        ('int4:g128', 4.125)
        >>> NumberFormat.parse("int8:tensor:asym").storage_bits((10,))  # 10 codes, 1 scale, 1 zero point
        120
        >>> NumberFormat.parse("mxfp4").bits_per_element((64, 256))  # an exponent of 8 bits for 32 elements
        4.25
    """

    family: str
    bits: int
    granularity: str = "channel"
    symmetric: bool = True
    exponent: int = 0
    mantissa: int = 0
    scale: str = ""
    variant: str = ""
    recipe: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.granularity.startswith("block:1x"):  # one thing, one name
            object.__setattr__(self, "granularity", self.granularity.replace("block:1x", "group:"))
        if self.family == "float" and (self.plain_float or self.exponent == 8):
            object.__setattr__(self, "granularity", "none")  # nothing is gained by scaling these
        if self.variant == "progressive":
            object.__setattr__(self, "symmetric", False)
        if self.family not in _BASE_NAMES:
            raise FormatError(f"unknown number family {self.family!r}; known: {', '.join(_BASE_NAMES)}")
        if self.granularity not in ("none", "tensor", "channel", "token", "cross") and self.block is None:
            raise FormatError(
                f"granularity is tensor, channel, group:G, block:RxC, token or cross, not {self.granularity!r}"
            )
        if self.granularity == "none":
            object.__setattr__(self, "scale", "none")
        elif not self.scale:
            object.__setattr__(self, "scale", _usual_scale(self))
        check_format(self)

    @cached_property
    def group_size(self) -> int | None:
        """Elements per scale for ``group:G``, else None."""
        match = re.fullmatch(r"group:([1-9]\d*)", self.granularity)
        return int(match[1]) if match else None

    @cached_property
    def block(self) -> tuple[int, int] | None:
        """Output channels and elements per scale for ``group:G`` and ``block:RxC``, else None."""
        match = re.fullmatch(r"block:([1-9]\d*)x([1-9]\d*)", self.granularity)
        if match:
            return int(match[1]), int(match[2])
        return None if self.group_size is None else (1, self.group_size)

    @property
    def needs_data(self) -> bool:
        """Whether the recipe looks at the layer's inputs."""
        return any(split_step(step)[0] in _WITH_DATA for step in self.recipe)

    @property
    def data_free(self) -> NumberFormat:
        """The format without the steps that look at the layer's inputs.

        ``qera`` has ``lorc`` for one that does not; where both are there, one with the ranks of both comes first.
        """
        rank = sum(number for name, number in map(split_step, self.recipe) if name in ("lorc", "qera"))
        steps = (f"lorc{rank}" if split_step(s)[0] in ("lorc", "qera") else s for s in self.recipe)
        return replace(self, recipe=tuple(s for s in dict.fromkeys(steps) if split_step(s)[0] not in _WITH_DATA))

    @property
    def calibrated(self) -> bool:
        """As an activation's format: its one scale comes from calibration, while others are found at run time."""
        return self.granularity == "tensor"

    @property
    def plain_float(self) -> bool:
        """A floating-point format of frameworks: fp32, fp16 or bf16."""
        return self.family == "float" and (self.bits, self.exponent, self.mantissa) in _FLOATS.values()

    @cached_property
    def name(self) -> str:
        """Compact name; ``NumberFormat.parse(f.name) == f``."""
        base = self.base
        usual = _parse_base(base, base)
        options = []
        if self.granularity != usual.granularity:
            short = self.granularity.replace("group:", "g").replace("block:", "b")
            options.append("raw" if short == "none" else short)
        if self.scale != _usual_scale(self):
            options.append({"e8m0": "p2", "fp32": "s32", "fp16": "s16"}.get(self.scale, self.scale))
        if self.symmetric != usual.symmetric and self.variant != "progressive":
            options.append("sym" if self.symmetric else "asym")
        if self.family == "int" and self.variant:
            options.append(self.variant)
        return ":".join([base, *options, *self.recipe])

    @property
    def base(self) -> str:
        """The name without options."""
        return _BASE_NAMES[self.family](self)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"NumberFormat({self.name!r})"

    def regrouped(self, granularity: str) -> NumberFormat:
        """With another granularity; scales that were the usual ones become the usual ones of that.

        Raises:
            FormatError: If there is no such granularity.
        """
        return replace(self, granularity=granularity, scale="" if self.scale == _usual_scale(self) else self.scale)

    @property
    def levels(self) -> tuple[int, int]:
        """Smallest and largest integer code."""
        if self.family == "int" and self.symmetric and self.variant != "bipolar" and self.bits > 1:
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    @property
    def scale_bits(self) -> int:
        """Bits of one stored scale; of ``kmeans`` of one codebook in float16, of ``progressive`` of an 8-bit scale."""
        if self.family == "kmeans":
            return 16 * int(2**self.bits)
        return 8 if self.variant == "progressive" else SCALE_BITS[self.scale]

    def num_scales(self, shape: Sequence[int], channel_axis: int = 0) -> int:
        """How many scales a tensor of this shape needs."""
        numel, channel_axis = math.prod(shape), axis_of(shape, channel_axis)
        if self.granularity == "none" or numel == 0:
            return 0
        if self.granularity == "tensor":
            return 1
        channels = shape[channel_axis] if shape else 1
        if self.granularity == "token":
            return numel // shape[-1] if shape else 1
        if self.granularity == "cross":
            return channels + numel // channels
        rows, columns = self.block or (1, numel)
        return math.ceil(channels / rows) * math.ceil(numel / channels / columns)

    def storage_bits(self, shape: Sequence[int], channel_axis: int = 0) -> int:
        """Exact bits of a tensor of this shape: elements, scales, zero points and whatever else a format keeps."""
        numel, channel_axis = math.prod(shape), axis_of(shape, channel_axis)
        channels = shape[channel_axis] if shape else 1
        overhead = self.scale_bits + (0 if self.symmetric else self.bits)
        bits = (
            self.element_bits(numel)
            + overhead * self.num_scales(shape, channel_axis)
            + _extra_bits(self, numel, channels)
        )
        return bits + (_recipe_bits(self, shape, channel_axis) if self.recipe and numel else 0)

    def element_bits(self, numel: int) -> int:
        """Bits of the codes of so many elements alone."""
        return 8 * math.ceil(numel / TRITS_PER_BYTE) if self.family == "ternary" else self.bits * numel

    def bits_per_element(self, shape: Sequence[int], channel_axis: int = 0) -> float:
        """Storage bits divided by the number of elements.

        Raises:
            FormatError: If there are none.
        """
        if not math.prod(shape):
            raise FormatError(f"a tensor {list(shape)} without elements has no bits for each of them")
        return self.storage_bits(shape, channel_axis) / math.prod(shape)

    @classmethod
    def parse(cls, name: str) -> NumberFormat:
        """Read a compact name.

        Raises:
            FormatError: If the name is not a known format.
        """
        match = _NAME.fullmatch(name.strip())
        base, options = (match["base"], match["options"].split(":")[1:]) if match else (name, [])
        return _with_options(_parse_base(base, name), options, name)


def _extra_bits(fmt: NumberFormat, numel: int, channels: int) -> int:
    """Bits besides elements, scales and zero points."""
    if numel == 0:
        return 0
    extra = 32 if fmt.scale == "e4m3" or fmt.family == "nupes" else 0  # a scale or an exponent for the whole tensor
    if fmt.variant == "progressive":
        extra += 16 * channels
    return extra


def _recipe_bits(fmt: NumberFormat, shape: Sequence[int], channel_axis: int) -> int:
    """What the steps of a recipe store beside the codes; scales of inputs count as if nothing could take them in."""
    channels, inputs, positions = matrix_of(shape, channel_axis)
    kept, wider = recipe_layout(fmt.recipe, channels, inputs, positions)
    plain = replace(fmt, recipe=())
    rounded = plain.storage_bits((channels, wider * positions))
    bits = 8 * kept_bytes(kept) + rounded - plain.storage_bits((channels, inputs * positions))
    name, clusters = split_step(fmt.recipe[-1])
    if name == "split":  # codes are stored once, all else for each cluster
        bits += (clusters - 1) * (rounded - plain.element_bits(channels * wider * positions))
    return bits


# Family -> the name without options.
_BASE_NAMES: dict[str, Callable[[NumberFormat], str]] = {
    "int": lambda f: f"int{f.bits}",
    "float": lambda f: next(
        (n for n, spec in _FLOATS.items() if spec == (f.bits, f.exponent, f.mantissa)),
        f"fp{f.bits}_e{f.exponent}m{f.mantissa}",
    ),
    "mx": lambda f: next(n for n, spec in MX.items() if spec == (f.bits, f.exponent, f.mantissa)),
    "nvfp": lambda f: "nvfp4",
    "table": lambda f: f.variant,
    "ternary": lambda f: "ternary",
    "binary": lambda f: "binary",
    **dict.fromkeys(("pow2", "post", "log2", "nupes", "kmeans", "pvq"), lambda f: f"{f.family}_{f.bits}"),
}


def _parse_base(base: str, name: str) -> NumberFormat:
    if base in _FLOATS:
        bits, exponent, mantissa = _FLOATS[base]
        return NumberFormat("float", bits, "none", True, exponent, mantissa)
    if base in MX:
        bits, exponent, mantissa = MX[base]
        return NumberFormat("mx", bits, "group:32", True, exponent, mantissa, "e8m0")
    if base == "nvfp4":
        return NumberFormat("nvfp", 4, "group:16", True, 2, 1, "e4m3")
    if base in _TABLES:
        table = base in ("nf4", "fp4_bnb")
        return NumberFormat("table" if table else base, _TABLES[base], variant=base if table else "")
    if found := re.fullmatch(r"fp([1-9]\d*)_e(\d+)m(\d+)", base):
        fmt = NumberFormat("float", int(found[1]), exponent=int(found[2]), mantissa=int(found[3]))
        if fmt.plain_float:
            raise FormatError(f"{base} is {fmt.base}, a cast without scales ({name!r})")
        return fmt
    if found := re.fullmatch(r"bfp(\d)", base):
        return NumberFormat("int", int(found[1]), "group:16", scale="e8m0")
    found = re.fullmatch(r"(int|[a-z]+2?_|post_)(\d+)", base)
    if found and found[1] in _WITH_BITS:
        family, bits = _WITH_BITS[found[1]], int(found[2])
        least, most = WIDTHS[family]
        if not least <= bits <= most:
            kind = "integer" if family == "int" else family
            raise FormatError(f"{kind} formats have {least} to {most} bits, not {bits} ({name!r})")
        dimensions = 16 if bits < 4 else 8 if bits < 8 else 4
        return NumberFormat(family, bits, f"group:{dimensions}" if family == "pvq" else "channel")
    raise FormatError(
        f"unknown number format {name!r}; known: int1 to int16 with :tensor, :g<size>, :sym or :asym, fp<n>_e<x>m<y>, "
        f"bfp<n>, nvfp4, {', '.join(n + '<n>' for n in _WITH_BITS if n != 'int')}, "
        f"{', '.join((*MX, *_TABLES, *_FLOATS))}"
    )


def _with_options(fmt: NumberFormat, options: Iterable[str], name: str) -> NumberFormat:
    """A base format with all its options at once: their order does not matter, but for recipes.

    Raises:
        FormatError: If there is no such option, or two contradict each other.
    """
    changes: dict[str, Any] = {}
    recipe: tuple[str, ...] = ()
    for option in options:
        before = dict(changes)
        if option in ("tensor", "channel", "token", "cross"):
            changes["granularity"] = option
        elif re.fullmatch(r"g[1-9]\d*", option):
            changes["granularity"] = f"group:{option[1:]}"
        elif re.fullmatch(r"b[1-9]\d*x[1-9]\d*", option):
            changes["granularity"] = f"block:{option[1:]}"
        elif option == "raw":
            changes["granularity"] = "none"
        elif option in ("p2", "s16", "s32"):
            changes["scale"] = {"p2": "e8m0", "s16": "fp16", "s32": "fp32"}[option]
        elif option in ("sym", "asym"):
            changes["symmetric"] = option == "sym"
        elif fmt.family == "int" and option in VARIANTS["int"]:
            changes["variant"] = option
        elif _RECIPE.fullmatch(option):
            recipe = (*recipe, option)
        else:
            raise FormatError(
                f"unknown option {option!r} in {name!r}; use tensor, channel, g<size>, b<rows>x<size>, token, cross, "
                "raw, p2, s16, s32, sym, asym, bipolar, nested, progressive or a recipe such as gptq"
            )
        if (twice := next((key for key in before if before[key] != changes[key]), None)) is not None:
            raise FormatError(f"{name!r} has two {_KINDS[twice]}, of which a format has one; not also {option!r}")
    # Scales that were the usual ones become the usual ones of another granularity.
    usual = "" if fmt.scale == _usual_scale(fmt) else fmt.scale
    return replace(fmt, **{"scale": usual, "recipe": recipe} | changes)


def _usual_scale(fmt: NumberFormat) -> str:
    if fmt.granularity == "none":
        return "none"
    return {"mx": "e8m0", "nvfp": "e4m3", "kmeans": "none"}.get(fmt.family, "fp32" if fmt.block is None else "fp16")
