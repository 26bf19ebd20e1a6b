"""GPTQModel: its own config class reads the rules, its own matcher gives every layer its bits."""

import json
from dataclasses import replace

import pytest
import torch
from configs import with_scheme
from llama import analysed, by_projection, mixed, tiny_llama, tokenizer, tokens

import mpq
from mpq.errors import ExportError

pytest.importorskip("transformers", reason="needs transformers")

SCHEMES = {"q": "W4:g32", "k": "W4:g32", "v": "W8:g64", "o": "W3", "gate": "W2:g16", "up": "W4:g32", "down": "W4:asym"}


scheme_of = by_projection(SCHEMES)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def config(model):
    return mixed(analysed(model, ",".join(SCHEMES.values()), "gptqmodel"), scheme_of)


@pytest.fixture(scope="module")
def gptq():
    return pytest.importorskip(
        "gptqmodel.quantization.config", reason="needs GPTQModel: pip install 'mpq[export-gptqmodel]'"
    )


def test_every_layer_has_its_rule(model, config, tmp_path):
    path = tmp_path / "quantize_config.json"
    exported = mpq.export(config, "gptqmodel", path, model)
    written = json.loads(path.read_text())
    assert (written["bits"], written["group_size"], written["sym"]) == (4, 32, True)
    assert written["dynamic"][r"+:^model\.layers\.0\.self_attn\.o_proj$"] == {"bits": 3, "group_size": -1, "sym": True}
    assert written["dynamic"][r"-:^lm_head$"] == {}
    assert "14 exact of 14 layers" in exported.summary()


def test_gptqmodel_finds_them(gptq, model, config, tmp_path):
    path = tmp_path / "quantize_config.json"
    mpq.export(config, "gptqmodel", path, model)
    read = gptq.QuantizeConfig.from_quant_config(json.loads(path.read_text()))
    assert read.format == gptq.FORMAT.GPTQ
    for name, module in model.named_modules():
        if name in config:
            fmt = config[name].weight
            found = [read.dynamic_get(name, key) for key in ("bits", "group_size", "sym")]
            assert found == [fmt.bits, fmt.group_size or -1, fmt.symmetric]
            assert read.dynamic_get(f"{name}.extra") is None  # no rule reaches another name
            assert read.dynamic_get(f"vision.{name}") is None
        elif isinstance(module, torch.nn.Linear):
            assert read.dynamic_get(name) is False
    read.save_pretrained(str(tmp_path))  # its own file
    assert mpq.import_config("gptqmodel", tmp_path, model, progress=False).schemes() == config.schemes()


@pytest.mark.slow
def test_gptqmodel_quantizes_every_layer_so(gptq, config, tmp_path, monkeypatch):
    """On a CPU too, where it compiles what packs the codes the first time."""
    from gptqmodel import GPTQModel
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)  # for its log
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # it takes one on two cores, and then asks for two
    path = tmp_path / "quantize_config.json"
    head = replace(config["model.layers.0.self_attn.v_proj"], weight_shape=(96, 128))
    outside = tuple(o for o in config.outside if o.name != "lm_head")
    config = replace(config, layers={**config.layers, "lm_head": head}, outside=outside)
    mpq.export(config, "gptqmodel", path)
    tiny_llama(torch.float16).save_pretrained(tmp_path / "float")
    tokenizer().save_pretrained(tmp_path / "float")
    settings = gptq.QuantizeConfig.from_quant_config(json.loads(path.read_text()))
    made = GPTQModel.load(str(tmp_path / "float"), settings, device="cpu")
    sentence = {"input_ids": list(range(32)), "attention_mask": [1] * 32}
    made.quantize([sentence] * 16, batch_size=4)
    made.save(str(tmp_path / "quantized"))
    stored = load_file(tmp_path / "quantized/model.safetensors")
    for name, choice in config.items():
        features, fmt = choice.weight_shape[1], choice.weight
        assert len(stored[f"{name}.qweight"]) == features * fmt.bits // 32
        assert len(stored[f"{name}.scales"]) == features // (fmt.group_size or features)
    assert "lm_head.weight" not in stored
    found = mpq.import_config("gptqmodel", tmp_path / "quantized", tiny_llama(), progress=False)
    assert found.schemes() == config.schemes()
    check_values(GPTQModel.load(str(tmp_path / "quantized"), device="cpu", backend="torch").model, config)


def check_values(found, config):
    """The loaded layers have as many levels as they have bits, symmetric or not, and are near the float weights."""
    float_model = tiny_llama(torch.float16)
    for name, choice in config.items():
        layer, fmt = found.get_submodule(name), choice.weight
        size = fmt.group_size or choice.weight_shape[1]
        with torch.no_grad():
            held = layer(torch.eye(choice.weight_shape[1], dtype=torch.float16)).T.float()
        levels = [len(group.unique()) for group in held.reshape(-1, size)]
        assert 2 ** (fmt.bits - 1) < max(levels) <= 2**fmt.bits or fmt.bits == 8, name
        weight = float_model.get_submodule(name).weight.detach().float()
        assert (held - weight).norm() < 2.0 ** (1 - fmt.bits) * 1.25 * weight.norm(), name
        # One zero point for all, of which 32 bits hold the same ones: of 3 bits there are three ways.
        assert (len(layer.qzeros.unique()) <= 3) == fmt.symmetric, name
    with torch.no_grad():
        assert torch.isfinite(found(**tokens()[0]).logits).all()


def test_imported_rules_are_resolved_as_gptqmodel_does(gptq, model, tmp_path):
    dynamic = {
        r"-:.*\.gate_proj": {},
        r"+:.*layers\.0\.self": {"bits": 8, "group_size": 64},
        r"down_proj": {"bits": 2},
        r"model\.layers\.1\.mlp\.up": {"bits": 3},
    }
    path = tmp_path / "quantize_config.json"
    path.write_text(json.dumps({"bits": 4, "group_size": 32, "dynamic": dynamic}))
    read = gptq.QuantizeConfig.from_quant_config(json.loads(path.read_text()))
    found = mpq.import_config("gptqmodel", path, model, progress=False)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            bits = read.dynamic_get(name, "bits", 4)
            assert (name in found) == (bits is not False)
            assert name not in found or found[name].weight.bits == bits


def test_bits_that_change_the_whole_file_are_refused(config, tmp_path):
    with pytest.raises(ExportError, match=r"'model.layers.0.mlp.up_proj' has W5:g32, but gptqmodel has no W5:g32"):
        mpq.export(with_scheme(config, "model.layers.0.mlp.up_proj", "W5:g32"), "gptqmodel", tmp_path / "x.json")


def test_the_trap_itself(gptq):
    made = gptq.QuantizeConfig(bits=4, group_size=32, dynamic={r"+:^a$": {"bits": 5}})
    assert made.format == gptq.FORMAT.GPTQ_P


@pytest.mark.parametrize("scheme", ["W4A8", "W4:g48", "Wnf4", "W4:tensor", "Wmxfp4"])
def test_unsupported_pairs_are_refused(config, tmp_path, scheme):
    with pytest.raises(ExportError, match=f"has {scheme}, but gptqmodel has no {scheme}"):
        mpq.export(with_scheme(config, "model.layers.0.mlp.up_proj", scheme), "gptqmodel", tmp_path / "x.json")
