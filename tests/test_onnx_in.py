"""ONNX files as PyTorch modules, against onnxruntime."""

import numpy as np
import pytest
import torch
from onnx_files import run, small
from torch import nn

import mpq
from mpq.errors import DataError, GraphError
from mpq.onnx_in import load_onnx
from mpq.view import copy_model

onnx = pytest.importorskip("onnx", reason="pip install 'mpq[export-onnx]'")
ort = pytest.importorskip("onnxruntime", reason="pip install 'mpq[export-onnx]'")
helper = onnx.helper


def write(model, x, path, opset=17, **options):
    torch.onnx.export(model, (x,), str(path), dynamo=False, opset_version=opset, input_names=["x"], **options)
    return path


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
        np.testing.assert_allclose(found(x).numpy(), run(path, x), atol=2e-5)
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
        np.testing.assert_allclose(found(other).numpy(), run(path, other), atol=2e-5)
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
        np.testing.assert_allclose(found(other).numpy(), run(path, other), atol=2e-5)


def test_another_exporter(example, tmp_path):
    pytest.importorskip("onnxscript", reason="torch's other exporter needs it")
    model, _, test = example
    torch.onnx.export(model, (test[0][0][:2],), str(tmp_path / "net.onnx"), dynamo=True, verbose=False)
    x = test[0][0][:2]
    with torch.no_grad():
        np.testing.assert_allclose(load_onnx(tmp_path / "net.onnx")(x).numpy(), model(x).numpy(), atol=2e-5)


def test_inputs_are_named_where_batches_have_others(tmp_path):
    node = helper.make_node("Gemm", ["input", "w"], ["y"])
    path = small([node], tmp_path / "x.onnx", inputs=["input"], initializers=[("w", np.ones((4, 3), np.float32))])
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
    path = small([node], tmp_path / "x.onnx", inputs=[name], initializers=[("w", np.ones((4, 3), np.float32))])
    config = mixed(path, [torch.randn(2, 4)], "W8A8", runtime="onnx-qdq")
    mpq.export(config, "onnx-qdq", tmp_path / "q.onnx", path, sample=torch.randn(2, 4), dynamo=dynamo)
    assert [i.name for i in onnx.load(tmp_path / "q.onnx").graph.input] == [exported]


@pytest.mark.parametrize(
    ("names", "arguments"),
    [
        (("a.b", "a_b"), ["a_b_1", "a_b"]),  # whose name is Python's keeps it
        (("a_b", "a.b"), ["a_b", "a_b_1"]),
        (("a.b", "a:b"), ["a_b", "a_b_1"]),
        (("1", "_1"), ["_1_1", "_1"]),
        (("in", "self"), ["in_", "self_"]),
    ],
)
def test_inputs_that_python_would_call_the_same_stay_apart(mixed, tmp_path, names, arguments):
    weight = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    nodes = [helper.make_node("MatMul", [names[0], "w"], ["h"]), helper.make_node("Sub", ["h", names[1]], ["y"])]
    path = small(nodes, tmp_path / "x.onnx", inputs=names, initializers=[("w", weight)])
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    model, batch = load_onnx(path), dict(zip(arguments, (a, b), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch), a @ torch.from_numpy(weight) - b)
    config = mixed(path, [batch], "W8", runtime="onnx-qdq")
    mpq.export(config, "onnx-qdq", tmp_path / "q.onnx", path, sample=batch)
    exported = [i.name for i in onnx.load(tmp_path / "q.onnx").graph.input]
    assert exported == [k if n == "1" else n for n, k in zip(names, arguments, strict=True)]


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (("in.weight", "a.lambda.weight"), ["in_", "a.lambda_"]),
        (("forward.a.weight", "a.training.weight"), ["forward_.a", "a.training_"]),
    ],
)
def test_layers_are_not_called_what_no_module_can_be(tmp_path, names, layers):
    weights = [(n, np.random.default_rng(i).normal(size=(4, 4)).astype(np.float32)) for i, n in enumerate(names)]
    nodes = [helper.make_node("MatMul", ["x", names[0]], ["h"]), helper.make_node("MatMul", ["h", names[1]], ["y"])]
    found, x = load_onnx(small(nodes, tmp_path / "x.onnx", initializers=weights)), torch.randn(2, 4)
    assert [n for n, m in found.named_modules() if isinstance(m, nn.Linear)] == layers
    with torch.no_grad():
        np.testing.assert_allclose(found(x).numpy(), run(tmp_path / "x.onnx", x), atol=1e-5)


def test_files_of_other_tools_integers_are_refused_by_name(example, mixed, tmp_path):
    model = nn.Sequential(nn.Linear(32, 4)).eval()
    x = torch.randn(2, 32)
    config = mixed(model, [x], "W4", runtime="onnx-qdq")
    mpq.export(config, "onnx-qdq", tmp_path / "q.onnx", model, sample=x)
    with pytest.raises(GraphError, match=r"q\.onnx: '0.weight.*' is of type INT4.*give the float model"):
        load_onnx(tmp_path / "q.onnx")


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
    exported = mpq.export(config, "onnx-qdq", tmp_path / "q.onnx", copy_model(model).half(), sample=half)
    assert exported.next_step.endswith("what stays float are float32 there, not torch.float16")
    session = ort.InferenceSession(str(tmp_path / "q.onnx"))
    found = session.run(None, {"ids": batch["ids"][:, :4].numpy(), "mask": batch["mask"][:, :4].numpy()})[0]
    with torch.no_grad():
        expected = model(batch["ids"][:, :4], batch["mask"][:, :4]).numpy()
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_files_that_are_none(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no")
    with pytest.raises(GraphError, match=r"x\.onnx can't be read as an ONNX model"):
        load_onnx(tmp_path / "x.onnx")
    with pytest.raises(GraphError, match=r"y\.onnx does not exist"):
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
    assert (run(tmp_path / "q.onnx", x).argmax(1) == expected.argmax(1).numpy()).mean() > 0.98
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
    np.testing.assert_allclose(run(again, x), run(first, x), atol=1e-6)


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
    assert run(out, calib[0][0]).shape == (64, 10)
