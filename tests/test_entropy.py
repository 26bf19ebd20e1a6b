"""Ranges by the divergence of histograms (`kl`), of which most bins hold nothing where groups are small."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tensors import tensor

from mpq import NumberFormat
from mpq.quantizers import entropy, find_range
from mpq.quantizers.entropy import best_share, entropy_range
from mpq.quantizers.grids import IntGrid, grid_of
from mpq.quantizers.ranges import minmax_range
from mpq.quantizers.scales import scale_and_zero

NAMES = ["int4:g128", "int4:g128:asym", "int8:g8", "int1:g8", "int2:g8:asym", "nf4:g64", "fp8_e4m3", "ternary:g8"]
NAMES += ["log2_4:tensor", "pow2_3:g16:p2", "int4:g16:asym"]


def divergences(counts, centres, ends, fmt, ratios):
    """What `best_share` minimizes, ``[ratios, blocks]``, with all bins of all blocks, filled or not, at each clip."""
    found = []
    for ratio in ratios:
        scale, zero = scale_and_zero(ends[0] * ratio, ends[1] * ratio, fmt)
        units, grid = centres / scale, grid_of(fmt)
        shift = zero if isinstance(grid, IntGrid) and not fmt.symmetric else torch.zeros_like(zero)
        left, right = units < grid.low - shift, units > grid.high - shift
        kept = counts * ~(left | right)
        reference, levels = kept.clone(), grid.round_(units.clone(), None if fmt.symmetric else zero)
        for row in range(len(counts)):
            inside = (~(left | right))[row].nonzero().flatten().tolist() or [0, counts.shape[1] - 1]
            reference[row, inside[0]] += (counts * left)[row].sum()
            reference[row, inside[-1]] += (counts * right)[row].sum()
        filled = (reference > 0).to(counts.dtype)
        run = torch.zeros_like(levels, dtype=torch.int64)
        run[:, 1:] = (levels[:, 1:] != levels[:, :-1]).cumsum(1)
        sums = torch.zeros_like(counts).scatter_add_(1, run, kept)
        sharers = torch.zeros_like(counts).scatter_add_(1, run, filled)
        rounded = (sums / sharers.clamp(min=1)).gather(1, run) * filled
        p = reference / reference.sum(1, keepdim=True).clamp(min=1e-10)
        q = rounded / rounded.sum(1, keepdim=True).clamp(min=1e-10)
        found.append(torch.xlogy(p, p / q.clamp(min=1e-10)).sum(1))
    return torch.stack(found)


def plain_divergence(counts, units, fmt):
    """Of one block at a time, bin by bin, in Python's numbers; for symmetric formats."""
    grid = grid_of(fmt)
    levels = grid.round_(torch.tensor(units, dtype=torch.float64)).tolist()
    inside = [i for i, u in enumerate(units) if grid.low <= u <= grid.high]
    true = {i: counts[i] for i in inside}
    true[inside[0]] += sum(counts[: inside[0]])
    true[inside[-1]] += sum(counts[inside[-1] + 1 :])
    shared = {}
    for i in inside:
        if true[i] > 0:
            same = [j for j in inside if levels[j] == levels[i]]
            shared[i] = sum(counts[j] for j in same) / sum(true[j] > 0 for j in same)
    whole = max(sum(shared.values()), 1e-10)
    parts = [(true[i] / sum(counts), q / whole) for i, q in shared.items()]
    return sum(p * math.log(p / max(q, 1e-10)) for p, q in parts)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([NumberFormat.parse(name) for name in NAMES]),
    st.integers(0, 999),
    st.sampled_from([1, 2, 7, 30, 128, 500]),
    st.sampled_from([1, 3]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(["signed", "rectified", "negative"]),
)
def test_shares_are_those_of_all_bins(fmt, seed, elements, power, dtype, signs):
    """Bit for bit, ties and all: filled bins alone do what all bins would."""
    x = tensor(seed, (5, elements), dtype, power)
    x = {"signed": x, "rectified": x.clamp(min=0), "negative": -x.abs()}[signs]
    x[-1] = 0
    lo, hi = ends = minmax_range(x)
    ratios = torch.linspace(1.0, 0.2, 20, dtype=dtype)
    counts, centres = entropy._histogram(x, lo, hi, None)
    assert counts.shape == (5, 2048)
    found = divergences(counts, centres, ends, fmt, ratios)
    assert torch.equal(best_share(counts, centres, ends, fmt, ratios)[:, 0], ratios[found.argmin(0)])
    lost = [divergence(counts, centres, ends, fmt, ratio) for ratio in ratios]
    assert torch.equal(torch.cat(lost, 1).T, found)


def divergence(counts, centres, ends, fmt, ratio):
    scale, zero = scale_and_zero(ends[0] * ratio, ends[1] * ratio, fmt)
    histogram = entropy._Histogram.of(counts, centres)
    return entropy._divergence(histogram, scale, grid_of(fmt), None if fmt.symmetric else zero)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["int3", "int1", "ternary", "nf4"]), st.integers(0, 9999), st.floats(0.05, 1), st.booleans())
def test_divergences_are_those_of_a_plain_loop(name, seed, share, whole):
    """With bins that hold nothing at the ends of what is inside, and with the weights of elements as counts."""
    fmt, generator = NumberFormat.parse(name), torch.Generator().manual_seed(seed)
    drawn = torch.rand(40, generator=generator, dtype=torch.float64)
    counts = torch.where(torch.rand(40, generator=generator) < 0.3, (drawn * 5).ceil() if whole else drawn, 0.0)
    counts[-1] = 1.0
    centres = torch.linspace(-1, 1, 40, dtype=torch.float64)
    ends = torch.tensor([[-1.0]], dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64)
    scale, _ = scale_and_zero(ends[0] * share, ends[1] * share, fmt)
    expected = plain_divergence(counts.tolist(), (centres / scale)[0].tolist(), fmt)
    found = divergence(counts[None], centres[None], ends, fmt, share)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", ["int4:g64", "int4:g64:asym", "nf4:g64"])
def test_weights_of_elements_are_counts(name):
    """Sums of what is beyond a clip may be rounded otherwise than those of all bins."""
    fmt, x, weights = NumberFormat.parse(name), tensor(1, (40, 64)), tensor(2, (40, 64)).square()
    weights[:, ::3] = 0
    ends = minmax_range(x)
    counts, centres = entropy._histogram(x, *ends, weights)
    ratios = torch.linspace(1.0, 0.3, 30)
    found = divergences(counts, centres, ends, fmt, ratios)
    chosen = best_share(counts, centres, ends, fmt, ratios)[:, 0]
    places = (ratios[:, None] == chosen).int().argmax(0)
    torch.testing.assert_close(found.gather(0, places[None])[0], found.min(0).values, rtol=1e-5, atol=1e-6)
    assert (ratios[found.argmin(0)] == chosen).float().mean() > 0.9


@pytest.mark.parametrize("weighted", [False, True])
def test_large_blocks_are_counted_in_stretches(weighted, monkeypatch):
    x, weights = tensor(5, (3, 1000)), (tensor(6, (3, 1000)).abs() * 4).round() if weighted else None
    ends = minmax_range(x)
    whole = entropy._histogram(x, *ends, weights)
    monkeypatch.setattr(entropy, "BUFFERED", 64)
    assert all(map(torch.equal, entropy._histogram(x, *ends, weights), whole))
    assert torch.equal(whole[0].sum(1), torch.full((3,), 1000.0) if weights is None else weights.sum(1))


def test_bins_count_beyond_the_whole_numbers_of_float32():
    count = 2**24 + 2**18
    x = torch.ones(1, 1).expand(1, count)
    counts, _ = entropy._histogram(x, torch.tensor([[0.0]]), torch.tensor([[1.0]]), None)
    assert counts.dtype == torch.float32
    assert counts[0, -1] == counts.sum() == count


def test_blocks_do_not_depend_on_their_neighbours():
    fmt = NumberFormat.parse("int4:g128")
    x = torch.cat([tensor(3, (200, 128)), tensor(4, (1, 128)).round()])
    lo, hi = find_range(x, fmt, "kl")
    for rows in (slice(0, 1), slice(127, 130), slice(200, 201)):
        alone = entropy_range(x[rows], minmax_range(x[rows]), fmt)
        assert torch.equal(torch.cat([lo[rows], hi[rows]]), torch.cat(alone))
