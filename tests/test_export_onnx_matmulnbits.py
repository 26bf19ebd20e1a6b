"""Files of MatMulNBits that onnxruntime runs, against `mpq.quantize`; and what holds for both kinds of ONNX files."""

import re

import numpy as np
import pytest
import torch
from configs import with_scheme
from onnx_files import reference, run, session, tiny_transformer
from torch import nn

import mpq
from mpq.errors import ConfigError, ExportError

onnx = pytest.importorskip("onnx", reason="pip install 'mpq[export-onnx]'")


@pytest.fixture(scope="module")
def tiny():
    return tiny_transformer()


def nbits(path):
    """Layer -> bits and block size of its MatMulNBits node."""
    found = {}
    for node in onnx.load(path).graph.node:
        if node.op_type == "MatMulNBits":
            values = {a.name: a.i for a in node.attribute}
            found[node.name.removesuffix("/MatMulNBits")] = values["bits"], values["block_size"]
    return found


@pytest.mark.parametrize("level", ["off", "all"])
@pytest.mark.parametrize("schemes", ["W4:g32,W8:g64:asym,W2:g16,W4:g16:asym", "W2:g64:asym,W8:g16,W4:g128,W4:g256:p2"])
def test_matmulnbits_has_every_layers_bits_and_our_values(tiny, mixed, tmp_path, schemes, level):
    model, tokens = tiny
    config = mixed(model, [tokens], schemes, runtime="onnx-matmulnbits", skip=["encoder.layers.1.linear2"])
    path = tmp_path / "tiny.onnx"
    mpq.export(config, "onnx-matmulnbits", path, model, sample=tokens)
    assert nbits(path) == {n: (c.weight.bits, c.weight.group_size) for n, c in config.items()}
    assert len(config) == 8  # of the nine matrices; one is skipped, the embedding has no such operator
    kept = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    skipped = model.get_parameter("encoder.layers.1.linear2.weight").detach().numpy()
    assert any(v.shape == skipped.shape and (v == skipped).all() for v in kept.values())
    expected = reference(model, config, tokens[:3])
    np.testing.assert_allclose(run(path, tokens[:3], level), expected, atol=2e-5 * np.abs(expected).max())


def test_onnxruntimes_own_quantizer_does_not_keep_to_included_nodes(tiny, mixed, tmp_path):
    """Why the nodes are written here, one by one."""
    pytest.importorskip("onnx_ir", reason="pip install 'mpq[export-onnx]'")
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model, tokens = tiny
    config = mixed(model, [tokens], "W4:g32", runtime="onnx-matmulnbits", skip=["encoder.*"])
    mpq.export(config, "onnx-matmulnbits", tmp_path / "tiny.onnx", model, sample=tokens)
    assert nbits(tmp_path / "tiny.onnx") == {"head": (4, 32)}
    make = onnx.helper
    weights = [onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), n) for n in ("v", "w")]
    nodes = [
        make.make_node("MatMul", ["x", "v"], ["h"], "first"),
        make.make_node("MatMul", ["h", "w"], ["y"], "second"),
    ]
    ends = [make.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 64]) for n in "xy"]
    graph = make.make_graph(nodes, "two", ends[:1], ends[1:], weights)
    file = make.make_model(graph, opset_imports=[make.make_opsetid("", 21)])
    theirs = MatMulNBitsQuantizer(file, bits=4, block_size=32, nodes_to_include=["first"])
    theirs.process()
    assert [n.op_type for n in theirs.model.model.graph.node] == ["MatMulNBits"] * 2


def test_matmulnbits_has_the_accuracy_of_the_quantized_model(example, mixed, tmp_path):
    """Convolutions stay float, so the head alone has few bits here."""
    model, calib, test = example
    config = mixed(model, calib[:1], "W2:g16", runtime="onnx-matmulnbits")
    assert list(config) == ["fc"]
    path = tmp_path / "resnet.onnx"
    mpq.export(config, "onnx-matmulnbits", path, model, sample=calib[0])
    ours, found = mpq.quantize(model, config), session(path)
    right = mine = total = 0
    for x, y in test:
        right += (found.run(None, {"input": x.numpy()})[0].argmax(1) == y.numpy()).sum()
        with torch.no_grad():
            mine += (ours(x).argmax(1) == y).sum().item()
        total += len(y)
    assert abs(right - mine) / total <= 0.005


def test_matmulnbits_in_int8_is_asked_for(tiny, mixed, tmp_path):
    model, tokens = tiny
    config = mixed(model, [tokens], "W4:g32", runtime="onnx-matmulnbits")
    expected = reference(model, config, tokens)
    path, errors = tmp_path / "x.onnx", {}
    held = {1: "", 2: ", products in float16", 3: ", products in bfloat16", 4: ", inputs rounded to 8 bits"}
    for level, products in held.items():
        exported = mpq.export(config, "onnx-matmulnbits", path, model, sample=tokens, accuracy_level=level)
        status = "exact" if level == 1 else "approximated"
        assert {exported.layers[n] for n in config} == {(status, f"4 bits, blocks of 32{products}")}
        errors[level] = np.abs(run(path, tokens) - expected).max()
    assert errors[4] > 100 * errors[1]
    with pytest.raises(ExportError, match="accuracy_level is 1"):
        mpq.export(config, "onnx-matmulnbits", tmp_path / "x.onnx", model, sample=tokens, accuracy_level=0)


def test_matmulnbits_refuses_what_it_has_not(example, tiny, mixed, tmp_path):
    model, tokens = tiny
    config = mixed(model, [tokens], "W4:g32", runtime="onnx-matmulnbits")
    for scheme, match in {
        "W3:g32": "has no W3:g32; choose one that it loads",
        "W4:g32A8": "has no W4:g32A8",
        "W4": "has no W4;",
        "W4:g48": "has no W4:g48",
    }.items():
        with pytest.raises(ExportError, match=match):
            mpq.export(with_scheme(config, "head", scheme), "onnx-matmulnbits", tmp_path / "x.onnx", model)
    image_model, calib, _ = example
    convolutions = mixed(image_model, calib[:1], "W4:g32")
    with pytest.raises(ExportError, match="onnx-matmulnbits does not quantize conv2d layers; allocate with runtime="):
        mpq.export(convolutions, "onnx-matmulnbits", tmp_path / "x.onnx", image_model, sample=calib[0])


def test_weights_that_are_used_in_another_way_are_refused(mixed, tmp_path):
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x + 1, x + 1)[0]

    torch.manual_seed(0)
    model, x = Cross().eval(), torch.randn(2, 3, 32)
    config = mixed(model, [x], "W4:g32", runtime="onnx-matmulnbits")
    with pytest.raises(ExportError, match=r"layer 'attention.in_proj': its weight is read by .* skip="):
        mpq.export(config, "onnx-matmulnbits", tmp_path / "x.onnx", model, sample=x)
    mpq.export(config, "onnx-qdq", tmp_path / "x.onnx", model, sample=x)
    np.testing.assert_allclose(run(tmp_path / "x.onnx", x), reference(model, config, x), atol=1e-5)


@pytest.mark.parametrize(
    ("tool", "scheme"),
    [("onnx-qdq", "W4:gptqA8"), ("onnx-qdq", "W4:weightedA8"), ("onnx-matmulnbits", "W4:g32:rsq:weighted:gptq")],
)
def test_codes_that_data_chose_are_written(tiny, mixed, tmp_path, tool, scheme):
    model, tokens = tiny
    config = mixed(model, [tokens], scheme, runtime=tool, weight_range="mse")
    with pytest.raises(ExportError, match=r"codes depend on calibration data: pass model=mpq.quantize\("):
        mpq.export(config, tool, tmp_path / "a.onnx", model, sample=tokens)
    quantized = mpq.quantize(model, config, calib=[tokens])
    mpq.export(config, tool, tmp_path / "a.onnx", quantized, sample=tokens)
    with torch.no_grad():
        expected = quantized(tokens).numpy()
    tolerance = 1e-5 if config["head"].activation is None else 0.02  # inputs on the edge of two codes
    np.testing.assert_allclose(run(tmp_path / "a.onnx", tokens, "off"), expected, rtol=0, atol=tolerance)
    plain = re.sub(":rsq|:weighted|:gptq", "", scheme)
    nearest = mpq.quantize(model, mixed(model, [tokens], plain, runtime=tool, weight_range="mse"))
    assert not torch.equal(nearest.head.weight, quantized.head.weight)
    changed = mpq.quantize(model, config, calib=[tokens])
    changed.head.weight.data.mul_(2)
    with pytest.raises(ConfigError, match="weight of layer 'head' was changed"):
        mpq.export(config, tool, tmp_path / "a.onnx", changed, sample=tokens)
