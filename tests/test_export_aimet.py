"""AIMET encodings, loaded into a simulation of aimet-onnx."""

import json

import numpy as np
import pytest
import torch
from configs import with_scheme
from torch import nn

import mpq
from mpq.errors import ExportError

onnx = pytest.importorskip("onnx", reason="pip install 'mpq[export-onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'mpq[export-onnx]'")


@pytest.fixture(scope="module")
def exported(example, mixed, tmp_path_factory):
    model, calib, _ = example
    config = mixed(model, calib[:2], "W4A8,W8:tensorA8:sym,W4:asymAint16,W8A8,Wint16Aint16", runtime="aimet")
    path = tmp_path_factory.mktemp("aimet") / "resnet.encodings"
    return config, mpq.export(config, "aimet", path, model, sample=calib[0])


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x):
        x = self.down(self.up(x).relu())
        return self.attention(x, x, x)[0]


def simulate(path):
    """A simulation with other defaults than ours, after the encodings are loaded; and what did not fit."""
    quantsim = pytest.importorskip("aimet_onnx.quantsim", reason="pip install 'mpq[export-aimet]'")
    sim = quantsim.QuantizationSimModel(onnx.load(path.with_suffix(".onnx")), param_type="int8", activation_type="int8")
    return sim, quantsim.load_encodings_to_sim(sim, str(path), strict=False)


def test_every_tensor_has_its_encoding(example, exported):
    model = example[0]
    config, result = exported
    data = json.loads(result.path.read_text())
    assert data["version"] == "1.0.0"
    weights = {e["name"]: e for e in data["param_encodings"]}
    assert weights.keys() == {f"{n}.weight" for n in config}
    quantized = mpq.quantize(model, config)
    graph = onnx.load(result.path.with_suffix(".onnx")).graph
    held = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    tensors = {i for n in graph.node for i in n.input}
    for name, choice in config.items():
        encoding, weight = weights[f"{name}.weight"], held[f"{name}.weight"]
        assert (encoding["bw"], encoding["is_sym"]) == (choice.weight.bits, choice.weight.symmetric)
        assert len(encoding["scale"]) == (1 if choice.weight.granularity == "tensor" else len(weight))
        scale, offset = (
            np.asarray(encoding[k], np.float32).reshape(-1, *[1] * (weight.ndim - 1)) for k in ("scale", "offset")
        )
        # What AIMET computes of scale and offset.
        codes = np.clip(np.round(weight / scale) - offset, 0, 2 ** encoding["bw"] - 1)
        expected = quantized.get_submodule(name).weight.detach().numpy()
        assert (np.abs((codes + offset) * scale - expected) <= (1.01 * scale if encoding["bw"] == 16 else 1e-6)).all()
    assert {e["name"] for e in data["activation_encodings"]} <= tensors


def test_inputs_that_others_read_are_reported(exported):
    config, result = exported
    assert result.layers["layer1.1.conv1"][0] == "approximated"
    assert "rounded for Add too" in result.layers["layer1.1.conv1"][1]
    assert result.layers["layer1.1.conv2"] == ("exact", str(config["layer1.1.conv2"].scheme))


class Fork(nn.Module):
    """Two layers read one tensor, which is an output too."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        y = self.a(x).relu()
        return self.b(y) + self.c(y), y


def test_float_inputs_that_are_rounded_for_another_layer_are_reported(mixed, tmp_path):
    torch.manual_seed(0)
    model, x = Fork().eval(), torch.randn(4, 8)
    config = mixed(model, [x], "W8A8,W8", share_inputs=False, pin={"b": "W8A8", "c": "W8"})
    found = mpq.export(config, "aimet", tmp_path / "fork.encodings", model, sample=x).layers
    assert found["a"] == ("exact", str(config["a"].scheme))
    assert found["b"] == ("approximated", "W8A8; its input is rounded for the model's output too")
    assert found["c"] == ("approximated", "W8; its input is rounded for layer 'b'")


def test_no_file_is_replaced_but_its_own(example, exported, tmp_path):
    """The float model is written to a path that nobody gave: the model itself may be there."""
    model, calib, _ = example
    for content in (b"", b"no ONNX file", exported[1].path.with_suffix(".onnx").read_bytes()):
        (tmp_path / "net.onnx").write_bytes(content)
        with pytest.raises(ExportError, match=r"there is another .*net\.onnx already, which may be your model"):
            mpq.export(exported[0], "aimet", tmp_path / "net.encodings", model, sample=calib[0])
        assert (tmp_path / "net.onnx").read_bytes() == content
    (tmp_path / "net.onnx").unlink()
    for _ in range(2):
        mpq.export(exported[0], "aimet", tmp_path / "net.encodings", model, sample=calib[0])


@pytest.mark.slow
def test_aimet_applies_every_encoding(example, exported):
    """Loading with strict=False reports what does not fit and goes on, so what was applied is looked at."""
    _, calib, _ = example
    config, result = exported
    sim, mismatches = simulate(result.path)
    quantizers = sim.qc_quantize_op_dict
    data = json.loads(result.path.read_text())
    ours = {e["name"]: e for e in data["param_encodings"] + data["activation_encodings"]}
    # AIMET lets a tensor before a ReLU share the quantizer after it.
    assert {id(q) for q in quantizers.values() if q.enabled} == {id(quantizers[n]) for n in ours}
    for name, encoding in ours.items():
        assert quantizers[name].bitwidth == encoding["bw"]
        assert quantizers[name].use_symmetric_encodings == encoding["is_sym"]
    for name, choice in config.items():
        per_channel = choice.weight.granularity == "channel"
        assert quantizers[f"{name}.weight"].quant_info.usePerChannelMode == per_channel
        assert len(quantizers[f"{name}.weight"].get_encodings()) == (choice.weight_shape[0] if per_channel else 1)
    assert {m.quantizer_name for m in mismatches} >= {f"{n}.weight" for n in config if config[n].weight.bits != 8}
    x = calib[1][0][:16]
    with torch.no_grad():
        expected = mpq.quantize(example[0], config)(x).numpy()
    found = sim.session.run(None, {"input": x.numpy()})[0]
    # The residual path is rounded too.
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert (found.argmax(1) == expected.argmax(1)).all()


@pytest.mark.slow
def test_aimet_on_matrices_with_groups(mixed, tmp_path):
    torch.manual_seed(0)
    model, x = Mlp().eval(), torch.randn(2, 5, 32)
    config = mixed(model, [x], "W4:g16,W8A8,W4:g32:asym", runtime="aimet")
    path = tmp_path / "mlp.encodings"
    result = mpq.export(config, "aimet", path, model, sample=x)
    assert {s for s, _ in result.layers.values()} == {"exact"}
    sim, _ = simulate(path)
    assert {n: q.bitwidth for n, q in sim.qc_quantize_op_dict.items() if q.enabled and n.endswith("weight")} == {
        f"{n}.weight": c.weight.bits for n, c in config.items()
    }
    for name, choice in config.items():
        quantizer = sim.qc_quantize_op_dict[f"{name}.weight"]
        assert quantizer.quant_info.blockSize == (choice.weight.group_size or 0)
        assert quantizer.use_symmetric_encodings == choice.weight.symmetric
    with torch.no_grad():
        expected = mpq.quantize(model, config)(x).numpy()
    np.testing.assert_allclose(sim.session.run(None, {"input": x.numpy()})[0], expected, atol=1e-3)


def test_what_aimet_has_not_is_refused(example, exported, tmp_path):
    model, calib, _ = example
    config, _ = exported
    for scheme, match in {
        "W3A8": "aimet has no W3A8; choose one that it loads",
        "W4A8:token": "aimet has no W4A8:token",
    }.items():
        with pytest.raises(ExportError, match=match):
            mpq.export(with_scheme(config, "fc", scheme), "aimet", tmp_path / "x.encodings", model, sample=calib[0])
    clash = with_scheme(config, "layer2.0.shortcut.0", "W8Aint16")
    clash = with_scheme(clash, "layer2.0.conv1", "W8A8")
    with pytest.raises(
        ExportError, match=r"layers '.*' and '.*' need different encodings of the tensor .* that both read"
    ):
        mpq.export(clash, "aimet", tmp_path / "x.encodings", model, sample=calib[0])
