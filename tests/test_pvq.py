"""Pyramid vector quantization."""

import itertools

import pytest
import torch
from random_tensors import tensor

from mpq import NumberFormat
from mpq.errors import FormatError
from mpq.quantizers import dequantize, fake_quantize, quantize
from mpq.quantizers.packing import from_parts, to_parts
from mpq.quantizers.pvq import decode_group, encode_group, project, pulses


@pytest.mark.parametrize(("dimensions", "bits"), [(1, 2), (2, 2), (3, 2), (3, 3), (4, 1), (5, 1), (2, 4)])
def test_points_of_a_pyramid_are_counted_and_numbered(dimensions, bits):
    total = pulses(dimensions, bits)
    steps = range(-total, total + 1)
    points = torch.tensor([p for p in itertools.product(steps, repeat=dimensions) if sum(map(abs, p)) == total])
    numbers = encode_group(points, bits)
    assert sorted(numbers.tolist()) == list(range(len(points)))
    assert len(points) <= 2 ** (bits * dimensions)
    assert torch.equal(decode_group(numbers, dimensions, bits).long(), points)
    if dimensions > 1:  # one pulse more would be too many
        larger = range(-total - 1, total + 2)
        more = sum(sum(map(abs, p)) == total + 1 for p in itertools.product(larger, repeat=dimensions))
        assert more > 2 ** (bits * dimensions)
    with pytest.raises(FormatError, match="must add up"):
        encode_group(points * 0, bits)


@pytest.mark.parametrize(("dimensions", "bits"), [(2, 2), (3, 2), (4, 1), (3, 3), (4, 2)])
def test_projection_is_nearly_the_nearest_point(dimensions, bits):
    total = pulses(dimensions, bits)
    steps = range(-total, total + 1)
    points = [p for p in itertools.product(steps, repeat=dimensions) if sum(map(abs, p)) == total]
    every = torch.tensor(points, dtype=torch.float64)
    x = tensor(4, (500, dimensions), torch.float64)
    found = project(x, total, torch.ones_like(x))
    assert torch.equal(found.abs().sum(1), torch.full((500,), float(total), dtype=torch.float64))

    def missed(y):  # share of the energy that the best multiple of a point leaves
        return 1 - ((x * y).sum(1) / y.norm(dim=1) / x.norm(dim=1)).square()

    best = 1 - ((x @ every.T) / every.norm(dim=1) / x.norm(dim=1, keepdim=True)).square().max(1).values
    assert missed(found).mean() <= 1.05 * best.mean()


def test_pyramids_beat_integers_of_the_same_size():
    x = tensor(6, (64, 256))
    errors = [(fake_quantize(x, NumberFormat.parse(n)) - x).square().mean() for n in ("pvq_2:g16", "int2:g16")]
    assert errors[0] < 0.75 * errors[1]


def test_groups_of_zeros_and_importance_in_pyramids():
    x = tensor(7, (2, 32))
    x[0, :16] = 0
    fmt = NumberFormat.parse("pvq_2:g16")
    assert (fake_quantize(x, fmt)[0, :16] == 0).all()
    importance = torch.ones(2, 32)
    importance[:, ::4] = 50
    plain, weighted = ((fake_quantize(x, fmt, importance=i) - x).square() * importance for i in (None, importance))
    assert weighted.sum() < 0.7 * plain.sum()


@pytest.mark.parametrize("size", [1e-9, 3e-8, 1e-6, 1e-5])
def test_small_lengths_are_rounded_to_nearest(size):
    """Upwards they would be up to sixty times as long as the group itself."""
    x = tensor(8, (4, 32)).mul_(size)
    exact, rounded = (quantize(x, NumberFormat.parse(name)) for name in ("pvq_2:g16:s32", "pvq_2:g16"))
    assert torch.equal(rounded.codes, exact.codes)
    assert (rounded.scale - exact.scale).abs().max() <= 2.0**-25
    assert (dequantize(rounded) == 0).all() == (size < 1e-8)
    parts = to_parts(rounded)
    assert torch.equal(from_parts(parts, rounded.fmt, rounded.shape).scale, rounded.scale)
