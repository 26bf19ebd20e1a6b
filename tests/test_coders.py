"""What all formats have in common that are more than a scale times a grid."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tensors import CODED, tensor

from mpq import NumberFormat, Scheme
from mpq.errors import FormatError
from mpq.quantizers import dequantize, fake_quantize, quantize
from mpq.quantizers.pvq import decode_group, encode_group, group_sizes

KEEP_ZERO = ("nupes", "int8:cross", "fp8", "int4")  # prefixes of formats that have a zero at any scale


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_stored_gives_the_fake_quantized_tensor(name, dtype):
    fmt = NumberFormat.parse(name)
    shapes = ((6, 5, 4), 0), ((6, 5, 4), 1), ((3, 1), 0), ((7,), 0), ((), 0)
    for shape, axis in shapes if dtype == torch.float32 else shapes[1:2]:
        x = tensor(3, shape, dtype)
        before = x.clone()
        q = quantize(x, fmt, axis)
        rounded = fake_quantize(x, fmt, axis)
        assert torch.equal(x, before)
        assert rounded.dtype == dtype
        assert rounded.shape == x.shape
        assert torch.equal(dequantize(q).to(dtype), rounded)
        assert torch.isfinite(rounded).all()
        stored = {"fp16": torch.float16, "fp32": torch.float32, "e8m0": torch.float32, "none": torch.float32}
        whole = fmt.variant == "progressive"
        assert torch.equal(q.scale.to(torch.uint8 if whole else stored[fmt.scale]).to(q.scale.dtype), q.scale)
        if q.outer is not None:
            assert torch.equal(q.outer.to(torch.float16 if whole else torch.float32).to(q.outer.dtype), q.outer)
        if q.codebook is not None:
            assert torch.equal(q.codebook.half().to(q.codebook.dtype), q.codebook)


def stored_bits(q, axis):
    """Counted from the parts of a quantized tensor alone."""
    fmt, numel = q.fmt, math.prod(q.shape)
    scale = 8 if fmt.variant == "progressive" else {"fp16": 16, "fp32": 32, "e8m0": 8, "none": 0}[fmt.scale]
    bits = fmt.bits * numel + scale * q.scale.numel()
    if fmt.variant == "progressive":
        bits += 4 * q.zero_point.numel()
    if q.outer is not None:
        bits += (16 if fmt.variant == "progressive" else 32) * q.outer.numel()
    return bits + (0 if q.codebook is None else 16 * q.codebook.numel())


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize(("shape", "axis"), [((6, 27), 0), ((5, 3, 4), 1), ((4, 16), 0), ((3, 1), 0)])
def test_storage_is_what_is_stored(name, shape, axis):
    fmt = NumberFormat.parse(name)
    assert fmt.storage_bits(shape, axis) == stored_bits(quantize(tensor(0, shape), fmt, axis), axis)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CODED), st.integers(0, 1000), st.sampled_from([1, 3]))
def test_codes_fit_their_bits(name, seed, power):
    fmt = NumberFormat.parse(name)
    q = quantize(tensor(seed, (4, 21), power=power), fmt)
    low, high = int(q.codes.min()), int(q.codes.max())
    if fmt.family == "pvq":
        full, last = group_sizes(fmt, q.shape)
        groups = q.codes.reshape(4, -1, full)
        for points, width in ((groups[:, :-1].reshape(-1, full), full), (groups[:, -1, :last], last)):
            if len(points):
                numbers = encode_group(points, fmt.bits)
                assert 0 <= int(numbers.min()) <= int(numbers.max()) < 2 ** (fmt.bits * width)
                assert torch.equal(decode_group(numbers, width, fmt.bits).to(points.dtype), points)
    else:
        assert high - low < 2**fmt.bits


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([n for n in CODED if n[:3] in ("kme", "pvq")]), st.integers(0, 1000))
def test_rounding_twice_changes_nothing(name, seed):
    """Codebooks and pyramids find their own values again."""
    fmt = NumberFormat.parse(name)
    once = fake_quantize(tensor(seed, (4, 27)), fmt)
    torch.testing.assert_close(fake_quantize(once, fmt), once, rtol=1e-3 if fmt.family == "pvq" else 0, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CODED), st.integers(0, 1000), st.sampled_from([1, 3]))
def test_all_zero_channels_and_zeros_stay(name, seed, power):
    fmt = NumberFormat.parse(name)
    x = tensor(seed, (4, 24), power=power)
    x[1] = 0
    x[:, 3] = 0
    rounded = fake_quantize(x, fmt)
    assert torch.isfinite(rounded).all()
    if fmt.granularity != "tensor" and fmt.block is None:
        assert (rounded[1].abs() < 1e-37).all()
    if name.startswith(KEEP_ZERO):
        assert (rounded[:, 3] == 0).all()


@pytest.mark.parametrize("name", CODED)
def test_empty_tensors_stay_empty(name):
    for shape in ((0, 5), (3, 0)):
        assert fake_quantize(torch.zeros(shape), NumberFormat.parse(name)).shape == shape


@pytest.mark.parametrize("name", [n for n in CODED if "p2" not in n])
def test_errors_of_normal_weights_are_near_the_theory(name):
    """No better than Shannon's bound for the bits that are stored, at most 4 times worse than that for the codes."""
    fmt = NumberFormat.parse(name)
    x = tensor(5, (16, 512))
    noise = (fake_quantize(x, fmt) - x).square().mean().item()
    assert noise >= 0.9 * 4.0 ** -fmt.bits_per_element(x.shape)
    # One code for 8 bits more covers the tails; the clip of nested codes is that of 8 bits.
    slack = {"nested": 12.0}.get(fmt.variant, 12.0 if fmt.family == "float" else 4.0) * (4 if fmt.bits == 8 else 1)
    assert noise <= slack * 4.0**-fmt.bits


@pytest.mark.parametrize("name", [*CODED, "pvq_4", "pvq_8:g2", "int4:g128:progressive", "W"])
def test_names_parse_back(name):
    if name == "W":
        assert str(Scheme.parse("W4:g128:progressive")) == "W4:g128:progressive"
        return
    fmt = NumberFormat.parse(name)
    assert NumberFormat.parse(fmt.name) == fmt
    assert Scheme.parse(str(Scheme(fmt))).weight == fmt
    shuffled = ":".join([name.split(":")[0], *reversed(name.split(":")[1:])])
    assert NumberFormat.parse(shuffled) == fmt


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("kmeans_4:p2", "stored in none"),
        ("kmeans_4:token", "is for weights"),
        ("kmeans_4:cross", "is for weights"),
        ("nupes_4:token", "is for weights"),
        ("int4:progressive", "by group"),
        ("int4:b2x8:progressive", "by group"),
        ("int3:g128:progressive", "4 bits"),
        ("int4:g128:p2:progressive", "fp16"),
        ("int9:nested", "at most 8 bits"),
        ("int4:asym:nested", "symmetric"),
        ("int4:token:nested", "is for weights"),
        ("pvq_2:channel", "has groups"),
        ("pvq_2:g32", "at most 62 bits"),
        ("pvq_2:p2", "too coarse"),
        ("int8:cross:asym", "cross is for symmetric"),
        ("nf4:cross", "cross is for symmetric"),
        ("int8:cross:p2", "fp32"),
        ("mxfp4:channel", "by group or block"),
        ("mxfp4:s16", "e8m0"),
        ("nvfp4:tensor", "by group or block"),
        ("nvfp4:p2", "e4m3"),
    ],
)
def test_combinations_without_sense_are_refused(name, match):
    with pytest.raises(FormatError, match=match):
        NumberFormat.parse(name)


def test_fields_without_sense_are_refused():
    with pytest.raises(FormatError, match="no variant"):
        NumberFormat("int", 4, variant="nf4")
    with pytest.raises(FormatError, match="only nvfp4"):
        NumberFormat("int", 4, "group:16", scale="e4m3")
    with pytest.raises(FormatError, match="needs scales"):
        NumberFormat("int", 4, scale="none")
