"""Inputs that are smoothed or rotated before they are rounded, as the weight they meet is."""

import pytest
import torch
from torch import nn

import mpq
from mpq.bank import quantize_inputs
from mpq.errors import FormatError
from mpq.packed import packed_bytes
from mpq.quantizers import (
    ActivationObserver,
    NumberFormat,
    Scheme,
    fake_quantize,
    fake_quantize_dynamic,
    fake_quantize_static,
    hadamard,
)
from mpq.quantizers import basis as basis_module
from mpq.quantizers.basis import InputBasis, input_basis
from mpq.quantizers.equalization import smooth_scales
from mpq.quantizers.hadamard import hadamard_rotation, rotate


class Outliers(nn.Module):
    """A linear layer and convolutions whose inputs have channels far larger than others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 16, 3, groups=2)
        self.up = nn.ConvTranspose1d(16, 12, 3, groups=4)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.up(self.conv(x).flatten(2))
        return self.fc(x.mean(2) * torch.logspace(0, 2, 12))


def images(seed=0, count=64):
    x = torch.randn(count, 8, 5, 5, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([1.0, 1, 50, 1, 1, 1, 1, 9])[:, None, None]


@pytest.fixture(scope="module")
def net():
    return Outliers().eval(), [images(0), images(1)]


def uniform(model, calib, scheme, **options):
    options = {"estimator": "influence", "progress": False} | options
    return mpq.analyze(model, calib, scheme, **options).uniform(scheme)


def lost(model, calib, scheme):
    found = mpq.quantize(model, uniform(model, calib, scheme), calib=calib)
    with torch.no_grad():
        return float((found(images(5)) - model(images(5))).square().mean())


def test_schemes_say_that_inputs_are_in_another_basis():
    smoothed = Scheme.parse("W8:smooth:gptqA8")
    assert smoothed.activation.name == "int8:tensor:asym:smooth"
    assert str(smoothed) == "W8:smooth:gptqA8"
    assert Scheme.parse(str(smoothed)) == smoothed == Scheme(smoothed.weight, smoothed.activation)
    assert Scheme.parse("W4:hadamard:smoothA8:token").activation.recipe == ("hadamard", "smooth")
    assert Scheme.parse("W4:sparse5:gptqA8").activation.recipe == ()
    assert Scheme.parse("W4:awqA16").activation.recipe == ()
    for name in ("W4:awqA8", "W4:sparse5:smoothA8", "W4:smooth:lorc2:hadamardA4"):
        with pytest.raises(FormatError, match="changes what inputs are rounded to"):
            Scheme.parse(name)
    with pytest.raises(FormatError, match="smooth is for weights"):
        Scheme.parse("W8A8:smooth")


def test_a_basis_and_back_is_nothing_and_products_stay():
    x, weight = torch.randn(3, 12, 4).double(), torch.randn(5, 6).double()
    rotation = hadamard_rotation(6, torch.float64)
    basis = InputBasis((torch.rand(6).half() + 0.5, rotation))
    torch.testing.assert_close(basis.back(basis.into(x, 1), 1), x)
    one = InputBasis(basis.steps[:1])
    scaled = rotate(weight * basis.steps[0].double(), rotation)
    rows = x[:, :6].movedim(1, -1)
    torch.testing.assert_close(basis.into(rows) @ scaled.T, rows @ weight.T)
    assert torch.equal(one.into(x, 1)[:, 6:], x[:, 6:] / basis.steps[0].double()[:, None])  # of the second group


def test_smoothed_inputs_are_divided_before_they_are_rounded(net):
    """SmoothQuant by hand: ``Q(x / s) Q(s W)``, with the range of the divided inputs."""
    model, calib = net
    cfg = uniform(model, calib, "W8:smoothA8", weight_range="minmax", activation_range="minmax")
    quantized = mpq.quantize(model, cfg, calib=calib)
    weight = model.conv.weight.detach()
    largest = torch.stack([x.abs().amax((0, 2, 3)) for x in calib]).amax(0).view(2, 4).amax(0)
    scales = smooth_scales(largest, weight.flatten(1), positions=9)[:, None, None]
    x = calib[1]
    divided = [b / scales.repeat(2, 1, 1) for b in calib]
    ends = torch.cat(divided).aminmax()
    assert cfg["conv"].activation_range == pytest.approx([v.item() for v in ends])
    observer = ActivationObserver()
    for b in divided:
        observer.update(b)
    fmt = cfg["conv"].activation
    rounded = fake_quantize_static(divided[1], fmt, *observer.range(fmt, "minmax"))
    expected = nn.functional.conv2d(
        rounded, fake_quantize(weight * scales, cfg["conv"].weight.data_free, 0, "minmax"), model.conv.bias, groups=2
    )
    with torch.no_grad():
        torch.testing.assert_close(quantized.conv(x), expected, rtol=1e-4, atol=1e-4)


def test_rotated_inputs_are_rounded_where_they_are_rotated(net):
    model, calib = net
    cfg = uniform(model, calib, "Wint16:hadamardA4:token")
    quantized = mpq.quantize(model, cfg)
    seen = {}
    quantized.fc.register_forward_pre_hook(lambda m, args: seen.update(before=args[0]), prepend=True)
    quantized.fc.register_forward_hook(lambda m, args, out: seen.update(after=args[0]))
    with torch.no_grad():
        quantized(calib[0])
    rotation = hadamard_rotation(12)
    expected = rotate(fake_quantize_dynamic(rotate(seen["before"], rotation), cfg["fc"].activation), rotation.T)
    torch.testing.assert_close(seen["after"], expected)


@pytest.mark.parametrize("steps", [("hadamard",), ("smooth",), ("smooth", "hadamard")])
def test_half_precision_is_rotated_and_scaled_in_float32(steps):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    kept = {"smooth.scales": torch.logspace(-1, 1, 256).half()}
    basis, layer, fmt = input_basis(steps, kept, 256), nn.Linear(256, 1), NumberFormat.parse("int8:token")
    ((found,), _), ((wide,), _) = (quantize_inputs(layer, fmt, None, ((t,), {}), basis) for t in (x, x.float()))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wide.bfloat16())
    ((static,), _) = quantize_inputs(layer, NumberFormat.parse("int8:tensor"), (-4.0, 4.0), ((x,), {}), basis)
    assert static.dtype == torch.bfloat16


def test_rotations_are_made_when_needed_and_shared_by_size():
    kept = {"smooth.scales": torch.ones(48).half()}
    first, second = (input_basis(("smooth", "hadamard"), kept, n).steps[1] for n in (48, 16))
    assert first is second is hadamard_rotation(80, torch.float64)
    del first, second
    assert (16, torch.float64) not in hadamard._in_use
    with torch.inference_mode(), torch.device("meta"):
        made = hadamard_rotation(32)
    assert not made.is_inference()
    assert made.device.type == "cpu"


def test_scales_alone_build_no_rotation(monkeypatch):
    monkeypatch.setattr(basis_module, "hadamard_rotation", None)
    assert len(input_basis(("smooth",), {"smooth.scales": torch.ones(48).half()}, 48).steps) == 1


def test_outliers_of_inputs_lose_less(net):
    model, calib = net
    plain, smoothed, turned = (lost(model, calib, s) for s in ("W8A8", "W8:smoothA8", "W8:hadamardA8"))
    assert smoothed < 0.8 * plain
    assert turned < plain


@pytest.mark.parametrize("scheme", ["W8:smoothA8", "W4:hadamard:smooth:gptqA8:token", "W6:hadamardAfp8_e4m3"])
def test_evaluators_and_files_have_the_same_basis(net, scheme, tmp_path):
    model, calib = net
    cfg = uniform(model, calib, scheme)
    cfg = mpq.load(cfg.save(tmp_path / "bits.json"))
    quantized = mpq.quantize(model, cfg, calib=calib)
    x = [images(7)]
    found = mpq.Evaluator(model, x, calib=calib, progress=False).measure(cfg)
    assert found.kl == pytest.approx(mpq.evaluate(quantized, x, reference=model, progress=False).kl, rel=1e-5)
    path = mpq.save_quantized(quantized, cfg, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(mpq.load_quantized(model, path)(x[0]), quantized(x[0]))
    assert packed_bytes(path) == mpq.packed_size(model, cfg)


def test_each_basis_costs_a_pass_over_the_data(net):
    model, calib = net
    passes = [uniform(model, calib, s).provenance["forward_passes"] for s in ("W8A8", "W8:hadamardA8", "W8:smoothA8")]
    assert passes[1] == pytest.approx(passes[0] + 1)
    assert passes[2] == pytest.approx(passes[0] + 2)  # statistics of inputs as well
