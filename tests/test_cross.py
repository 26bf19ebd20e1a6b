"""Scales of rows and columns (CrossQuant)."""

import torch
from random_tensors import tensor

from mpq import NumberFormat, Scheme
from mpq.quantizers import fake_quantize, fake_quantize_dynamic


def test_cross_scales_follow_the_paper():
    x = tensor(8, (6, 10), torch.float64)
    scale = x.abs().amax(1, keepdim=True) ** 0.15 * x.abs().amax(0, keepdim=True) ** 0.85 / 127
    rounded = fake_quantize(x, NumberFormat.parse("int8:cross"))
    torch.testing.assert_close(rounded, (x / scale).round() * scale, rtol=1e-6, atol=0)
    assert ((rounded - x).abs() <= scale * 0.5001).all()


def test_cross_keeps_small_activations_beside_an_outlier_channel():
    x = tensor(9, (2, 50, 64))
    x[..., 5] *= 100
    errors = {}
    for name in ("int8:token", "int8:cross"):
        errors[name] = (fake_quantize_dynamic(x, NumberFormat.parse(name)) - x)[..., :5].square().mean()
    assert errors["int8:cross"] < 0.01 * errors["int8:token"]
    image = x.movedim(-1, 1)
    rounded = fake_quantize_dynamic(image, NumberFormat.parse("int8:cross"), 1)
    assert torch.equal(rounded, fake_quantize_dynamic(x, NumberFormat.parse("int8:cross")).movedim(-1, 1))
    assert str(Scheme.parse("W4A8:cross")) == "W4A8:cross"
