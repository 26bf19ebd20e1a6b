"""What recipes store: parts in the bits foretold, and the same weight out of them."""

from dataclasses import replace

import pytest
import torch
from random_tensors import drawn

from mpq import NumberFormat
from mpq.errors import FormatError
from mpq.quantizers import apply_recipe
from mpq.quantizers.recipes import ROUNDINGS, round_weight
from mpq.quantizers.statistics import LayerStats
from mpq.quantizers.stored import from_parts, layout, to_parts

parse = NumberFormat.parse
SHAPE = 6, 8, 3
SCALAR = """
    int4 int3:asym int3:g5 int4:g8:asym int2:tensor int8:b4x3 int4:bipolar int1 int16 nf4 nvfp4 mxfp4 mxint8
    fp8_e4m3:raw fp4_e2m1:g8:p2 fp10_e5m4 fp12_e8m3 fp16_e4m11:g8 pow2_3 post_4 ternary binary
    """.split()  # noqa: SIM905
OTHERS = "kmeans_2 nupes_3 pvq_2:g4 int8:cross int4:nested int4:g8:progressive".split()  # noqa: SIM905
# Any format takes these; the others round to a grid.
STEPS = ["hadamard", "awq", "smooth", "svd2", "lorc2", "qera2", "sparse20", "sparse20:hadamard:lorc2:awq"]
TO_GRIDS = [
    *("gptq", "adaround", "flexround", "adaquant", "stochastic", "ocs10", "split3", "split5"),
    *("rsq:gptq", "sparse20:ocs20:hadamard:awq:lorc2:gptq", "ocs20:sparse10:smooth:split2"),
]


@pytest.fixture(scope="module")
def stats():
    x = drawn(400, 24, seed=1) @ drawn(24, 24, seed=2)
    return LayerStats((x.T @ x / len(x))[None], x.abs().mean(0)[None], x.abs().amax(0)[None], len(x))


@pytest.mark.parametrize("name", [*SCALAR, *OTHERS])
def test_parts_give_the_same_weight_in_the_bits_of_the_format(name, stats):
    for recipe in [*STEPS, *(TO_GRIDS if name in SCALAR else ())]:
        fmt = parse(f"{name}:{recipe}")
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            weight = drawn(*SHAPE).to(dtype)
            stored = round_weight(weight, fmt, "minmax", stats)
            parts = to_parts(stored)
            assert {part: (t.dtype, tuple(t.shape)) for part, t in parts.items()} == layout(fmt, SHAPE)
            back = from_parts(parts, fmt, SHAPE, torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.equal(back.values().to(dtype), apply_recipe(weight, fmt, 0, "minmax", stats))
            held = 8 * sum(t.nbytes for t in parts.values())
            assert fmt.storage_bits(SHAPE) <= held < fmt.storage_bits(SHAPE) + 8 * len(parts)


@pytest.mark.parametrize("way", ROUNDINGS)
@pytest.mark.parametrize("name", SCALAR)
def test_codes_are_those_of_the_values_that_were_chosen(name, way, stats):
    weight, fmt = drawn(6, 24).float(), parse(name)
    chosen = ROUNDINGS[way](weight, fmt, stats, "mse")
    stored = round_weight(weight, replace(fmt, recipe=(way,)), "mse", stats)
    assert torch.equal(stored.values(), chosen)
    assert torch.equal(stored.plain_codes().scale, round_weight(weight, fmt).codes[0].scale)


def test_what_recipes_leave_is_known_to_within_a_byte_a_part(stats):
    """On a weight as large as a layer's: a tenth of a per cent."""
    weight = drawn(96, 24, 5)
    wide = LayerStats(torch.eye(120)[None].double(), torch.ones(1, 120), torch.ones(1, 120), 100)
    for recipe in ("gptq", "hadamard", "awq", "lorc4", "sparse5", "ocs5", "split3"):
        fmt = parse(f"int4:{recipe}")
        held = 8 * sum(t.nbytes for t in to_parts(round_weight(weight, fmt, "minmax", wide)).values())
        assert held == pytest.approx(fmt.storage_bits(tuple(weight.shape)), rel=1e-3)


def test_more_than_codes_is_not_taken_for_codes(stats):
    weight = drawn(*SHAPE)
    assert round_weight(weight, parse("int4:rsq:gptq"), "mse", stats).plain_codes().shape == SHAPE
    for recipe in ("hadamard:gptq", "awq", "lorc2", "split2"):
        with pytest.raises(FormatError, match=f"more than codes and scales: {recipe.partition(':')[0]} would be lost"):
            round_weight(weight, parse(f"int4:{recipe}"), "mse", stats).plain_codes()


@pytest.mark.parametrize(
    ("recipe", "part", "change", "says"),
    [
        ("lorc2", "lorc.left", lambda t: t.fill_(torch.nan), "lorc.left holds NaN"),
        ("awq", "awq.scales", lambda t: t.fill_(0), "awq.scales holds what is no positive"),
        ("sparse20", "sparse.places", lambda t: t.fill_(6 * 24), "sparse.places holds 144 to 144"),
        ("sparse20:ocs20", "sparse.places", lambda t: t.fill_(150), "sparse.places holds 150"),
        ("ocs20", "ocs.channels", lambda t: t.fill_(-1), "ocs.channels holds -1"),
        ("split3", "split.clusters", lambda t: t.fill_(255), "split.clusters holds 3 to 3"),
        ("lorc2", "lorc.left", lambda t: t[:1], r"lorc.left is torch.float16 \[1, 2\]"),
        ("split3", "scale.2", lambda t: t.fill_(-1), "scale holds what is no positive"),
    ],
)
def test_parts_are_not_trusted(recipe, part, change, says, stats):
    fmt = parse(f"int4:{recipe}")
    parts = to_parts(round_weight(drawn(*SHAPE), fmt, "mse", stats))
    with pytest.raises(FormatError, match=says):
        from_parts(parts | {part: change(parts[part].clone())}, fmt, SHAPE)


@pytest.mark.parametrize("name", ["int4:split1", "int4:split2:hadamard", "int4:lorc2:lorc4", "kmeans_2:split3"])
def test_steps_that_can_not_be_stored_are_refused(name):
    with pytest.raises(FormatError):
        parse(name)
