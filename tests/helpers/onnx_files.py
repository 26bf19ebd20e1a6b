"""What tests of ONNX files share: a small transformer, files of a few nodes, sessions of onnxruntime."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mpq

onnx = pytest.importorskip("onnx", reason="pip install 'mpq[export-onnx]'")
ort = pytest.importorskip("onnxruntime", reason="pip install 'mpq[export-onnx]'")

LEVELS = {"off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL, "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL}


class Transformer(nn.Module):
    """An embedding, attentions and linear layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 7, bias=False)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)))


def tiny_transformer():
    """The network in evaluation mode, and a batch."""
    torch.manual_seed(0)
    tokens = torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(1))
    return Transformer().eval(), tokens


def session(path, level="all", outputs=(), **entries):
    """A session that computes in float32 what the file has in float32; also of tensors inside."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = LEVELS[level]
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    loaded = path if isinstance(path, onnx.ModelProto) else onnx.load(path)
    for name in outputs:
        loaded.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return ort.InferenceSession(loaded.SerializeToString(), options)


def run(path, x, level="all", **entries):
    found = session(path, level, **entries)
    return found.run(None, {found.get_inputs()[0].name: x.numpy()})[0]


def reference(model, config, x):
    with torch.no_grad():
        return mpq.quantize(model, config)(x).numpy()


def small(nodes, path, outputs=("y",), opset=17, initializers=(), inputs=("x",), shape=("n", 4)):
    """Writes a file of a few nodes that read inputs of floats."""
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info(i, onnx.TensorProto.FLOAT, shape) for i in inputs],
        [onnx.helper.make_empty_tensor_value_info(o) for o in outputs],
        [onnx.numpy_helper.from_array(v, n) for n, v in initializers],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8), path)
    return path
