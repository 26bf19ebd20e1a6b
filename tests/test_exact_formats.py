"""Scalar formats against the references that people trust: every code, and every finite bfloat16 number as input."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from random_tensors import MINIFLOATS

from mpq import NumberFormat
from mpq.quantizers import dequantize, fake_quantize, quantize
from mpq.quantizers.grids import FloatGrid, IntGrid, grid_of
from mpq.quantizers.packing import pack, to_parts, unpack
from mpq.quantizers.scales import scale_and_zero
from mpq.quantizers.tensors import round_elements


@pytest.fixture(scope="module")
def ml_dtypes():
    return pytest.importorskip("ml_dtypes")


BF16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
BF16 = BF16[BF16.isfinite()]
FP16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
FP16 = FP16[FP16.isfinite()]
MX_ELEMENTS = {  # name -> largest power of two, OCP MX v1.0 tables 2 to 6
    "mxfp8_e4m3": 8,
    "mxfp8_e5m2": 15,
    "mxfp6_e3m2": 4,
    "mxfp6_e2m3": 2,
    "mxfp4": 2,
    "mxint8": 0,
}


def decoded(name, count):
    codes = torch.arange(count, dtype=torch.int32).to(torch.uint8)
    return grid_of(NumberFormat.parse(name)).decode(codes, torch.float32)


def levels(name):
    return sorted(grid_of(NumberFormat.parse(name)).values)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)], ids=["e4m3", "e5m2"]
)
@pytest.mark.parametrize("scale", [1.0, 0.0371])
def test_fp8_is_torchs_cast_that_saturates(name, dtype, scale):
    x = BF16 * scale
    x = x[x.isfinite()]
    limit = torch.finfo(dtype).max
    expected = x.clamp(-limit, limit).to(dtype)
    raw = quantize(x, NumberFormat.parse(f"{name}:raw"))
    assert torch.equal(dequantize(raw), expected.float())
    assert torch.equal(fake_quantize(x, NumberFormat.parse(f"{name}:raw")), expected.float())
    for codes in (raw.codes.flatten(), to_parts(raw)["codes"]):
        same = codes == expected.view(torch.uint8)
        assert (same | (expected.float() == 0)).all()  # zero has two codes
    for value in (torch.inf, -torch.inf):  # in the middle of a forward pass too the ends stand for what is beyond them
        grid = grid_of(NumberFormat.parse(f"{name}:raw"))
        assert grid.round_(torch.tensor([value])).item() == math.copysign(limit, value)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp8_e4m3", "float8_e4m3fn"),
        ("fp8_e5m2", "float8_e5m2"),
        ("fp6_e2m3", "float6_e2m3fn"),
        ("fp6_e3m2", "float6_e3m2fn"),
        ("fp4_e2m1", "float4_e2m1fn"),
    ],
)
def test_minifloats_are_those_of_ml_dtypes(ml_dtypes, name, dtype):
    fmt, dtype = NumberFormat.parse(f"{name}:raw"), np.dtype(getattr(ml_dtypes, dtype))
    values = np.arange(2**fmt.bits, dtype=np.uint8).view(dtype).astype(np.float32)
    ours = decoded(f"{name}:raw", 2**fmt.bits)[: len(values)].numpy() if np.isfinite(values).all() else None
    finite = np.isfinite(values)
    codes = torch.from_numpy(np.flatnonzero(finite).astype(np.uint8))
    decoded_ = grid_of(fmt).decode(torch.where(codes == 2 ** (fmt.bits - 1), 0, codes), torch.float32).numpy()
    np.testing.assert_array_equal(decoded_, values[finite])
    assert ours is None or np.array_equal(ours, values)
    limit = values[finite].max()
    x = BF16.numpy()
    expected = np.clip(x, -limit, limit).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(fake_quantize(BF16, fmt).numpy(), expected)


@pytest.mark.parametrize("name", MINIFLOATS)
def test_every_minifloat_is_rounded_to_nearest(name):
    """The slow twin in float64: neighbours by bisection, ties to the even code; upwards where there is no mantissa.

    Of every number in half precision, of every tie, and of float32's numbers beside it.
    """
    fmt = NumberFormat.parse(f"{name}:raw")
    sizes = np.array([v for v in levels(f"{name}:raw") if v >= 0])
    middles = (sizes[1:] + sizes[:-1]) / 2
    ties = torch.from_numpy(middles).float()
    assert (ties.double().numpy() == middles).all()
    near = [ties, -ties, torch.nextafter(ties, ties * 0), torch.nextafter(-ties, ties * 4)]
    x = torch.cat([BF16, FP16, *near])
    size = x.abs().double().numpy()
    below, above = np.searchsorted(middles, size, "left"), np.searchsorted(middles, size, "right")
    even = np.where((below % 2 == 0) if fmt.mantissa else (below == 0), below, above)
    expected = np.copysign(sizes[even], x.double().numpy())
    np.testing.assert_array_equal(fake_quantize(x.double(), fmt).numpy(), expected)
    np.testing.assert_array_equal(fake_quantize(x, fmt).numpy(), expected.astype(np.float32))
    np.testing.assert_array_equal(dequantize(quantize(x, fmt)).numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("name", MINIFLOATS)
def test_values_of_minifloats_are_those_of_the_formula(name):
    """OCP MX v1.0, section 5.3: an exponent of zero has no implicit one. Code by code, in Python's numbers."""
    fmt = NumberFormat.parse(name)
    bias, half, ones = 2 ** (fmt.exponent - 1) - 1, 2 ** (fmt.bits - 1), 2**fmt.mantissa
    reserved = {"fp8_e4m3": 1, "fp8_e5m2": 4}.get(name, ones if fmt.exponent == 8 else 0)
    expected = []
    for code in range(half - reserved):
        field, fraction = divmod(code, ones)
        expected.append(math.ldexp(fraction + ones * (field > 0), max(field, 1) - bias - fmt.mantissa))
    grid = grid_of(fmt)
    codes = torch.arange(len(expected), dtype=torch.int32)
    for dtype in (torch.float32, torch.float64):
        assert grid.decode(codes, dtype).tolist() == expected
        assert grid.decode(codes + half, dtype).tolist() == [-v for v in expected]
        assert not grid.decode(codes[:1] + half, dtype).signbit()
    assert (grid.low, grid.high) == (-expected[-1], expected[-1])
    assert grid.values == (*(-v for v in expected[:0:-1]), *expected)
    smallest = torch.uint8 if fmt.bits <= 8 else torch.int16 if fmt.bits < 16 else torch.int32
    assert grid.encode(torch.zeros(1)).dtype == smallest


@pytest.mark.parametrize(
    ("exponent", "mantissa", "dtype"), [(5, 10, torch.float16), (8, 7, torch.bfloat16)], ids=["fp16", "bf16"]
)
@pytest.mark.parametrize("scale", [1.0, 0.0371, 2.0**-20])
def test_minifloats_as_wide_as_torchs_are_torchs(exponent, mantissa, dtype, scale):
    """Every code, and every number in half precision times a scale, as far as torch's type reaches."""
    grid = FloatGrid(exponent, mantissa)
    codes = torch.arange(2**15, dtype=torch.int32)
    known = codes.to(torch.int16).view(dtype)
    finite = known.isfinite()
    values = grid.decode(codes, torch.float32)
    assert torch.equal(values[finite], known[finite].float())
    assert torch.equal(grid.encode(values[finite]), codes[finite])
    x = torch.cat([BF16, FP16]) * scale
    x = x[x.abs() <= torch.finfo(dtype).max]
    for wide in (torch.float32, torch.float64):
        rounded = grid.round_(x.to(wide))
        assert torch.equal(rounded, x.to(dtype).to(wide))
        assert torch.equal(grid.decode(grid.encode(rounded), wide), rounded)


def test_what_is_no_number_stays_none():
    for name in ("fp10_e5m4:raw", "fp12_e8m3", "fp9_e8m0"):
        grid = grid_of(NumberFormat.parse(name))
        found = grid.round_(torch.tensor([math.nan, math.inf, -math.inf, 3.4e38]))
        assert found.isnan().tolist() == [True, False, False, False]
        assert found[1:].tolist() == [grid.high, -grid.high, grid.high]


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_are_torchs_fake_quantization_bit_for_bit(bits, symmetric):
    fmt = NumberFormat("int", bits, "tensor", symmetric)
    for lo, hi in ((-1.0, 1.0), (-0.3, 7.1), (-1e-3, 2e-3), (0.0, 1e5)):
        scale, zero = scale_and_zero(torch.tensor(lo), torch.tensor(hi), fmt)
        expected = torch.fake_quantize_per_tensor_affine(BF16, scale, zero.int(), *fmt.levels)
        assert torch.equal(round_elements(BF16, scale, zero, fmt), expected)


@pytest.mark.parametrize("name", ["int3", "int4", "int8", "int4:asym", "int8:asym"])
def test_channels_are_torchs_fake_quantization_bit_for_bit(name):
    x = torch.randn(6, 500) * torch.logspace(-3, 3, 6)[:, None]
    q = quantize(x, NumberFormat.parse(name), method="minmax")
    zero = q.zero_point.flatten().int()
    expected = torch.fake_quantize_per_channel_affine(x, q.scale.flatten(), zero, 0, *q.fmt.levels)
    assert torch.equal(fake_quantize(x, q.fmt, method="minmax"), expected)
    assert torch.equal(dequantize(q), expected)


# bitsandbytes/functional.py, get_4bit_type (0.49 to 0.50, commit 95f9af3): values by code, divided by the largest.
BNB = {
    "nf4": [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    "fp4_bnb": [0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0],
}  # fmt: skip


def bnb_quantize(x, table):
    """Codes and largest elements of blocks ``[blocks, 64]``: bitsandbytes/backends/default/ops.py, quantize_4bit."""
    order = torch.argsort(table, stable=True)
    middles = (table[order[:-1]] + table[order[1:]]) / 2
    largest = x.abs().amax(1, keepdim=True)
    scaled = (x * (1.0 / largest.clamp(min=1e-38))).clamp(-1, 1)
    return order[torch.bucketize(scaled, middles)], largest


@pytest.mark.parametrize("name", list(BNB))
def test_tables_are_those_of_bitsandbytes(name):
    table = torch.tensor(BNB[name])
    table /= table.abs().max()
    ours = decoded(name, 16)
    assert torch.equal(ours, table)
    inside = BF16[BF16.abs() <= 1]
    blocks = torch.nn.functional.pad(inside, (0, -len(inside) % 63)).reshape(-1, 63)
    for factor in (1.0, 0.0123):
        x = torch.cat([blocks, torch.ones(len(blocks), 1)], 1) * factor
        codes, largest = bnb_quantize(x, table)
        q = quantize(x, NumberFormat.parse(f"{name}:g64:s32"), method="minmax")
        assert torch.equal(dequantize(q), table[codes] * largest)
        assert torch.equal(q.scale, largest)
        nonzero = table[codes] != 0  # fp4_bnb has two codes for zero
        assert torch.equal(q.codes.long()[nonzero], codes[nonzero])
        assert (q.codes.long()[~nonzero] % 8 == (0 if name == "fp4_bnb" else 7)).all()


def mx_block(block, name):
    """OCP MX v1.0, section 6.3, in exact arithmetic: the shared power of two, then each element."""
    largest = max(abs(v) for v in block)
    power = -127 if not largest else min(max(math.frexp(largest)[1] - 1 - MX_ELEMENTS[name], -127), 127)
    scale = Fraction(2) ** power
    found = []
    grid = [Fraction(v) for v in levels(name)]
    for v in block:
        p = Fraction(v) / scale
        p = min(max(p, grid[0]), grid[-1])  # beyond the largest element it is the largest
        near = sorted(grid, key=lambda g: abs(g - p))[:2]
        tie = len({abs(g - p) for g in near}) == 1
        # Of two neighbours one is even: its code's last bit is 0, so it is a multiple of twice their distance.
        pick = next(g for g in near if g % (2 * abs(near[0] - near[1])) == 0) if tie else near[0]
        found.append(float(pick * scale))
    return found, power


@pytest.mark.parametrize("name", list(MX_ELEMENTS))
def test_blocks_are_those_of_ocp_mx(name):
    fmt = NumberFormat.parse(name)
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(6, 32, generator=rng).to(torch.bfloat16).float()
    x[1] *= 2.0**-130  # the shared exponent ends at -127
    x[2] = torch.arange(32) / 16  # ties
    x[3] = 0
    x[4, 0] = 3e38
    q = quantize(x, fmt)
    expected = [mx_block(row.tolist(), name) for row in x]
    assert dequantize(q).tolist() == [values for values, _ in expected]
    assert q.scale.flatten().tolist() == [2.0**power for _, power in expected]
    assert to_parts(q)["scale"].tolist() == [127 + power for _, power in expected]


@pytest.mark.parametrize("name", list(MX_ELEMENTS))
def test_mx_elements_of_every_bfloat16(name):
    """One block for each number with a largest element that sets the scale to one: the element's own cast."""
    fmt = NumberFormat.parse(name)
    x = torch.stack([BF16, torch.full_like(BF16, 2.0 ** MX_ELEMENTS[name])], 1)
    x = x[x[:, 0].abs() < 2 * x[:, 1]]
    values = fake_quantize(x, NumberFormat.parse(f"{name}:g2"))[:, 0]
    if name == "mxint8":
        expected = (x[:, 0] * 64).round().clamp(-127, 127) / 64
    else:
        expected = fake_quantize(x[:, 0], NumberFormat.parse(f"fp{fmt.bits}_e{fmt.exponent}m{fmt.mantissa}:raw"))
    assert torch.equal(values, expected)


def microxcaling(x, exponent, mantissa, largest, power):
    """microsoft/microxcaling, mx/mx_ops.py and elemwise_ops.py: blocks ``[blocks, 32]``, rounding "even"."""
    shared = x.abs().amax(1, keepdim=True)
    shared = torch.floor(torch.log2(shared + 2.0**-126 * (shared == 0))) - power
    a = x / 2 ** shared.clamp(min=-127)
    bits = mantissa + 2
    private = torch.zeros_like(a)
    if exponent:
        private = torch.floor(torch.log2(a.abs() + (a == 0))).clamp(min=2 - 2 ** (exponent - 1))
    out = a / 2**private * 2 ** (bits - 2)
    size = out.abs()
    out = out.sign() * (torch.floor(size + 0.5) - ((size - 0.5) % 2 == 0).float())
    out = out / 2 ** (bits - 2) * 2**private
    return out.clamp(-largest, largest) * 2 ** shared.clamp(min=-127)


@pytest.mark.parametrize("name", list(MX_ELEMENTS))
def test_blocks_are_those_of_microxcaling(name):
    fmt = NumberFormat.parse(name)
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 500)[:, None]
    mantissa = fmt.mantissa if fmt.exponent else 6
    expected = microxcaling(x, fmt.exponent, mantissa, grid_of(fmt).high, MX_ELEMENTS[name])
    assert torch.equal(fake_quantize(x, fmt), expected)


def test_scales_of_powers_of_two_are_those_of_ml_dtypes(ml_dtypes):
    powers = torch.arange(-126, 125)
    for name, largest in (("int4:g1:p2", 7.0), ("mxfp4", 4.0)):
        x = torch.ldexp(torch.full((len(powers), 1), largest), powers[:, None])
        stored = to_parts(quantize(x, NumberFormat.parse(name), method="minmax"))["scale"].numpy()
        np.testing.assert_array_equal(stored.view(ml_dtypes.float8_e8m0fnu).astype(np.float64), 2.0 ** powers.numpy())


def test_scales_of_nvfp4_are_torchs_fp8():
    x = torch.randn(64, 64) * torch.logspace(-4, 0, 64)[:, None]
    q = quantize(x, NumberFormat.parse("nvfp4"), method="minmax")
    stored = to_parts(q)["scale"]
    outer = x.abs().max() / (6 * 448)
    assert torch.equal(q.outer.flatten(), outer[None])
    blocks = x.reshape(-1, 16).abs().amax(1)
    assert torch.equal(stored.float(), (blocks / 6 / outer).clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float())
    element = NumberFormat.parse("fp4_e2m1:raw")
    scale = (stored.float() * outer)[:, None]
    expected = fake_quantize(x.reshape(-1, 16) * (1 / scale), element) * scale
    assert torch.equal(dequantize(q), expected.reshape(64, 64))


TABLES = [
    *(f"{family}_{bits}" for family in ("pow2", "post") for bits in range(2, 9)),
    *(f"log2_{bits}" for bits in range(1, 7)),
    *(f"int{bits}:bipolar" for bits in range(1, 9)),
    *("int1", "ternary", "binary", "nf4", "fp4_bnb"),
]


@pytest.mark.parametrize("name", TABLES)
def test_every_bfloat16_goes_to_the_nearest_level_of_a_table(name):
    """The slow twin: middles in float64; of two levels that are as near the lower."""
    grid = grid_of(NumberFormat.parse(name))
    levels = torch.tensor(grid.values, dtype=torch.float32).double()
    x = BF16.double().clamp(grid.low, grid.high)
    at = torch.searchsorted(levels, x).clamp(0, len(levels) - 1)
    above, below = levels[at], levels[(at - 1).clamp(min=0)]
    middle = (below + above) / 2
    expected = torch.where(x <= middle, below, above)
    found = grid.round_(BF16.clone()).double()
    near_tie = (x - middle).abs() <= 1e-6 * middle.abs()  # of irrational levels
    exact = torch.ones_like(near_tie) if not name.startswith(("post", "nf4", "fp4")) else ~near_tie
    assert torch.equal(found[exact], expected[exact])
    assert torch.isin(found, levels).all()


CODES = [
    *TABLES,
    *MINIFLOATS,
    *("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4"),
    *(f"int{bits}{sign}" for bits in range(1, 17) for sign in ("", ":asym")),
]


@pytest.mark.parametrize("name", CODES)
def test_every_code_comes_back(name):
    """Each value has one code, within the bits of the format, which stands for it; but for minifloats' second zero."""
    fmt = NumberFormat.parse(name)
    grid = grid_of(fmt)
    values = torch.arange(grid.first, grid.last + 1.0) if isinstance(grid, IntGrid) else torch.tensor(grid.values)
    codes = grid.encode(values.clone())
    assert torch.equal(grid.decode(codes, torch.float32), values)
    assert torch.equal(grid.round_(values.clone()), values)
    assert len(codes.unique()) == len(values) <= 2**fmt.bits
    packed = pack(codes.to(torch.int32), fmt.bits)
    signed = fmt.family == "int" and fmt.levels[0] < 0
    assert torch.equal(unpack(packed, fmt.bits, len(codes), signed=signed).int(), codes.int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MINIFLOATS)
def test_processes_that_flush_subnormals_lose_none_of_a_format(name, dtype):
    """Those of the wider float they can't hold: some of what has 8 exponent bits."""
    fmt = NumberFormat.parse(name)
    grid = FloatGrid(fmt.exponent, fmt.mantissa)
    every = torch.cat([torch.arange(grid.last + 1), torch.arange(grid.last + 1) + 2 ** (fmt.bits - 1)])
    tiny = torch.finfo(dtype).tiny
    x = torch.where(BF16.to(dtype).abs() < tiny, 0.0, BF16.to(dtype))
    values, rounded = grid.decode(every, dtype), grid.round_(x.clone())
    codes = grid.encode(values)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        fresh = FloatGrid(fmt.exponent, fmt.mantissa)  # which keeps no table from before
        found = fresh.decode(every, dtype), fresh.round_(x.clone())
        encoded, listed = fresh.encode(values), fresh.values
    finally:
        torch.set_flush_denormal(False)
    for flushed, usual in zip(found, (values, rounded), strict=True):
        assert torch.equal(flushed, torch.where(usual.abs() < tiny, 0.0, usual))
    assert torch.equal(encoded, codes)
    assert listed == grid.values
