"""NVIDIA ModelOpt reads an exported list, and with our scales gives our values."""

import copy
import json

import pytest
import torch
from configs import with_scheme
from llama import analysed, by_projection, mixed, tiny_llama, tokens
from torch import nn

import mpq
from mpq.errors import ExportError
from mpq.export.modelopt import load_modelopt

pytest.importorskip("transformers", reason="needs transformers")

SCHEMES = {
    "q": "W4:g32",
    "k": "W8",
    "v": "W3:tensor",
    "o": "Wnvfp4",
    "gate": "Wfp8_e4m3:tensor",
    "up": "Wmxfp4",
    "down": "W8A8:sym",
}


scheme_of = by_projection(SCHEMES)


@pytest.fixture(scope="module")
def mtq():
    pytest.importorskip("modelopt", reason="needs ModelOpt: pip install 'mpq[export-modelopt]'")
    return pytest.importorskip("modelopt.torch.quantization")


@pytest.fixture(scope="module")
def model():
    return tiny_llama(torch.float32)


@pytest.fixture(scope="module")
def config(model):
    made = mixed(
        analysed(model, ",".join(SCHEMES.values()).replace("A8:sym", ""), "modelopt"),
        lambda n: scheme_of(n).replace("A8:sym", ""),
    )
    for name in made:
        if name.endswith("down_proj"):
            made = with_scheme(made, name, SCHEMES["down"])
    return made


def test_the_list_is_ordered_and_names_are_escaped(config, tmp_path):
    path = tmp_path / "quant_cfg.json"
    mpq.export(config, "modelopt", path)
    entries = json.loads(path.read_text())["quant_cfg"]
    assert entries[0] == {"quantizer_name": "*", "enable": False}
    names = [e["quantizer_name"] for e in entries[1:]]
    assert len(names) == len(set(names)) == 14 + 2
    assert load_modelopt(path)["quant_cfg"][1]["cfg"]["block_sizes"] == {-1: 32}
    again = mpq.import_config("modelopt", path, tiny_llama(torch.float32), progress=False)
    assert again.schemes() == config.schemes()


def test_modelopt_gives_every_layer_its_format(mtq, model, config, tmp_path):
    path = tmp_path / "quant_cfg.json"
    mpq.export(config, "modelopt", path, model)
    found = copy.deepcopy(model)
    mtq.quantize(found, load_modelopt(path), lambda m: m(**tokens()[0]))
    for name, module in found.named_modules():
        if not hasattr(module, "weight_quantizer"):
            continue
        weight, inputs = module.weight_quantizer, module.input_quantizer
        assert weight.is_enabled == (name in config)
        assert inputs.is_enabled == name.endswith("down_proj")
        assert not module.output_quantizer.is_enabled
        if name in config:
            fmt = config[name].weight
            assert weight.num_bits == ((fmt.exponent, fmt.mantissa) if fmt.exponent else fmt.bits)
            assert (weight.block_sizes or {}).get(-1) == fmt.group_size
            if fmt.family in ("nvfp", "mx"):  # made anew for each block
                held = weight.block_sizes["type"], weight.block_sizes["scale_bits"]
                assert held == ("dynamic", {"nvfp4": (4, 3), "mxfp4": (8, 0)}[fmt.name])
            if fmt.group_size is None:  # ModelOpt's own reshaping gives blocks an axis
                assert weight.axis == (0 if fmt.granularity == "channel" else None)
    inputs = found.get_submodule("model.layers.0.mlp.down_proj").input_quantizer
    assert (inputs.num_bits, inputs.axis, inputs.block_sizes) == (8, None, None)


def test_with_our_scales_modelopt_has_our_values(mtq, model, tmp_path):
    from mpq.export.packed import layer_codes

    schemes = {k: v.replace("A8:sym", "") for k, v in SCHEMES.items()}
    analysis = analysed(model, ",".join(schemes.values()), "modelopt")
    config = mixed(analysis, by_projection(schemes))
    path = tmp_path / "quant_cfg.json"
    mpq.export(config, "modelopt", path)
    found, ours = copy.deepcopy(model), mpq.quantize(model, config)
    mtq.quantize(found, load_modelopt(path), lambda m: m(**tokens()[0]))
    compared = 0
    for name, choice in config.items():
        if choice.weight.family in ("nvfp", "mx"):  # which ModelOpt rounds to on GPUs only
            continue
        module, codes, fmt = found.get_submodule(name), layer_codes(config, model, name), choice.weight
        quantizer = module.weight_quantizer
        largest = 448 if fmt.exponent else 2 ** (fmt.bits - 1) - 1
        quantizer.amax = (codes.scale * largest).reshape(quantizer.amax.shape)
        held, rounded = quantizer(module.weight), ours.get_submodule(name).weight
        torch.testing.assert_close(held, rounded, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
        compared += 1
    assert compared == 10


def test_convolutions(mtq, example, tmp_path):
    model, calib, _ = example
    analysis = mpq.analyze(model, calib[:1], "W4,W8", estimator="weight_sqnr", runtime="modelopt", progress=False)
    config = analysis.allocate("avg_bits<=6")
    assert len(set(config.schemes().values())) == 2
    path = tmp_path / "quant_cfg.json"
    mpq.export(config, "modelopt", path, model)
    found = copy.deepcopy(model)
    mtq.quantize(found, load_modelopt(path), lambda m: m(calib[0][0] if isinstance(calib[0], tuple) else calib[0]))
    checked = [n for n, m in found.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {n: found.get_submodule(n).weight_quantizer.num_bits for n in checked} == {
        n: c.weight.bits for n, c in config.items()
    }


@pytest.mark.parametrize("scheme", ["W4A8", "Wnf4", "W4:asym", "W9", "W8A4:sym"])
def test_unsupported_pairs_are_refused(config, tmp_path, scheme):
    with pytest.raises(ExportError, match=f"has {scheme}, but modelopt has no {scheme}"):
        mpq.export(with_scheme(config, "model.layers.0.mlp.up_proj", scheme), "modelopt", tmp_path / "x.json")
