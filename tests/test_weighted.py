"""The recipe step ``weighted``: ranges and codebooks for errors that count by the mean squares of inputs."""

from dataclasses import replace

import pytest
import torch
from grouped_layers import Grouped
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tensors import drawn, inputs
from torch import nn

import mpq
from mpq import NumberFormat, Scheme
from mpq.errors import FormatError
from mpq.input_statistics import gather
from mpq.packed import packed_bytes
from mpq.quantizers import dequantize, fake_quantize
from mpq.quantizers.clips import least_share
from mpq.quantizers.gptq import gptq
from mpq.quantizers.recipes import apply_recipe, round_weight
from mpq.quantizers.scales import scale_and_zero
from mpq.quantizers.statistics import LayerStats
from mpq.quantizers.stored import from_parts, layout, to_parts
from mpq.quantizers.tensors import round_elements
from mpq.testing import prepared
from mpq.view import channels_first

parse = NumberFormat.parse
SCALAR = ["int3", "int2:asym", "int3:g4", "int3:tensor", "int4:bipolar", "nf4", "fp4_e2m1:g4", "pow2_3", "ternary"]
OTHERS = ["kmeans_2", "kmeans_3:g8", "nupes_3", "pvq_2:g4", "int4:g8:progressive", "binary", "int1"]


def stats_of(*groups):
    """Of the inputs ``[rows, in]`` of each group of output channels."""
    x = torch.stack(groups)
    return LayerStats(x.transpose(1, 2) @ x / x.shape[1], x.abs().mean(1), x.abs().amax(1), x.shape[1])


def uneven(width=8, rows=300, seed=1):
    """Independent inputs of very different sizes."""
    return drawn(rows, width, seed=seed) * torch.logspace(-1.5, 1, width).double().roll(3 * seed)


def weighted_error(weight, rounded, squares):
    return float(((rounded - weight).square() * squares).sum())


@pytest.fixture(scope="module")
def net():
    return Grouped().eval(), [inputs(16, 3, 10, 10, seed=i) for i in range(2)]


def uniform(model, calib, scheme, **options):
    return mpq.analyze(model, calib, scheme, estimator="weight_sqnr", progress=False, **options).uniform(scheme)


# Names


@pytest.mark.parametrize(
    "name",
    [
        *("int3:weighted", "kmeans_3:weighted", "int4:g128:weighted:gptq", "int4:awq:weighted", "nf4:rsq:weighted"),
        *("int4:hadamard:weighted:adaround", "int4:weighted:split2", "int4:lorc2:weighted", "int4:weighted:stochastic"),
    ],
)
def test_names_parse_back_and_need_data(name):
    fmt = parse(name)
    assert fmt.name == name
    assert fmt.needs_data
    assert "weighted" not in fmt.data_free.recipe
    assert str(Scheme.parse(str(Scheme(fmt)))) == str(Scheme(fmt))
    without = replace(fmt, recipe=tuple(step for step in fmt.recipe if step not in ("weighted", "rsq")))
    assert fmt.storage_bits((64, 32, 3)) == without.storage_bits((64, 32, 3))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("int4:weighted:awq", "weighted says how .* such as awq:weighted:gptq, unlike weighted:awq"),
        ("int4:weighted:hadamard:gptq", "weighted says how"),
        ("int4:weighted:rsq:gptq", "weighted says how"),
        ("int4:weighted:weighted", "names each step once"),
        ("int4:gptq:weighted", "ends with at most one way to round"),
        ("int4:split2:weighted", "come last"),
        ("fp16:weighted", "fp16 is a cast"),
        ("fp8_e4m3:raw:weighted", "no error is minimised where scales of fp8_e4m3 are chosen by raw"),
        ("int8:cross:weighted", "no error is minimised where scales of int8 are chosen by cross"),
        ("int4:nested:weighted", "no error is minimised where scales of int4 are chosen by nested"),
    ],
)
def test_what_it_does_not_go_with_is_refused(name, says):
    with pytest.raises(FormatError, match=says):
        parse(name)
    with pytest.raises(FormatError, match="weighted is for weights, not for activations"):
        Scheme.parse("W4A8:weighted")


def test_range_rules_that_minimise_nothing_are_refused(net):
    weight, stats = drawn(4, 8), stats_of(uneven())
    for method, name in (("minmax", "int4"), ("percentile:99", "nf4"), ("absmean", "ternary"), ("mse", "mxfp4")):
        with pytest.raises(FormatError, match=f"{method} ranges of {name} minimise none: use mse:N"):
            round_weight(weight, parse(f"{name}:weighted"), method, stats)
    for method, name in (("minmax", "kmeans_3"), ("minmax", "pvq_2"), ("mse:5", "mxfp4"), ("kl", "int4")):
        round_weight(weight, parse(f"{name}:weighted"), method, stats)


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("W4:weighted", {"weight_range": "minmax"}, "int4:weighted weighs the errors .* minmax ranges of int4"),
        ("Wmxfp4:weightedA8", {}, "mxfp4:weighted weighs the errors .* mse ranges of mxfp4"),
        ("W3A8", {"weight_range": "absmedian"}, "absmedian ranges are for ternary and binary formats, not for int3"),
        ("W3A8", {"activation_range": "absmean"}, "absmean ranges are for ternary .* not for int8:tensor:asym"),
    ],
)
def test_rules_that_no_format_goes_with_are_refused_before_any_work(net, monkeypatch, scheme, options, message):
    model, calib = net
    monkeypatch.setattr("mpq.bank.gather", lambda *args: pytest.fail("statistics were gathered"))
    monkeypatch.setattr("mpq.bank.QuantizerBank.observe", lambda *args: pytest.fail("ranges were observed"))
    with pytest.raises(FormatError, match=message):
        uniform(model, calib, scheme, **options)


def test_it_needs_data(net):
    with pytest.raises(FormatError, match="kmeans_3:weighted needs calibration data"):
        apply_recipe(drawn(4, 8), parse("kmeans_3:weighted"))
    model, calib = net
    config = uniform(model, calib, "W3:weighted")
    with pytest.raises(FormatError, match=r"layer 'first': int3:weighted .* pass calib="):
        mpq.quantize(model, config)


@pytest.mark.parametrize("scheme", ["W4:weighted", "W4:hadamard:weighted", "W4:gptq", "W4:qera2"])
def test_inputs_whose_squares_overflow_are_the_cause_that_is_named(scheme):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    uniform(model, [inputs(64, 16) * 1e18], scheme)
    with pytest.raises(FormatError, match=r"layer '0': the second moments of the inputs overflow float32; scale .*"):
        uniform(model, [inputs(64, 16) * 1e20], scheme)


# Against brute force


@pytest.mark.parametrize("name", SCALAR)
@pytest.mark.parametrize("groups", [1, 2])
def test_ranges_are_the_best_clips_for_weighted_errors(name, groups):
    """Clip by clip and element by element, from the inputs themselves."""
    fmt, weight = parse(name), drawn(4, 8, seed=3) ** 3
    rows = [uneven(seed=1 + g) for g in range(groups)]
    found = round_weight(weight, replace(fmt, recipe=("weighted",)), "mse:9", stats_of(*rows)).values()
    squares = torch.cat([x.square().mean(0).expand(4 // groups, -1) for x in rows])
    width = fmt.group_size or 8
    blocks = [(slice(None), slice(None))]
    if fmt.granularity != "tensor":
        blocks = [(slice(o, o + 1), slice(i, i + width)) for o in range(4) for i in range(0, 8, width)]
    for block in blocks:
        x, best = weight[block], None
        for share in torch.linspace(1, least_share(fmt), 9, dtype=torch.float64):
            scale, zero = scale_and_zero(x.min().clamp(max=0) * share, x.max().clamp(min=0) * share, fmt)
            rounded = round_elements(x, scale, None if fmt.symmetric else zero, fmt)
            error = weighted_error(x, rounded, squares[block])
            if best is None or error < best[0]:
                best = error, rounded
        assert weighted_error(x, found[block], squares[block]) == pytest.approx(best[0], rel=1e-9)
        torch.testing.assert_close(found[block], best[1])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_codebooks_are_the_best_partitions_for_weighted_errors(seed):
    weight, x = drawn(2, 7, seed=seed) ** 3, uneven(7, seed=seed % 5)
    found = apply_recipe(weight, parse("kmeans_1:weighted"), stats=stats_of(x))
    squares = x.square().mean(0)
    for row, rounded in zip(weight, found, strict=True):
        order, best = row.argsort(), torch.inf
        for cut in range(1, 7):
            parts = [(row[i], squares[i]) for i in (order[:cut], order[cut:])]
            best = min(best, sum(float((w * (v - (w * v).sum() / w.sum()) ** 2).sum()) for v, w in parts))
        stored = float(squares.sum() * (row.abs().max() * 2.0**-11).square())  # levels are in float16
        assert best * (1 - 1e-9) <= weighted_error(row, rounded, squares) <= best + stored + 1e-9


def test_gptq_rounds_to_the_weighted_scales():
    weight, stats = drawn(6, 8) ** 3, stats_of(uneven())
    alone, both = (round_weight(weight, parse(f"int3:{r}"), "mse", stats) for r in ("weighted", "weighted:gptq"))
    assert torch.equal(both.codes[0].scale, alone.codes[0].scale)
    assert not torch.equal(both.codes[0].scale, round_weight(weight, parse("int3")).codes[0].scale)
    assert torch.equal(both.values(), gptq(weight, parse("int3"), stats, nearest=alone.codes[0]))


# What it is good for


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SCALAR), st.integers(0, 10_000), st.integers(0, 4))
def test_the_weighted_error_is_never_above_that_of_plain_rounding(name, seed, spread):
    fmt, weight, x = parse(name), drawn(4, 8, seed=seed) ** 3, uneven(seed=spread)
    plain, weighted = (apply_recipe(weight, parse(n), 0, "mse:12", stats_of(x)) for n in (name, f"{name}:weighted"))
    squares = x.square().mean(0)
    lost = [weighted_error(weight, q, squares) for q in (plain, weighted)]
    assert lost[1] <= lost[0] * (1 + 1e-9)
    assert weighted_error(weight, plain, 1.0) <= weighted_error(weight, weighted, 1.0) * (1 + 1e-9)
    assert torch.equal(plain, fake_quantize(weight, fmt, 0, "mse:12"))


@pytest.mark.parametrize("name", ["int3", "int3:g8", "int2:asym", "kmeans_2", "nf4", "nupes_3", "binary"])
def test_outputs_lose_less_with_independent_inputs(name):
    weight, x = drawn(32, 64), uneven(64, rows=4000)
    plain, weighted = (apply_recipe(weight, parse(n), stats=stats_of(x)) for n in (name, f"{name}:weighted"))
    lost = [float(((q - weight) @ x.T).square().sum()) for q in (plain, weighted)]
    assert lost[1] < 0.95 * lost[0]


@pytest.mark.parametrize("name", [*SCALAR, *OTHERS])
def test_inputs_that_are_alike_change_nothing(name):
    weight = drawn(6, 16)
    for hessian in (0 * torch.eye(16), 4 * torch.eye(16)):
        alike = LayerStats(hessian.double()[None], torch.ones(1, 16), torch.ones(1, 16), 100)
        found = apply_recipe(weight, parse(f"{name}:weighted"), stats=alike)
        torch.testing.assert_close(found, fake_quantize(weight, parse(name)))


def test_the_unit_of_inputs_does_not_matter():
    weight, x = drawn(6, 8).float(), uneven().float()
    found = [apply_recipe(weight, parse("int3:weighted"), stats=stats_of(x * unit)) for unit in (2.0**-50, 1, 2.0**50)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[1])


def test_awq_chooses_its_scales_for_the_weighted_rounding():
    weight, stats = drawn(6, 32), stats_of(uneven(32))
    alone, after = (apply_recipe(weight, parse(f"int3:{r}"), stats=stats) for r in ("weighted", "awq:weighted"))
    lost = [float(stats.output_error(q - weight).sum()) for q in (alone, after)]
    assert lost[1] <= lost[0]  # no scales are among those it tries


# In networks


@pytest.mark.parametrize("name", ["int3", "int3:g4:asym", "kmeans_2", "int4:tensor"])
def test_every_layer_is_rounded_by_its_own_inputs(net, name):
    model, calib = net
    view, space, data, bank = prepared(model, calib, f"W{name},W{name}:weighted")
    stats = gather(view, data, view.layers, progress=False)
    for layer in space.layers:
        weight, module = view.weight(layer.name), view.layers[layer.name]
        plain, weighted = (bank.weight(layer, s.weight) for s in space.schemes)
        rows = channels_first(module, weight)
        own = apply_recipe(rows, parse(f"{name}:weighted"), stats=stats[layer.name])
        assert torch.equal(channels_first(module, own), weighted)
        squares = stats[layer.name].mean_squares(len(rows))
        lost = [((channels_first(module, q) - rows).flatten(1).square() * squares).sum() for q in (plain, weighted)]
        assert lost[1] <= 1.01 * lost[0]  # clips are not tried one by one
    assert bank.passes == 1


def test_one_pass_serves_it_and_other_recipes(net):
    model, calib = net
    *_, bank = prepared(model, calib, "W4")
    bank.prepare(mpq.quantizers.parse_schemes("W4:weighted,Wkmeans_3:weighted,W3:gptq"), progress=False)
    assert bank.passes == 1
    bank.prepare(mpq.quantizers.parse_schemes("W4:rsq:weighted"), progress=False)
    assert bank.passes == 2


@pytest.mark.parametrize("name", ["int3:weighted", "kmeans_3:weighted", "int4:g4:weighted:gptq"])
def test_packed_files_hold_it_as_they_do_without(net, name, tmp_path):
    model, calib = net
    config = uniform(model, calib, f"W{name}")
    quantized = mpq.quantize(model, config, calib=calib)
    path = mpq.save_quantized(quantized, config, tmp_path / "a")
    assert packed_bytes(path) == mpq.packed_size(model, config)
    plain = uniform(model, calib, f"W{name.partition(':weighted')[0]}")
    assert mpq.packed_size(model, plain)["parameters"] == packed_bytes(path)["parameters"]
    back = mpq.load_quantized(Grouped().eval(), path)
    for layer in config:
        assert torch.equal(back.get_submodule(layer).weight, quantized.get_submodule(layer).weight)
    assert not torch.equal(back.fc.weight, mpq.quantize(model, plain, calib=calib).fc.weight)


@pytest.mark.parametrize(
    "name",
    [
        *(f"{name}:weighted" for name in [*SCALAR, *OTHERS]),
        *("int4:rsq:weighted", "int4:sparse20:ocs20:hadamard:awq:lorc2:weighted:gptq", "int3:weighted:split3"),
        *("int3:weighted:stochastic", "int4:ocs20:weighted", "kmeans_2:smooth:qera2:weighted"),
    ],
)
def test_parts_give_the_same_weight_in_the_bits_of_the_format(name):
    fmt, stats = parse(name), stats_of(uneven(24, rows=400))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight = drawn(6, 8, 3).to(dtype)
        stored = round_weight(weight, fmt, "mse", stats)
        parts = to_parts(stored)
        assert {part: (t.dtype, tuple(t.shape)) for part, t in parts.items()} == layout(fmt, (6, 8, 3))
        back = from_parts(parts, fmt, (6, 8, 3), torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(back.values().to(dtype), apply_recipe(weight, fmt, 0, "mse", stats))
    if fmt.recipe == ("weighted",):
        assert torch.equal(dequantize(stored.plain_codes()), stored.values())
