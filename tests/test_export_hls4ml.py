"""Fixed-point types in hls4ml: read back from it, and its C++ simulation against `mpq.quantize`."""

import json

import numpy as np
import pytest
import torch
from configs import with_scheme
from torch import nn

import mpq
from mpq.corrections import add_noise_bias
from mpq.errors import ConfigError, ExportError
from mpq.export.hls4ml import update
from mpq.quantizers.scales import scale_and_zero
from mpq.quantizers.tensors import quantize

SCHEMES = "W4:tensor:p2A8:sym:p2,W3:tensor:p2A6:sym:p2,W6:tensor:p2A10:sym:p2"


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.Linear(16, 5),
    )
    x = torch.randn(16, 1, 8, 8)
    model(x)
    return model.eval(), x


@pytest.fixture(scope="module")
def exported(cnn, mixed, tmp_path_factory):
    model, x = cnn
    config = mixed(model, [x], SCHEMES, runtime="hls4ml", skip=["6"])
    assert len(config) == 3
    path = tmp_path_factory.mktemp("hls4ml") / "precision.json"
    return config, mpq.export(config, "hls4ml", path, model)


def expected_type(fmt, scale):
    return fmt.bits, fmt.bits + round(np.log2(scale))


def test_types_hold_our_very_grid(cnn, exported):
    model, _ = cnn
    config, result = exported
    data = json.loads(result.path.read_text())
    names = {"0": "_0", "3.0": "_3_0", "5": "_5"}
    inputs = {"0": "input_1", "3.0": "_2", "5": "_3_1"}  # what makes the values, not what shapes them
    for name, choice in config.items():
        weight = quantize(model.get_submodule(name).weight, choice.weight, 0, "minmax")
        w, i = expected_type(choice.weight, weight.scale.item())
        assert data["LayerName"][names[name]]["Precision"]["weight"] == f"ap_fixed<{w},{i},RND_CONV,SAT>"
        scale, _ = scale_and_zero(*torch.tensor(choice.activation_range), choice.activation)
        w, i = expected_type(choice.activation, scale.item())
        assert data["LayerName"][inputs[name]]["Precision"]["result"] == f"ap_fixed<{w},{i},RND_CONV,SAT>"
    assert {n: s for n, (s, _) in result.layers.items()} == {**dict.fromkeys(config, "exact"), "6": "left float"}


def converted(model, result, folder, trace=()):
    hls4ml = pytest.importorskip("hls4ml", reason="pip install 'mpq[export-hls4ml]'")
    found = hls4ml.utils.config_from_pytorch_model(model, (1, 8, 8), granularity="name", backend="Vitis")
    for name in trace:
        found["LayerName"][name]["Trace"] = True
    return hls4ml.converters.convert_from_pytorch_model(
        model, hls_config=update(found, result.path), output_dir=str(folder), backend="Vitis"
    )


def bits(kind):
    return kind.width, kind.integer, str(kind.rounding_mode), str(kind.saturation_mode)


@pytest.mark.slow
def test_hls4ml_has_every_layers_types(cnn, exported, tmp_path):
    model, _ = cnn
    config, result = exported
    found = converted(model, result, tmp_path)
    layers = {layer.name: layer for layer in found.get_layers()}
    assert "_1" in layers  # the batch normalization, which hls4ml would merge with the weights
    data = json.loads(result.path.read_text())["LayerName"]
    for name, choice in config.items():
        layer = layers["_" + name.replace(".", "_")]
        kind = bits(layer.weights["weight"].type.precision)
        wanted = data[layer.name]["Precision"]["weight"]
        assert wanted == "ap_fixed<{},{},{},{}>".format(*(str(k).removeprefix("AP_") for k in kind))
        result_type = layer.get_input_variable().type.precision
        scale, _ = scale_and_zero(*torch.tensor(choice.activation_range), choice.activation)
        assert (result_type.width, result_type.integer) == expected_type(choice.activation, scale.item())
        assert bits(result_type)[2:] == kind[2:]
        assert [str(k).removeprefix("AP_") for k in kind[2:]] == ["RND_CONV", "SAT"]
    default = (32, 16)
    left_out = layers["_6"].weights["weight"].type.precision
    assert (left_out.width, left_out.integer) == default


@pytest.mark.slow
def test_the_simulation_gives_our_outputs(cnn, exported, tmp_path):
    model, x = cnn
    config, result = exported
    names = {name: "_" + name.replace(".", "_") for name in config}
    found = converted(model, result, tmp_path, names.values())
    quantized, ours = mpq.quantize(model, config), {}
    for name in names:
        quantized.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: ours.update({name: out.numpy()})
        )
    with torch.no_grad():
        expected = quantized(x).numpy()
    outputs, theirs = found.trace(np.ascontiguousarray(x.numpy().transpose(0, 2, 3, 1)))
    # All else, such as biases, has a step of 2**-16; codes of weights or inputs that differ by one give much more.
    for name, here in names.items():
        channels_last = np.moveaxis(ours[name], 1, -1)
        np.testing.assert_allclose(theirs[here].reshape(channels_last.shape), channels_last, rtol=0, atol=1e-4)
    np.testing.assert_allclose(outputs.reshape(expected.shape), expected, rtol=0, atol=1e-4)


def test_names_that_hls4ml_does_not_know_are_refused(exported):
    """hls4ml would accept them in silence."""
    _, result = exported
    config = {"Model": {"Precision": {"default": "ap_fixed<16,6>"}}, "LayerName": {"conv": {"Precision": {}}}}
    with pytest.raises(ExportError, match=r"hls4ml has no layer .*; it has conv"):
        update(config, result.path)


@pytest.mark.slow
def test_hls4ml_alone_accepts_unknown_names(cnn, exported, tmp_path):
    hls4ml = pytest.importorskip("hls4ml", reason="pip install 'mpq[export-hls4ml]'")
    model, _ = cnn
    found = hls4ml.utils.config_from_pytorch_model(model, (1, 8, 8), granularity="name", backend="Vitis")
    found["LayerName"]["no_such_layer"] = {"Precision": {"weight": "ap_fixed<4,1>"}}
    hls4ml.converters.convert_from_pytorch_model(
        model, hls_config=found, output_dir=str(tmp_path), backend="Vitis"
    )  # no error


def test_inputs_that_others_read_are_reported_or_refused(mixed, tmp_path):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.a(x).relu()
            return self.b(y) + self.c(y) + y

    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(16, 8)
    config = mixed(model, [x], SCHEMES, runtime="hls4ml")
    found = mpq.export(config, "hls4ml", tmp_path / "x.json", model)
    assert found.layers["a"][0] == "exact"
    assert found.layers["b"][0] == "approximated"
    assert found.layers["b"][1].endswith("which add_1 reads too")
    split = with_scheme(config, "c", "W4:tensor:p2A12:sym:p2")
    with pytest.raises(ExportError, match="layers 'b' and 'c' read one tensor, which can't be both"):
        mpq.export(split, "hls4ml", tmp_path / "x.json", model)


def test_float_inputs_that_are_rounded_for_another_layer_are_reported(mixed, tmp_path):
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.a(x).relu()
            return self.b(y) + self.c(y.flatten(1))

    torch.manual_seed(0)
    model, x = Fork().eval(), torch.randn(16, 8)
    rounded, free = "W4:tensor:p2A8:sym:p2", "W4:tensor:p2"
    pins = {"a": rounded, "b": rounded, "c": free}
    config = mixed(model, [x], f"{rounded},{free}", share_inputs=False, pin=pins)
    found = mpq.export(config, "hls4ml", tmp_path / "x.json", model).layers
    assert found["b"][0] == "exact"
    assert found["c"][0] == "approximated"
    assert found["c"][1].endswith("input for layer 'b'")


def test_layers_that_tracing_does_not_see_are_refused(mixed, tmp_path):
    """They would be missing in the file and in the report."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model, x = nn.Sequential(nn.Linear(16, 16), layer).eval(), torch.randn(2, 4, 16)
    scheme = "W4:tensor:p2"
    config = mixed(model, [x], scheme, skip=["*self_attn*", "*linear2"])
    with pytest.raises(ExportError, match=r"layer '1.linear1' is inside a module .* skip=\['1.linear1'\]"):
        mpq.export(config, "hls4ml", tmp_path / "x.json", model)


def test_noise_is_refused(mixed, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16)).eval(), torch.randn(64, 16)
    config = mixed(model, [x], "W8:tensor:p2A2:sym:p2", runtime="hls4ml")
    quantized = mpq.quantize(model, config)
    types = [
        mpq.export(config, "hls4ml", tmp_path / n, m).path.read_text() for n, m in (("a", model), ("b", quantized))
    ]
    assert types[0] == types[1]
    noisy = add_noise_bias(quantized, [x])
    assert noisy[0].input_quantizer.noise is not None
    with pytest.raises(ConfigError, match="layer '0' adds noise to its inputs"):
        mpq.export(config, "hls4ml", tmp_path / "x.json", noisy)


def test_what_is_no_fixed_point_is_refused(cnn, exported, tmp_path):
    config, _ = exported
    for scheme in ("W4:tensorA8:sym:p2", "W4:p2A8:sym:p2", "W4:tensor:p2A8:p2", "W1:tensor:p2"):
        changed = with_scheme(config, "5", scheme)
        with pytest.raises(ExportError, match=r"layer '5' has .*, but hls4ml has no"):
            mpq.export(changed, "hls4ml", tmp_path / "x.json", cnn[0])
    with pytest.raises(ExportError, match="pass model="):
        mpq.export(config, "hls4ml", tmp_path / "x.json")
