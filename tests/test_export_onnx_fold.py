"""Batch norms folded into the scales of files of QuantizeLinear and DequantizeLinear."""

from collections import Counter

import numpy as np
import pytest
import torch
from onnx_files import LEVELS, reference, run, session
from torch import nn

import mpq

onnx = pytest.importorskip("onnx", reason="pip install 'mpq[export-onnx]'")
ort = pytest.importorskip("onnxruntime", reason="pip install 'mpq[export-onnx]'")


def operators(path, tmp_path):
    """How often each operator is run, after onnxruntime has fused what it can."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    ort.InferenceSession(str(path), options)
    return Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)


def codes(path):
    """All stored integers, by name."""
    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    tensors = onnx.load(path).graph.initializer
    return {t.name: onnx.numpy_helper.to_array(t).tolist() for t in tensors if t.data_type in kinds}


def test_folded_batch_norms_leave_the_codes_and_let_onnxruntime_compute_in_integers(example, mixed, tmp_path):
    model, calib, _ = example
    config = mixed(model, calib[:2], "W8A8,W4A8", runtime="onnx-qdq", pin={"layer1.*": "W8A8"})
    paths = {fold: tmp_path / f"{fold}.onnx" for fold in (False, True)}
    for fold, path in paths.items():
        mpq.export(config, "onnx-qdq", path, model, sample=calib[0], fold=fold)
    assert codes(paths[False]) == codes(paths[True])
    found = {fold: operators(path, tmp_path) for fold, path in paths.items()}
    assert found[False]["BatchNormalization"] == 21
    assert found[False]["QLinearConv"] == 0
    assert found[True]["BatchNormalization"] == 0
    assert found[True]["QLinearConv"] >= 3  # the first convolution of each block: nothing is added to its output
    x = calib[1][0]
    np.testing.assert_allclose(run(paths[True], x, "off"), run(paths[False], x, "off"), atol=0.05)


def test_batch_norms_stay_where_their_factors_are_no_scales(mixed, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
            for norm in self.norms:
                norm.weight.data.uniform_(0.5, 1.5)
                norm.bias.data.normal_()
            self.norms[1].weight.data[2] *= -1

        def forward(self, x):
            for conv, norm in zip(self.convs[:3], self.norms[:3], strict=True):
                x = norm(conv(x)).relu()
            y = self.convs[3](x)
            return self.norms[3](y) + y

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 4, 6, 6)
    config = mixed(model, [x], "W8A8", runtime="onnx-qdq", pin={"convs.2": "W8:tensorA8"})
    path = tmp_path / "net.onnx"
    mpq.export(config, "onnx-qdq", path, model, sample=x)
    kept = [n.input[0] for n in onnx.load(path).graph.node if n.op_type == "BatchNormalization"]
    assert len(kept) == 3  # all but the first: a negative factor, one scale for all, another use of the output
    expected = reference(model, config, x)
    for level in LEVELS:
        assert np.abs(run(path, x, level) - expected).max() < 0.02 * np.abs(expected).max()


def test_batch_norms_stay_where_the_convolutions_result_is_an_output(mixed, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y), y

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 4, 6, 6)
    config = mixed(model, [x], "W8A8", runtime="onnx-qdq")
    mpq.export(config, "onnx-qdq", tmp_path / "net.onnx", model, sample=x)
    with torch.no_grad():
        expected = mpq.quantize(model, config)(x)
    for found, ours in zip(session(tmp_path / "net.onnx").run(None, {"input": x.numpy()}), expected, strict=True):
        assert np.abs(found - ours.numpy()).max() < 0.02 * ours.abs().max()
