import importlib.util
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mpq
from mpq.errors import FormatError
from mpq.quantizers import NumberFormat, dequantize, fake_quantize, quantize
from mpq.quantizers.packing import from_parts, pack, pack_trits, to_parts, unpack, unpack_trits

FORMATS = """
    int1 int3 int4 int8 int11 int16 int2:asym int4:tensor int4:g3 int5:g16:asym int16:asym int4:b2x3 bfp4 int4:bipolar
    fp5_e2m2 fp8_e4m3 fp8_e5m2:g8 fp6_e2m3:raw fp4_e2m1:g8:p2 fp9_e4m4 fp10_e5m4:g8
    fp12_e8m3 fp16_e6m9:tensor mxfp4 mxfp6_e3m2 mxfp8_e5m2 mxint8 nvfp4 nf4:g64 fp4_bnb
    pow2_3 post_4 log2_4 ternary ternary:g7 binary int8:token int4:token:asym
    """.split()  # noqa: SIM905
OWN = "kmeans_3 kmeans_2:g8 nupes_4 nupes_3:g8 pvq_2:g4 int4:nested int1:nested int8:cross int4:g8:progressive"

FORMATS += OWN.split()


@pytest.fixture(scope="module")
def compressed_tensors():
    """Its packing alone: the package itself loads transformers."""
    found = importlib.util.find_spec("compressed_tensors")
    if found is None:
        pytest.skip("compressed-tensors is not installed")
    path = Path(found.origin).parent / "compressors" / "pack_quantized" / "helpers.py"
    spec = importlib.util.spec_from_file_location("helpers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@given(st.integers(1, 62), st.integers(0, 70), st.booleans(), st.integers(0, 99))
def test_codes_come_back(bits, count, signed, seed):
    low = -(2 ** (bits - 1)) if signed else 0
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, low + 2**bits, (count,), generator=rng, dtype=torch.int64)
    packed = pack(codes, bits)
    assert len(packed) == math.ceil(count * bits / 8)
    assert torch.equal(unpack(packed, bits, count, signed=signed).long(), codes)
    stream = int.from_bytes(bytes(packed.tolist()), "little")  # the slow twin
    assert [stream >> i * bits & (2**bits - 1) for i in range(count)] == [c % 2**bits for c in codes.tolist()]


@given(st.lists(st.integers(0, 2), max_size=23))
def test_trits_come_back(trits):
    packed = pack_trits(torch.tensor(trits, dtype=torch.uint8))
    assert len(packed) == math.ceil(len(trits) / 5)
    assert unpack_trits(packed, len(trits)).tolist() == trits
    assert packed[:1].tolist() == [sum(t * 3**i for i, t in enumerate(trits[:5]))][: len(packed)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_packed_as_compressed_tensors_does(compressed_tensors, bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 50), dtype=torch.int8)
    expected = compressed_tensors.pack_to_int32(codes, bits)
    words = expected.shape[1]
    rows = [pack(row.int() + 2 ** (bits - 1), bits) for row in codes]
    filled = torch.stack([torch.nn.functional.pad(row, (0, 4 * words - len(row))) for row in rows])
    assert torch.equal(filled.view(torch.int32), expected)
    unpacked = compressed_tensors.unpack_from_int32(filled.view(torch.int32), bits, codes.shape)
    assert torch.equal(unpacked, codes)


def test_bad_streams_are_refused():
    with pytest.raises(FormatError, match="1 to 62 bits, not 63"):
        pack(torch.zeros(3), 63)
    for function in (pack_trits, lambda codes: pack(codes, 3)):
        with pytest.raises(FormatError, match=r"codes are integers, not torch.float32"):
            function(torch.tensor([1.7]))
    for codes in ([5], [0, 3], [-1, 1], [256]):
        with pytest.raises(FormatError, match="ternary codes are 0, 1 and 2, not"):
            pack_trits(torch.tensor(codes))
    with pytest.raises(FormatError, match="from 0 to 8 do not fit into 3 bits"):
        pack(torch.tensor([0, 8]), 3)
    with pytest.raises(FormatError, match=r"5 codes of 3 bits are 2 bytes of uint8, not \[3\]"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 5)
    with pytest.raises(FormatError, match="byte 243 holds no five"):
        unpack_trits(torch.tensor([243], dtype=torch.uint8), 5)


@pytest.mark.parametrize("name", FORMATS)
def test_parts_give_the_same_tensor_in_the_bits_of_the_format(name):
    fmt = NumberFormat.parse(name)
    shapes = [((7, 5, 3), 0), ((7, 5, 3), 1), ((2, 70), 0), ((3,), 0), ((), 0), ((0, 3), 0), ((3, 0), 0)]
    for i, (shape, axis) in enumerate(shapes):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(dtype)
            q = quantize(x, fmt, axis)
            parts = to_parts(q)
            back = from_parts(parts, fmt, shape, axis, q.scale.dtype)
            assert torch.equal(dequantize(back).to(dtype), fake_quantize(x, fmt, axis))
            stored = 8 * sum(t.nbytes for t in parts.values())
            bits = fmt.storage_bits(shape, axis) if x.numel() else 0
            assert bits <= stored < bits + 8 * len(parts)


@pytest.mark.parametrize("name", FORMATS)
def test_size_on_disk_is_the_size_foretold(name):
    fmt = NumberFormat.parse(name)
    stored = sum(t.nbytes for t in to_parts(quantize(torch.randn(96, 160), fmt, method="minmax")).values())
    assert 8 * stored == pytest.approx(fmt.storage_bits((96, 160)), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "part", "value", "says"),
    [
        ("fp8_e4m3", "codes", torch.full((12,), 127, dtype=torch.uint8), "codes holds 127, which fp8_e4m3"),
        ("pow2_8", "codes", torch.full((12,), 128, dtype=torch.uint8), "codes holds 128, which pow2_8"),
        (
            "int4",
            "codes",
            torch.zeros(7, dtype=torch.uint8),
            r"codes is torch.uint8 \[7\], but must be torch.uint8 \[6\]",
        ),
        (
            "int4",
            "scale",
            torch.ones(3, dtype=torch.float16),
            r"scale is torch.float16 \[3\], but must be torch.float32",
        ),
        ("int4", "scale", torch.tensor([1.0, 0.0, 1.0]), "scale holds what is no positive number"),
        ("int4", "scale", torch.tensor([1.0, torch.inf, 1.0]), "scale holds what is no positive number"),
        ("int4:asym", "zero_point", None, "has the parts codes, scale, but the format has codes, scale, zero_point"),
        ("int4", "more", torch.ones(1), "has the parts codes, scale, more"),
        ("mxfp4", "scale", torch.full((3,), 255, dtype=torch.uint8), "byte 255"),
        ("nvfp4", "outer", torch.tensor([-1.0]), "outer holds what is no positive number"),
    ],
)
def test_parts_are_not_trusted(name, part, value, says):
    fmt = NumberFormat.parse(name)
    parts = to_parts(quantize(torch.randn(3, 4), fmt))
    changed = {k: v for k, v in (parts | {part: value}).items() if v is not None}
    with pytest.raises(FormatError, match=says):
        from_parts(changed, fmt, (3, 4))


def test_scales_that_the_format_does_not_hold_are_refused():
    fmt = NumberFormat.parse("int4:g2")
    q = quantize(torch.randn(3, 4), fmt)
    with pytest.raises(FormatError, match=r"the scale of int4:g2 is not what torch.float16 can hold"):
        to_parts(mpq.quantizers.QuantizedTensor(q.codes, q.scale * 1.0001, q.zero_point, fmt, q.shape, 0))
