"""Core ML packages, read back with coremltools; predicting needs macOS."""

import numpy as np
import pytest
import torch
from configs import with_scheme
from torch import nn

import mpq
from mpq.errors import ExportError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.norm = nn.BatchNorm1d(64)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.head = nn.Linear(64, 7, bias=False)

    def forward(self, tokens):
        x = self.norm(self.conv(self.embed(tokens).transpose(1, 2))).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.down(self.up(x).relu()))


@pytest.fixture(scope="module")
def net(mixed):
    torch.manual_seed(0)
    model, tokens = Net().eval(), torch.randint(50, (2, 6))
    config = mixed(model, [tokens], "W4,W8:asym,W4:g16,W8:g32,W4:g32:asym,W8:tensor,W8", runtime="coreml", skip=["up"])
    assert len(config) == 6
    return model, tokens, config


def read_back(path):
    """Constant's name -> element type and shape of the scale, and the values that it decodes to."""
    ct = pytest.importorskip("coremltools", reason="pip install 'mpq[export-coreml]'")
    from coremltools.converters.mil.frontend.milproto import load
    from coremltools.converters.mil.mil import types

    package = ct.models.MLModel(str(path), skip_model_load=True)
    spec = package.get_spec()
    program = load.load(spec, specification_version=spec.specificationVersion, file_weights_dir=package.weights_dir)
    found = {}
    for op in program.functions["main"].operations:
        if op.op_type == "constexpr_blockwise_shift_scale":
            found[op.name] = (
                types.builtin_to_string(op.data.dtype),
                tuple(op.scale.shape),
                op.materialized_val_inference(),
            )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_package_has_every_layers_type_and_our_values(net, tmp_path, precision):
    pytest.importorskip("coremltools", reason="pip install 'mpq[export-coreml]'")
    model, tokens, config = net
    path = tmp_path / "net.mlpackage"
    exported = mpq.export(config, "coreml", path, model, sample=tokens, compute_precision=precision)
    assert {exported.layers[n][0] for n in config} == {"exact" if precision == "float32" else "approximated"}
    assert exported.layers["up"][0] == "left float"
    held = read_back(path)
    assert len(held) == len(config)  # the skipped layer is float; the smallest has 448 weights, under 2048
    quantized = mpq.quantize(model, config)
    for name, choice in config.items():
        kind, scale, values = next(v for k, v in held.items() if k.startswith(name.replace(".", "_") + "_weight"))
        fmt = choice.weight
        assert kind.endswith(f"int{fmt.bits}")
        assert kind.startswith("u") != fmt.symmetric
        rows = 1 if fmt.granularity == "tensor" else choice.weight_shape[0]
        groups = choice.weight_shape[1] // fmt.group_size if fmt.group_size else 1
        assert scale[:2] == (rows, groups)
        expected = quantized.get_submodule(name).weight.detach().numpy()
        tolerance = 1e-6 if precision == "float32" else 2e-3 * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(values, np.float32).reshape(expected.shape), expected, atol=tolerance)


@pytest.mark.slow
def test_coreml_alone_leaves_small_layers_float(mixed, tmp_path):
    """Its ``weight_threshold`` of 2048 is why exported packages are made in another way."""
    ct = pytest.importorskip("coremltools", reason="pip install 'mpq[export-coreml]'")
    from coremltools.optimize.coreml import OpLinearQuantizerConfig, OptimizationConfig, linear_quantize_weights

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 7)).eval(), torch.randn(2, 64)
    whole = ct.convert(
        torch.jit.trace(model, x),
        inputs=[ct.TensorType("input", tuple(x.shape))],
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    plan = OptimizationConfig(OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8"))
    linear_quantize_weights(whole, plan).save(str(tmp_path / "theirs.mlpackage"))
    config = mixed(model, [x], "W8", runtime="coreml")
    mpq.export(config, "coreml", tmp_path / "ours.mlpackage", model, sample=x)
    assert len(read_back(tmp_path / "theirs.mlpackage")) == 1
    assert len(read_back(tmp_path / "ours.mlpackage")) == 2


@pytest.mark.slow
def test_layers_with_equal_weights_share_a_constant(mixed, tmp_path):
    """coremltools keeps one of equal constants, as in encoders that PyTorch makes of copies of one layer."""
    pytest.importorskip("coremltools", reason="pip install 'mpq[export-coreml]'")
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 7)).eval(),
        torch.randn(2, 64),
    )
    model[2].load_state_dict(model[0].state_dict())
    config = mixed(model, [x], "W8", runtime="coreml")
    mpq.export(config, "coreml", tmp_path / "equal.mlpackage", model, sample=x)
    assert len(read_back(tmp_path / "equal.mlpackage")) == 2
    assert len(config) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "match"),
    [
        (["up_weight_x_weight", "head_weight"], r"no quantized constant of the weight of layer up: .* skip=\['up'\]"),
        (["up_weight", "head_weight", "head_weight_1"], "of the weight of layer up_weight.x: "),
        (["up_weight", "up_weight_x_weight"], "of the weight of layers embed, head: "),
    ],
)
def test_the_layer_that_lost_its_constant_is_named(mixed, tmp_path, monkeypatch, kept, match):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up, self.head = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 50, bias=False)
            self.up_weight = nn.ModuleDict({"x": nn.Linear(64, 64)})
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.up_weight["x"](self.up(self.embed(tokens))))

    pytest.importorskip("coremltools", reason="pip install 'mpq[export-coreml]'")
    model, tokens = Tied().eval(), torch.randint(50, (2, 6))
    config = mixed(model, [tokens], "W8", runtime="coreml")
    monkeypatch.setattr("mpq.export.coreml._constants", lambda package: kept)
    with pytest.raises(ExportError, match=match):
        mpq.export(config, "coreml", tmp_path / "x.mlpackage", model, sample=tokens)


def test_what_coreml_has_not_is_refused(net, tmp_path):
    model, tokens, config = net
    for scheme in ("W3", "W4A8", "W4:bipolar"):
        with pytest.raises(
            ExportError, match=f"layer 'head' has {scheme}, but coreml has no {scheme}; choose one that it loads"
        ):
            mpq.export(with_scheme(config, "head", scheme), "coreml", tmp_path / "x.mlpackage", model, sample=tokens)
    with pytest.raises(ExportError, match="no groups in conv1d layers"):
        mpq.export(with_scheme(config, "conv", "W4:g16"), "coreml", tmp_path / "x.mlpackage", model, sample=tokens)
    with pytest.raises(ExportError, match=r"needs a path like net\.mlpackage"):
        mpq.export(config, "coreml", tmp_path / "x.json", model, sample=tokens)
    with pytest.raises(ExportError, match=r"pass model="):
        mpq.export(config, "coreml", tmp_path / "x.mlpackage")
