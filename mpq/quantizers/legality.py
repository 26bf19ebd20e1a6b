"""Which parts of a number format go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpq.errors import FormatError
from mpq.quantizers.recipe_storage import split_step

if TYPE_CHECKING:
    from mpq.quantizers.formats import NumberFormat

SCALE_BITS = {"none": 0, "fp32": 32, "fp16": 16, "e8m0": 8, "e4m3": 8}
VARIANTS = {"int": ("", "bipolar", "nested", "progressive"), "table": ("nf4", "fp4_bnb")}
ROUNDINGS = ("stochastic", "adaround", "flexround", "adaquant", "gptq")
# Family -> how many bits it may have.
WIDTHS = {
    "int": (1, 16),
    "pow2": (2, 8),
    "post": (2, 8),
    "log2": (1, 8),
    "nupes": (2, 8),
    "kmeans": (1, 8),
    "pvq": (1, 8),
    "table": (4, 4),
    "ternary": (2, 2),
    "binary": (1, 1),
}
# Name -> bits, exponent and mantissa.
MX = {
    "mxfp8_e4m3": (8, 4, 3),
    "mxfp8_e5m2": (8, 5, 2),
    "mxfp6_e3m2": (6, 3, 2),
    "mxfp6_e2m3": (6, 2, 3),
    "mxfp4": (4, 2, 1),
    "mxint8": (8, 0, 0),
}
PVQ_BITS = 62  # the enumeration of a group's points is worked in int64


def check_format(fmt: NumberFormat) -> None:
    """Refuse what no kernel rounds to.

    Raises:
        FormatError: Saying what does not go together.
    """
    _check_width(fmt)
    if fmt.family == "float" and fmt.bits != 1 + fmt.exponent + fmt.mantissa:
        raise FormatError(f"a float of {fmt.exponent} exponent and {fmt.mantissa} mantissa bits has no {fmt.bits} bits")
    minifloat = 3 <= fmt.bits <= 16 and 1 <= fmt.exponent <= 8 and fmt.mantissa >= 0
    if fmt.family == "float" and not fmt.plain_float and not minifloat:
        raise FormatError(f"minifloats have 3 to 16 bits, of which 1 to 8 are exponent bits, unlike {fmt.base}")
    if fmt.granularity == "none" and fmt.family != "float":
        raise FormatError(f"only floats can do without a scale, not {fmt.base}")
    if not fmt.symmetric and fmt.family != "int":
        raise FormatError(f"only integers have a zero point, not {fmt.base}")
    if fmt.variant not in VARIANTS.get(fmt.family, ("",)):
        raise FormatError(f"{fmt.family} formats have no variant {fmt.variant!r}")
    if fmt.variant in ("bipolar", "nested") and (not fmt.symmetric or fmt.bits > 8):
        raise FormatError(f"{fmt.variant} integers are symmetric, of at most 8 bits")
    if fmt.variant == "progressive" and (fmt.bits != 4 or fmt.group_size is None):
        raise FormatError("progressive is for 4 bits by group, such as int4:g128:progressive")
    _check_granularity(fmt)
    _check_scale(fmt)
    if fmt.recipe:
        _check_recipe(fmt)


def _check_width(fmt: NumberFormat) -> None:
    least, most = WIDTHS.get(fmt.family, (fmt.bits, fmt.bits))
    if not least <= fmt.bits <= most:
        kind, widths = "integer" if fmt.family == "int" else fmt.family, f"{least} to {most}" if least < most else least
        raise FormatError(f"{kind} formats have {widths} bits, not {fmt.bits}")
    spec = fmt.bits, fmt.exponent, fmt.mantissa
    known = {"mx": tuple(MX.values()), "nvfp": ((4, 2, 1),)}
    if fmt.family in known and spec not in known[fmt.family]:
        raise FormatError(
            f"{fmt.family} formats have no {fmt.bits} bits with {spec[1]} of exponent, {spec[2]} of mantissa"
        )
    if fmt.family in WIDTHS and spec[1:] != (0, 0):
        raise FormatError(f"only floats have exponent and mantissa bits, not {fmt.family}")


def _check_scale(fmt: NumberFormat) -> None:
    if fmt.scale not in SCALE_BITS:
        raise FormatError(f"scales are stored in {', '.join(SCALE_BITS)}, not {fmt.scale!r}")
    only = {"mx": "e8m0", "nvfp": "e4m3", "kmeans": "none"}.get(fmt.family)
    only = "fp16" if fmt.variant == "progressive" else "fp32" if fmt.granularity == "cross" else only
    if only is not None and fmt.scale != only:
        raise FormatError(f"scales of {fmt.base} by {fmt.granularity} are stored in {only}, not in {fmt.scale}")
    if fmt.scale == "e4m3" and fmt.family != "nvfp":
        raise FormatError(f"only nvfp4 has scales in e4m3, not {fmt.base}")
    if fmt.scale == "none" and fmt.granularity != "none" and fmt.family != "kmeans":
        raise FormatError(f"{fmt.base} needs scales")
    if fmt.scale == "e8m0" and fmt.family == "pvq":
        raise FormatError("the scales of pvq are lengths of vectors: powers of two are too coarse for them")


def _check_granularity(fmt: NumberFormat) -> None:
    if fmt.family in ("mx", "nvfp") and fmt.block is None:
        raise FormatError(f"{fmt.base} shares scales by group or block, not by {fmt.granularity}")
    if fmt.family == "pvq" and (fmt.group_size is None or fmt.bits * fmt.group_size > PVQ_BITS):
        raise FormatError(f"pvq has groups whose code takes at most {PVQ_BITS} bits, such as pvq_2:g16; not {fmt.base}")
    if fitted(fmt) and fmt.granularity in ("token", "cross"):
        raise FormatError(f"{fmt.variant or fmt.base} is for weights: there is none by {fmt.granularity}")
    if fmt.granularity == "cross" and not (fmt.symmetric and fmt.family in ("int", "float")):
        raise FormatError(f"cross is for symmetric integers and minifloats, not for {fmt.base}")


def _check_recipe(fmt: NumberFormat) -> None:
    """Refuse recipes whose steps do not go together."""
    steps = [split_step(step) for step in fmt.recipe]
    names = [name for name, _ in steps]
    ways = [name for name in names if name in ROUNDINGS]
    if fmt.plain_float:
        raise FormatError(f"{fmt.base} is a cast: there is nothing for {', '.join(fmt.recipe)} to do")
    if len(set(names)) < len(names) or len(ways) > 1 or (ways and names[-1] != ways[0]):
        raise FormatError(
            f"a recipe names each step once and ends with at most one way to round ({', '.join(ROUNDINGS)}), "
            f"unlike {':'.join(fmt.recipe)}"
        )
    if "split" in names[:-1] or ("split", 1) in steps:
        raise FormatError("clusters of weights (split2, split3, ...) come last and are rounded to nearest")
    if "split" in names and (fitted(fmt) or fmt.granularity == "cross"):
        raise FormatError(f"clusters of weights (split) are for formats of a grid times a scale, not for {fmt.base}")
    if "rsq" in fmt.recipe and fmt.recipe[-1] not in ROUNDINGS[1:] and "weighted" not in fmt.recipe:
        raise FormatError("rsq says which tokens count for what comes after it, such as rsq:gptq")
    if "weighted" in names:
        _check_weighted(fmt, names[names.index("weighted") + 1 :])


def _check_weighted(fmt: NumberFormat, after: list[str]) -> None:
    """Refuse weighted errors where none are minimised, and two names for one thing."""
    if any(name not in (*ROUNDINGS, "split") for name in after):
        raise FormatError(
            "weighted says how ranges of what is rounded in the end are found: only a way to round or clusters come "
            f"after it, such as awq:weighted:gptq, unlike {':'.join(fmt.recipe)}"
        )
    if fmt.granularity in ("none", "cross") or fmt.variant == "nested":
        kind = fmt.variant or {"none": "raw"}.get(fmt.granularity, fmt.granularity)
        raise FormatError(f"no error is minimised where scales of {fmt.base} are chosen by {kind}: weighted can't help")


def fitted(fmt: NumberFormat) -> bool:
    """Whether more than a scale is fitted to a tensor, for which there is no time while a network runs."""
    return fmt.family in ("kmeans", "nupes", "pvq") or fmt.variant in ("nested", "progressive")
