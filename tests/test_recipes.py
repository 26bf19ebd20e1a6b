import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tensors import drawn
from torch import nn

from mpq import NumberFormat
from mpq.errors import FormatError
from mpq.quantizers import elements, fake_quantize, quantize, recipes
from mpq.quantizers.adaround import adaquant, adaround, flexround
from mpq.quantizers.elements import element_scales, neighbours, stochastic
from mpq.quantizers.equalization import (
    awq_scales,
    cross_layer_scales,
    fake_quantize_noisy,
    noise_bias,
    smooth_scales,
)
from mpq.quantizers.hadamard import hadamard_rotation, rotate, rotate_stats
from mpq.quantizers.lowrank import low_rank_factors
from mpq.quantizers.outliers import channels_to_split, clusters, largest_elements
from mpq.quantizers.recipes import ROUNDINGS, apply_recipe, round_weight
from mpq.quantizers.statistics import LayerStats
from mpq.testing import prepared

parse = NumberFormat.parse
DATA = ["gptq", "adaround", "flexround", "adaquant", "awq", "smooth", "qera2", "rsq:gptq", "awq:gptq", "hadamard:gptq"]
FREE = ["stochastic", "hadamard", "svd2", "lorc2", "sparse20", "ocs10", "split3"]


def stats_of(x):
    """Of inputs ``[rows, in]``."""
    return LayerStats((x.T @ x / len(x))[None], x.abs().mean(0)[None], x.abs().amax(0)[None], len(x))


def correlated(rows=400, width=32, seed=1):
    return drawn(rows, width, seed=seed) @ drawn(width, width, seed=seed + 1) * torch.logspace(-1, 0.5, width).double()


def error(stats, weight, rounded):
    return float(stats.output_error(rounded - weight).sum())


# Names


@pytest.mark.parametrize("recipe", [*DATA, *FREE])
def test_names_parse_back_and_say_whether_they_need_data(recipe):
    fmt = parse(f"int3:g8:{recipe}")
    assert parse(fmt.name) == fmt
    assert fmt.needs_data == (recipe in DATA)
    assert not fmt.data_free.needs_data


@pytest.mark.parametrize(
    "name", ["int4:gptq:hadamard", "int4:gptq:adaround", "int4:awq:awq", "int4:split2:gptq", "fp16:gptq", "int4:rsq"]
)
def test_steps_that_do_not_go_together_are_refused(name):
    with pytest.raises(FormatError):
        parse(name)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int4:gptq", 0),
        ("int4:hadamard:adaround", 0),
        ("int4:lorc8", 16 * 8 * (64 + 96)),
        ("int4:smooth:svd8", 16 * 32 + 16 * 8 * (64 + 96)),
        ("int4:qera100", 16 * 64 * (64 + 96)),  # no factor is wider than the smaller side
        ("int4:sparse5", 48 * math.ceil(0.005 * 64 * 96)),
        ("int4:awq", 16 * 32),
        ("int4:smooth:lorc1", 16 * 32 + 16 * (64 + 96)),
        ("int4:ocs10", 4 * 64 * 4 * 3 + 32 * 4),  # 4 of 32 input channels, with kernels of 3
        ("int4:split3", 2 * 64 * 96 + 2 * 64 * 32),
    ],
)
def test_storage_counts_what_recipes_keep(name, bits):
    shape = (64, 32, 3)
    assert parse(name).storage_bits(shape) - parse("int4").storage_bits(shape) == bits
    moved = (32, 64, 3)
    assert parse(name).storage_bits(moved, 1) - parse("int4").storage_bits(moved, 1) == bits


# What all have in common


@pytest.mark.parametrize("recipe", [*DATA, *FREE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_dtype_and_the_weight_itself_stay(recipe, dtype):
    x = correlated(width=8 * 3)
    weight = drawn(3, 6, 8, seed=5).to(dtype)  # output channels are the second axis
    before = weight.clone()
    fmt = parse(f"int4:{recipe}")
    rounded = apply_recipe(weight, fmt, 1, "mse", stats_of(x))
    assert (rounded.shape, rounded.dtype) == (weight.shape, dtype)
    assert rounded.is_contiguous()
    assert torch.equal(weight, before)
    assert torch.equal(rounded, apply_recipe(weight, fmt, 1, "mse", stats_of(x)))  # nothing is left to chance
    first = apply_recipe(weight.movedim(1, 0).contiguous(), fmt, 0, "mse", stats_of(x))
    assert torch.equal(first.movedim(0, 1), rounded)
    if fmt.needs_data:
        with pytest.raises(FormatError, match="needs calibration data"):
            apply_recipe(weight, fmt, 1)


def test_enough_bits_leave_the_weight_alone():
    weight, stats = drawn(6, 32), stats_of(correlated())
    for recipe in [*DATA, *FREE]:
        rounded = apply_recipe(weight, parse(f"int16:{recipe}"), 0, "minmax", stats)
        torch.testing.assert_close(rounded, weight, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "unit", "what"),
    [
        ("kmeans_4:g8", 1e15, "a level of kmeans_4:g8"),
        ("int4:sparse5", 1e5, "a weight of sparse5"),
        ("int4:lorc2", 1e15, "a low-rank factor"),
        ("int4:qera2", 1e15, "a low-rank factor"),
        ("int4:svd2", 1e11, "a low-rank factor"),
    ],
)
def test_what_float16_does_not_hold_is_refused_by_name(name, unit, what):
    weight = drawn(8, 32) * unit
    advice = "; leave the low-rank step out of the recipe" if what == "a low-rank factor" else ""
    with pytest.raises(FormatError, match=f"^{what} is .*, but float16, which it is kept in, ends at 65504{advice}$"):
        round_weight(weight, parse(name), "mse", stats_of(correlated()))
    net = nn.Sequential(nn.Linear(32, 8)).double()
    net[0].weight.data = weight
    _, space, _, bank = prepared(net, [correlated()], f"W{name}A16")
    with pytest.raises(FormatError, match=f"^layer '0': {what}.* float16"):
        bank.prepare(space.schemes, progress=False)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("recipe", ["sparse5", "hadamard", "sparse5:gptq"])
def test_weights_that_are_not_finite_are_refused(recipe, broken):
    weight = drawn(8, 32)
    weight[2, 3] = broken
    with pytest.raises(FormatError, match=r"the weight \[8, 32\] holds NaN or infinity"):
        apply_recipe(weight, parse(f"int4:{recipe}"), 0, "mse", stats_of(correlated()))


def test_what_float16_holds_is_kept():
    weight = torch.tensor([[65504.0, -65519.0, 0.0, 1.0]])
    assert fake_quantize(weight, parse("kmeans_2")).tolist() == [[65504, -65504, 0, 1]]
    assert apply_recipe(weight, parse("int4:sparse500")).tolist() == [[65504, -65504, 0, 1]]


# Rounding


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["int3", "int3:asym", "nf4", "fp4_e2m1", "fp10_e5m4", "fp12_e8m3", "pow2_3", "int2:bipolar"]),
    st.integers(0, 99),
)
def test_neighbours_enclose_and_are_values_of_the_format(name, seed):
    fmt, x = parse(name), drawn(4, 30, seed=seed)
    scale, zero = element_scales(x, fmt)
    low, high = neighbours(x, scale, zero, fmt)
    nearest = fake_quantize(x, fmt)
    torch.testing.assert_close(torch.where((x - low).abs() <= (high - x).abs(), low, high), nearest)
    inside = low < high
    assert ((low <= x + 1e-12) & (x <= high + 1e-12))[inside].all()
    assert inside.float().mean() > 0.5


def test_stochastic_rounding_is_unbiased_and_seeded():
    x = torch.full((1, 20_000), 0.3).double()
    x[0, 0] = 7  # the largest code: a step of 1
    fmt = parse("int4")
    found = torch.stack([stochastic(x, fmt, "minmax", seed) for seed in range(2)])
    assert set(found[:, 0, 1:].unique().tolist()) == {0, 1}
    assert found[:, 0, 1:].mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 40_000) ** 0.5)
    assert torch.equal(found[0], stochastic(x, fmt, "minmax", 0))
    assert not torch.equal(found[0], found[1])


def test_weights_and_formats_have_draws_of_their_own():
    """Of weights that are alike but for one, and in formats with the same scales."""
    weight = drawn(40, 50).clamp(-1, 1)
    weight[:, 0] = 7
    other = weight.clone()
    other[0, 1] = 0.5
    found, moved, grouped = (
        apply_recipe(w, parse(n), 0, "minmax")
        for w, n in ((weight, "int4:stochastic"), (other, "int4:stochastic"), (weight, "int4:g50:stochastic"))
    )
    assert torch.equal(found, apply_recipe(weight.clone(), parse("int4:stochastic"), 0, "minmax"))
    for again in (moved, grouped):
        errors = torch.stack([found - weight, again - weight])[:, :, 2:].flatten(1)
        assert torch.corrcoef(errors)[0, 1] < 0.1


@pytest.mark.parametrize("learn", [adaround, flexround, adaquant])
@pytest.mark.parametrize("name", ["int3", "int4:g8", "nf4", "int2:asym"])
def test_learned_rounding_beats_nearest_in_every_output(learn, name):
    weight, stats, fmt = drawn(12, 32), stats_of(correlated()), parse(name)
    found, nearest = (stats.output_error(q - weight) for q in (learn(weight, fmt, stats), fake_quantize(weight, fmt)))
    assert (found <= nearest * 1.05).all()  # it minimises the damped error
    assert found.sum() < 0.9 * nearest.sum()


def test_adaround_moves_no_weight_beyond_its_neighbours():
    weight, stats, fmt = drawn(12, 32), stats_of(correlated()), parse("int3")
    low, high = neighbours(weight, *element_scales(weight, fmt), fmt)
    found = adaround(weight, fmt, stats)
    assert ((found == low) | (found == high)).all()


def test_adaround_comes_near_the_best_of_all_roundings():
    """Against enumeration: 2^8 roundings of rows of eight weights; most of what is to be won is won."""
    weight, stats, fmt = drawn(30, 8, seed=3), stats_of(correlated(width=8)), parse("int3")
    low, high = neighbours(weight, *element_scales(weight, fmt), fmt)
    choices = (torch.arange(256)[:, None] >> torch.arange(8)) % 2 > 0
    hessian = stats.damped()[0]

    def cost(q):
        return ((q - weight) @ hessian * (q - weight)).sum(-1)

    best = torch.stack([cost(torch.where(c, high, low)) for c in choices]).amin(0).sum()
    nearest, found = cost(fake_quantize(weight, fmt)).sum(), cost(adaround(weight, fmt, stats)).sum()
    assert best <= found <= best + 0.6 * (nearest - best)


@pytest.mark.parametrize("way", [*ROUNDINGS, "stochastic"])
def test_the_range_is_searched_once(way, monkeypatch):
    searched = []
    for module in (recipes, elements):
        monkeypatch.setattr(module, "quantize", lambda *args: searched.append(args) or quantize(*args))
    apply_recipe(drawn(6, 32), parse(f"int4:g8:{way}"), 0, "mse", stats_of(correlated()))
    assert len(searched) == 1


# Rotation


@pytest.mark.parametrize("channels", [1, 6, 8, 48, 64])
def test_rotation_is_orthogonal_with_entries_of_one_size(channels):
    rotation = hadamard_rotation(channels, torch.float64)
    size = len(rotation)
    assert channels % size == 0
    assert (channels // size) % 2
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size).double())
    torch.testing.assert_close(rotation.abs(), torch.full((size, size), size**-0.5).double())


@pytest.mark.parametrize("positions", [1, 9])
def test_rotating_weight_and_inputs_leaves_the_outputs(positions):
    x, weight = drawn(50, 12 * positions), drawn(5, 12 * positions, seed=1)
    rotation = hadamard_rotation(12, torch.float64)
    turned = rotate(x, rotation, positions)
    torch.testing.assert_close(turned @ rotate(weight, rotation, positions).T, x @ weight.T)
    torch.testing.assert_close(rotate(turned, rotation.T, positions), x)
    torch.testing.assert_close(rotate_stats(stats_of(x), rotation, positions).hessian, stats_of(turned).hessian)


def test_rotation_spreads_outliers():
    weight = drawn(16, 64) ** 3
    plain, turned = (apply_recipe(weight, parse(n), 0, "minmax") for n in ("int8", "int8:hadamard"))
    assert (turned - weight).square().sum() < 0.4 * (plain - weight).square().sum()


# Low rank


def test_full_rank_is_exact_up_to_float16():
    weight, stats = drawn(8, 32), stats_of(correlated())
    for recipe in ("lorc8", "qera8", "lorc100", "svd8"):
        found = apply_recipe(weight, parse(f"int2:{recipe}"), 0, "mse", stats)
        torch.testing.assert_close(found, weight, rtol=0, atol=3e-3)


def test_low_rank_is_the_truncated_svd_and_with_statistics_better_for_outputs():
    e, stats = drawn(10, 32), stats_of(correlated())
    _, s, _ = torch.linalg.svd(e)
    plain, weighted = (torch.mm(*(f.double() for f in low_rank_factors(e, 3, s))) for s in (None, stats))
    torch.testing.assert_close((e - plain).square().sum(), s[3:].square().sum(), rtol=1e-3, atol=0)
    values, vectors = torch.linalg.eigh(stats.hessian[0])
    root = vectors * values.clamp(min=0).sqrt()
    best = torch.linalg.svdvals(e @ root)[3:].square().sum()  # Eckart and Young: no rank-3 matrix does better
    assert float(best) <= error(stats, e, weighted) <= 1.01 * float(best)
    assert error(stats, e, weighted) < 0.8 * error(stats, e, plain)


@pytest.mark.parametrize("last", ["", ":gptq"])
def test_what_low_rank_takes_off_is_not_rounded(last):
    """A weight with a few large singular values and little else keeps them."""
    generator = torch.Generator().manual_seed(0)
    large = 20 * torch.randn(48, 2, generator=generator) @ torch.randn(2, 64, generator=generator)
    weight, stats = large + torch.randn(48, 64, generator=generator), stats_of(correlated(width=64))
    left, right = low_rank_factors(weight, 2)
    product = (left.double() @ right.double()).to(weight)
    rest = apply_recipe(weight - product, parse(f"int4{last}"), 0, "mse", stats)
    found = apply_recipe(weight, parse(f"int4:svd2{last}"), 0, "mse", stats)
    assert torch.equal(found, rest + product)
    nearest, after = (apply_recipe(weight, parse(name), 0, "mse", stats) for name in ("int4", "int4:lorc2"))
    assert (found - weight).norm() < 0.1 * min((nearest - weight).norm(), (after - weight).norm())


# Outliers


def test_sparse_keeps_the_largest_in_float16():
    weight = drawn(10, 50)
    kept = torch.zeros(500, dtype=torch.bool).index_fill(0, largest_elements(weight, 7), True).view(10, 50)
    assert int(kept.sum()) == 4  # 3.5, rounded up
    assert weight[kept].abs().min() > weight[~kept].abs().max()
    found = apply_recipe(weight, parse("int4:sparse7"))
    assert torch.equal(found[kept], weight[kept].half().double())
    assert torch.equal(found[~kept], fake_quantize(weight.masked_fill(kept, 0), parse("int4"))[~kept])


def test_split_channels_are_those_with_the_largest_weights_and_lose_less():
    weight = drawn(8, 20 * 2)
    weight[3, 14] = 8.0
    assert channels_to_split(weight, 5, 2).tolist() == [7]
    plain, split = (apply_recipe(weight.view(8, 20, 2), parse(n), 0, "minmax") for n in ("int4", "int4:ocs5"))
    lost = [(q - weight.view(8, 20, 2))[3].square().sum() for q in (plain, split)]
    assert lost[1] < 0.45 * lost[0]  # half the scale, a quarter of the error


def test_clusters_are_those_of_a_naive_kmeans():
    weight = torch.cat([drawn(60) * 0.1 - 2, drawn(80, seed=1) * 0.1, drawn(60, seed=2) * 0.1 + 3])
    found = clusters(weight, 3)
    assert torch.equal(found, torch.tensor([0] * 60 + [1] * 80 + [2] * 60))
    plain, split = (apply_recipe(weight.view(2, 100), parse(n)) for n in ("int3", "int3:split3"))
    assert (split - weight.view(2, 100)).square().sum() < 0.8 * (plain - weight.view(2, 100)).square().sum()


# Scaled channels


def test_smooth_scales_share_the_ranges_evenly():
    x, weight = correlated(), drawn(6, 32)
    scales = smooth_scales(x.abs().amax(0), weight)
    ratio = (x / scales).abs().amax(0) / (weight * scales).abs().amax(0)
    torch.testing.assert_close(ratio / ratio[0], torch.ones(32).double(), rtol=5e-3, atol=0)  # scales are float16's
    assert scales.log().mean().item() == pytest.approx(0, abs=1e-3)
    x[:, 3], weight[:, 4] = 0, 0
    assert smooth_scales(x.abs().amax(0), weight)[[3, 4]].tolist() == [1, 1]


def test_awq_of_alpha_zero_changes_nothing_and_others_never_hurt():
    weight, stats = drawn(6, 32), stats_of(correlated())

    def nearest(w, stats=None):
        return fake_quantize(w, parse("int3"))

    # With alpha = 0 the factors are one; inputs that are all alike have no better.
    alike = LayerStats(torch.eye(32).double()[None], torch.ones(1, 32), torch.ones(1, 32), 100)
    assert torch.equal(awq_scales(weight, alike, nearest), torch.ones(32).double())
    assert torch.equal(apply_recipe(weight, parse("int3:awq"), stats=alike), nearest(weight))
    found = apply_recipe(weight, parse("int3:awq"), stats=stats)
    assert error(stats, weight, found) < 0.95 * error(stats, weight, nearest(weight))


def test_cross_layer_scales_equalize_and_keep_the_function():
    first, bias, second = drawn(5, 8), drawn(5, seed=2), drawn(3, 5, seed=1)
    first[0] *= 30
    scales = cross_layer_scales(first, second.T)
    a, b = first / scales[:, None], second * scales
    torch.testing.assert_close(a.abs().amax(1), b.abs().amax(0))
    x = drawn(20, 8, seed=3)
    before, after = ((x @ w.T + c).relu() @ v.T for w, c, v in ((first, bias, second), (a, bias / scales, b)))
    torch.testing.assert_close(after, before)
    assert cross_layer_scales(torch.zeros(2, 3), torch.ones(2, 3)).tolist() == [1, 1]


def test_noise_helps_where_values_fall_between_two_codes():
    fmt = parse("int4:tensor:asym")
    rows = torch.full((50, 64), 0.45).double() + 0.02 * drawn(50, 64)  # a step is 1
    weight = drawn(1, 64).abs()
    noise = noise_bias(rows, fmt, 0.0, 15.0, weight)
    assert noise.shape == (64,)
    plain, noisy = (
        ((fake_quantize_noisy(rows, fmt, 0.0, 15.0, n) - rows) @ weight.T).square().sum()
        for n in (torch.zeros(64).double(), noise)
    )
    assert noisy < 0.1 * plain
    on_codes = torch.arange(16.0).repeat(4, 4)
    assert torch.equal(noise_bias(on_codes, fmt, 0.0, 15.0), torch.zeros(64))
