"""AutoRound quantizes a tiny Llama by an exported config and says what each layer got."""

import json

import pytest
import torch
from configs import with_scheme
from llama import analysed, by_projection, mixed, tiny_llama, tokenizer, tokens

import mpq
from mpq.errors import ExportError

pytest.importorskip("transformers", reason="needs transformers")

SCHEMES = {"q": "W4:g32", "k": "W4:g32", "v": "W8:g64", "o": "W3", "gate": "W2:g32", "up": "W4:g32", "down": "W4:asym"}


scheme_of = by_projection(SCHEMES)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def config(model):
    return mixed(analysed(model, ",".join(SCHEMES.values()), "autoround"), scheme_of)


def test_every_layer_is_named_in_full(config, tmp_path):
    path = tmp_path / "layer_config.json"
    mpq.export(config, "autoround", path)
    written = json.loads(path.read_text())
    first = written["model.layers.0.self_attn.v_proj"]
    assert first == {"bits": 8, "group_size": 64, "sym": True, "data_type": "int", "act_bits": 16}
    assert written["lm_head"]["bits"] == 16
    assert set(config) <= set(written)


def check_values(folder, float_model, config):
    """Transformers loads the layers with as many levels as they have bits, about as near to the weights as ours."""
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ours = mpq.quantize(float_model, config)
    for name, choice in config.items():
        layer, fmt = found.get_submodule(name), choice.weight
        rows, features = choice.weight_shape
        size = fmt.group_size or features
        assert tuple(layer.qweight.shape) == (features * fmt.bits // 32, rows)
        assert tuple(layer.scales.shape) == (features // size, rows)
        with torch.no_grad():
            held = layer(torch.eye(features, dtype=torch.bfloat16)).T.float()
        levels = [len(group.unique()) for group in held.reshape(-1, size)]
        assert 2 ** (fmt.bits - 1) < max(levels) <= 2**fmt.bits or fmt.bits == 8
        weight, rounded = (m.get_submodule(name).weight.detach().float() for m in (float_model, ours))
        assert (held - weight).norm() < 1.6 * (rounded - weight).norm(), name
    assert type(found.lm_head) is torch.nn.Linear
    with torch.no_grad():
        assert torch.isfinite(found(**tokens()[0]).logits).all()


def test_autoround_gives_every_layer_its_bits(config, tmp_path, monkeypatch):
    auto_round = pytest.importorskip("auto_round", reason="needs AutoRound: pip install 'mpq[export-autoround]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "layer_config.json"
    exported = mpq.export(config, "autoround", path)
    assert "AutoRound(model, tokenizer, sym=False, layer_config" in exported.next_step  # for the asymmetric ones
    model = tiny_llama()
    layers = json.loads(path.read_text())
    plain = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu"}  # rounding to nearest needs no data
    rounding = auto_round.AutoRound(model, tokenizer(), sym=False, layer_config=layers, **plain)
    rounding.quantize_and_save(str(tmp_path / "out"), format="auto_round")
    file = next((tmp_path / "out").rglob("config.json"))
    written = json.loads(file.read_text())["quantization_config"]
    defaults = {k: written[k] for k in ("bits", "group_size", "sym")}
    for name, choice in config.items():
        found = defaults | written["extra_config"].get(name, {})
        fmt = choice.weight
        assert (found["bits"], found["group_size"], found["sym"]) == (fmt.bits, fmt.group_size or -1, fmt.symmetric)
    assert written["extra_config"].get("lm_head", {"bits": 16})["bits"] == 16
    assert mpq.import_config("autoround", file, tiny_llama(), progress=False).schemes() == config.schemes()
    check_values(file.parent, tiny_llama(), config)


def test_what_autoround_would_change_silently_is_refused(config, tmp_path):
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(ExportError, match=f"'{name}' has W8:asym, but autoround has no W8:asym"):
        mpq.export(with_scheme(config, name, "W8:asym"), "autoround", tmp_path / "x.json")
    narrow = tiny_llama(intermediate_size=200)
    with pytest.warns(UserWarning, match="needs features that are multiples of 32, not 200"):
        found = analysed(narrow, "W4:g8", "autoround")
    assert not any("mlp" in x.name for x in found.space.layers)


@pytest.mark.parametrize("scheme", ["W4A8", "W5:g32", "Wnf4", "Wmxfp4"])
def test_unsupported_pairs_are_refused(config, tmp_path, scheme):
    with pytest.raises(ExportError, match=f"has {scheme}, but autoround has no {scheme}"):
        mpq.export(with_scheme(config, "model.layers.0.mlp.up_proj", scheme), "autoround", tmp_path / "x.json")
