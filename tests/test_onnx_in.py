"""ONNX files as PyTorch modules, against onnxruntime."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.errors import DataError, GraphError
from mpq.onnx_in import load_onnx
from mpq.onnx_ops import OPERATORS
from mpq.view import copy_model

onnx = pytest.importorskip("onnx", reason="pip install 'mpq[export-onnx]'")
ort = pytest.importorskip("onnxruntime", reason="pip install 'mpq[export-onnx]'")
helper = onnx.helper


def write(model, x, path, opset=17, **options):
    torch.onnx.export(model, (x,), str(path), dynamo=False, opset_version=opset, input_names=["x"], **options)
    return path


def theirs(path, x):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight
        for p in self.parameters():  # PyTorch makes both layers alike, and its exporter would store them once
            nn.init.normal_(p, std=0.2)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)))


class Mixture(nn.Module):
    """Operators of small image models."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Hardswish())
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        first = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU6()
        self.squeeze = nn.Sequential(*first, nn.Conv2d(4, 8, 1), nn.Hardsigmoid())
        self.pool, self.mean = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 1, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.norm = nn.GroupNorm(2, 12)
        self.fc = nn.Linear(12 * 256, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.squeeze(x) * nn.functional.silu(self.depth(x))
        x = self.up(self.mean(self.pool(x)))
        a, b = x.split(2, 1)
        x = torch.cat([x, nn.functional.leaky_relu(a), b.sigmoid(), (a - b).abs().clamp(max=1), -b], 1)
        x = self.norm(nn.functional.elu(x))
        return self.fc(x.flatten(1)).log_softmax(-1)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("opset", [13, 20])
def test_resnet_is_read_back(example, tmp_path, folded, opset):
    model, _, test = example
    path = write(
        model, test[0][0][:2], tmp_path / "net.onnx", opset, do_constant_folding=folded, dynamic_axes={"x": {0: "n"}}
    )
    found, x = load_onnx(path), test[0][0][:16]
    with torch.no_grad():
        np.testing.assert_allclose(found(x).numpy(), theirs(path, x), atol=2e-5)
        np.testing.assert_allclose(found(x).numpy(), model(x).numpy(), atol=2e-5)
    layers = {n for n, m in found.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert layers == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def test_a_transformer_is_read_back(tmp_path):
    torch.manual_seed(0)
    model, tokens = Encoder().eval(), torch.randint(50, (2, 6))
    model = copy_model(model)
    path = write(model, tokens, tmp_path / "net.onnx", do_constant_folding=False, dynamic_axes={"x": {0: "n", 1: "t"}})
    found, other = load_onnx(path), torch.randint(50, (3, 9))
    with torch.no_grad():
        np.testing.assert_allclose(found(other).numpy(), theirs(path, other), atol=2e-5)
    layers = {n: m for n, m in found.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    assert layers.keys() == {
        *("embed", "head"),
        *(f"encoder.layers.{i}.{n}" for i in range(2) for n in ("linear1", "linear2", "self_attn.in_proj")),
        *(f"encoder.layers.{i}.self_attn.out_proj" for i in range(2)),
    }
    assert layers["embed"].weight is layers["head"].weight


def test_operators_of_image_models(tmp_path):
    torch.manual_seed(0)
    model, x = Mixture().eval(), torch.randn(2, 3, 31, 31)
    path = write(model, x, tmp_path / "net.onnx", dynamic_axes={"x": {0: "n"}})
    found, other = load_onnx(path), torch.randn(5, 3, 31, 31)
    with torch.no_grad():
        np.testing.assert_allclose(found(other).numpy(), theirs(path, other), atol=2e-5)


def test_another_exporter(example, tmp_path):
    pytest.importorskip("onnxscript", reason="torch's other exporter needs it")
    model, _, test = example
    torch.onnx.export(model, (test[0][0][:2],), str(tmp_path / "net.onnx"), dynamo=True, verbose=False)
    x = test[0][0][:2]
    with torch.no_grad():
        np.testing.assert_allclose(load_onnx(tmp_path / "net.onnx")(x).numpy(), model(x).numpy(), atol=2e-5)


X = np.random.default_rng(0).normal(size=(2, 4, 6, 6)).astype(np.float32)
PLAIN = [
    "Relu",
    "Sigmoid",
    "HardSwish",
    "Tanh",
    "Mish",
    "Softplus",
    "Softsign",
    "Erf",
    "Exp",
    "Abs",
    "Neg",
    "Sin",
    "Cos",
    "Floor",
    "Ceil",
    "Round",
    "Sign",
    "Identity",
    "HardSigmoid",
    "Elu",
    "LeakyRelu",
    "Gelu",
    "Flatten",
    "Shape",
]
PAIRS = ["Add", "Sub", "Mul", "Div", "Min", "Max", "Equal", "Less", "GreaterOrEqual", "PRelu"]
REDUCTIONS = [(op, k) for op in ("Mean", "Sum", "Max", "Min", "L2") for k in (0, 1)]
FLOOR = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
CORNERS = {"mode": "linear", "coordinate_transformation_mode": "align_corners"}


def ints(*values):
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("op", "constants", "attributes"),
    [
        *((op, (), {}) for op in PLAIN),
        *((op, (X[:1, :1] + 0.1,), {}) for op in PAIRS),
        *((f"Reduce{op}", (ints(1, -1),), {"keepdims": k}) for op, k in REDUCTIONS),
        ("ReduceMean", (), {}),
        ("Gelu", (), {"approximate": "tanh"}),
        ("Clip", (np.float32(-0.5), np.float32(1)), {}),
        ("Clip", (None, np.float32(1)), {}),
        ("Clip", (np.float32(-0.5),), {}),
        ("Softmax", (), {"axis": 1}),
        ("LogSoftmax", (), {}),
        ("MaxPool", (), {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 0, 1]}),
        ("MaxPool", (), {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
        ("AveragePool", (), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("AveragePool", (), {"kernel_shape": [3, 3], "pads": [1, 1, 0, 0], "count_include_pad": 1}),
        ("GlobalAveragePool", (), {}),
        ("GlobalMaxPool", (), {}),
        ("Flatten", (), {"axis": 2}),
        ("Reshape", (np.array([0, -1, 3]),), {}),
        ("Transpose", (), {"perm": [0, 2, 3, 1]}),
        ("Transpose", (), {}),
        ("Slice", (ints(1, -4), ints(100, -1), ints(1, 3), ints(1, 2)), {}),
        ("Slice", (ints(-1), ints(-100), ints(2), ints(-2)), {}),
        ("Unsqueeze", (ints(0, -1),), {}),
        ("Squeeze", (ints(-1),), {}),
        ("Expand", (ints(3, 1, 1, 6, 6),), {}),
        ("Tile", (ints(1, 2, 1, 3),), {}),
        ("Gather", (np.array([[2, -1], [0, 1]]),), {"axis": 1}),
        ("Gather", (np.array(1),), {"axis": 2}),
        ("GatherElements", (np.zeros((2, 4, 6, 1), np.int64) - 1,), {"axis": 3}),
        ("Pad", (ints(0, 0, 1, 2, 0, 0, 3, 0), np.float32(2)), {}),
        ("Pad", (ints(0, 0, 1, 2, 0, 0, 3, 0),), {"mode": "reflect"}),
        ("Pad", (ints(0, 0, 1, 2, 0, 0, 3, 0),), {"mode": "edge"}),
        ("Resize", (None, np.float32([1, 1, 2, 2])), FLOOR),
        ("Resize", (None, None, ints(2, 4, 9, 13)), {"mode": "linear"}),
        ("Resize", (None, None, ints(2, 4, 9, 13)), CORNERS),
        ("DepthToSpace", (), {"blocksize": 2}),
        ("DepthToSpace", (), {"blocksize": 2, "mode": "CRD"}),
        ("Trilu", (np.array(1),), {"upper": 0}),
        ("ArgMax", (), {"axis": 1, "keepdims": 0}),
        ("ArgMax", (), {"axis": -1}),
        ("ArgMax", (), {"axis": -1, "select_last_index": 1}),
        ("ArgMax", (), {"axis": 1, "keepdims": 0, "select_last_index": 1}),
        ("CumSum", (np.array(1),), {}),
        ("Cast", (), {"to": 7}),
        ("InstanceNormalization", (np.float32([1, 2, 3, 4]), np.float32([0, 1, 0, 1])), {}),
        ("GroupNormalization", (np.float32([1, 2]), np.float32([3, -1])), {"num_groups": 2}),  # before version 21
        ("GroupNormalization", (np.float32([2]), np.float32([1])), {"num_groups": 1}),
        ("GroupNormalization", (np.float32([1, 2, 3, 4]), np.float32([3, -1, 0, 1])), {"num_groups": 4}),
        ("LayerNormalization", (X[0, 0], X[1, 0]), {"axis": 2}),
        ("MatMul", (X[0, 0],), {}),
        ("MatMul", (X[0],), {}),
        ("Einsum", (X[0],), {"equation": "ncij,cjk->nik"}),
        ("Conv", (X[:, :, :3, :2], X[0, 0, 0, :2]), {"pads": [1, 0, 1, 2], "strides": [2, 1]}),
        ("Conv", (X[:, :1, :3, :3].repeat(2, 0),), {"group": 4, "auto_pad": "SAME_LOWER", "strides": [2, 2]}),
        ("Conv", (X[:, :, :2, :2],), {"dilations": [2, 1], "auto_pad": "VALID"}),
        ("ConvTranspose", (X[:1, :, :3, :3].transpose(1, 0, 2, 3),), {"strides": [2, 2], "output_padding": [1, 1]}),
        ("ConvTranspose", (X[:1, :, :3, :3].transpose(1, 0, 2, 3),), {"pads": [1, 1, 1, 1], "dilations": [1, 2]}),
        ("BatchNormalization", tuple(np.float32([1, 2, 3, 4]) + k for k in range(4)), {"epsilon": 1e-3}),
    ],
)  # fmt: skip
def test_one_operator(tmp_path, op, constants, attributes):
    x = {"Squeeze": X[..., :1].copy(), "ArgMax": X.round()}.get(op, X)  # largest values are there more than once
    names = ["" if c is None else f"c{i}" for i, c in enumerate(constants)]
    node = helper.make_node(op, ["x", *names], ["y"], "the_node", **attributes)
    initializers = [onnx.numpy_helper.from_array(np.asarray(c), n) for n, c in zip(names, constants, strict=True) if n]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [helper.make_empty_tensor_value_info("y")],
        initializers,
    )
    path = tmp_path / "one.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    with torch.no_grad():
        found = load_onnx(path)(torch.from_numpy(x)).numpy()
    expected = theirs(path, torch.from_numpy(x))
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)


def small(nodes, path, outputs=("y",), opset=17, initializers=(), input_name="x", shape=("n", 4)):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(input_name, onnx.TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info(o) for o in outputs],
        [onnx.numpy_helper.from_array(v, n) for n, v in initializers],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("node", "match"),
    [
        (("Det", ["x"]), r"node 'here' is Det, which mpq can't convert"),
        (("QuantizeLinear", ["x", "s"]), r"is QuantizeLinear \(is the model quantized already\?\)"),
        (("Softmax", ["x"], {"colour": 1}), r"node 'here' is Softmax with \{'colour': 1\}"),
        (("Conv", ["x", "x"]), r"is Conv with a weight that is computed"),
    ],
)
def test_what_is_not_known_is_named(tmp_path, node, match):
    op, inputs, *rest = node
    attributes = rest[0] if rest else {}
    path = small(
        [helper.make_node(op, inputs, ["y"], "here", **attributes)],
        tmp_path / "x.onnx",
        initializers=[("s", np.float32(1))],
    )
    with pytest.raises(GraphError, match=match):
        load_onnx(path)


def test_inputs_are_named_where_batches_have_others(tmp_path):
    node = helper.make_node("Gemm", ["input", "w"], ["y"])
    path = small([node], tmp_path / "x.onnx", input_name="input", initializers=[("w", np.ones((4, 3), np.float32))])
    with pytest.raises(DataError, match=r"for the inputs input: .* unexpected keyword argument 'images'"):
        mpq.allocate(path, [{"images": torch.zeros(2, 4)}], "avg_bits<=4", "W4", progress=False)


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize(
    ("name", "exported"),
    [("input", "input"), ("input.1", "input.1"), ("data/x:0", "data/x:0"), ("0", "_0")],  # torch refuses digits alone
)
def test_exported_files_have_inputs_of_the_same_name(mixed, tmp_path, name, exported, dynamo):
    """Also where fx or Python have another name for it."""
    if dynamo:
        pytest.importorskip("onnxscript", reason="pip install 'mpq[export-onnx]'")
    node = helper.make_node("Gemm", [name, "w"], ["y"])
    path = small([node], tmp_path / "x.onnx", input_name=name, initializers=[("w", np.ones((4, 3), np.float32))])
    config = mixed(path, [torch.randn(2, 4)], "W8A8", runtime="onnx-qdq")
    mpq.export(config, "onnx-qdq", tmp_path / "q.onnx", path, sample=torch.randn(2, 4), dynamo=dynamo)
    assert [i.name for i in onnx.load(tmp_path / "q.onnx").graph.input] == [exported]


def test_files_of_other_tools_integers_are_refused_by_name(example, mixed, tmp_path):
    model = nn.Sequential(nn.Linear(32, 4)).eval()
    x = torch.randn(2, 32)
    config = mixed(model, [x], "W4", runtime="onnx-qdq")
    mpq.export(config, "onnx-qdq", tmp_path / "q.onnx", model, sample=x)
    with pytest.raises(GraphError, match=r"q\.onnx: '0.weight.*' is of type INT4.*give the float model"):
        load_onnx(tmp_path / "q.onnx")


def test_constants_of_integers_that_pytorch_has_not_are_refused(tmp_path):
    value = helper.make_tensor("", onnx.TensorProto.INT4, [4], [1, -2, 3, 4])
    nodes = [helper.make_node("Constant", [], ["four"], value=value), helper.make_node("Add", ["x", "four"], ["y"])]
    with pytest.raises(GraphError, match=r"'four' is of type INT4, which PyTorch does not have"):
        load_onnx(small(nodes, tmp_path / "x.onnx", opset=21))


def test_half_precision_and_masks_of_floats(mixed, tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(20, 32), nn.Linear(32, 4)

        def forward(self, ids, mask):
            return self.out((self.embed(ids) * mask[..., None]).mean(1))

    torch.manual_seed(0)
    model, batch = Masked().eval(), {"ids": torch.randint(20, (2, 6)), "mask": torch.ones(2, 6)}
    half = {"ids": batch["ids"], "mask": batch["mask"].half()}
    config = mixed(copy_model(model).half(), [half], "W8", runtime="onnx-qdq")
    mpq.export(config, "onnx-qdq", tmp_path / "q.onnx", copy_model(model).half(), sample=half)
    session = ort.InferenceSession(str(tmp_path / "q.onnx"))
    found = session.run(None, {"ids": batch["ids"][:, :4].numpy(), "mask": batch["mask"][:, :4].numpy()})[0]
    with torch.no_grad():
        expected = model(batch["ids"][:, :4], batch["mask"][:, :4]).numpy()
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_several_outputs_and_constants(tmp_path):
    nodes = [
        helper.make_node("Constant", [], ["two"], value=onnx.numpy_helper.from_array(np.float32(2))),
        helper.make_node("Neg", ["two"], ["minus"]),
        helper.make_node("Split", ["x"], ["whole"], axis=1),
        helper.make_node("Split", ["whole"], ["a", "b"], axis=1),
        helper.make_node("Mul", ["a", "minus"], ["c"]),
        helper.make_node("Gemm", ["x", "w", "v"], ["d"], transB=1),
    ]
    rng = np.random.default_rng(0)
    weights = [("w", rng.normal(size=(3, 4)).astype(np.float32)), ("v", rng.normal(size=3).astype(np.float32))]
    found = load_onnx(small(nodes, tmp_path / "x.onnx", ("b", "c", "d"), initializers=weights))
    x = torch.randn(2, 4)
    b, c, d = found(x)
    assert torch.equal(b, x[:, 2:])
    assert torch.equal(c, -2 * x[:, :2])
    torch.testing.assert_close(d, x @ torch.from_numpy(weights[0][1]).T + torch.from_numpy(weights[1][1]))
    assert len(list(found.parameters())) == 2


FURTHER = [
    ("Dropout", (), {}),
    ("MaxPool", (), {"kernel_shape": [2, 2]}),
    ("LayerNormalization", (X[0, 0, 0], X[0, 0, 1]), {}),
]


@pytest.mark.parametrize(("op", "constants", "attributes"), FURTHER)
def test_further_outputs_have_names_but_no_use(tmp_path, op, constants, attributes):
    """Files of the model zoo name the mask of Dropout."""
    initializers = [(f"c{i}", c) for i, c in enumerate(constants)]
    inputs, path = ["x", *(n for n, _ in initializers)], tmp_path / "x.onnx"
    node = helper.make_node(op, inputs, ["y", "further"], "here", **attributes)
    x = torch.from_numpy(X)
    found = load_onnx(small([node], path, initializers=initializers, shape=X.shape))(x)
    np.testing.assert_allclose(found.detach().numpy(), theirs(path, x), atol=2e-5)
    both = small([node], path, ("y", "further"), initializers=initializers, shape=X.shape)
    with pytest.raises(GraphError, match=f"node 'here' is {op} whose further output 'further' is used"):
        load_onnx(both)


def test_files_that_are_none(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no")
    with pytest.raises(GraphError, match=r"x\.onnx can't be read as an ONNX model"):
        load_onnx(tmp_path / "x.onnx")
    with pytest.raises(GraphError, match=r"y\.onnx can't be read as an ONNX model: FileNotFoundError"):
        load_onnx(tmp_path / "y.onnx")


def test_bits_for_a_file(example, mixed, tmp_path):
    """Allocated, quantized and exported without the code of the model."""
    model, calib, test = example
    path = write(model, test[0][0][:2], tmp_path / "net.onnx", do_constant_folding=False, dynamic_axes={"x": {0: "n"}})
    options = {"estimator": "weight_sqnr", "runtime": "onnx-qdq", "progress": False}
    config = mpq.allocate(path, calib[:2], "avg_bits<=5", "W4A8,W8A8", **options)
    same = mpq.allocate(model, calib[:2], "avg_bits<=5", "W4A8,W8A8", **options)
    assert config.schemes() == same.schemes()
    x = test[0][0][:64]
    with torch.no_grad():
        expected = mpq.quantize(model, same)(x)
        torch.testing.assert_close(mpq.quantize(path, config)(x), expected, atol=2e-2, rtol=0)
    mpq.export(config, "onnx-qdq", tmp_path / "q.onnx", path, sample=calib[0])
    assert (theirs(tmp_path / "q.onnx", x).argmax(1) == expected.argmax(1).numpy()).mean() > 0.98
    measured = mpq.evaluate(str(path), test[:2], progress=False)
    assert measured.accuracy == mpq.evaluate(model, test[:2], progress=False).accuracy


class Positions(nn.Module):
    """Sizes that are computed in every way that BERT-like files have."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(50, 32), nn.Embedding(20, 32)
        self.mix, self.norm, self.head = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 7)

    def forward(self, ids, mask):
        batch, tokens = ids.shape
        place = torch.arange(tokens).expand(batch, tokens) * torch.ones_like(ids)
        x = self.norm(self.embed(ids) + self.position(place))
        heads = self.mix(x).view(batch, tokens, 4, -1).transpose(1, 2)
        scores = (heads @ heads.transpose(2, 3)).masked_fill(mask[:, None, None, :] == 0, -1e4)
        return self.head((scores.softmax(-1) @ heads).transpose(1, 2).reshape(batch, tokens, -1)[:, : tokens - 1])


@pytest.mark.parametrize("folded", [False, True])
def test_exported_files_take_other_sizes_and_have_the_inputs_of_the_file(mixed, tmp_path, folded):
    torch.manual_seed(0)
    ids, mask = torch.randint(50, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    model, path = Positions().eval(), tmp_path / "net.onnx"
    names = ["ids", "mask"]
    axes = {n: {0: "n", 1: "t"} for n in names}
    options = {"input_names": names, "dynamic_axes": axes, "do_constant_folding": folded, "opset_version": 17}
    torch.onnx.export(model, (ids, mask), str(path), dynamo=False, **options)
    batch = {"ids": ids, "mask": mask}
    config = mixed(load_onnx(path), [batch], "W8:g32,W4:g32", runtime="onnx-matmulnbits")
    mpq.export(config, "onnx-matmulnbits", tmp_path / "q.onnx", path, sample=batch)
    session = ort.InferenceSession(str(tmp_path / "q.onnx"))
    assert [(i.name, i.shape) for i in session.get_inputs()] == [(n, ["batch", "length"]) for n in names]
    quantized = mpq.quantize(path, config)
    for size in ((2, 6), (3, 9), (1, 4)):
        inputs = {"ids": torch.randint(50, size), "mask": torch.randint(2, size) | torch.eye(*size, dtype=torch.int64)}
        with torch.no_grad():
            expected = quantized(**inputs).numpy()
        found = session.run(None, {n: v.numpy() for n, v in inputs.items()})[0]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_all_operators_tell_what_they_take():
    for name, function in OPERATORS.items():
        assert inspect.signature(function), name


def test_files_go_out_with_the_operators_that_they_came_with(tmp_path):
    """Runtimes fuse Clip and GlobalAveragePool, but no chain of others that computes the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    x = torch.randn(2, 3, 6, 6)
    options = {"dynamic_axes": {"x": {0: "n"}}, "output_names": ["y"]}
    first = write(model, x, tmp_path / "first.onnx", **options)
    again = write(load_onnx(first), x, tmp_path / "again.onnx", **options)
    kinds = [sorted({n.op_type for n in onnx.load(p).graph.node} - {"Constant"}) for p in (first, again)]
    assert kinds[0] == kinds[1] == ["Clip", "Conv", "Flatten", "Gemm", "GlobalAveragePool"]
    np.testing.assert_allclose(theirs(again, x), theirs(first, x), atol=1e-6)


def test_clip_with_computed_ends(tmp_path):
    nodes = [
        helper.make_node("ReduceMin", ["x"], ["low"], keepdims=0),
        helper.make_node("Constant", [], ["half"], value=onnx.numpy_helper.from_array(np.float32(0.5))),
        helper.make_node("Mul", ["low", "half"], ["end"]),
        helper.make_node("Clip", ["x", "end", "half"], ["y"]),
        helper.make_node("Clip", ["x", "", "end"], ["z"]),
    ]
    y, z = load_onnx(small(nodes, tmp_path / "x.onnx", ("y", "z")))(torch.tensor([[-2.0, -0.5, 0.2, 3.0]]))
    assert y.tolist() == [[-1.0, -0.5, pytest.approx(0.2), 0.5]]
    assert z.tolist() == [[-2.0, -1.0, -1.0, -1.0]]


def test_the_command_line_takes_files(example, tmp_path):
    from typer.testing import CliRunner

    from mpq.cli import app

    model, calib, _ = example
    path = write(model, calib[0][0][:2], tmp_path / "net.onnx", dynamic_axes={"x": {0: "n"}})
    bits, out = tmp_path / "bits.json", tmp_path / "q.onnx"
    data = "mpq.bundled:calibration"
    common = "--budget avg_bits<=5 --schemes W4A8,W8A8 --estimator weight_sqnr --max-samples 64 --runtime onnx-qdq"
    arguments = ["allocate", str(path), "--calib", data, *common.split(), "--out", str(bits)]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    found = CliRunner().invoke(
        app, ["export", str(bits), "--to", "onnx-qdq", "--out", str(out), "--model", str(path), "--calib", data]
    )
    assert found.exit_code == 0, found.output
    assert theirs(out, calib[0][0]).shape == (64, 10)
