"""torchao: configs that ``quantize_`` and transformers apply, and models that hold our codes."""

import json

import pytest
import torch
from configs import with_scheme
from llama import analysed, by_projection, mixed, tiny_llama, tokens
from torch import nn

import mpq
from mpq.errors import ExportError

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("torchao", reason="needs torchao: pip install 'mpq[export-torchao]'")

SCHEMES = {
    "q": "W4:g32",
    "k": "W3",
    "v": "W2:g64",
    "o": "W4:g32A8:token",
    "gate": "W5:g64:asym",
    "up": "W8",
    "down": "W6:asym",
}


scheme_of = by_projection(SCHEMES)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(torch.float32)


@pytest.fixture(scope="module")
def config(model):
    weights = mixed(analysed(model, ",".join(SCHEMES.values()).replace("A8:token", ""), "torchao"), weight_scheme)
    for name in weights:
        weights = with_scheme(weights, name, scheme_of(name))
    return weights


def weight_scheme(name):
    return scheme_of(name).replace("A8:token", "")


def check_tensor(weight, choice, shape):
    fmt = choice.weight
    assert weight.target_dtype == getattr(torch, f"int{fmt.bits}")
    assert tuple(weight.block_size) == (1, fmt.group_size or shape[1])
    assert (weight.activation_quantization is None) == (choice.activation is None)
    assert weight.qdata.unique().numel() <= 2**fmt.bits
    assert (weight.zero_point.count_nonzero() == 0) == fmt.symmetric


def test_quantize_gives_every_layer_its_format(model, config, tmp_path):
    import copy

    from torchao.core.config import config_from_dict
    from torchao.quantization import quantize_

    path = tmp_path / "torchao.json"
    exported = mpq.export(config, "torchao", path, model)
    assert "14 exact of 14 layers" in exported.summary()
    rules = config_from_dict(json.loads(path.read_text()))
    assert rules.fqn_to_config["lm_head"] is None
    again = mpq.import_config("torchao", path, model, tokens(), estimator="weight_sqnr", progress=False)
    assert again.schemes() == config.schemes()
    found = copy.deepcopy(model)
    quantize_(found, rules, filter_fn=None)
    for name, module in found.named_modules():
        if name in config:
            check_tensor(module.weight, config[name], config[name].weight_shape)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            assert type(module.weight) is nn.Parameter
    with torch.no_grad():
        assert torch.isfinite(found(**tokens()[0]).logits).all()


def test_transformers_applies_saves_and_loads_it(config, tmp_path):
    from transformers import AutoModelForCausalLM, TorchAoConfig

    model = tiny_llama()
    model.save_pretrained(tmp_path / "float")
    path = tmp_path / "quantization_config.json"
    mpq.export(config, "torchao", path, form="transformers")
    settings = TorchAoConfig.from_dict(json.loads(path.read_text()))
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", dtype=torch.bfloat16, quantization_config=settings
    ).eval()
    found.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.bfloat16).eval()
    for name, choice in config.items():
        check_tensor(again.get_submodule(name).weight, choice, choice.weight_shape)
    imported = mpq.import_config("torchao", tmp_path / "quantized", model, progress=False)
    assert imported.schemes() == config.schemes()
    assert type(again.lm_head.weight) is nn.Parameter
    with torch.no_grad():
        assert torch.equal(found(**tokens()[0]).logits, again(**tokens()[0]).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_tensors_have_our_values(config, dtype):
    from mpq.export.torchao import hold

    model = tiny_llama(dtype)
    made = mixed(analysed(model, ",".join(SCHEMES.values()).replace("A8:token", ""), "torchao"), weight_scheme)
    held, ours = hold(model, made), mpq.quantize(model, made)
    for name, choice in made.items():
        weight = held.get_submodule(name).weight
        check_tensor(weight, choice, choice.weight_shape)
        assert torch.equal(weight.dequantize(), ours.get_submodule(name).weight)
    with torch.no_grad():
        torch.testing.assert_close(held(**tokens()[0]).logits, ours(**tokens()[0]).logits)


def test_torchao_ignores_unknown_names_so_mpq_does_not(model, config, tmp_path):
    import copy

    from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, quantize_

    found = copy.deepcopy(model)
    quantize_(found, FqnToConfig({"model.layers.7.q": IntxWeightOnlyConfig()}), filter_fn=None)  # the trap: no error
    shallow = tiny_llama(torch.float32, num_hidden_layers=1)
    with pytest.raises(ExportError, match=r"no layer 'model.layers.1.self_attn.q_proj'"):
        mpq.export(config, "torchao", tmp_path / "x.json", shallow)


@pytest.mark.parametrize("scheme", ["W9", "W1", "W4:g32:p2", "Wnf4", "W4A8", "W4:g32A8:token:sym", "Wmxfp4"])
def test_unsupported_pairs_are_refused(config, tmp_path, scheme):
    name = "model.layers.1.mlp.up_proj"
    with pytest.raises(
        ExportError, match=rf"'{name}' has {scheme}, but torchao has no {scheme}; choose one that it loads"
    ):
        mpq.export(with_scheme(config, name, scheme), "torchao", tmp_path / "x.json")


def test_groups_must_divide(config, tmp_path):
    with pytest.raises(ExportError, match="groups that divide the 128 input features; 48 does not"):
        mpq.export(with_scheme(config, "model.layers.1.mlp.up_proj", "W4:g48"), "torchao", tmp_path / "x.json")
    with pytest.raises(ExportError, match="unknown form 'xml'"):
        mpq.export(config, "torchao", tmp_path / "x.json", form="xml")


def test_codes_that_data_chose_are_held(model):
    from mpq.export.torchao import hold

    config = mixed(analysed(model, "W4:g32:gptqA8:token", "torchao"), lambda name: "W4:g32:gptqA8:token")
    with pytest.raises(ExportError, match="codes depend on calibration data"):
        hold(model, config)
    quantized = mpq.quantize(model, config, calib=tokens())
    held = hold(quantized, config)
    for name in config:
        assert torch.equal(held.get_submodule(name).weight.dequantize(), quantized.get_submodule(name).weight)
        assert "input_quantizer" not in held.get_submodule(name)._modules
        assert not held.get_submodule(name)._forward_pre_hooks
    with torch.no_grad():
        ours, theirs = (m(**tokens()[0]).logits for m in (quantized, held))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0.02)
