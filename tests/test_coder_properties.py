"""What holds for every format that is more than a scale times a grid, whatever the tensor.

`test_coders` has the rest: dtypes, scalars, empty tensors, zeros, codes within their bits.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_tensors import CODED, tensor

from mpq import NumberFormat
from mpq.errors import FormatError
from mpq.quantizers import dequantize, fake_quantize, quantize
from mpq.quantizers.blocks import to_blocks
from mpq.quantizers.grids import grid_of
from mpq.quantizers.kmeans import nearest_level
from mpq.quantizers.nupes import _nearest
from mpq.quantizers.tensors import coder_of

ONE_ELEMENT = ["kmeans_2:g1", "nupes_4:g1", "pvq_4:g1", "int4:g1:nested", "int4:g1:progressive", "int3:b1x1:nested"]
formats = st.sampled_from([NumberFormat.parse(name) for name in [*CODED, *ONE_ELEMENT]])
weights_of = st.sampled_from(["minmax", "mse"])
seeds = st.integers(0, 999)
BY_GROUP = [
    f
    for f in map(NumberFormat.parse, [*CODED, *ONE_ELEMENT])
    if f.block is not None and f.block[0] == 1 and f.family != "nupes" and f.variant != "progressive"
]  # nupes shares an exponent, progressive scales of channels
FAITHFUL = [f for f in map(NumberFormat.parse, CODED) if f.family in ("kmeans", "nupes") or f.granularity == "cross"]


@settings(max_examples=100, deadline=None)
@given(formats, weights_of, st.sampled_from([math.nan, math.inf, -math.inf]), seeds)
def test_what_is_not_finite_is_refused(fmt, method, bad, seed):
    x = tensor(seed, (3, 10))
    x.view(-1)[seed % 30] = bad
    for function in (quantize, fake_quantize):
        with pytest.raises(FormatError, match=r"the tensor \[3, 10\] holds NaN or infinity"):
            function(x, fmt, method=method)


@settings(max_examples=100, deadline=None)
@given(formats, weights_of, seeds)
def test_layout_in_memory_does_not_matter(fmt, method, seed):
    x = tensor(seed, (4, 6, 3, 3))
    expected = fake_quantize(x, fmt, method=method)
    assert torch.equal(fake_quantize(x.to(memory_format=torch.channels_last), fmt, method=method), expected)
    wide = torch.zeros(4, 6, 3, 6)
    wide[..., ::2] = x
    assert torch.equal(fake_quantize(wide[..., ::2], fmt, method=method), expected)


@settings(max_examples=100, deadline=None)
@given(formats, weights_of, seeds, st.integers(-100, 100))
def test_a_power_of_two_goes_through(fmt, method, seed, power):
    """But for rows and columns, whose powers of 0.15 and 0.85 are rounded each."""
    x = tensor(seed, (4, 24))
    if fmt.scale == "fp16" or fmt.family == "kmeans":
        power //= 16
    small, large = quantize(x, fmt, method=method), quantize(x * 2.0**power, fmt, method=method)
    # Where float16 ends the grid can't follow: scales of channels are in it, or those of the 8-bit codes behind.
    least = small.outer if fmt.variant == "progressive" else small.scale / (256 if fmt.variant == "nested" else 1)
    assume(fmt.scale != "fp16" or float(least.min()) * min(1.0, 2.0**power) > 2.0**-14)
    if fmt.family == "kmeans":  # levels in float16
        assume(float(small.codebook.abs().min()) * min(1.0, 2.0**power) > 2.0**-14)
    found, expected = dequantize(large), dequantize(small) * 2.0**power
    if fmt.granularity == "cross":
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    else:
        assert torch.equal(found, expected)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(BY_GROUP), st.sampled_from(["minmax", "mse", "percentile:80"]), seeds, st.integers(1, 20))
def test_a_ragged_last_group_is_a_group(fmt, method, seed, width):
    """It is what channels of so many elements would be, where groups share nothing; of pyramids a full group."""
    x = tensor(seed, (3, width))
    start = (width - 1) // fmt.block[1] * fmt.block[1]
    whole = f"group:{width - start}" if fmt.family == "pvq" else "channel"
    alone = fake_quantize(x[:, start:].contiguous(), replace(fmt, granularity=whole), method=method)
    assert torch.equal(fake_quantize(x, fmt, method=method)[:, start:], alone)


@settings(max_examples=100, deadline=None)
@given(formats, weights_of, seeds, st.sampled_from([1e-45, 1e-41, 1e-38, 1e-30]))
def test_subnormal_numbers(fmt, method, seed, size):
    x = tensor(seed, (3, 8)).sign() * size
    q = quantize(x, fmt, method=method)
    values = dequantize(q)
    assert torch.isfinite(values).all()
    assert torch.isfinite(q.scale).all()
    # Codebooks and scales have a smallest number; of two levels there is no zero beside it.
    least = {"fp16": 2.0**-24, "none": 2.0**-24}.get(fmt.scale, 2.0**-126)
    outer = 1.0 if q.outer is None or fmt.family == "nupes" else float(q.outer.max())
    assert fmt.family in ("kmeans", "pvq") or float(q.scale.min()) * outer <= max(2 * size, 300 * least)
    assert values.abs().max() <= (max(2 * size, least) if fmt.bits == 1 else 2 * size)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["kmeans_4:tensor", "nupes_8:tensor", "nupes_3:tensor", "int8:tensor:nested"]), weights_of, seeds
)
def test_order_is_kept(name, method, seed):
    x = tensor(seed, (200,)).sort().values
    assert (fake_quantize(x, NumberFormat.parse(name), method=method).diff() >= 0).all()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FAITHFUL), weights_of, seeds, st.sampled_from([1, 3]))
def test_no_level_is_nearer(fmt, method, seed, power):
    """The error is that of the best code, for the scales that were chosen."""
    x = tensor(seed, (4, 24), power=power)
    q = quantize(x, fmt, method=method)
    half = 2 ** (fmt.bits - 1)
    signed = fmt.family not in ("kmeans", "float")
    every = range(-half, half) if signed else range(2 * half)
    if fmt.family == "float":
        every = [code for code in every if code % half <= grid_of(fmt).last]
    best = torch.full_like(x, torch.inf)
    for code in every:
        tried = coder_of(fmt).dequantize(replace(q, codes=torch.full_like(q.codes, code)))
        best = torch.minimum(best, (tried - x).abs())
    assert ((dequantize(q) - x).abs() <= best * (1 + 1e-5) + 1e-30).all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FAITHFUL), seeds)
def test_rounding_again_with_the_same_scales_changes_nothing(fmt, seed):
    """Of codebooks and pyramids `test_coders` tells as much with scales found anew."""
    q = quantize(tensor(seed, (4, 24)), fmt)
    values, units = dequantize(q), to_blocks(dequantize(q), fmt) / q.scale
    if fmt.family == "nupes":
        assert torch.equal(_nearest(units, fmt.bits, q.outer.reshape(())).to(q.codes.dtype), q.codes)
    elif fmt.family == "kmeans":
        assert torch.equal(q.codebook.gather(1, nearest_level(units, q.codebook).long()), units)
    else:
        again = grid_of(fmt).round_(values / (q.scale * q.outer))
        assert torch.equal(again, grid_of(fmt).decode(q.codes, torch.float32))
