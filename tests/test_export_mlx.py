"""MLX-LM: folders that ``mlx_lm`` loads and runs, with our values."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from configs import with_scheme
from llama import analysed, by_projection, mixed, tiny_llama, tokens

import mpq
from mpq.errors import ExportError
from mpq.quantizers import Scheme

pytest.importorskip("transformers", reason="needs transformers")

SCHEMES = {
    "embed_tokens": "W8:g64",
    "q": "W4:g32",
    "k": "W3:g64",
    "v": "W2:g32:asym",
    "o": "W5:g32",
    "gate": "W6:g64:asym",
    "up": "Wmxfp4",
    "down": "W8:g128",
}


scheme_of = by_projection(SCHEMES)


def config_of(model):
    return mixed(analysed(model, ",".join(SCHEMES.values()), "mlx", skip=["lm_head"]), scheme_of)


@pytest.fixture(scope="module")
def mx():
    pytest.importorskip("mlx_lm", reason="needs MLX-LM: pip install 'mpq[export-mlx]'")
    return pytest.importorskip("mlx.core")


def numpy_of(mx, array):
    return torch.from_numpy(np.array(array.astype(mx.float32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mlx_loads_every_layer_with_our_values(mx, tmp_path, dtype):
    from mlx_lm.utils import load_model

    model = tiny_llama(dtype)
    config = config_of(model)
    exported = mpq.export(config, "mlx", tmp_path / "mlx", model)
    found, _ = load_model(tmp_path / "mlx")
    again = mpq.import_config("mlx", tmp_path / "mlx", model, progress=False)
    asymmetric = {n: c.weight.base + f":g{c.weight.group_size}:asym" for n, c in config.items()}  # a scale and a bias
    assert {n: c.weight.name for n, c in again.items()} == {
        n: "mxfp4" if "mxfp4" in name else name for n, name in asymmetric.items()
    }
    modules = dict(found.named_modules())
    ours = mpq.quantize(model, config)
    for name, choice in config.items():
        layer, fmt = modules[name], choice.weight
        mode = "affine" if fmt.family == "int" else "mxfp4"
        assert (layer.bits, layer.group_size, layer.mode) == (fmt.bits, fmt.group_size, mode)
        args = (layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits)
        held = numpy_of(mx, mx.dequantize(*args, mode=mode))
        expected = ours.get_submodule(name).weight.detach().float()
        exact = exported.layers[name][0] == "exact"
        assert exact or dtype != torch.float32
        torch.testing.assert_close(held, expected, rtol=0.0, atol=0.0 if exact else 0.02 * expected.abs().max().item())
    assert not hasattr(modules["lm_head"], "bits")
    logits = numpy_of(mx, found(mx.array(tokens()[0]["input_ids"].numpy())))
    with torch.no_grad():
        expected = ours(**tokens()[0]).logits.float()
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-4 if dtype == torch.float32 else 0.03)


def test_tied_head_follows_the_embedding(mx, tmp_path):
    from mlx_lm.utils import load_model

    model = tiny_llama(torch.float32, tie_word_embeddings=True)
    config = mixed(analysed(model, "W4:g32,W8:g64", "mlx", skip=[]), lambda n: "W8:g64" if "embed" in n else "W4:g32")
    assert config["lm_head"].scheme == config["model.embed_tokens"].scheme
    mpq.export(config, "mlx", tmp_path / "mlx", model)
    found, _ = load_model(tmp_path / "mlx")
    logits = numpy_of(mx, found(mx.array(tokens()[0]["input_ids"].numpy())))
    with torch.no_grad():
        torch.testing.assert_close(logits, mpq.quantize(model, config)(**tokens()[0]).logits, rtol=0.0, atol=1e-4)
    with pytest.raises(ExportError, match=r"model.embed_tokens, lm_head must have one scheme because they share one"):
        mpq.export(with_scheme(config, "lm_head", "W4:g32"), "mlx", tmp_path / "split", model)


def test_settings_convert_every_layer_in_spite_of_the_global_group_size(mx, tmp_path):
    """``mlx_lm.convert`` skips layers whose input features don't divide by the global group size."""
    from mlx_lm.utils import _get_classes, quantize_model

    model = tiny_llama(
        torch.float32, hidden_size=96, intermediate_size=160, num_attention_heads=3, num_key_value_heads=3
    )
    config = mixed(analysed(model, "W4:g32,W6:g32", "mlx"), lambda n: "W6:g32" if "down" in n else "W4:g32")
    path = tmp_path / "quantization.json"
    exported = mpq.export(config, "mlx", path)
    settings = json.loads(path.read_text())["quantization"]
    assert settings["group_size"] == 32
    assert "q_group_size=32" in exported.next_step
    status, held = exported.layers["model.layers.0.mlp.up_proj"]  # MLX makes an asymmetric format of it
    assert status == "approximated"
    assert held.startswith("W4:g32 with a bias for each group beside its scale; ")
    asymmetric = with_scheme(config, "model.layers.0.mlp.up_proj", "W4:g32:asym")
    assert mpq.export(asymmetric, "mlx", tmp_path / "other.json").layers["model.layers.0.mlp.up_proj"][0] == "exact"

    def converted(group_size):
        plain = model.config.to_dict()
        model_class, arguments = _get_classes(plain)
        made = model_class(arguments.from_dict(plain))
        made, _ = quantize_model(made, plain, group_size, 4, quant_predicate=lambda p, m: settings.get(p, False))
        return {n: m.bits for n, m in made.named_modules() if hasattr(m, "bits")}

    assert converted(32) == {n: c.weight.bits for n, c in config.items()}
    assert converted(64) == {}  # the trap: neither 96 nor 160 divide, and MLX says nothing


def test_experts_are_one_layer_of_mlx(mx, tmp_path):
    from mlx_lm.models import mixtral
    from mlx_lm.utils import quantize_model

    block = "model.layers.0.block_sparse_moe"
    bits = {"w1": "W8:g32", "w2": "W3:g32", "w3": "W6:g64"}
    config = mixed(analysed(tiny_llama(), "W4:g32", "mlx"), lambda _: "W4:g32")
    choice = config["model.layers.0.mlp.up_proj"]
    experts = {
        f"{block}.experts.{e}.{n}": replace(choice, scheme=Scheme.parse(s)) for n, s in bits.items() for e in (0, 1)
    }
    config = replace(config, layers=experts)
    mpq.export(config, "mlx", tmp_path / "q.json")
    settings = json.loads((tmp_path / "q.json").read_text())["quantization"]
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 96}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    model = mixtral.Model(mixtral.ModelArgs(model_type="mixtral", **sizes))
    made, _ = quantize_model(model, {}, 32, 4, quant_predicate=lambda p, m: settings.get(p, False))
    found = {n: m.bits for n, m in made.named_modules() if hasattr(m, "bits")}
    assert found == {f"{block}.switch_mlp.{n}": b for n, b in (("gate_proj", 8), ("down_proj", 3), ("up_proj", 6))}
    split = with_scheme(config, f"{block}.experts.1.w2", "W4:g32")
    with pytest.raises(ExportError, match=r"experts.0.w2, .*experts.1.w2 must have one scheme because mlx loads them"):
        mpq.export(split, "mlx", tmp_path / "q.json")


@pytest.mark.parametrize("scheme", ["W4", "W7:g32", "W4:g16", "W4:g32A8", "Wnvfp4", "W4:g32:p2", "W4:g32:nested"])
def test_unsupported_pairs_are_refused(tmp_path, scheme):
    config = config_of(tiny_llama())
    name = "model.layers.1.mlp.up_proj"
    with pytest.raises(ExportError, match=rf"'{name}' has {scheme}, but mlx has no {scheme}; choose one that it loads"):
        mpq.export(with_scheme(config, name, scheme), "mlx", tmp_path / "x.json")
