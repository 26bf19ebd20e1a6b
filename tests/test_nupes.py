"""Power functions (NUPES)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tensors import tensor

from mpq import NumberFormat
from mpq.errors import FormatError
from mpq.quantizers import blocks, dequantize, nupes, quantize
from mpq.quantizers.nupes import power_levels


def test_power_levels_follow_the_formula():
    a = torch.tensor(0.5, dtype=torch.float64)
    expected = [math.copysign((abs(k) / 7) ** 2, k) for k in range(-8, 8)]
    torch.testing.assert_close(power_levels(4, a), torch.tensor(expected, dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["nupes_2", "nupes_3", "nupes_4:g8", "nupes_6"]))
def test_power_codes_are_nearest(seed, name):
    x, fmt = tensor(seed, (3, 40), torch.float64), NumberFormat.parse(name)
    q = quantize(x, fmt)
    levels = power_levels(fmt.bits, q.outer.reshape(())) * q.scale[:, :, None]
    nearest = (x.reshape(len(levels), -1, 1) - levels).abs().min(2).values
    torch.testing.assert_close((dequantize(q) - x).abs().reshape(nearest.shape), nearest, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("exponent", [0.4, 0.6125, 1.0, 1.4])
def test_the_exponent_is_found(exponent):
    levels = power_levels(4, torch.tensor(exponent, dtype=torch.float64))
    x = levels[torch.randint(0, 16, (8, 400), generator=torch.Generator().manual_seed(0))]
    q = quantize(x, NumberFormat.parse("nupes_4"))
    assert q.outer.item() == pytest.approx(exponent, abs=1e-6)
    torch.testing.assert_close(dequantize(q), x)


@pytest.mark.parametrize("name", ["nupes_3", "nupes_4:tensor", "nupes_4:p2", "nupes_4:g8:p2"])
@pytest.mark.parametrize("power", [-100, -70, 50, 100])
def test_squares_neither_vanish_nor_overflow(name, power):
    fmt, x = NumberFormat.parse(name), tensor(3, (4, 48), power=2)
    usual, other = quantize(x, fmt), quantize(x * 2.0**power, fmt)
    assert torch.equal(other.outer, usual.outer)
    assert torch.equal(other.codes, usual.codes)
    assert torch.equal(other.scale, usual.scale * 2.0**power)
    if not name.endswith("tensor"):
        both = quantize(torch.cat([x, x * 2.0**power]), fmt)
        assert torch.equal(both.outer, usual.outer)
        assert torch.equal(both.codes, torch.cat([usual.codes, usual.codes]))


def test_large_blocks_are_worked_on_in_stretches(monkeypatch):
    """Sums are rounded otherwise, which near equals may hang on."""
    fmt, x, w = NumberFormat.parse("nupes_4:tensor"), tensor(4, (40, 50)), tensor(5, (40, 50)).square()
    for method, importance in (("mse", None), ("mse", w), ("percentile:98", None)):
        whole = quantize(x, fmt, 0, method, importance)
        with monkeypatch.context() as patch:
            for module in (blocks, nupes):
                patch.setattr(module, "BUFFERED", 256)
            parts = quantize(x, fmt, 0, method, importance)
            assert torch.equal(parts.codes, whole.codes)
            assert torch.equal(parts.scale, whole.scale)
            assert torch.equal(dequantize(parts), dequantize(whole))


@pytest.mark.parametrize("name", ["nupes_4", "nupes_2:tensor", "nupes_3:g8:p2"])
def test_scales_that_are_not_stored_are_refused(name):
    fmt, x = NumberFormat.parse(name), tensor(6, (4, 48), torch.float64, power=2)
    for method in ("mse", "minmax"):
        with pytest.raises(FormatError, match=rf"scales of {name} are stored in .* but .*e\+1\d\d is needed"):
            quantize(x * 2.0**400, fmt, 0, method)
        quantize(x * 2.0**100, fmt, 0, method)
    with pytest.raises(FormatError, match="scales of nupes_3:g8 are stored in fp16, which ends at 65504, but"):
        quantize(x.float() * 2.0**20, NumberFormat.parse("nupes_3:g8"))


@pytest.mark.parametrize("method", ["mse", "percentile:98"])
def test_ranges_are_found_once_for_all_exponents(monkeypatch, method):
    calls = []
    for finder in ("minmax_range", "find_range"):
        real = getattr(nupes, finder)
        monkeypatch.setattr(nupes, finder, lambda *args, real=real, own=finder: calls.append(own) or real(*args))
    quantize(tensor(7, (4, 48)), NumberFormat.parse("nupes_4"), 0, method)
    assert max(calls.count(finder) for finder in set(calls)) <= 2  # of the sample and of all
