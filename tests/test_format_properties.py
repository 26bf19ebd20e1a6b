"""What holds for every scalar format, whatever the tensor."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_tensors import tensor

from mpq import NumberFormat
from mpq.errors import FormatError
from mpq.quantizers import dequantize, fake_quantize, fake_quantize_dynamic, fake_quantize_static, quantize
from mpq.quantizers.blocks import from_blocks
from mpq.quantizers.grids import grid_of
from mpq.quantizers.scales import scale_and_zero

_BASES = (
    [f"int{b}" for b in range(1, 17)]
    + [f"int{b}:asym" for b in range(1, 17)]
    + [f"int{b}:bipolar" for b in range(1, 9)]
    + [f"fp{1 + e + m}_e{e}m{m}" for e in range(1, 8) for m in range(8 - e) if e + m > 1]
    + ["fp9_e4m4", "fp10_e5m4", "fp11_e7m3", "fp12_e4m7", "fp13_e1m11", "fp16_e6m9"]
    + [f"{family}_{b}" for family in ("pow2", "post") for b in range(2, 9)]
    + [f"log2_{b}" for b in range(1, 7)]
    + ["nf4", "fp4_bnb", "ternary", "binary", "bfp4", "bfp8", "nvfp4"]
    + ["mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8"]
)
_OPTIONS = ["", ":tensor", ":g1", ":g3", ":g8", ":g64", ":b2x3", ":p2", ":g4:s32"]


def _formats():
    for base in _BASES:
        for option in _OPTIONS:
            name = base.split(":")[0] + option + base[len(base.split(":")[0]) :]
            try:
                yield NumberFormat.parse(name)
            except FormatError:
                assert base.startswith(("mx", "nvfp"))  # whose blocks and scales are given
                assert option in (":tensor", ":p2", ":g4:s32")


ALL = sorted(set(_formats()), key=lambda f: f.name)
formats = st.sampled_from(ALL)
scaled_by_tensor = st.sampled_from([f for f in ALL if f.granularity == "tensor"])
methods = st.sampled_from(["minmax", "mse"])
seeds = st.integers(0, 999)
shapes = st.sampled_from([(5, 7), (4, 3, 3, 3), (1, 64), (6,), (2, 1), (3, 10)])


def sized(seed, shape, dtype=torch.float64):
    """Of sizes that depend on the seed, some without negative numbers."""
    x = tensor(seed, shape, torch.float64) * 2.0 ** (seed % 9 - 4)
    return x.abs().to(dtype) if seed % 7 == 0 else x.to(dtype)


def has_zero(fmt):
    return not fmt.symmetric or 0.0 in values(fmt)


def values(fmt):
    """Levels in units of the scale, of unsigned integers without their zero point."""
    grid = grid_of(fmt)
    return grid.values if hasattr(grid, "values") else tuple(float(v) for v in range(int(grid.low), int(grid.high) + 1))


@given(formats)
def test_names_parse_back(fmt):
    assert NumberFormat.parse(fmt.name) == fmt


@settings(max_examples=300, deadline=None)
@given(formats, methods, seeds, shapes, st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_codes_stand_for_the_rounded_tensor(fmt, method, seed, shape, dtype):
    x = sized(seed, shape, dtype)
    before = x.clone()
    y, q = fake_quantize(x, fmt, method=method), quantize(x, fmt, method=method)
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert torch.equal(dequantize(q).to(dtype), y)
    assert torch.equal(x, before)
    assert len(q.scale) == fmt.num_scales(shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scaled_in_single_precision(dtype):
    x = sized(1, (5, 7), dtype)
    for fmt in (f for f in ALL if f.granularity == "tensor" or f.bits == 1):
        q, single = quantize(x, fmt), quantize(x.float(), fmt)
        assert q.scale.dtype == torch.float32, fmt.name
        assert torch.equal(q.scale, single.scale), fmt.name
        assert torch.equal(q.codes, single.codes), fmt.name


@settings(max_examples=300, deadline=None)
@given(formats, seeds, shapes)
def test_rounding_again_with_the_same_scales_changes_nothing(fmt, seed, shape):
    q = quantize(sized(seed, shape, torch.float32), fmt, method="minmax")
    zero = None if fmt.symmetric else q.zero_point
    grid = grid_of(fmt)
    units = grid.decode(q.codes, torch.float32, zero)
    assert torch.equal(grid.round_(units.clone(), zero), units)
    assert torch.equal(grid.decode(grid.encode(units, zero), torch.float32, zero), units)


@settings(max_examples=200, deadline=None)
@given(scaled_by_tensor, methods, seeds)
def test_order_is_kept(fmt, method, seed):
    x = sized(seed, (200,), torch.float32).sort().values
    assert (fake_quantize(x, fmt, method=method).diff() >= 0).all()


@settings(max_examples=300, deadline=None)
@given(formats, methods, seeds, shapes)
def test_no_level_is_nearer(fmt, method, seed, shape):
    """The error is at most half the gap between neighbouring levels, or the distance to the last one."""
    q = quantize(sized(seed, shape), fmt, method=method)
    scale = from_blocks(q.scale.expand_as(q.codes).contiguous(), shape, 0, *(fmt.block or (1, 0)))
    zero = from_blocks(q.zero_point.expand_as(q.codes).contiguous(), shape, 0, *(fmt.block or (1, 0)))
    x = sized(seed, shape) / scale
    if fmt.bits > 8 and fmt.family == "float":  # too many to compare with all
        levels = torch.tensor(values(fmt), dtype=x.dtype)
        above = torch.searchsorted(levels, x).clamp(1, len(levels) - 1)
        best = torch.minimum((levels[above] - x).abs(), (levels[above - 1] - x).abs())
    elif fmt.bits > 8:
        low, high = (v - zero for v in fmt.levels)
        best = torch.maximum((x.round().maximum(low).minimum(high) - x).abs(), torch.zeros_like(x))
    else:
        best = (torch.tensor(values(fmt), dtype=x.dtype) - zero[..., None] - x[..., None]).abs().amin(-1)
    assert ((dequantize(q) / scale - x).abs() <= best + 1e-9 * (1 + x.abs())).all()


@settings(max_examples=300, deadline=None)
@given(formats, methods, seeds, shapes)
def test_zero_stays_zero(fmt, method, seed, shape):
    x = sized(seed, shape, torch.float32)
    x.view(-1)[::2] = 0
    y = fake_quantize(x, fmt, method=method)
    assert not has_zero(fmt) or not y.view(-1)[::2].any()


def test_which_formats_promise_a_zero():
    without = {f.base + f.variant for f in ALL if not has_zero(f)}
    assert without == {"int1", "binary", *(f"int{b}bipolar" for b in range(1, 9))}


@settings(max_examples=300, deadline=None)
@given(formats, methods, seeds, shapes, st.one_of(st.integers(-6, 6), st.integers(-100, 100)))
def test_a_power_of_two_goes_through(fmt, method, seed, shape, power):
    power = max(-6, min(6, power)) if fmt.scale == "fp16" else power
    x = sized(seed, shape, torch.float32)
    small, large = quantize(x, fmt, method=method), quantize(x * 2.0**power, fmt, method=method)
    # Where a scale's own type ends, the grid can't follow.
    least = {"fp16": 2.0**-14, "e4m3": 0.0}.get(fmt.scale, 2.0**-125)
    assume(min(small.scale.min(), large.scale.min()) > least)
    assert torch.equal(dequantize(large), dequantize(small) * 2.0**power)


@pytest.mark.parametrize("method", ["mse", "mse:20", "pnorm:2.4", "pnorm:4"])
@pytest.mark.parametrize("power", [-100, -85, -50, 50, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_size_is_too_small_or_large_for_searched_clips(method, power, dtype):
    """Squares of such errors would all vanish or overflow, which says nothing about clips."""
    x = sized(1, (4, 300), dtype)
    for name in ("int4", "int8:asym", "int8:g20:s32", "fp8_e4m3", "int4:tensor"):
        fmt = NumberFormat.parse(name)
        small, large = fake_quantize(x, fmt, method=method), fake_quantize(x * 2.0**power, fmt, method=method)
        torch.testing.assert_close(large, small * 2.0**power, rtol=0 if "mse" in method else 1e-2, atol=0)


@settings(max_examples=200, deadline=None)
@given(formats, methods, st.sampled_from([math.nan, math.inf, -math.inf]), seeds, shapes)
def test_what_is_not_finite_is_refused(fmt, method, bad, seed, shape):
    x = sized(seed, shape, torch.float32)
    x.view(-1)[seed % x.numel()] = bad
    for function in (quantize, fake_quantize):
        with pytest.raises(FormatError, match=r"the tensor \[.*\] holds NaN or infinity"):
            function(x, fmt, method="percentile:60" if method == "mse" else method)


@given(formats, st.sampled_from([(0,), (0, 4), (4, 0), (2, 0, 3)]), st.sampled_from([0, -1]))
def test_empty_tensors(fmt, shape, axis):
    axis = axis % len(shape)
    x = torch.empty(shape)
    assert fake_quantize(x, fmt, axis).shape == shape
    q = quantize(x, fmt, axis)
    assert dequantize(q).shape == shape
    assert q.codes.numel() == 0


@given(formats, methods, st.floats(-1e4, 1e4, width=32))
def test_one_number(fmt, method, value):
    x = torch.tensor(value)
    y = fake_quantize(x, fmt, method=method)
    assert y.shape == ()
    assert torch.equal(y, fake_quantize(x[None], fmt, method=method)[0])
    assert torch.equal(dequantize(quantize(x, fmt, method=method)), y)


@settings(max_examples=150, deadline=None)
@given(formats, methods, seeds)
def test_layout_in_memory_does_not_matter(fmt, method, seed):
    x = sized(seed, (4, 6, 3, 3), torch.float32)
    expected = fake_quantize(x, fmt, method=method)
    assert torch.equal(fake_quantize(x.to(memory_format=torch.channels_last), fmt, method=method), expected)
    wide = torch.zeros(4, 6, 3, 6)
    wide[..., ::2] = x
    assert torch.equal(fake_quantize(wide[..., ::2], fmt, method=method), expected)
    swapped = x.transpose(0, 1)  # means over the whole tensor are summed in another order
    close = {"rtol": 1e-6 if fmt.granularity == "tensor" else 0, "atol": 0}
    torch.testing.assert_close(fake_quantize(swapped, fmt, 1, method), expected.transpose(0, 1), **close)
    torch.testing.assert_close(dequantize(quantize(swapped, fmt, 1, method)), expected.transpose(0, 1), **close)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([f for f in ALL if f.block is not None and f.block[0] == 1 and f.scale != "e4m3"]),
    st.sampled_from(["minmax", "mse", "percentile:80", "percentile:99"]),
    seeds,
    st.integers(1, 20),
)
def test_a_ragged_last_group_is_a_group(fmt, method, seed, width):
    """Each block depends on its own elements alone: the last one of a row is what channels of so many would be."""
    x = sized(seed, (3, width), torch.float32)
    start = (width - 1) // fmt.block[1] * fmt.block[1]
    # Where there are no channels (OCP's blocks), a block that needs no padding tells as much.
    scaled = fmt.family != "mx"
    by_channel = replace(fmt, granularity="channel") if scaled else replace(fmt, granularity=f"group:{width - start}")
    alone = fake_quantize(x[:, start:].contiguous(), by_channel, method=method)
    assert torch.equal(fake_quantize(x, fmt, method=method)[:, start:], alone)


@given(formats, methods, seeds)
def test_channels_of_zeros(fmt, method, seed):
    x = sized(seed, (4, 12), torch.float32)
    x[1] = 0
    y = fake_quantize(x, fmt, method=method)
    assert torch.isfinite(y).all()
    assert torch.isfinite(fake_quantize(x * 0, fmt, method=method)).all()
    if has_zero(fmt) or fmt.granularity == "channel":
        assert y[1].abs().max() <= (0 if has_zero(fmt) else 1e-3)


@settings(max_examples=150, deadline=None)
@given(formats, methods, seeds, st.sampled_from([1e-45, 1e-41, 1e-38, 1e-30]), st.sampled_from([0, 1]))
def test_subnormal_numbers(fmt, method, seed, size, mixed):
    x = sized(seed, (3, 8), torch.float32).sign() * size
    x[0] *= 10.0**mixed
    y = fake_quantize(x, fmt, method=method)
    assert torch.isfinite(y).all()
    scale, largest = quantize(x, fmt, method=method).scale, 2 * x.abs().max()
    assert (scale > 0).all()
    # Scales have a smallest number, and so have levels without zero; else the nearest is at most twice as large.
    least = {"fp16": 2.0**-24, "e4m3": 1.0}.get(fmt.scale, 2.0**-126)
    # Powers of two are at most twice what a range needs, which with a zero point is up to twice the largest number.
    assert scale.max() <= max(largest if fmt.symmetric else 2 * largest, least)
    assert y.abs().max() <= (largest if has_zero(fmt) else max(largest, least))


@settings(max_examples=100, deadline=None)
@given(scaled_by_tensor, seeds, st.floats(0.01, 100), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_activations_with_known_ranges(fmt, seed, size, dtype):
    x = sized(seed, (3, 40), dtype)
    lo, hi = -size * (not fmt.symmetric or grid_of(fmt).low < 0), size
    y = fake_quantize_static(x, fmt, lo, hi)
    assert y.dtype == dtype
    scale, zero = scale_and_zero(torch.tensor(lo), torch.tensor(hi), fmt)
    if fmt.family == "int" and not hasattr(grid_of(fmt), "values"):
        assert torch.equal(
            y, torch.fake_quantize_per_tensor_affine(x.float(), scale, zero.int(), *fmt.levels).to(dtype)
        )
        return
    levels = torch.tensor(values(fmt)) * scale
    distance = (x.float()[..., None] - levels).abs()
    chosen = torch.where(y[..., None] == levels.to(dtype), distance, math.inf).amin(-1)  # inf: no level at all
    assert (chosen <= distance.amin(-1) + 1e-6 * (x.float().abs() + levels.abs().amax())).all()


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["int8:token", "int4:token:asym", "fp8_e4m3:token", "mxfp4", "mxint8:g2", "int8:g3", "nf4:token"]),
    seeds,
)
def test_activations_with_scales_of_their_own(name, seed):
    fmt = NumberFormat.parse(name)
    x = sized(seed, (2, 5, 7), torch.float32)
    rows = torch.stack([fake_quantize_dynamic(row, fmt) for row in x.flatten(0, 1)]).reshape(x.shape)
    assert torch.equal(fake_quantize_dynamic(x, fmt), rows)
    assert torch.equal(fake_quantize_dynamic(x.movedim(-1, 1), fmt, 1), rows.movedim(-1, 1))
    if fmt.granularity == "token":
        assert torch.equal(fake_quantize(x, fmt, method="minmax"), rows)
        assert len(quantize(x, fmt).scale) == fmt.num_scales(x.shape) == 10
    assert fake_quantize_dynamic(torch.tensor(1.5), fmt).shape == ()
    assert fake_quantize_dynamic(torch.empty(3, 0), fmt).shape == (3, 0)
    for bad in (math.inf, -math.inf, math.nan):  # a network that breaks is measured, not refused
        x[0, 0, 0] = bad
        broken = fake_quantize_dynamic(x, fmt)
        assert torch.equal(broken[1], rows[1])
        width = (fmt.block or (1, 7))[1]
        assert broken[0, 0, :width].isnan().all()
        assert torch.equal(broken[0, 0, width:], rows[0, 0, width:])
        assert torch.equal(broken[0, 1:], rows[0, 1:])


@pytest.mark.parametrize("name", ["int4:g16", "int8:g16", "int12:g16", "fp6_e3m2:g16"])
def test_small_weights_keep_their_bits(name):
    """Float16 scales go on under 2**-14: in steps of 2**-24, upwards, so that no weight is clipped."""
    x = sized(3, (8, 16)) * 2.0**-20
    q = quantize(x, NumberFormat.parse(name), method="minmax")
    assert (q.scale < 2.0**-14).all()
    grid = grid_of(q.fmt)
    exact = torch.maximum(x.amax(1, keepdim=True) / grid.high, x.amin(1, keepdim=True) / grid.low)
    assert (q.scale >= exact * (1 - 1e-6)).all()
    assert (q.scale <= exact + 2.0**-24).all()


@pytest.mark.parametrize("name", ["int4", "int3:g8", "int4:tensor", "kmeans_2", "nupes_4", "pvq_2:g16", "nf4:g100"])
def test_blocks_without_importance_count_all_alike(name):
    x, fmt = sized(1, (3, 300), torch.float32), NumberFormat.parse(name)
    for method in ("mse", "percentile:90"):
        plain = fake_quantize(x, fmt, method=method)
        assert torch.equal(fake_quantize(x, fmt, method=method, importance=torch.zeros(300)), plain)
    for bad in (-1.0, math.nan, math.inf):
        importance = torch.ones(300)
        importance[5] = bad
        with pytest.raises(FormatError, match="importance holds negative numbers, NaN or infinity"):
            fake_quantize(x, fmt, importance=importance)


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_zero_points_of_ranges_wider_than_the_largest_number(bits, method):
    x = sized(1, (4, 100), torch.float32)
    x /= x.abs().max()
    fmt = NumberFormat.parse(f"int{bits}:asym")
    large = fake_quantize(x * 3e38, fmt, method=method) / 3e38
    torch.testing.assert_close(large, fake_quantize(x, fmt, method=method), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["int4", "int4:g3", "int4:b2x3", "int4:tensor", "int8:token", "nf4:g5", "pvq_2:g16"])
def test_axes_count_from_either_end(name):
    x, fmt = sized(2, (4, 6, 5), torch.float32), NumberFormat.parse(name)
    for axis in range(3):
        assert torch.equal(fake_quantize(x, fmt, axis - 3), fake_quantize(x, fmt, axis))
        if fmt.granularity != "token":
            assert torch.equal(dequantize(quantize(x, fmt, axis - 3)), dequantize(quantize(x, fmt, axis)))
        with_steps = replace(fmt, recipe=("lorc2",))
        assert with_steps.storage_bits(x.shape, axis - 3) == with_steps.storage_bits(x.shape, axis)
    for axis in (3, -4):
        with pytest.raises(FormatError, match=f"no axis {axis}"):
            fmt.storage_bits(x.shape, axis)
        if fmt.granularity not in ("tensor", "token"):
            with pytest.raises(FormatError, match=f"no axis {axis}"):
                fake_quantize(x, fmt, axis)
