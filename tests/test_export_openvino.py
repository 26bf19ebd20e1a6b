"""Plans for NNCF, carried out by it, and the ONNX file in OpenVINO."""

import json
import re

import numpy as np
import pytest
import torch
from configs import with_scheme
from torch import nn

import mpq
from mpq.errors import ExportError
from mpq.export.openvino import compress


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(11))  # blocks.1 begins like blocks.10
        self.head = nn.Linear(64, 7, bias=False)

    def forward(self, tokens):
        x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(x)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval(), torch.randint(50, (2, 6))


SCHEMES = "W8,W4:g32,W4,W4:g16:asym,W2:g32,W8:asym,W4:asym,Wnf4:g64,Wfp8_e4m3,Wmxfp4,Wnvfp4"


@pytest.fixture
def config(net, mixed):
    found = mixed(net[0], [net[1]], SCHEMES, runtime="openvino", pick={"head": "W4:g32"})
    assert len(found) == 12
    return found


def test_passes_leave_each_others_layers_alone(config, tmp_path):
    result = mpq.export(config, "openvino", tmp_path / "plan.json")
    passes = json.loads(result.path.read_text())["passes"]
    names = {n: f"__module.{n}/aten::linear/MatMul" for n in config}
    others = [
        "__module.conv/aten::_convolution/Convolution",
        "__module.embed/aten::embedding/Gather",
        "aten::matmul/MatMul",
    ]
    for step in passes:
        pattern = re.compile(step["ignored_scope"]["patterns"][0])  # NNCF matches from the start only
        assert {n for n, node in names.items() if not pattern.match(node)} == step["layers"].keys()
        assert all(pattern.match(o) for o in others)
        arguments = step["compress_weights"]
        assert arguments["mode"].startswith("int8") or (arguments["ratio"], arguments["all_layers"]) == (1.0, True)
    assert sorted(n for step in passes for n in step["layers"]) == sorted(config)
    assert {s for s, _ in result.layers.values()} == {"exact", "left float"}


@pytest.mark.slow
def test_nncf_gives_every_layer_its_format(net, config, tmp_path):
    ov = pytest.importorskip("openvino", reason="pip install 'mpq[export-openvino]'")
    pytest.importorskip("nncf", reason="pip install 'mpq[export-openvino]'")
    model, tokens = net
    exported = mpq.export(config, "openvino", tmp_path / "plan.json")
    found = compress(ov.convert_model(model, example_input=tokens), tmp_path / "plan.json")
    kinds = {
        op.get_friendly_name(): op.get_element_type().get_type_name()
        for op in found.get_ops()
        if op.get_type_name() == "Constant" and re.fullmatch(r"self\..*weight", op.get_friendly_name())
    }
    groups = {
        op.get_friendly_name(): op.get_output_shape(0)
        for op in found.get_ops()
        if op.get_type_name() == "Constant" and op.get_friendly_name().endswith("weight/scale")
    }
    scales = {
        op.get_friendly_name(): op.get_element_type().get_type_name()
        for op in found.get_ops()
        if op.get_type_name() == "Constant" and op.get_friendly_name().endswith("weight/scale")
    }
    for name, choice in config.items():
        kind = {"f16": "float16", "f8e8m0": "e8m0", "f8e4m3": "e4m3"}[scales[f"self.{name}.weight/scale"]]
        assert exported.layers[name][1].endswith(f", scales in {kind}")
        per_row = (choice.weight.group_size and 64 // choice.weight.group_size) or 1
        assert int(np.prod(groups[f"self.{name}.weight/scale"])) == choice.weight_shape[0] * per_row, name
    expected = {"int8": "i8", "int4": "i4", "int2": "u2", "nf4": "nf4", "fp8_e4m3": "f8e4m3"}
    expected |= {"mxfp4": "f4e2m1", "nvfp4": "f4e2m1", "int8:asym": "u8", "int4:asym": "u4"}
    for name, choice in config.items():
        base = choice.weight.base + ("" if choice.weight.symmetric else ":asym")
        assert kinds.pop(f"self.{name}.weight") == expected[base]
    assert set(kinds.values()) <= {"f32", "f16"}  # the embedding and the convolution
    hints = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    theirs = ov.Core().compile_model(found, "CPU", hints)(tokens.numpy())[0]
    with torch.no_grad():
        ours, exact = mpq.quantize(model, config)(tokens).numpy(), model(tokens).numpy()
    assert np.abs(theirs - exact).max() < 2 * np.abs(ours - exact).max()


@pytest.mark.slow
def test_nncf_alone_gives_the_last_layer_8_bits(net, tmp_path):
    """What all_layers=True is for."""
    ov = pytest.importorskip("openvino", reason="pip install 'mpq[export-openvino]'")
    nncf = pytest.importorskip("nncf", reason="pip install 'mpq[export-openvino]'")
    model, tokens = net
    found = nncf.compress_weights(
        ov.convert_model(model, example_input=tokens), mode=nncf.CompressWeightsMode.INT4_SYM, group_size=32
    )
    kinds = {op.get_friendly_name(): op.get_element_type().get_type_name() for op in found.get_ops()}
    assert kinds["self.head.weight"] == "u8"
    assert kinds["self.conv.weight"] == "u8"  # nor is anything else but a matrix product ever of 4 bits


@pytest.mark.slow
def test_plans_for_other_models_are_refused(net, config, tmp_path):
    ov = pytest.importorskip("openvino", reason="pip install 'mpq[export-openvino]'")
    pytest.importorskip("nncf", reason="pip install 'mpq[export-openvino]'")
    mpq.export(config, "openvino", tmp_path / "plan.json")
    other = ov.convert_model(nn.Linear(64, 7), example_input=torch.randn(1, 64))
    with pytest.raises(ExportError, match=r"layer 'blocks\.0': the model has no operation"):
        compress(other, tmp_path / "plan.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ExportError, match="is no plan"):
        compress(other, tmp_path / "other.json")


@pytest.mark.slow
def test_openvino_reads_our_values_from_onnx(net, mixed, tmp_path):
    ov = pytest.importorskip("openvino", reason="pip install 'mpq[export-openvino]'")
    model, tokens = net
    config = mixed(model, [tokens], "W4:g32,W8,W4:asym,W4:g16:asym", runtime="onnx-qdq")
    mpq.export(config, "onnx-qdq", tmp_path / "net.onnx", model, sample=tokens)
    found = ov.convert_model(tmp_path / "net.onnx")
    hints = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    theirs = ov.Core().compile_model(found, "CPU", hints)(tokens.numpy())[0]
    with torch.no_grad():
        ours = mpq.quantize(model, config)(tokens).numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-4 * np.abs(ours).max())


def test_what_nncf_has_not_is_refused(config, tmp_path):
    for scheme in ("W4A8", "W8:g32", "W3", "W4:tensor"):
        with pytest.raises(
            ExportError, match=f"layer 'head' has {scheme}, but openvino has no {scheme}; choose one that it loads"
        ):
            mpq.export(with_scheme(config, "head", scheme), "openvino", tmp_path / "x.json")
    with pytest.raises(ExportError, match="needs groups that divide the 64 input features; 48 does not"):
        mpq.export(with_scheme(config, "head", "W4:g48"), "openvino", tmp_path / "x.json")
