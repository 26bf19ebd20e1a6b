"""Codebooks by k-means."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tensors import tensor

from mpq import NumberFormat
from mpq.quantizers import blocks, dequantize, fake_quantize, kmeans, quantize, sorted_sums
from mpq.quantizers.kmeans import fit_codebook, nearest_level
from mpq.quantizers.sorted_sums import SortedBlocks


def brute_force(values, weights, levels):
    """Least weighted squared error of all partitions of sorted values into intervals."""
    order = values.argsort()
    v, w = values[order], weights[order]
    best = math.inf
    for cuts in itertools.combinations(range(1, len(v)), levels - 1):
        error = 0.0
        for a, b in itertools.pairwise((0, *cuts, len(v))):
            mean = (w[a:b] * v[a:b]).sum() / w[a:b].sum()
            error += (w[a:b] * (v[a:b] - mean).square()).sum().item()
        best = min(best, error)
    return best


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 4]), st.booleans())
def test_small_codebooks_are_optimal(seed, levels, weighted):
    x = tensor(seed, (3, 8), torch.float64, power=3)
    w = tensor(seed + 1, (3, 8), torch.float64).square() + 1e-3 if weighted else torch.ones_like(x)
    codebook = fit_codebook(x, levels, w)
    assert (codebook.diff(dim=1) >= 0).all()
    rounded = codebook.gather(1, nearest_level(x, codebook).long())
    for row in range(3):
        error = (w[row] * (rounded[row] - x[row]).square()).sum().item()
        assert error == pytest.approx(brute_force(x[row], w[row], levels), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("bits", "expected"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002499)])
def test_codebooks_of_normal_values_are_those_of_lloyd_and_max(bits, expected):
    """Mean squared errors of the optimal quantizers of a normal distribution (Max, 1960, table 1)."""
    x = tensor(11, (1, 200_000), torch.float64)
    found = (fake_quantize(x, NumberFormat.parse(f"kmeans_{bits}")) - x).square().mean().item()
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("levels", [4, 16, 64])
def test_levels_are_the_means_of_what_is_rounded_to_them(levels):
    x, w = tensor(21, (3, 2000), torch.float64, power=2), tensor(22, (3, 2000), torch.float64).square()
    codebook = fit_codebook(x, levels, w)
    codes = nearest_level(x, codebook).long()
    zero = torch.zeros(3, levels, dtype=torch.float64)
    means = zero.scatter_add(1, codes, w * x) / zero.scatter_add(1, codes, w)
    torch.testing.assert_close(codebook, means, rtol=1e-9, atol=1e-12)


@pytest.fixture
def in_stretches(monkeypatch):
    """As with blocks of millions of elements."""

    def switch():
        monkeypatch.setattr(sorted_sums, "_LARGE", 0)
        monkeypatch.setattr(sorted_sums, "_STRETCH", 64)
        monkeypatch.setattr(sorted_sums, "_STEP", 16)

    return switch


@pytest.mark.parametrize("count", [1, 2, 16, 63, 64, 65, 128, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_in_stretches_are_the_same_bit_for_bit(count, weighted, in_stretches):
    x = torch.cat([tensor(3, (2, count), power=3), tensor(4, (1, count)).round(), torch.zeros(1, count)])
    w = tensor(5, x.shape).square() if weighted else None
    cuts = torch.arange(0, count + 1).expand(len(x), -1)
    whole = SortedBlocks(x, w)
    expected = whole.values, whole.before(cuts), *(whole.even_cuts(n) for n in (2, 16, 64))
    codebooks = [fit_codebook(x, levels, w) for levels in (2, 16, 32)]
    in_stretches()
    parts = SortedBlocks(x, w)
    found = parts.values, parts.before(cuts), *(parts.even_cuts(n) for n in (2, 16, 64))
    assert parts._kept.shape[2] == 1 + count // 16
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, [fit_codebook(x, levels, w) for levels in (2, 16, 32)], codebooks))
    order = x.argsort(1)
    each = torch.ones_like(x) if w is None else w.gather(1, order)
    moments = [(each.double() * x.gather(1, order).double() ** k)[:, : count // 2].sum(1) for k in range(3)]
    torch.testing.assert_close(found[1][:, :, count // 2], torch.stack(moments))


@pytest.mark.parametrize("name", ["kmeans_3", "kmeans_3:tensor"])
def test_large_blocks_get_codes_in_stretches(name, monkeypatch):
    fmt, x, w = NumberFormat.parse(name), tensor(6, (4, 500)), tensor(7, (4, 500)).square()
    whole = quantize(x, fmt, 0, importance=w)
    values = dequantize(whole)
    for module in (blocks, kmeans):
        monkeypatch.setattr(module, "BUFFERED", 64)
    parts = quantize(x, fmt, 0, importance=w)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.codebook, whole.codebook)
    assert torch.equal(dequantize(parts), values)


def test_codebooks_keep_few_values_exactly():
    levels = torch.tensor([-1.5, -0.25, -0.0009765625, 0.0, 0.125, 7.0, 100.0, 1000.0])
    x = levels[torch.randint(0, 8, (3, 1000), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(fake_quantize(x, NumberFormat.parse("kmeans_3")), x)
    assert torch.equal(fake_quantize(x, NumberFormat.parse("kmeans_6")), x)


def test_sensitive_weights_are_rounded_better():
    x, importance = tensor(2, (4, 300)), torch.ones(4, 300)
    x[:, :100] *= 0.3
    importance[:, :100] = 100
    fmt = NumberFormat.parse("kmeans_3")
    plain, weighted = ((fake_quantize(x, fmt, importance=i) - x).square() for i in (None, importance))
    assert weighted[:, :100].sum() < 0.7 * plain[:, :100].sum()
    assert (weighted * importance).sum() < 0.8 * (plain * importance).sum()
    importance[:, 5:] = 0
    few = fake_quantize(x, fmt, importance=importance)
    torch.testing.assert_close(few[:, :5], x[:, :5], rtol=1e-3, atol=0)


def test_padding_of_the_last_group_does_not_pull_levels():
    x = torch.cat([torch.zeros(1, 8), torch.arange(1.0, 4.0)[None]], 1)
    torch.testing.assert_close(
        fake_quantize(x, NumberFormat.parse("kmeans_1:g8"))[0, 8:], torch.tensor([1.0, 2.5, 2.5])
    )
