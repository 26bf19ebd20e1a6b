"""Operators of ONNX files in PyTorch, one by one against onnxruntime."""

import inspect

import numpy as np
import pytest
import torch
from onnx_files import run, small

from mpq.errors import GraphError
from mpq.onnx_in import load_onnx
from mpq.onnx_ops import OPERATORS

onnx = pytest.importorskip("onnx", reason="pip install 'mpq[export-onnx]'")
helper = onnx.helper


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
    expected = run(path, torch.from_numpy(x))
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)


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


def test_constants_of_integers_that_pytorch_has_not_are_refused(tmp_path):
    value = helper.make_tensor("", onnx.TensorProto.INT4, [4], [1, -2, 3, 4])
    nodes = [helper.make_node("Constant", [], ["four"], value=value), helper.make_node("Add", ["x", "four"], ["y"])]
    with pytest.raises(GraphError, match=r"'four' is of type INT4, which PyTorch does not have"):
        load_onnx(small(nodes, tmp_path / "x.onnx", opset=21))


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
    np.testing.assert_allclose(found.detach().numpy(), run(path, x), atol=2e-5)
    both = small([node], path, ("y", "further"), initializers=initializers, shape=X.shape)
    with pytest.raises(GraphError, match=f"node 'here' is {op} whose further output 'further' is used"):
        load_onnx(both)


def test_all_operators_tell_what_they_take():
    for name, function in OPERATORS.items():
        assert inspect.signature(function), name


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
