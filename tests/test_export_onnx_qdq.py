"""Files of QuantizeLinear and DequantizeLinear that onnxruntime runs, against `mpq.quantize`."""

import numpy as np
import pytest
import torch
from configs import with_scheme
from onnx_files import LEVELS, reference, run, session, tiny_transformer
from torch import nn

import mpq
from mpq.errors import ExportError
from mpq.quantizers.scales import scale_and_zero

onnx = pytest.importorskip("onnx", reason="pip install 'mpq[export-onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'mpq[export-onnx]'")


@pytest.fixture(scope="module")
def tiny():
    return tiny_transformer()


def weight_types(path):
    """Layer -> element type, shape and block size of its weight in the file."""
    graph = onnx.load(path).graph
    tensors = {t.name: t for t in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.name.endswith("/weight/DequantizeLinear"):
            codes, scale = tensors[node.input[0]], tensors[node.input[1]]
            kind = onnx.TensorProto.DataType.Name(codes.data_type)
            blocks = next((a.i for a in node.attribute if a.name == "block_size"), 0)
            found[node.name.removesuffix("/weight/DequantizeLinear")] = kind, tuple(scale.dims), blocks
    return found


@pytest.fixture(scope="module")
def resnet(example, mixed, tmp_path_factory):
    model, calib, _ = example
    config = mixed(model, calib[:2], "W2A8,W4A8,W8:tensorA8:sym,W4:asymAint16,W8", runtime="onnx-qdq")
    path = tmp_path_factory.mktemp("onnx") / "resnet.onnx"
    exported = mpq.export(config, "onnx-qdq", path, model, sample=calib[0], fold=False)
    return config, path, exported


@pytest.fixture(scope="module")
def folded(example, resnet, tmp_path_factory):
    """The same with batch norms folded."""
    model, calib, _ = example
    path = tmp_path_factory.mktemp("onnx") / "folded.onnx"
    return resnet[0], path, mpq.export(resnet[0], "onnx-qdq", path, model, sample=calib[0])


@pytest.mark.parametrize("kind", ["resnet", pytest.param("folded", marks=pytest.mark.slow)])
def test_onnxruntime_has_the_accuracy_of_the_quantized_model(example, request, kind):
    model, _, test = example
    config, path, exported = request.getfixturevalue(kind)
    ours = mpq.quantize(model, config)
    found = session(path)
    same = right = wrong = total = 0
    for x, y in test:
        theirs = torch.from_numpy(found.run(None, {"input": x.numpy()})[0])
        with torch.no_grad():
            mine = ours(x)
        same += (theirs.argmax(1) == mine.argmax(1)).sum().item()
        right += (theirs.argmax(1) == y).sum().item()
        wrong += (mine.argmax(1) == y).sum().item()
        total += len(y)
    assert total == 2000
    assert abs(right - wrong) / total <= 0.005
    assert same / total > 0.995
    assert {s for s, _ in exported.layers.values()} == {"exact"}


def batch_norm_of(model, name):
    """The batch norm right behind a convolution of the bundled network; None behind the linear layer."""
    names = name.replace("conv", "bn"), name.removesuffix("0") + "1"
    return next((m for n, m in model.named_modules() if n in names and isinstance(m, nn.BatchNorm2d)), None)


def layer_in(loaded, nodes, name):
    """The node that reads a layer's weight."""
    weight = nodes.get(f"{name}/weight/Squeeze", nodes[f"{name}/weight/DequantizeLinear"]).output[0]
    return next(n for n in loaded.graph.node if weight in n.input)


@pytest.mark.parametrize("level", ["off", "all"])
@pytest.mark.parametrize("kind", ["resnet", "folded"])
def test_every_layer_is_within_one_step(example, request, kind, level):
    """Each layer on what reaches it in our model: its rounded input, and its output where no value was on the edge."""
    model, calib, _ = example
    config, path, _ = request.getfixturevalue(kind)
    ours, before, after, weights = mpq.quantize(model, config), {}, {}, {}
    loaded = onnx.shape_inference.infer_shapes(onnx.load(path))
    nodes = {n.name: n for n in loaded.graph.node}
    kept = [n.input[0] for n in loaded.graph.node if n.op_type == "BatchNormalization"]
    assert len(kept) == 21 if kind == "resnet" else len(kept) < 10  # some stay, such as behind weights of 2 bits
    for name in config:
        layer, norm = ours.get_submodule(name), batch_norm_of(ours, name)
        weights[name] = layer.weight.detach()
        layer.register_forward_pre_hook(lambda m, a, name=name: before.update({name: a[0].numpy()}), prepend=True)
        layer.register_forward_hook(lambda m, a, out, name=name: after.update({name: (a[0].numpy(), out.numpy())}))
        if norm is not None and layer_in(loaded, nodes, name).output[0] not in kept:
            factor = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
            weights[name] = weights[name] * factor[:, None, None, None]
            norm.register_forward_hook(lambda m, a, out, name=name: after.update({name: (after[name][0], out.numpy())}))
    with torch.no_grad():
        ours(calib[1][0][:16])
    for name, choice in config.items():
        rounded = nodes.get(f"{name}/input/DequantizeLinear")
        layer = layer_in(loaded, nodes, name)
        source = nodes[f"{name}/input/QuantizeLinear"].input[0] if rounded else layer.input[0]
        outputs = [rounded.output[0] if rounded else source, layer.output[0]]
        part = onnx.utils.Extractor(loaded).extract_model([source], outputs if rounded else outputs[1:])
        found = session(part, level).run(None, {source: before[name]})
        mine, result = after[name]
        error, reach = 0.0, 0.0
        if rounded:
            scale, _ = scale_and_zero(*torch.tensor(choice.activation_range), choice.activation)
            error = np.abs(found[0] - mine).max()
            assert error <= scale.item() * 1.01, name  # two neighbours, in float32
            reach = error * weights[name].abs().flatten(1).sum(1).max().item()
        assert np.abs(found[-1] - result).max() <= reach + 1e-5 * np.abs(result).max(), name


def test_layers_have_their_types_in_the_file_and_our_very_values(example, resnet):
    model, _, _ = example
    config, path, _ = resnet
    types = weight_types(path)
    for name, choice in config.items():
        kind, scales, blocks = types[name]
        assert kind == f"{'' if choice.weight.symmetric else 'U'}INT{choice.weight.bits}"
        assert scales == (() if choice.weight.granularity == "tensor" else (choice.weight_shape[0],))
        assert blocks == 0
    graph = onnx.load(path).graph
    zeros = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer}
    rounded = {n.name: zeros[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"}
    assert rounded == {
        f"{name}/input/QuantizeLinear": f"{'' if c.activation.symmetric else 'U'}INT{c.activation.bits}"
        for name, c in config.items()
        if c.activation is not None
    }
    ours = mpq.quantize(model, config)
    outputs = {n.name: n.output[0] for n in onnx.load(path).graph.node}
    names = [outputs[f"{n}/weight/DequantizeLinear"] for n in config]
    values = session(path, "off", names).run(names, {"input": np.zeros((1, 1, 28, 28), np.float32)})
    for name, found in zip(config, values, strict=True):
        np.testing.assert_array_equal(
            found.reshape(config[name].weight_shape), ours.get_submodule(name).weight.detach()
        )


@pytest.mark.parametrize("level", ["off", "all"])
@pytest.mark.parametrize(
    "schemes",
    [
        "W2A8",  # onnxruntime must not fuse 2-bit weights with 8-bit inputs: it refuses the type, at run time only
        "W2:g16A8,W4:g32A8,W8:g64A8",
        "W4:asymA4:sym,W2:asymAint16",
        "W2:g32,W4:g32:asym,W8,W8:tensor,Wint16",
    ],
)
def test_a_transformer_runs_at_every_level_of_optimization(tiny, mixed, tmp_path, schemes, level):
    model, tokens = tiny
    config = mixed(model, [tokens], schemes, runtime="onnx-qdq", skip=["head"])
    assert "encoder.layers.0.self_attn.in_proj" in config
    path = tmp_path / "tiny.onnx"
    mpq.export(config, "onnx-qdq", path, model, sample=tokens)
    held = weight_types(path)
    assert held.keys() == config.layers.keys()
    for name, choice in config.items():
        fmt, (rows, features) = choice.weight, choice.weight_shape
        kind, scales, blocks = held[name]
        assert (kind, blocks) == (f"{'' if fmt.symmetric else 'U'}INT{fmt.bits}", fmt.group_size or 0), name
        if fmt.group_size:  # stored turned for MatMul, or with an axis in front
            assert sorted(n for n in scales if n > 1) == sorted(n for n in (rows, features // fmt.group_size) if n > 1)
        else:
            assert scales == (() if fmt.granularity == "tensor" else (rows,)), name
    x = tokens[:3]
    expected = reference(model, config, x)
    error = np.abs(run(path, x, level) - expected).max()
    assert error < (0.05 if "A" in schemes else 1e-4) * np.abs(expected).max()


def test_torchs_other_exporter_gives_the_same(tiny, mixed, tmp_path):
    pytest.importorskip("onnxscript", reason="pip install 'mpq[export-onnx]'")
    model, tokens = tiny
    config = mixed(model, [tokens], "W4A8,W8A8,W8:tensorAint16", runtime="onnx-qdq", skip=["encoder.*"])
    path = tmp_path / "tiny.onnx"
    mpq.export(config, "onnx-qdq", path, model, sample=tokens, dynamo=True)
    assert weight_types(path).keys() == config.layers.keys()
    expected = reference(model, config, tokens[:3])
    np.testing.assert_allclose(run(path, tokens[:3]), expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize("dynamo", [False, True])
def test_sentences_of_another_length(tiny, mixed, tmp_path, dynamo):
    if dynamo:
        pytest.importorskip("onnxscript", reason="pip install 'mpq[export-onnx]'")
    model, tokens = tiny
    config = mixed(model, [tokens], "W8A8", runtime="onnx-qdq", skip=["encoder.*"])
    path = tmp_path / "tiny.onnx"
    mpq.export(config, "onnx-qdq", path, model, sample=tokens, dynamo=dynamo)
    longer = torch.cat([tokens[:3], tokens[:3, :3]], 1)
    expected = reference(model, config, longer)
    np.testing.assert_allclose(run(path, longer), expected, atol=0.02 * np.abs(expected).max())
    mpq.export(config, "onnx-qdq", path, model, sample=tokens, dynamic_batch=False)
    with pytest.raises(Exception, match="invalid dimensions"):
        run(path, longer)


@pytest.mark.parametrize("dynamo", [False, True])
def test_inputs_by_keyword_in_any_order_keep_their_names(mixed, tmp_path, dynamo):
    if dynamo:
        pytest.importorskip("onnxscript", reason="pip install 'mpq[export-onnx]'")

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 8)

        def forward(self, a, unused=None, b=None):
            return self.layer(a) - 2 * b

    torch.manual_seed(0)
    model, batch = Two().eval(), {"b": torch.randn(2, 8), "a": torch.randn(2, 32)}
    config = mixed(model, [batch], "W8", runtime="onnx-qdq")
    mpq.export(config, "onnx-qdq", tmp_path / "two.onnx", model, sample=batch, dynamo=dynamo)
    found = session(tmp_path / "two.onnx").run(None, {k: v.numpy() for k, v in batch.items()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, mpq.quantize(model, config)(**batch).numpy(), atol=1e-5)


def test_weights_alone_need_a_session_option(tiny, mixed, tmp_path):
    """onnxruntime rounds inputs to 8 bits on its own unless told otherwise."""
    model, tokens = tiny
    config = mixed(model, [tokens], "W4:g32", runtime="onnx-qdq")
    path = tmp_path / "tiny.onnx"
    exported = mpq.export(config, "onnx-qdq", path, model, sample=tokens)
    expected = reference(model, config, tokens)
    errors = {level: np.abs(run(path, tokens, qdq_matmulnbits_accuracy_level=level) - expected).max() for level in "14"}
    assert errors["1"] < 1e-4
    assert errors["4"] > 100 * errors["1"]
    assert "session.qdq_matmulnbits_accuracy_level=1" in repr(exported)


def test_convolutions_of_all_kinds(mixed, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, 2, groups=2),
        nn.Flatten(2),
        nn.Conv1d(6, 6, 3, groups=6),
        nn.ConvTranspose1d(6, 5, 3),
    ).eval()
    x = torch.randn(3, 4, 6, 6)
    config = mixed(model, [x], "W4A8,W8A8:sym,W4:tensor:asymA8", runtime="onnx-qdq")
    path = tmp_path / "convs.onnx"
    mpq.export(config, "onnx-qdq", path, model, sample=x)
    assert len(weight_types(path)) == 4
    expected = reference(model, config, x)
    for level in LEVELS:
        assert np.abs(run(path, x, level) - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize(("first", "second"), [("W2A8", "W2A8"), ("W2:asymA4", "W8A8"), ("W8A2", "W4A2")])
@pytest.mark.parametrize("kind", ["conv", "gemm"])
def test_two_bits_are_not_fused_into_operators_that_refuse_them(mixed, tmp_path, kind, first, second):
    torch.manual_seed(0)
    if kind == "conv":
        model, x = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval(), torch.randn(2, 4, 8, 8)
    else:
        model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    schemes = ",".join({first: 0, second: 0})
    config = mixed(model, [x], schemes, runtime="onnx-qdq", pin={"0": first, "2": second})
    path = tmp_path / "two.onnx"
    mpq.export(config, "onnx-qdq", path, model, sample=x)
    expected = reference(model, config, x)
    step = 0.3 if "A2" in first else 0.02  # a value at an edge may go to the neighbour
    assert np.abs(run(path, x) - expected).max() < step * np.abs(expected).max()


def test_tied_weights_are_stored_once_and_other_names_stay(mixed, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40, bias=False)).eval()
    model[2].weight = model[0].weight
    tokens = torch.randint(40, (2, 5))
    config = mixed(model, [tokens], "W4:g32", runtime="onnx-qdq", skip=["1"])
    path = tmp_path / "tied.onnx"
    mpq.export(config, "onnx-qdq", path, model, sample=tokens)
    names = {t.name for t in onnx.load(path).graph.initializer}
    assert {"1.weight", "1.bias"} <= names
    np.testing.assert_allclose(run(path, tokens), reference(model, config, tokens), atol=1e-5)
    split = with_scheme(config, "2", "W8:g32")
    with pytest.raises(ExportError, match="layers 0, 2 must have one scheme because they share one weight"):
        mpq.export(split, "onnx-qdq", path, model, sample=tokens)


@pytest.mark.parametrize(
    ("layer", "scheme", "match"),
    [
        ("fc", "W3A8", "layer 'fc' has W3A8, but onnx-qdq has no W3A8; choose one that it loads"),
        ("fc", "W4A8:token", "onnx-qdq has no W4A8:token"),
        ("fc", "W4:g16:bipolarA8", "onnx-qdq has no W4:g16:bipolarA8"),
        ("fc", "W4:g48A8", "needs groups that divide the 64 input features; 48 does not"),
        ("conv1", "W4:g3A8", "layer 'conv1' .* has no groups in conv2d layers; use one scale per channel"),
    ],
)
def test_what_onnx_has_not_is_refused_by_name(example, resnet, tmp_path, layer, scheme, match):
    model, calib, _ = example
    with pytest.raises(ExportError, match=match):
        mpq.export(with_scheme(resnet[0], layer, scheme), "onnx-qdq", tmp_path / "x.onnx", model, sample=calib[0])


def test_what_is_missing_is_named(example, resnet, tmp_path):
    model, calib, _ = example
    with pytest.raises(ExportError, match="pass model= and sample="):
        mpq.export(resnet[0], "onnx-qdq", tmp_path / "x.onnx", model)
    with pytest.raises(ExportError, match="the model does not run on sample=, which is one batch"):
        mpq.export(resnet[0], "onnx-qdq", tmp_path / "x.onnx", model, sample=calib)
    other = mpq.bundled.resnet20()
    with torch.no_grad():
        other.fc.weight += 1
    with pytest.raises(mpq.MpqError, match="other weights"):
        mpq.export(resnet[0], "onnx-qdq", tmp_path / "x.onnx", other, sample=calib[0])


def test_modules_that_are_called_twice(mixed, tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.b(self.a(self.a(x).relu()).relu())

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(8, 16)
    config = mixed(model, [x], "W8A8", runtime="onnx-qdq")
    mpq.export(config, "onnx-qdq", tmp_path / "x.onnx", model, sample=x)
    loaded = session(tmp_path / "x.onnx")
    found = loaded.run(None, {loaded.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, reference(model, config, x), atol=0.02)
