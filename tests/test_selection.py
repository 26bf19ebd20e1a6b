"""Ranks in blocks too large to sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tensors import tensor

from mpq import NumberFormat
from mpq.quantizers import find_range, mean_ranges, ranges, selection
from mpq.quantizers.selection import weighted_rank

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _pieces(monkeypatch):
    for module in (selection, mean_ranges):
        monkeypatch.setattr(module, "BUFFERED", 64)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 9999), st.sampled_from(DTYPES), st.integers(1, 300), st.integers(-30, 30), st.booleans())
def test_ranks_are_those_of_sorted_values(seed, dtype, count, power, repeats):
    x = tensor(seed, (count,), torch.float64, 3)
    x = (((x * 2).round() if repeats else x) * 2.0**power).to(dtype)
    rank = 1 + seed % count
    assert weighted_rank(x, rank) == x.sort().values[rank - 1]
    assert weighted_rank(x, rank, magnitudes=True) == x.abs().sort().values[rank - 1]
    own = tensor(seed + 1, (count,)) > 0
    own[seed % count] = True
    kept = x[own].sort().values
    assert weighted_rank(x, 1 + seed % len(kept), own) == kept[seed % len(kept)]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9999), st.sampled_from(DTYPES[:2]), st.integers(1, 300), st.floats(0, 1))
def test_weighted_ranks_leave_less_than_the_target_below(seed, dtype, count, share):
    x, w = tensor(seed, (count,), dtype).round(decimals=1), tensor(seed + 1, (count,), dtype).square().double()
    w[:: 1 + seed % 5] *= 0
    w[-1] += 1
    target = share * w.sum()
    found = weighted_rank(x, target, w)
    rounding = 1e-12 * w.sum()
    assert w[x < found].sum() <= target + rounding
    assert w[x <= found].sum() >= target - rounding
    assert w[x == found].sum() > 0


@pytest.mark.parametrize("extreme", [0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38])
def test_all_floats_have_their_place(extreme):
    x = torch.tensor([extreme, 1.0, -1.0, 2.0**-126, -(2.0**-126)])
    for rank in range(1, 6):
        assert weighted_rank(x, rank) == x.sort().values[rank - 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("method", ["percentile:99", "percentile:100", "percentile:61.8", "absmedian"])
def test_ranges_of_large_blocks_are_those_of_sorted_ones(method, weighted, dtype, monkeypatch):
    fmt = NumberFormat.parse("ternary")
    for x in (tensor(5, (3, 501), dtype), tensor(6, (2, 40), dtype).abs()):
        weights = (tensor(7, x.shape).abs() * 4).round() if weighted else None
        expected = find_range(x, fmt, method, weights)
        with monkeypatch.context() as patch:
            patch.setattr(ranges, "LARGE", 1)
            patch.setattr(mean_ranges, "LARGE", 1)
            assert all(map(torch.equal, find_range(x, fmt, method, weights), expected))
