import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tensors import tensor

from mpq import NumberFormat
from mpq.errors import DataError, FormatError
from mpq.quantizers import ActivationObserver, dequantize, fake_quantize, fake_quantize_static, find_range, quantize
from mpq.quantizers.blocks import from_blocks, to_blocks
from mpq.quantizers.scales import scale_and_zero

formats = st.builds(
    NumberFormat,
    st.just("int"),
    st.integers(1, 8),
    st.one_of(st.sampled_from(["tensor", "channel"]), st.sampled_from(["group:3", "group:8", "group:64"])),
    st.booleans(),
)
methods = st.sampled_from(["mse", "minmax", "percentile:99"])


@settings(max_examples=80, deadline=None)
@given(formats, methods, st.integers(0, 1000), st.sampled_from([0, 1]))
def test_fake_quantize_equals_codes_times_scales(fmt, method, seed, axis):
    x = tensor(seed)
    q = quantize(x, fmt, axis, method)
    low, high = fmt.levels
    assert low <= int(q.codes.min())
    assert int(q.codes.max()) <= high
    assert (q.scale > 0).all()
    assert len(q.scale) == fmt.num_scales(x.shape, axis)
    torch.testing.assert_close(dequantize(q), fake_quantize(x, fmt, axis, method), rtol=1e-6, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(formats, st.integers(0, 1000))
def test_quantizing_twice_changes_nothing_more(fmt, seed):
    """Where the ends of the codes are taken, the second range is the first."""
    x = tensor(seed)
    low, high = (-4.0, 4.0) if fmt.symmetric else (0.0, 4.0)
    blocks = to_blocks(x, fmt).clamp(low, high)
    blocks[:, 0] = -4.0 if fmt.symmetric else 4.0
    x = from_blocks(blocks, tuple(x.shape))
    once = fake_quantize(x, fmt, method="minmax")
    torch.testing.assert_close(fake_quantize(once, fmt, method="minmax"), once, rtol=1e-3, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(formats.filter(lambda f: f.bits > 1), st.integers(0, 1000))
def test_minmax_error_is_at_most_half_a_step(fmt, seed):
    x = tensor(seed)
    q = quantize(x, fmt, method="minmax")
    step = from_blocks(q.scale.expand_as(q.codes).contiguous(), q.shape)
    # A rounded zero point shifts the range by up to half a step; float16 scales add their own rounding.
    slack = (1.0 if not fmt.symmetric else 0.5) + (2 ** (fmt.bits - 11) if fmt.group_size else 1e-3)
    assert ((dequantize(q) - x).abs() <= step * slack).all()


@settings(max_examples=40, deadline=None)
@given(formats, st.integers(0, 1000))
def test_mse_range_is_never_worse_than_minmax(fmt, seed):
    x = tensor(seed, (6, 50))
    errors = {m: (fake_quantize(x, fmt, method=m) - x).square().sum().item() for m in ("mse", "minmax")}
    assert errors["mse"] <= errors["minmax"] * (1 + 1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_range_agrees_with_a_dense_search(bits, symmetric):
    fmt = NumberFormat("int", bits, "channel", symmetric)
    x = tensor(7, (3, 400))
    lo, hi = find_range(x, fmt, "minmax")
    best = torch.full((3,), math.inf)
    for ratio in torch.linspace(0.02, 1, 1500):
        scale, zero = scale_and_zero(lo * ratio, hi * ratio, fmt)
        codes = ((x / scale).round() + zero).clamp(*fmt.levels)
        best = torch.minimum(best, ((codes - zero) * scale - x).square().sum(1))
    found = (fake_quantize(x, fmt, method="mse") - x).square().sum(1)
    assert (found <= best * 1.02).all()


def test_agrees_with_torch_per_channel():
    x = tensor(1, (6, 40))
    q = quantize(x, NumberFormat.parse("int4"), method="minmax")
    expected = torch.fake_quantize_per_channel_affine(x, q.scale.flatten(), torch.zeros(6, dtype=torch.int32), 0, -8, 7)
    torch.testing.assert_close(dequantize(q), expected, rtol=1e-5, atol=1e-6)


def test_one_symmetric_bit_is_plus_or_minus_scale():
    x = tensor(2, (4, 30))
    values = fake_quantize(x, NumberFormat.parse("int1"))
    assert torch.equal(values.sign(), torch.where(x >= 0, 1.0, -1.0))
    # The best scale is the mean magnitude (XNOR-Net, Rastegari et al., 2016); the search comes close to it.
    torch.testing.assert_close(values.abs()[:, 0], x.abs().mean(1), rtol=0.1, atol=0)


def test_percentile_clips_the_tails():
    x = torch.arange(1.0, 1001.0)[None]
    _, hi = find_range(x, NumberFormat.parse("int8"), "percentile:99")
    assert hi.item() == 990
    lo, hi = find_range(torch.cat([-x, x], 1), NumberFormat.parse("int8"), "percentile:75")
    assert (lo.item(), hi.item()) == (-500, 500)  # ranks 501 and 1500 of 2000


@pytest.mark.parametrize(
    "method",
    [
        *("median", "percentile", "percentile:x", "percentile:50", "percentile:101"),
        *("percentile:\u0669\u0669", "percentile:9_9", "percentile: 99", "pnorm:\u0662", "mse:\u0669", "mse:1e2"),
    ],
)
def test_unknown_range_methods_are_refused(method):
    with pytest.raises(FormatError, match="unknown range method"):
        fake_quantize(tensor(0), NumberFormat.parse("int4"), method=method)


def test_constant_and_zero_tensors():
    for value in (0.0, 3.0, -2.0):
        x = torch.full((3, 5), value)
        for name in ("int4", "int4:asym", "int4:g2", "int1"):
            out = fake_quantize(x, NumberFormat.parse(name))
            assert torch.isfinite(out).all()
            torch.testing.assert_close(out, x, rtol=0.04, atol=1e-6)


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_float_formats_are_casts(name, dtype):
    x = tensor(3)
    assert torch.equal(fake_quantize(x, NumberFormat.parse(name)), x.to(dtype).float())
    with pytest.raises(FormatError, match="no integer codes"):
        quantize(x, NumberFormat.parse(name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_dtype_and_does_not_touch_the_input(dtype):
    x = tensor(4, dtype=dtype)
    before = x.clone()
    assert fake_quantize(x, NumberFormat.parse("int8")).dtype == dtype
    assert torch.equal(x, before)


def test_group_scales_are_representable_in_float16():
    q = quantize(tensor(5, (4, 64)), NumberFormat.parse("int4:g16"))
    assert torch.equal(q.scale, q.scale.half().float())


@given(st.integers(1, 9), st.sampled_from([0, 1]), st.sampled_from([1, 2, 5, 8, 100]))
def test_blocks_round_trip(width, axis, group):
    x = tensor(width, (3, width, 2))
    fmt = NumberFormat("int", 4, f"group:{group}")
    assert torch.equal(from_blocks(to_blocks(x, fmt, axis), tuple(x.shape), axis), x)


def test_observer_sees_exact_extremes_and_is_bounded():
    observer = ActivationObserver()
    data = [tensor(i, (64, 1000)) for i in range(40)]
    for x in data:
        observer.update(x)
    everything = torch.cat(data)
    fmt = NumberFormat.parse("int8:tensor:asym")
    assert observer.range(fmt, "minmax") == (everything.min().item(), everything.max().item())
    assert sum(len(s) for s in observer._samples.values()) <= 2**17
    low, high = observer.range(fmt, "percentile:99")
    assert high == pytest.approx(torch.quantile(everything.flatten()[::7], 0.99).item(), abs=0.05)
    assert low == pytest.approx(-high, abs=0.1)


def test_observer_range_minimizes_the_error():
    observer, x = ActivationObserver(), tensor(9, (200, 50)).relu()
    observer.update(x)
    fmt = NumberFormat.parse("int4:tensor:asym")
    errors = {
        m: (fake_quantize_static(x, fmt, *observer.range(fmt, m)) - x).square().mean().item() for m in ("mse", "minmax")
    }
    assert errors["mse"] < 0.8 * errors["minmax"]


def test_observer_refuses_what_it_can_not_use():
    observer = ActivationObserver()
    with pytest.raises(DataError, match="nothing was observed"):
        observer.range(NumberFormat.parse("int8:tensor"))
    for bad in (math.nan, math.inf):
        with pytest.raises(DataError, match="NaN or infinity"):
            observer.update(torch.tensor([1.0, bad]))
    observer.update(torch.ones(3))
    with pytest.raises(FormatError, match="per-tensor"):
        observer.range(NumberFormat.parse("int8"))
