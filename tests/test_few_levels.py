"""Ternary, binary and powers: ranges of few levels, tables, and scales as they are stored."""

import pytest
import torch
from random_tensors import tensor

from mpq import NumberFormat, Scheme
from mpq.errors import FormatError
from mpq.quantizers import fake_quantize, find_range, quantize
from mpq.quantizers.grids import grid_of
from mpq.quantizers.scales import stored_scale


def test_ternary_by_mean_and_median_as_bitnet_has_it():
    x = tensor(15, (4, 101))
    for method, gamma in (
        ("absmean", x.abs().mean(1, keepdim=True)),
        ("absmedian", x.abs().median(1, keepdim=True).values),
    ):
        expected = (x / gamma).round().clamp(-1, 1) * gamma
        torch.testing.assert_close(fake_quantize(x, NumberFormat.parse("ternary"), method=method), expected)
    mse, mean = (
        (fake_quantize(x, NumberFormat.parse("ternary"), method=m) - x).square().sum() for m in ("mse", "absmean")
    )
    assert mse < mean


def test_ternary_mse_is_the_optimal_ternary_network():
    """The best scale and threshold over all supports (Ternary Weight Networks, Li et al., 2016, equation 5)."""
    x = tensor(16, (1, 300), torch.float64)
    size = x.abs().flatten().sort(descending=True).values
    kept = torch.arange(1, 301, dtype=torch.float64)
    best = size.square().sum() - (size.cumsum(0).square() / kept).max()
    found = (fake_quantize(x, NumberFormat.parse("ternary"), method="mse") - x).square().sum()
    assert best * (1 - 1e-9) <= found <= best * 1.005


@pytest.mark.parametrize("name", ["binary", "int1"])
def test_binary_scale_is_the_mean_magnitude(name):
    x = tensor(17, (4, 50), torch.float64)
    importance = tensor(18, (4, 50), torch.float64).square()
    q = quantize(x, NumberFormat.parse(name))
    torch.testing.assert_close(q.scale, x.abs().mean(1, keepdim=True), rtol=1e-6, atol=0)
    q = quantize(x, NumberFormat.parse(name), importance=importance)
    mean = (x.abs() * importance).sum(1, keepdim=True) / importance.sum(1, keepdim=True)
    torch.testing.assert_close(q.scale, mean, rtol=1e-6, atol=0)


def test_means_and_medians_leave_padding_out():
    x = torch.tensor([[1.0, -2, 3, 4, 5, 6, 7, 9]])
    fmt = NumberFormat.parse("ternary:g5")
    assert quantize(x, fmt, method="absmean").scale.flatten().tolist() == [3.0, pytest.approx(22 / 3, rel=1e-3)]
    assert quantize(x, fmt, method="absmedian").scale.flatten().tolist() == [3.0, 7.0]
    for method in ("absmean", "absmedian"):
        with pytest.raises(FormatError, match="ternary and binary"):
            find_range(x, NumberFormat.parse("int4"), method)


def test_log2_is_for_softmax():
    x = torch.softmax(3 * tensor(19, (8, 40)), 1)
    fmt = NumberFormat.parse("log2_4:tensor")
    grid = grid_of(fmt)
    assert sorted(grid.values) == [0.0, *(2.0**-k for k in range(14, -1, -1))]
    assert grid.encode(torch.tensor([1.0, 0.5, 2.0**-14, 0.0])).tolist() == [0, 1, 14, 15]
    rounded = fake_quantize(x, fmt, method="minmax")
    assert ((rounded / x).log2().abs()[x > 1e-3 * x.max()] <= 0.6).all()
    assert (fake_quantize(torch.zeros(3, 3), fmt) == 0).all()
    with pytest.raises(FormatError, match="no negative numbers"):
        Scheme.parse("Wlog2_4")
    assert Scheme.parse("W8Alog2_4").activation == fmt


def test_levels_of_powers():
    assert grid_of(NumberFormat.parse("pow2_3")).values == (-1, -0.5, -0.25, 0, 0.25, 0.5, 1)
    expected = [2 ** (-k / 2) for k in range(7)]
    assert sorted(v for v in grid_of(NumberFormat.parse("post_4")).values if v > 0) == pytest.approx(sorted(expected))
    assert grid_of(NumberFormat.parse("int2:bipolar")).values == (-1.5, -0.5, 0.5, 1.5)


def test_mxint8_rounds_ties_to_even():
    grid = grid_of(NumberFormat.parse("mxint8"))
    ticks = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 200.0, -128.0])
    assert (grid.round_(ticks / 64) * 64).tolist() == [0, 2, 2, 0, -2, 126, 127, -127]


def test_power_of_two_scales_are_exact_and_never_clip():
    fmt = NumberFormat.parse("int4:p2")
    powers = torch.tensor([2.0**k for k in range(-126, 127)])
    assert torch.equal(stored_scale(powers, fmt), powers)
    assert torch.equal(stored_scale(torch.nextafter(powers, torch.tensor(torch.inf)), fmt), powers * 2)
    assert torch.equal(stored_scale(powers * 1.5, fmt), powers * 2)


def test_scales_of_float64_tensors_are_stored_in_float32():
    q = quantize(tensor(20, (5, 30), torch.float64), NumberFormat.parse("int4"))
    assert q.scale.dtype == torch.float64
    assert torch.equal(q.scale, q.scale.float().double())
