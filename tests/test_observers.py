"""Observers of activations: samples, histograms and statistics along an axis."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tensors import inputs

import mpq
from mpq import NumberFormat
from mpq.errors import DataError, FormatError
from mpq.quantizers import ActivationObserver, fake_quantize_static, find_range
from mpq.quantizers.entropy import best_share
from mpq.quantizers.observers import AxisObserver, HistogramObserver
from mpq.quantizers.scales import scale_and_zero

INT8, INT4 = (NumberFormat.parse(f"int{bits}:tensor:asym") for bits in (8, 4))
EVERY = (ActivationObserver, HistogramObserver, AxisObserver)


def batches(seed, count=4, shape=(16, 250), relu=False):
    g = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=g) * (1 + i) for i in range(count)]
    return [x.relu() for x in found] if relu else found


def watched(observer, data):
    for x in data:
        observer.update(x)
    return observer


@pytest.mark.parametrize("make", EVERY)
def test_observers_share_one_protocol(make):
    observer = make()
    with pytest.raises(DataError, match="nothing was observed"):
        observer.range(INT8, "minmax")
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(DataError, match="NaN or infinity"):
            observer.update(torch.tensor([1.0, bad]))
    data = batches(0)
    observer.update(torch.zeros(0, 250))
    watched(observer, data)
    values = torch.cat(data)
    assert observer.range(INT8, "minmax") == (values.min().item(), values.max().item())
    assert observer.range(INT8, "minmax") == watched(make(), data).range(INT8, "minmax")
    with pytest.raises(FormatError, match="per-tensor"):
        observer.range(NumberFormat.parse("int8"), "minmax")
    with pytest.raises(FormatError, match="range"):
        observer.range(INT8, "magic")


@pytest.mark.parametrize("method", ["mse", "minmax", "percentile:99"])
def test_the_default_is_a_strided_sample_with_the_ends(method):
    data = batches(1, 6, (40, 999))
    sample = torch.cat([x.flatten()[:: -(-x.numel() // 8192) | 1] for x in data])
    ends = torch.stack([f(x) for x in data for f in (torch.amin, torch.amax)])
    values = torch.cat([sample, ends.min()[None], ends.max()[None]])[None]
    expected = [end.item() for end in find_range(values, INT4, method)]
    assert watched(ActivationObserver(), data).range(INT4, method) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(4)), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_histograms_do_not_depend_on_the_order(seed, order, unit):
    data = [x * unit for x in batches(seed, shape=(3, 50))]
    one, other = watched(HistogramObserver(), data), watched(HistogramObserver(), [data[i] for i in order])
    assert torch.equal(one.counts, other.counts)
    assert int(one.counts.sum()) == 600
    for method in ("mse", "percentile:95", "kl"):
        assert one.range(INT8, method) == other.range(INT8, method)


def test_bins_count_what_they_hold():
    data = batches(2)
    observer = watched(HistogramObserver(), data)
    width = 2.0**observer._power
    values = torch.cat(data).flatten().double()
    edges = width * torch.arange(-2048, 2049, dtype=torch.float64)
    expected = torch.histogram(values, edges).hist
    assert torch.equal(observer.counts.double(), expected)
    assert width <= values.abs().max() / 1024


@pytest.mark.parametrize("percentile", [75, 99, 99.9, 100])
@pytest.mark.parametrize("relu", [False, True])
def test_percentiles_of_a_histogram_are_those_of_the_values(percentile, relu):
    data = batches(3, relu=relu)
    observer = watched(HistogramObserver(), data)
    values = torch.cat(data).flatten().sort().values
    rank = round(percentile / 100 * len(values))
    lo, hi = observer.range(INT8, f"percentile:{percentile}")
    assert hi == pytest.approx(values[rank - 1].item(), abs=2.0**observer._power)
    assert lo == pytest.approx(min(0.0, values[len(values) - rank].item()), abs=2.0**observer._power)


@pytest.mark.parametrize("fmt", [INT8, INT4, NumberFormat.parse("fp4_e2m1:tensor"), NumberFormat.parse("int4:tensor")])
@pytest.mark.parametrize("relu", [False, True])
def test_mse_of_a_histogram_is_at_least_as_good_as_of_a_sample(fmt, relu):
    data = batches(4, 6, (64, 500), relu)
    values = torch.cat(data)
    errors = [
        (fake_quantize_static(values, fmt, *watched(make(), data).range(fmt, "mse")) - values).square().mean().item()
        for make in (HistogramObserver, ActivationObserver)
    ]
    assert errors[0] <= 1.02 * errors[1]


def plain_kl(values, counts, fmt, lo, hi):
    """The divergence that `best_share` minimizes, bin by bin."""
    scale, zero = (v.item() for v in scale_and_zero(torch.tensor(lo), torch.tensor(hi), fmt))
    first, last = ((level - zero) * scale for level in fmt.levels)
    inside = [i for i, v in enumerate(values) if first <= v <= last]
    kept = torch.tensor([values[i] for i in inside])
    levels = fake_quantize_static(kept, fmt, lo, hi).tolist()
    true = [float(counts[i]) for i in inside]
    true[0] += sum(counts[: inside[0]])
    true[-1] += sum(counts[inside[-1] + 1 :])
    kl = 0.0
    for p, level in zip(true, levels, strict=True):
        same = [counts[i] for i, other in zip(inside, levels, strict=True) if other == level]
        q = sum(same) / len(same) / sum(counts[i] for i in inside)
        kl += p / sum(counts) * math.log(p / sum(counts) / q)
    return kl


@pytest.mark.parametrize("fmt", [INT4, NumberFormat.parse("int3:tensor")])
def test_kl_agrees_with_a_plain_loop(fmt):
    values = torch.linspace(-1, 3, 200)
    counts = (1000 * torch.exp(-(values.abs() * 2)) + 1).round().long()
    shares = torch.arange(100, math.ceil(100 * 2**fmt.bits / 199) - 1, -1) / 100
    ends = torch.tensor([[-1.0]]), torch.tensor([[3.0]])
    found = best_share(counts[None].double(), values[None], ends, fmt, shares)
    best = min((plain_kl(values.tolist(), counts.tolist(), fmt, -r, 3 * r), -r) for r in shares.tolist())
    assert found.item() == pytest.approx(-best[1])


def test_kl_clips_tails_but_not_the_body():
    """Zeros of a ReLU have no say; a far outlier is given up."""
    body = batches(5, 1, (100, 1000), relu=True)[0]
    observer = watched(HistogramObserver(), [body])
    largest = body.max().item()
    assert observer.range(INT8, "kl")[1] > 0.8 * largest
    assert observer.range(INT4, "kl") == watched(HistogramObserver(), [body[body > 0]]).range(INT4, "kl")
    observer.update(torch.tensor([20 * largest]))
    lo, hi = observer.range(INT4, "kl")
    assert lo == 0
    assert 0.3 * largest < hi < 1.2 * largest
    assert observer.range(INT8, "kl")[1] < 4 * largest
    assert watched(HistogramObserver(), [torch.zeros(5)]).range(INT8, "kl") == (0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_histograms_take_any_float(dtype):
    x = batches(6, 1)[0].to(dtype)
    observer = watched(HistogramObserver(), [x])
    assert int(observer.counts.sum()) == x.numel()
    assert observer.range(INT8, "minmax") == (x.min().item(), x.max().item())
    assert torch.equal(observer.counts, watched(HistogramObserver(), [x.double()]).counts)


@pytest.mark.parametrize(("axis", "size"), [(-1, 6), (1, 5)])
def test_statistics_along_an_axis(axis, size):
    g = torch.Generator().manual_seed(0)
    data = [torch.randn(n, 5, 6, generator=g) for n in (3, 1, 4)]
    observer = watched(AxisObserver(axis), data)
    values = torch.cat(data).movedim(axis, -1).reshape(-1, size).double()
    assert observer.rows == len(values)
    torch.testing.assert_close(observer.largest, values.abs().amax(0))
    torch.testing.assert_close(observer.lo, values.amin(0))
    torch.testing.assert_close(observer.hi, values.amax(0))
    torch.testing.assert_close(observer.mean_abs, values.abs().mean(0))
    torch.testing.assert_close(observer.mean_square, values.square().mean(0))
    with pytest.raises(DataError, match="elements, now 7"):
        observer.update(torch.zeros(7, 7, 7))
    with pytest.raises(FormatError, match="minmax only"):
        observer.range(INT8, "mse")


@pytest.mark.parametrize("size", [(8192,), (3 * 8192,), (4, 1000, 5)])
def test_samples_stay_even(size):
    """However often samples are thinned, equal updates keep equally many, and all of them together meet all places."""
    observer = ActivationObserver()
    numel = math.prod(size)
    for _ in range(70):
        observer.update(torch.arange(numel).float().reshape(size) % 64)
    kept = [len(s) for s in observer._samples.values()]
    assert len(kept) == 70
    assert max(kept) - min(kept) <= 1
    assert sum(kept) <= 2**17
    assert len(torch.cat(list(observer._samples.values())).unique()) == 64


def test_samples_are_copies():
    x = torch.ones(10)
    observer = watched(ActivationObserver(), [x])
    x.fill_(5)
    assert observer.range(INT8, "percentile:60") == (0, 1)


@pytest.mark.parametrize("make", EVERY)
def test_what_scales_do_not_reach_is_refused(make):
    with pytest.raises(DataError, match=r"size 1e\+200, which float32, what scales are stored in,"):
        make().update(torch.tensor([1.0, -1e200], dtype=torch.float64))


@pytest.mark.parametrize("granularity", ["", ":token"])
def test_formats_without_negative_numbers_are_for_inputs_without(granularity):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).eval()
    data = torch.utils.data.TensorDataset(inputs(16, 6), torch.zeros(16, dtype=torch.long))
    schemes, options = f"W8Alog2_4{granularity}", {"estimator": "weight_sqnr", "progress": False}
    with pytest.raises(FormatError, match=r"layer '0': log2_4.* has no negative numbers, but the layer's input has: -"):
        mpq.analyze(model, torch.utils.data.DataLoader(data, 8), schemes, **options)
    data = torch.utils.data.TensorDataset(inputs(16, 6).abs(), torch.zeros(16, dtype=torch.long))
    mpq.analyze(model, torch.utils.data.DataLoader(data, 8), schemes, **options)
