"""Integers inside 8-bit ones: nested (Double Rounding) and progressive (QServe)."""

import pytest
import torch
from random_tensors import tensor

from mpq import NumberFormat
from mpq.errors import FormatError
from mpq.quantizers import dequantize, fake_quantize, quantize
from mpq.quantizers.nested import narrow
from mpq.quantizers.progressive import eight_bits


def test_one_stored_tensor_serves_every_width():
    x = tensor(10, (5, 60))
    for options in ("", ":g16", ":tensor"):
        eight = quantize(x, NumberFormat.parse("int8" + options))
        for bits in range(1, 9):
            fmt = NumberFormat.parse(f"int{bits}{options}:nested")
            narrowed = narrow(eight, bits)
            assert narrowed.fmt == fmt
            assert torch.equal(dequantize(narrowed), fake_quantize(x, fmt))
            wide = eight.codes.double()
            if 1 < bits < 8:  # the second rounding: to nearest, halves up
                units = (wide / 2 ** (8 - bits) + 0.5).floor().clamp(*fmt.levels)
                assert torch.equal(narrowed.codes.double(), units)
            elif bits == 8:
                assert torch.equal(narrowed.codes, eight.codes)
    errors = [(fake_quantize(x, NumberFormat.parse(f"int{b}:nested")) - x).square().sum().item() for b in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


def test_nested_scales_have_the_least_error_against_the_stored_tensor():
    eight = quantize(tensor(12, (3, 200), torch.float64), NumberFormat.parse("int8"))
    stored = dequantize(eight)
    for bits in (1, 2, 4):
        q = narrow(eight, bits)
        units = dequantize(q) / q.scale
        best = (units * stored).sum(1, keepdim=True) / units.square().sum(1, keepdim=True)
        torch.testing.assert_close(q.scale, best, rtol=1e-6, atol=0)
    short = quantize(torch.tensor([[1.0, 2, 3, 4, 100, 60]], dtype=torch.float64), NumberFormat.parse("int8:g4"))
    q = narrow(short, 2)
    units, wide = q.codes[1, :2].double(), short.codes[1, :2] * short.scale[1]
    best = (units * wide).sum() / units.square().sum()
    assert q.scale[1].item() == pytest.approx(best.item(), rel=1e-3)  # without the padding; float16
    with pytest.raises(FormatError, match="only symmetric 8-bit"):
        narrow(quantize(tensor(0), NumberFormat.parse("int4")), 2)


@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_progressive_is_an_integer_grid_of_8_bits(method):
    x = tensor(13, (8, 70), power=3)
    q = quantize(x, NumberFormat.parse("int4:g16:progressive"), method=method)
    raw = (q.codes.double() - q.zero_point) * q.scale
    assert raw.abs().max() <= 127  # no overflow: the protective range
    assert torch.equal(eight_bits(q).double(), raw)
    assert (q.scale == q.scale.round()).all()
    assert 1 <= int(q.scale.min()) <= int(q.scale.max()) <= 16
    assert 0 <= int(q.zero_point.min()) <= int(q.zero_point.max()) <= 15
    assert int(q.codes.max()) <= 15
    assert torch.equal(q.outer[:, 0], (x.abs().amax(1) / 119).half().float())


def test_progressive_by_minmax_is_the_paper_s_formula():
    x = tensor(14, (100, 32), torch.float64)
    q = quantize(x, NumberFormat.parse("int4:g16:progressive"), method="minmax")
    whole = (x / q.outer).round().reshape(200, 16)
    lo, hi = whole.amin(1, keepdim=True), whole.amax(1, keepdim=True)
    scale = ((hi - lo) / 15).round()
    assert torch.equal(q.scale, scale)
    covered = (15 * scale >= hi - lo).flatten()
    zero = (-lo / scale).round()
    assert torch.equal(q.zero_point[covered], zero[covered])
    codes = ((whole / scale).round() + zero).clamp(0, 15)
    assert torch.equal(q.codes[covered].double(), codes[covered])
    error = {m: (fake_quantize(x, q.fmt, method=m) - x).square().sum() for m in ("mse", "minmax")}
    assert error["mse"] <= error["minmax"]
