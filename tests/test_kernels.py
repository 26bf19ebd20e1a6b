"""Rounding in chunks against rounding all at once, look-ups against bisection, range rules against brute force."""

import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tensors import tensor

from mpq import NumberFormat
from mpq.errors import FormatError
from mpq.quantizers import (
    dequantize,
    fake_quantize,
    fake_quantize_all,
    fake_quantize_static,
    find_range,
    kernels,
    loss_aware_range,
    quantize,
    quantize_all,
)
from mpq.quantizers.blocks import from_blocks, weighted_blocks
from mpq.quantizers.clips import clip_errors, least_share
from mpq.quantizers.compiled import compiled
from mpq.quantizers.grids import FloatGrid, IntGrid, TableGrid, grid_of
from mpq.quantizers.lookup import nearest, nearest_by_tables
from mpq.quantizers.ranges import minmax_range, parse_range_method
from mpq.quantizers.scales import outer_scale, scale_and_zero

FORMATS = (
    *("int4", "int8", "int2", "int1", "int16", "int4:asym", "int8:tensor", "int3:tensor:asym", "int4:g8", "int4:g7"),
    *("int5:g16:asym", "int4:b2x8", "int4:b3x5", "int4:g16:p2", "int4:bipolar", "int8:token", "fp16", "bf16"),
    *("fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp4_e2m1:g16", "fp8_e4m3:tensor", "fp4_e2m1:raw", "mxfp4", "mxfp8_e5m2"),
    *("fp10_e5m4", "fp13_e4m8:g8", "fp16_e3m12:tensor", "fp11_e2m8:raw", "fp9_e8m0", "fp12_e8m3", "fp15_e8m6"),
    *("mxint8", "nvfp4", "nf4", "nf4:g8", "nf4:tensor", "fp4_bnb", "pow2_4", "post_4", "log2_4", "ternary", "binary"),
)
GRIDS = {n: grid_of(NumberFormat.parse(n)) for n in (*FORMATS, "pow2_8") if n not in ("fp16", "bf16")}
LISTED = [n for n, grid in GRIDS.items() if isinstance(grid, TableGrid)]


def plain(x, fmt, axis=0, method="minmax", importance=None):
    """Everything at once: the sum of the steps of a textbook, with bisection for all grids but integers."""
    if fmt.plain_float:
        return x.to(kernels.FLOAT_DTYPES[fmt.name]).to(x.dtype)
    if fmt.granularity == "token":
        return plain(x.reshape(-1, x.shape[-1]), NumberFormat.parse("int8"), 0, method).view(x.shape)
    blocks, counts = weighted_blocks(x, fmt, axis, importance)
    scale, zero = torch.ones(1, 1, dtype=blocks.dtype), torch.zeros(1, 1, dtype=blocks.dtype)
    if fmt.granularity != "none":
        outer = outer_scale(x, fmt)
        scale, zero = scale_and_zero(*find_range(blocks, fmt, method, counts, outer), fmt, outer)
    units, grid = blocks * (1 / scale), grid_of(fmt)
    if isinstance(grid, IntGrid):
        units = (units.round() + zero).clamp(grid.first, grid.last) - zero
    elif isinstance(grid, FloatGrid):
        units = to_even(units, grid.values, grid.mantissa)
    else:
        units = nearest(units, grid.values, grid.values)
    return from_blocks(units * scale, tuple(x.shape), axis, *(fmt.block or (1, 0))).to(x.dtype)


def to_even(units, values, mantissa):
    """Nearest level of a minifloat; of two that are as near the one with an even code."""
    levels = torch.tensor(values, dtype=units.dtype)
    at = torch.searchsorted(levels, units.contiguous()).clamp(1, len(levels) - 1)
    low, high = levels[at - 1], levels[at]
    near = torch.where(units - low > high - units, high, low)
    tie = (units - low) == (high - units)
    order = (at - torch.searchsorted(levels, torch.zeros(1, dtype=units.dtype))).abs()  # code without sign
    return torch.where(tie, torch.where(order % 2 == 0, high, low), near)


@pytest.fixture(params=[None, 64], ids=["one chunk", "chunks of 64"])
def chunks(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(kernels, "_CHUNK", request.param)
        monkeypatch.setattr("mpq.quantizers.grids._WORTH_TABLES", 1)


@pytest.mark.parametrize("name", FORMATS)
def test_chunks_are_bit_identical_to_rounding_at_once(name, chunks):
    fmt = NumberFormat.parse(name)
    for shape, axis in (((12, 40), 0), ((5, 6, 3, 3), 0), ((6, 10), 1), ((7,), 0), ((1, 3), 0)):
        x = tensor(0, shape) ** 3
        expected = plain(x, fmt, axis)
        torch.testing.assert_close(fake_quantize(x, fmt, axis, "minmax"), expected, rtol=0, atol=0)
        if not fmt.plain_float:
            q = quantize(x, fmt, axis, "minmax")
            assert torch.equal(dequantize(q), expected)


@pytest.mark.parametrize(
    "name", ["int4", "int4:g8", "int3:b2x8:asym", "fp4_e2m1:g16", "nvfp4", "nf4:g8", "int8:tensor"]
)
@pytest.mark.parametrize("method", ["mse", "mse:20", "percentile:97", "pnorm:2.4", "kl"])
def test_range_rules_are_the_same_in_chunks(name, method, chunks):
    fmt, x, weights = NumberFormat.parse(name), tensor(3, (5, 40)), tensor(4, (5, 40)).abs()
    assert torch.equal(fake_quantize(x, fmt, 0, method, weights), plain(x, fmt, 0, method, weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["int4", "int4:g8", "fp8_e4m3", "nf4", "int8:tensor", "mxfp4", "fp4_e2m1:raw"])
def test_other_dtypes_and_layouts(name, dtype, chunks):
    fmt = NumberFormat.parse(name)
    for x in (tensor(1, (8, 6, 4, 4), dtype), tensor(1, (8, 6, 4, 4), dtype).to(memory_format=torch.channels_last)):
        out = torch.full_like(x, math.nan)
        assert fake_quantize(x, fmt, 0, "minmax", out=out) is out
        assert torch.equal(out, plain(x, fmt))
    turned = tensor(2, (6, 8), dtype).T
    assert torch.equal(fake_quantize(turned, fmt, 0, "minmax"), plain(turned, fmt))
    assert torch.equal(fake_quantize(turned[:, ::2], fmt, 0, "mse"), plain(turned[:, ::2], fmt, 0, "mse"))


@pytest.mark.parametrize("name", ["int4", "int4:g8", "int4:b2x8", "fp8_e4m3", "nf4", "nvfp4", "int8:tensor", "fp16"])
def test_in_place(name, chunks):
    fmt, x = NumberFormat.parse(name), tensor(0, (12, 40))
    expected = fake_quantize(x, fmt)
    part = torch.nn.Parameter(x.clone())
    assert fake_quantize(part, fmt, out=part) is part
    assert torch.equal(part, expected)
    assert part.requires_grad
    assert not fake_quantize(part, fmt).requires_grad


@pytest.mark.parametrize("name", ["int8:tensor:asym", "nf4:tensor", "fp8_e4m3:tensor", "fp4_e2m1:raw", "bf16"])
def test_activations_round_alike_with_gradients_and_in_inference(name):
    fmt, x = NumberFormat.parse(name), tensor(0, (8, 1000)).requires_grad_()
    with torch.inference_mode():
        expected = fake_quantize_static(x, fmt, -2.0, 3.0).clone()
    with torch.no_grad():
        assert torch.equal(fake_quantize_static(x, fmt, -2.0, 3.0), expected)
    fake_quantize_static(x, fmt, -2.0, 3.0).sum().backward()
    assert torch.equal(fake_quantize_static(x, fmt, -2.0, 3.0), expected)


def test_tensors_to_write_to_must_fit():
    fmt = NumberFormat.parse("int4")
    for out in (torch.empty(12, 41), torch.empty(12, 40, dtype=torch.float64)):
        with pytest.raises(FormatError, match="out is"):
            fake_quantize(tensor(0, (12, 40)), fmt, out=out)
    with pytest.raises(FormatError, match="1 formats, but 0 tensors"):
        fake_quantize_all(tensor(0, (12, 40)), [fmt], outs=[])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(FORMATS), min_size=1, max_size=6),
    st.sampled_from(["minmax", "mse", "percentile:95"]),
    st.sampled_from([0, 1]),
    st.integers(0, 99),
)
def test_all_formats_in_one_call_are_those_of_each_alone(names, method, axis, seed):
    formats = [NumberFormat.parse(n) for n in names]
    x = tensor(seed, (8, 24))
    found = fake_quantize_all(x, formats, axis, method)
    assert list(found) == list(dict.fromkeys(formats))
    for fmt, values in found.items():
        assert torch.equal(values, fake_quantize(x, fmt, axis, method))
    coded = quantize_all(x, [f for f in formats if not f.plain_float], axis, method)
    for fmt, q in coded.items():
        alone = quantize(x, fmt, axis, method)
        assert all(torch.equal(getattr(q, n), getattr(alone, n)) for n in ("codes", "scale", "zero_point"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LISTED)
def test_tables_find_what_bisection_finds(name, dtype):
    values = grid_of(NumberFormat.parse(name)).values
    levels = torch.tensor(values, dtype=dtype)
    middles = (levels[1:] + levels[:-1]) / 2
    ends = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, math.inf, -math.inf, math.nan], dtype=dtype)
    near = [torch.nextafter(t, t + side) for t in (levels, middles) for side in (9, -9)]
    x = torch.cat([levels, middles, *near, ends, tensor(1, (5000,), dtype) * max(values) / 2])
    expected = nearest(x, values, values)
    assert torch.equal(expected.isnan(), x.isnan())
    found = nearest_by_tables(x, values, values, torch.empty_like(x))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_codes_of_minifloats_are_those_of_torch():
    for name, dtype in (("fp8_e4m3:raw", torch.float8_e4m3fn), ("fp8_e5m2:raw", torch.float8_e5m2)):
        every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        every = every[every.isfinite()]
        x = torch.cat([every, tensor(5, (4000,)) * 30])
        codes = quantize(x, NumberFormat.parse(name)).codes.flatten()
        expected = x.to(dtype).view(torch.uint8)
        assert torch.equal(codes[x != 0], torch.where(expected == 128, 0, expected)[x != 0])  # here zero has no sign


def exhaustive(blocks, fmt, candidates, power=2.0, weights=1.0):
    """Sum of powers of errors of each clip ``[K, blocks]`` in float64, and the clips."""
    x = blocks.double()
    lo, hi = minmax_range(x)
    ratios = torch.linspace(least_share(fmt), 1, candidates, dtype=torch.float64)
    found = []
    for r in ratios:
        scale, zero = scale_and_zero(lo * r, hi * r, fmt)
        units = grid_of(fmt).round_(x / scale, None if fmt.symmetric else zero)
        found.append(((units * scale - x).abs() ** power * weights).sum(1))
    return torch.stack(found), ratios


def loss_of(blocks, fmt, ends, power=2.0, weights=1.0):
    scale, zero = scale_and_zero(*(e.double() for e in ends), fmt)
    units = grid_of(fmt).round_(blocks.double() / scale, None if fmt.symmetric else zero)
    return ((units * scale - blocks).abs() ** power * weights).sum(1)


@pytest.mark.parametrize("tails", [1, 2, 3])
@pytest.mark.parametrize("name", ["int2", "int4", "int6", "int8", "int4:asym", "fp4_e2m1", "nf4"])
def test_clips_of_a_grid_are_within_a_thousandth_of_trying_all(name, tails):
    fmt = NumberFormat.parse(name)
    for size in (64, 128, 1024):
        blocks = tensor(6, (40, size))
        blocks = blocks.sign() * blocks.abs() ** tails
        best = exhaustive(blocks, fmt, 80)[0].amin(0).sum()
        found = loss_of(blocks, fmt, find_range(blocks, fmt, "mse:80")).sum()
        assert best * (1 - 1e-5) <= found <= best * 1.001


@pytest.mark.parametrize("power", [1.0, 2.4, 4.0])
def test_powers_and_weights_of_errors(power):
    fmt, blocks, weights = NumberFormat.parse("int3"), tensor(7, (20, 300)), tensor(8, (20, 300)).abs()
    for own in (None, weights):
        losses, _ = exhaustive(blocks, fmt, 80, power, 1.0 if own is None else own)
        found = loss_of(blocks, fmt, find_range(blocks, fmt, f"pnorm:{power}", own), power, 1.0 if own is None else own)
        assert found.sum() <= losses.amin(0).sum() * 1.002
    # The larger the power, the less is clipped.
    widths = [find_range(blocks, fmt, f"pnorm:{p}")[1].sum() for p in (1, 2, 8)]
    assert widths == sorted(widths)


def test_errors_of_clips_of_long_rows_are_summed(monkeypatch):
    fmt, x = NumberFormat.parse("int4"), tensor(0, (3, 1000))
    ratios = torch.linspace(0.5, 1, 5)[:, None].expand(-1, 3)
    expected = clip_errors(x, minmax_range(x), ratios, fmt)
    monkeypatch.setattr("mpq.quantizers.clips.CACHED", 128)
    torch.testing.assert_close(clip_errors(x, minmax_range(x), ratios, fmt), expected, rtol=1e-5, atol=0)


def divergence(x, fmt, ratio, bins=2048):
    """TensorRT's criterion of one block, in float64."""
    x = x.double().numpy()
    lo, hi = min(x.min(), 0.0), max(x.max(), 0.0)
    width = (hi - lo) / bins
    counts = np.bincount(np.clip((x - lo) / width, 0, bins - 1).astype(int), minlength=bins).astype(float)
    ends = torch.tensor([[lo * ratio]]), torch.tensor([[hi * ratio]])
    scale, zero = (t.item() for t in scale_and_zero(*ends, fmt))
    first, last = ((fmt.levels[i] - zero) for i in (0, 1))
    units = (lo + (np.arange(bins) + 0.5) * width) / scale
    inside = [i for i in range(bins) if first <= units[i] <= last]
    p = counts[inside].copy()
    p[0] += counts[: inside[0]].sum()
    p[-1] += counts[inside[-1] + 1 :].sum()
    _, level = np.unique(np.round(units[inside]), return_inverse=True)
    sharers = np.bincount(level, p > 0)
    q = np.where(p > 0, (np.bincount(level, counts[inside]) / np.maximum(sharers, 1))[level], 0)
    p, q = p / p.sum(), q / q.sum()
    return sum(a * math.log(a / max(b, 1e-10)) for a, b in zip(p[p > 0], q[p > 0], strict=True))


@pytest.mark.parametrize("name", ["int4:tensor", "int8:tensor", "int4:tensor:asym"])
def test_entropy_range_has_the_least_divergence(name):
    fmt = NumberFormat.parse(name)
    for x in (tensor(9, (1, 5000)) ** 3, tensor(9, (1, 5000)).abs()):
        losses = [divergence(x[0], fmt, r) for r in torch.linspace(1, least_share(fmt), 80).tolist()]
        lo, hi = minmax_range(x)
        found = find_range(x, fmt, "kl")
        ratio = (found[1] / hi).item()
        assert divergence(x[0], fmt, ratio) <= min(losses) * 1.01 + 1e-6
        assert found[0] == pytest.approx((lo * ratio).item(), rel=1e-5)


def test_entropy_range_clips_outliers_and_keeps_even_spreads():
    x = torch.cat([tensor(1, (1, 50000)), torch.tensor([[40.0]])], 1)
    fmt = NumberFormat.parse("int8:tensor")
    assert find_range(x, fmt, "kl")[1] <= 0.55 * 40
    even = torch.linspace(-1, 1, 50001)[None]
    assert find_range(even, fmt, "kl")[1] >= 0.98
    _, hi = find_range(torch.cat([x, even]), fmt, "kl")  # blocks don't mix
    assert (hi[1] >= 0.98) & (hi[0] <= 0.55 * 40)


def test_loss_aware_range_asks_for_each_candidate_and_takes_the_best():
    x, fmt, calls = tensor(2, (3, 50)), NumberFormat.parse("int4:tensor"), []

    def loss(rounded):
        calls.append(rounded.shape)
        return (rounded - x).square().sum().item()

    lo, hi = loss_aware_range(x, fmt, loss, 40)
    assert calls == [x.shape] * 40
    losses, _ = exhaustive(x.reshape(1, -1), fmt, 40)
    assert loss(fake_quantize_static(x, fmt, lo.item(), hi.item())) == pytest.approx(losses.amin().item(), rel=1e-4)
    # A loss that sees only the largest element wants the whole range.
    whole = loss_aware_range(x, fmt, lambda t: -t.abs().amax().item())
    assert torch.equal(whole[1].amax(), x.amax())
    tokens = NumberFormat.parse("int4:token")  # whatever the axis, each row as it lies
    losses = []
    loss_aware_range(x, tokens, lambda t: losses.append(t) or 0.0, 1, channel_axis=1)
    assert torch.equal(losses[0], fake_quantize(x, tokens, 1, "minmax"))
    with pytest.raises(FormatError, match="no finite number"):
        loss_aware_range(x, fmt, lambda t: math.nan)
    with pytest.raises(FormatError, match="candidates"):
        loss_aware_range(x, fmt, loss, 0)


@pytest.mark.parametrize("method", ["mse:1", "mse:x", "mse:2.5", "mse:", "pnorm", "pnorm:0", "pnorm:-1", "kl:3"])
def test_malformed_range_methods_are_refused(method):
    with pytest.raises(FormatError, match="unknown range method"):
        parse_range_method(method)


@pytest.fixture
def uncompiled(monkeypatch):
    """Loops as they are before torch compiles them."""
    monkeypatch.setattr(torch, "compile", lambda loop: loop)
    compiled.cache_clear()
    yield
    compiled.cache_clear()


@pytest.mark.parametrize(
    "name",
    [
        *("int4", "int4:g8:asym", "int8:g32:asym", "int1:g8", "int2:bipolar", "int4:g8:p2", "fp8_e4m3", "fp8_e5m2:g8"),
        *("fp4_e2m1:g16", "fp6_e3m2", "nf4:g8", "fp4_bnb", "pow2_4", "post_3:g16", "log2_4", "ternary", "binary:g8"),
        *("mxfp4", "mxfp8_e4m3", "nvfp4"),
    ],
)
def test_what_is_compiled_gives_the_same_bits(name, uncompiled):
    fmt = NumberFormat.parse(name)
    for shape, dtype in (((24, 64), torch.float32), ((40, 32), torch.float32), ((3, 32), torch.float64)):
        x, out = tensor(0, shape, dtype) ** 3, torch.empty(shape, dtype=dtype)
        x = x.abs() if fmt.family == "log2" else x
        assert kernels.fake_quantize_compiled(out, x, fmt, 0)
        assert torch.equal(out, plain(x, fmt))


def test_sums_that_would_overflow_are_not_compiled(uncompiled):
    assert [compiled(NumberFormat.parse(name)) for name in ("fp9_e8m0", "fp12_e8m3")] == [None, None]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["int4", "int4:g8:asym", "fp8_e4m3", "nf4:g8", "mxfp4", "nvfp4"])
def test_compiled_loops_give_the_same_bits(name):
    fmt = NumberFormat.parse(name)
    for shape in ((24, 64), (40, 32)):
        x, out = tensor(0, shape) ** 3, torch.empty(shape)
        assert fake_quantize(x, fmt, 0, "minmax", out=out, compile=True) is out
        assert torch.equal(out, plain(x, fmt))
    x[3, 3] = math.nan
    with pytest.raises(FormatError, match="NaN or infinity"):
        fake_quantize(x, fmt, 0, "minmax", compile=True)
    if fmt.scale == "fp16":
        x[3, 3] = 1e7
        with pytest.raises(FormatError, match="stored in fp16"):
            fake_quantize(x, fmt, 0, "minmax", compile=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_formats_do_not_use_up_each_others_compiled_loops():
    """Torch gives up a function after a few versions of it, without an error."""
    x = tensor(0, (24, 64))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("int3:g16", "int5:g16"):
            fmt = NumberFormat.parse(name)
            assert torch.equal(fake_quantize(x, fmt, 0, "minmax", compile=True), plain(x, fmt))


@pytest.mark.parametrize("name", ["mxfp4", "int4:b2x8", "int8:tensor", "fp16", "mxint8", "int4:g7"])
def test_without_a_loop_for_it_rounding_is_as_ever(name):
    fmt, x = NumberFormat.parse(name), tensor(0, (12, 40))
    assert torch.equal(fake_quantize(x, fmt, 0, "minmax", compile=True), plain(x, fmt))
    assert torch.equal(fake_quantize(x, fmt, 0, "mse", compile=True), plain(x, fmt, 0, "mse"))


@pytest.mark.parametrize("name", ["int4", "int4:g8", "nf4"])
def test_in_place_there_is_no_loop(name, monkeypatch):
    monkeypatch.setattr(kernels, "compiled", lambda fmt: pytest.fail("a loop was asked for"))
    fmt, x = NumberFormat.parse(name), tensor(0, (12, 40))
    expected = plain(x, fmt)
    assert fake_quantize(x, fmt, 0, "minmax", out=x, compile=True) is x
    assert torch.equal(x, expected)
