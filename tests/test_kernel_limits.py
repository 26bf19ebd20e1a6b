"""What rounding refuses, what it passes on, and the memory that it takes."""

import math

import pytest
import torch
from random_tensors import tensor

from mpq import NumberFormat
from mpq.errors import FormatError
from mpq.quantizers import (
    dequantize,
    fake_quantize,
    fake_quantize_all,
    fake_quantize_dynamic,
    fake_quantize_static,
    find_range,
    kernels,
    loss_aware_range,
    quantize,
    quantize_all,
)

TABLES = [f"{name}:tensor" for name in ("nf4", "fp4_bnb", "pow2_4", "post_3", "log2_4", "ternary", "binary", "int1")]


@pytest.fixture(params=[None, 64], ids=["one chunk", "chunks of 64"])
def chunks(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(kernels, "_CHUNK", request.param)


@pytest.mark.parametrize(
    "name", ["int8:tensor", "int4:tensor:asym", "fp8_e4m3:tensor", "fp4_e2m1:raw", "fp16", *TABLES]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_activations_that_are_no_numbers_stay_so(name, dtype):
    """A network that breaks must not look sound."""
    for size in (10, 10_000):  # by bisection and by tables
        for bad in (math.nan, -math.nan):
            x = tensor(1, (size,), dtype)
            x[3] = bad
            rounded = fake_quantize_static(x, NumberFormat.parse(name), -2.0, 3.0)
            assert torch.equal(rounded.isnan(), x.isnan())


@pytest.mark.parametrize("name", ["nvfp4", "int4", "int8:token", "int8:cross", "kmeans_4:tensor", "int4:tensor:nested"])
def test_ranges_known_beforehand_are_of_one_scale(name):
    with pytest.raises(FormatError, match=r"no single scale|no scale times a grid"):
        fake_quantize_static(tensor(0), NumberFormat.parse(name), -1.0, 1.0)


@pytest.mark.parametrize("ends", [(2.0, 3.0), (-3.0, -2.0), (math.nan, 1.0)])
def test_ranges_known_beforehand_hold_zero(ends):
    with pytest.raises(FormatError, match="must hold zero, unlike"):
        fake_quantize_static(tensor(0), NumberFormat.parse("int8:tensor"), *ends)


@pytest.mark.parametrize("name", ["fp32", "fp16", "int4:g8:progressive", "int4:nested", "int8:cross", "kmeans_4"])
def test_losses_choose_ranges_of_scaled_grids_alone(name):
    with pytest.raises(FormatError, match="no scale times a grid"):
        loss_aware_range(tensor(0), NumberFormat.parse(name), lambda t: 0.0)


def test_casts_have_no_grid():
    for name in ("fp32", "fp16", "bf16"):
        with pytest.raises(FormatError, match=f"{name} is a cast"):
            find_range(tensor(0, (4, 8)), NumberFormat.parse(name))


@pytest.mark.parametrize("name", ["int4:hadamard", "int4:gptq", "nf4:lorc8", "int4:sparse5", "int4:nested:awq"])
def test_recipes_are_not_left_out_silently(name):
    fmt, x = NumberFormat.parse(name), tensor(0, (12, 40))
    for function in (quantize, fake_quantize):
        with pytest.raises(FormatError, match=f"{name} has a recipe .*: use apply_recipe"):
            function(x, fmt)
    for function in (quantize_all, fake_quantize_all):
        with pytest.raises(FormatError, match="use apply_recipe"):
            function(x, [NumberFormat.parse("int4"), fmt])
    with pytest.raises(FormatError, match="use apply_recipe"):
        fake_quantize(x, fmt, method="minmax", compile=True)


@pytest.mark.parametrize("name", ["int8:cross", "fp8_e4m3:cross", "int4:cross"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_and_columns_with_what_is_not_finite_become_nan(name, bad):
    fmt, x = NumberFormat.parse(name), tensor(0, (5, 7))
    x[1, 2] = bad
    broken = torch.zeros(5, 7, dtype=torch.bool)
    broken[1], broken[:, 2] = True, True
    assert torch.equal(fake_quantize_dynamic(x, fmt).isnan(), broken)


NESTED = ["int4:nested", "int1:nested", "int3:g8:nested", "int4:b2x8:nested", "int4:tensor:nested"]


@pytest.mark.parametrize(
    "name", [*NESTED, "int8:cross", "fp8_e4m3:cross", "int4:g8:progressive", "int4:g7:progressive"]
)
@pytest.mark.parametrize("method", ["mse", "minmax", "percentile:95"])
def test_formats_of_two_scales_are_the_same_in_chunks(name, method, monkeypatch):
    fmt, x = NumberFormat.parse(name), tensor(4, (12, 5, 8))
    for axis, importance in ((0, None), (1, None), (0, tensor(5, (12, 5, 8)).abs())):
        at_once = quantize(x, fmt, axis, method, importance)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_CHUNK", 64)
            q = quantize(x, fmt, axis, method, importance)
            parts = ("codes", "scale", "zero_point") + (("outer",) if q.outer is not None else ())
            assert all(torch.equal(getattr(q, part), getattr(at_once, part)) for part in parts)
            assert torch.equal(fake_quantize(x, fmt, axis, method, importance), dequantize(at_once))
        assert torch.equal(dequantize(q), dequantize(at_once))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["int4", "int4:g8", "int8:tensor", "nf4", "fp8_e4m3", "mxfp4", "fp4_e2m1:raw", "bf16"])
def test_what_is_not_finite_is_refused(name, bad, chunks):
    x = tensor(0, (12, 40))
    x[7, 30] = bad
    for method in ("minmax", "mse", "kl") if name == "int8:tensor" else ("minmax",):
        with pytest.raises(FormatError, match="NaN or infinity"):
            fake_quantize(x, NumberFormat.parse(name), method=method)


@pytest.mark.parametrize(
    ("name", "dtype", "largest", "says"),
    [
        ("fp16", torch.float32, 1e5, "fp16 ends at 65504, but the tensor holds a magnitude of 100000"),
        ("fp16", torch.float32, 65520.0, "fp16 ends at 65504"),
        ("bf16", torch.float32, 3.4e38, "bf16 ends at 3.38953e.38"),
        ("fp32", torch.float64, -1e300, "fp32 ends at 3.40282e.38, but the tensor holds a magnitude of 1e.300"),
        ("int4:g16", torch.float32, 1e7, r"stored in fp16, which ends at 65504, but 1.4\d*e.06 is needed"),
        ("int4:g16:asym", torch.float32, -1e7, "stored in fp16, which ends at 65504"),
        ("nf4:b2x8", torch.float32, 1e5, "stored in fp16"),
        ("int4", torch.float64, 1e300, "stored in fp32"),
        ("int4:tensor", torch.float64, 1e300, "stored in fp32"),
        ("nf4:g8:p2", torch.float32, 3e38, "stored in e8m0, which ends at 1.70141e.38"),
        ("mxfp4", torch.float64, 1e300, "stored in e8m0"),
        ("nvfp4", torch.float64, 1e300, "stored in e4m3"),
        ("int4:g8:nested", torch.float32, 1e7, "stored in fp16"),
        ("int2:g8:nested", torch.float32, 2e6, "int2:g8:nested are stored in fp16"),
        ("int4:g8:progressive", torch.float32, 1e7, "stored in fp16"),
        ("int8:cross", torch.float64, -1e300, "stored in fp32"),
    ],
)
def test_what_is_too_large_for_its_type_is_refused(name, dtype, largest, says, chunks):
    fmt, x = NumberFormat.parse(name), tensor(0, (12, 40), dtype)
    x[7, 30] = largest
    for method in ("minmax",) if fmt.plain_float or name.endswith("p2") else ("minmax", "mse"):  # whose clips fit
        for function in (fake_quantize,) if fmt.plain_float else (fake_quantize, quantize):
            with pytest.raises(FormatError, match=says if method == "minmax" else "stored in"):
                function(x, fmt, method=method)
    with pytest.raises(FormatError, match=says):
        fake_quantize_all(x, [NumberFormat.parse("fp8_e4m3:raw"), fmt], method="minmax")


@pytest.mark.parametrize(
    ("name", "dtype", "largest"),
    [
        ("fp16", torch.float32, 65519.0),
        ("bf16", torch.float32, 3.39e38),
        ("int4:g16", torch.float32, -8 * 65504.0),
        ("int4:g16:asym", torch.float32, 15 * 65504.0),
        ("nf4:g8", torch.float32, 65510.0),
        ("nf4:g8:p2", torch.float32, 2.0**127),
        ("int4", torch.float32, 3.4e38),
        ("mxfp4", torch.float32, 3.4e38),
        ("mxfp8_e4m3", torch.float64, 2.0**127 * 500),
        ("nvfp4", torch.float32, 3.4e38),
    ],
)
def test_the_largest_numbers_that_fit_are_rounded(name, dtype, largest):
    fmt, x = NumberFormat.parse(name), torch.zeros(2, 32, dtype=dtype)
    x[1, 3] = largest
    rounded = fake_quantize(x, fmt, method="minmax")
    assert rounded[1, 3].item() == pytest.approx(largest, rel=0.26 if fmt.family == "mx" else 0.01)
    assert fake_quantize(x, fmt, method="mse").isfinite().all()


def peak_bytes(run):
    """The most that torch holds at a time beyond what it held before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("int4:tensor", "percentile:99.9"), ("int8:tensor:asym", "kl"), ("ternary:tensor", "absmedian")),
        *(("ternary", "absmedian"), ("nupes_4:tensor", "mse"), ("nupes_4", "mse"), ("nupes_4:tensor", "percentile:99")),
        *(("kmeans_4:tensor", "mse"), ("kmeans_4", "mse"), ("kmeans_8:tensor", "mse")),
    ],
)
def test_peak_memory_of_rules_that_sort_is_below_twice_the_tensor_with_the_result(name, method):
    x = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    peak = peak_bytes(lambda: fake_quantize(x, NumberFormat.parse(name), 0, method))
    print(name, peak / (x.numel() * 4))
    assert x.numel() * 4 <= peak < 2 * x.numel() * 4


def test_peak_memory_is_below_twice_the_tensor():
    x = torch.randn(1024, 4096)
    size = x.numel() * 4
    names = "int4 int4:g128 int4:b2x64:asym fp8_e4m3 nf4 mxfp4 nvfp4 int8:tensor int4:nested int4:g128:progressive"
    for name in [*names.split(), "int8:cross"]:
        for method in ("minmax", "mse") if name in ("int4:g128", "int4:nested") else ("minmax",):
            out, fmt = torch.empty_like(x), NumberFormat.parse(name)
            peak = peak_bytes(lambda fmt=fmt, method=method, out=out: fake_quantize(x, fmt, 0, method, out=out))
            print(name, peak / size)
            assert 0 < peak < 2 * size
