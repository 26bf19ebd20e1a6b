"""compressed-tensors: packed checkpoints that transformers loads, recipes, and what is refused."""

import json
import re
from dataclasses import replace

import pytest
import torch
from configs import with_scheme
from llama import analysed, by_projection, mixed, tiny_llama, tokens

import mpq
from mpq.apply import InputQuantizer
from mpq.errors import ConfigError, ExportError
from mpq.layers import Outside
from mpq.quantizers import Scheme

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip(
    "compressed_tensors", reason="needs compressed-tensors: pip install 'mpq[export-compressed-tensors]'"
)

ATTENTION, MLP, OTHER = "W4:g32", "W8", "W8:g64"


def scheme_of(name):
    if name.endswith("q_proj"):
        return ATTENTION
    return MLP if "gate" in name else OTHER


# What QuantizationArgs has of a format: bits, type, strategy, group size, symmetry.
ARGUMENTS = {
    "int4:g32": (4, "int", "group", 32, True),
    "int8": (8, "int", "channel", None, True),
    "int8:g64": (8, "int", "group", 64, True),
    "int2:g32": (2, "int", "group", 32, True),
    "int3": (3, "int", "channel", None, True),
    "int5:g64": (5, "int", "group", 64, True),
    "int6": (6, "int", "channel", None, True),
    "int7:g128": (7, "int", "group", 128, True),
    "int4": (4, "int", "channel", None, True),
    "nvfp4": (4, "float", "tensor_group", 16, True),
    "mxfp4": (4, "float", "group", 32, True),
    "fp8_e4m3": (8, "float", "channel", None, True),
}


def check_arguments(found, config):
    """Every layer has the bits, format and group size of the config, and no other is quantized."""
    for name, module in found.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        assert (scheme is not None) == (name in config), name
        if scheme is not None:
            w = scheme.weights
            held = w.num_bits, w.type, w.strategy, w.group_size, w.symmetric
            assert held == ARGUMENTS[config[name].weight.name], name


def config_of(model, schemes=f"{ATTENTION},{MLP},{OTHER}", choose=scheme_of, runtime="vllm"):
    return mixed(analysed(model, schemes, runtime), choose)


def loaded(folder, dtype):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        logits = model(**tokens()[0]).logits  # decompresses the weights
    return model, logits


def weights_equal(found, model, config, tolerance=0.0):
    ours = mpq.quantize(model, config)
    for name in config:
        torch.testing.assert_close(
            found.get_submodule(name).weight.data, ours.get_submodule(name).weight.data, rtol=tolerance, atol=0.0
        )
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_our_values(tmp_path, dtype):
    model = tiny_llama(dtype)
    config = config_of(model)
    exported = mpq.export(config, "vllm", tmp_path / "packed", model)
    found, logits = loaded(tmp_path / "packed", dtype)
    check_arguments(found, config)
    exact = dtype == torch.float32
    ours = weights_equal(found, model, config, 0.0 if exact else 0.01)
    with torch.no_grad():
        torch.testing.assert_close(logits, ours(**tokens()[0]).logits, rtol=0.0, atol=0.0 if exact else 0.02)
    assert {s for s, _ in exported.layers.values()} - {"left float"} == ({"exact"} if exact else {"approximated"})
    if not exact:
        assert "scales are kept in bfloat16" in repr(exported)


def test_integers_with_quantized_inputs_and_floats(tmp_path):
    model = tiny_llama()
    schemes = {
        "q_proj": "W8A8:token:sym",
        "o_proj": "W8A8",
        "gate_proj": "Wnvfp4",
        "down_proj": "Wfp8_e4m3Afp8_e4m3:token",
    }

    def choose(name):
        return "Wmxfp4" if name.startswith("model.layers.1.") else schemes[name.rpartition(".")[2]]

    config = config_of(model, ",".join([*schemes.values(), "Wmxfp4"]), choose)
    exported = mpq.export(config, "compressed-tensors", tmp_path / "packed", model)
    written = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    assert written["format"] == "mixed-precision"
    found, logits = loaded(tmp_path / "packed", torch.bfloat16)
    check_arguments(found, config)
    ours = weights_equal(found, model, config, 0.01)
    inputs = {n: found.get_submodule(n).quantization_scheme.input_activations for n in config}
    token = inputs["model.layers.0.self_attn.q_proj"]
    assert (token.num_bits, token.type, token.strategy, token.dynamic) == (8, "int", "token", True)
    static = inputs["model.layers.0.self_attn.o_proj"]
    assert (static.strategy, static.dynamic, static.symmetric) == ("tensor", False, False)
    assert inputs["model.layers.0.mlp.gate_proj"] is None
    assert re.search("scale of its input is off by .*e-0[34] of", exported.layers["model.layers.0.self_attn.o_proj"][1])
    assert "scale of its input" not in exported.layers["model.layers.0.self_attn.q_proj"][1]
    with torch.no_grad():
        torch.testing.assert_close(logits, ours(**tokens()[0]).logits, rtol=0.0, atol=0.03)
    for name in config:
        if config[name].weight.family in ("mx", "nvfp"):
            assert exported.layers[name][0] == "exact"


def test_more_bits_for_transformers_than_for_vllm(tmp_path):
    model = tiny_llama(torch.float32)
    by_part = {"q": "W2:g32", "k": "W3", "v": "W5:g64", "o": "W6", "gate": "W7:g128", "up": "W8", "down": "W4"}
    config = config_of(
        model,
        ",".join(by_part.values()),
        lambda name: by_part[name.rpartition(".")[2].removesuffix("_proj")],
        "compressed-tensors",
    )
    exported = mpq.export(config, "compressed-tensors", tmp_path / "packed", model)
    found, _ = loaded(tmp_path / "packed", torch.float32)
    check_arguments(found, config)
    weights_equal(found, model, config)
    assert "14 exact of 14 layers" in exported.summary()
    with pytest.raises(ExportError, match=r"q_proj' has W2:g32, but vllm has no W2:g32; choose one that it loads"):
        mpq.export(config, "vllm", tmp_path / "other", model)


def test_zero_points_are_packed_as_the_library_unpacks_them(tmp_path):
    """Transformers 5.23.0 makes room for them in another shape, so that only vLLM may have them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from safetensors.torch import load_file

    model = tiny_llama(torch.float32)
    config = config_of(model, "W4:g64:asym", lambda _: "W4:g64:asym")
    exported = mpq.export(config, "vllm", tmp_path / "packed", model)
    stored = load_file(tmp_path / "packed/model.safetensors")
    written = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme(
        targets=[], weights=QuantizationArgs(**written["config_groups"]["W4:g64:asym"]["weights"])
    )
    ours = mpq.quantize(model, config)
    for name in config:
        tensors = {k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")}
        found = BaseCompressor.get_value_from_registry("pack-quantized").decompress(tensors, scheme)
        assert torch.equal(found["weight"], ours.get_submodule(name).weight)
    assert {s for s, _ in exported.layers.values()} - {"left float"} == {"exact"}
    with pytest.raises(ExportError, match="compressed-tensors has no W4:g64:asym"):
        mpq.export(config, "compressed-tensors", tmp_path / "other", model)


def test_all_bits_and_zero_points_with_quantized_inputs(tmp_path):
    """Weights of 2 to 8 bits lie in a byte each, and zero points beside them."""
    model = tiny_llama(torch.float32)
    schemes = {
        "q": "W2A8:token",
        "k": "W3A8:token",
        "v": "W4:asymA8:token",
        "o": "W5:asymA8",
        "gate": "W6A8:sym",
        "up": "W7:asymA8:sym",
        "down": "W8:asymA8:token:sym",
    }
    config = config_of(model, "W8A8:token", lambda _: "W8A8:token", "compressed-tensors")
    calibrated = config_of(model, "W8A8,W8A8:sym", lambda n: "W8A8:sym" if "mlp" in n else "W8A8", "compressed-tensors")
    choose = by_projection(schemes)
    for name in config:
        limits = calibrated[name].activation_range if Scheme.parse(choose(name)).activation.calibrated else None
        choice = replace(config[name], scheme=Scheme.parse(choose(name)), activation_range=limits)
        config = replace(config, layers={**config.layers, name: choice})
    exported = mpq.export(config, "compressed-tensors", tmp_path / "packed", model)
    assert "14 exact of 14 layers" in exported.summary()
    found, logits = loaded(tmp_path / "packed", torch.float32)
    for name, choice in config.items():
        held = found.get_submodule(name).quantization_scheme
        weights, inputs = held.weights, held.input_activations
        assert (weights.num_bits, weights.symmetric) == (choice.weight.bits, choice.weight.symmetric)
        assert (inputs.symmetric, inputs.dynamic) == (choice.activation.symmetric, choice.activation_range is None)
    ours = weights_equal(found, model, config)
    with torch.no_grad():
        torch.testing.assert_close(logits, ours(**tokens()[0]).logits, rtol=0.0, atol=0.02)
        assert (logits - model(**tokens()[0]).logits).abs().max() > 0.05


def test_recipe_is_read_by_the_library(tmp_path):
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = tiny_llama()
    config = config_of(model)
    path = tmp_path / "recipe.json"
    exported = mpq.export(config, "vllm", path)
    recipe = json.loads(path.read_text())["quantization_config"]
    assert {"lm_head", "model.embed_tokens"} <= set(recipe["ignore"])
    assert "llm-compressor" in exported.next_step
    apply_quantization_config(model, QuantizationConfig(**recipe))
    check_arguments(model, config)
    found = mpq.import_config("compressed-tensors", path, tiny_llama(), progress=False)
    assert found.schemes() == config.schemes()


def test_rules_hold_one_layer_each_in_any_order(tmp_path):
    """``re:`` patterns match prefixes; the library sorts them, vLLM takes them in order. Whole names are neither."""
    from compressed_tensors.utils.match import match_targets

    path = tmp_path / "recipe.json"
    mpq.export(config_of(tiny_llama()), "vllm", path)
    groups = json.loads(path.read_text())["quantization_config"]["config_groups"]
    targets = [t for g in groups.values() for t in g["targets"]]
    assert len(targets) == len(set(targets)) == 14
    for name in targets:
        assert match_targets(name, torch.nn.Linear(1, 1), targets) == [name]
        assert match_targets(f"{name}_extra", torch.nn.Linear(1, 1), targets) == []
    assert match_targets("a.layers.10", torch.nn.Linear(1, 1), [r"re:a\.layers\.1"])  # the trap


def test_illegal_configs_are_refused_by_name(tmp_path):
    model = tiny_llama()
    config = config_of(model)
    first = "model.layers.0.self_attn"
    with pytest.raises(ExportError, match=rf"{first}.q_proj, {first}.k_proj, {first}.v_proj must have one scheme"):
        mpq.export(with_scheme(config, f"{first}.k_proj", "W8"), "vllm", tmp_path / "x", model)
    with pytest.raises(ExportError, match="o_proj' has W3, but vllm has no W3"):
        mpq.export(with_scheme(config, f"{first}.o_proj", "W3"), "vllm", tmp_path / "x", model)
    with pytest.raises(ExportError, match="o_proj' has W4A8, but vllm has no W4A8"):
        mpq.export(with_scheme(config, f"{first}.o_proj", "W4A8"), "vllm", tmp_path / "x", model)
    narrow = replace(config[f"{first}.o_proj"], weight_shape=(128, 96))
    with pytest.raises(ExportError, match="groups that divide the 96 input features; 64 does not"):
        mpq.export(replace(config, layers={**config.layers, f"{first}.o_proj": narrow}), "vllm", tmp_path / "x")
    without = {n: c for n, c in config.layers.items() if n != f"{first}.v_proj"}
    apart = (*config.outside, Outside(f"{first}.v_proj", 1, 1, 1, "skipped by the user", "skipped"))
    with pytest.raises(ExportError, match=r"k_proj are quantized and .*v_proj not, but vllm loads them as one"):
        mpq.export(replace(config, layers=without, outside=apart), "vllm", tmp_path / "x")
    with pytest.raises(ExportError, match=r"k_proj are quantized and .*v_proj not, but vllm loads them as one"):
        mpq.export(replace(config, layers=without), "vllm", tmp_path / "x", model)  # that it left out without a word
    assert not (tmp_path / "x").exists()


def test_a_tied_head_is_not_split(tmp_path):
    tied = tiny_llama(tie_word_embeddings=True)
    config = config_of(tied)
    split = replace(config, layers={**config.layers, "lm_head": replace(config["model.layers.0.self_attn.q_proj"])})
    with pytest.raises(
        ExportError, match=r"lm_head are quantized and model.embed_tokens not, .* a tied head can't be split"
    ):
        mpq.export(split, "vllm", tmp_path / "x", tied)
    found, _ = loaded(mpq.export(config, "vllm", tmp_path / "tied", tied).path, torch.bfloat16)
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_models_that_do_not_fit(tmp_path):
    model = tiny_llama()
    config = config_of(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(ConfigError, match="other weights"):
        mpq.export(config, "vllm", tmp_path / "x", model)


@pytest.mark.parametrize("tool", ["vllm", "mlx"])
def test_noise_at_inputs_is_not_lost(tmp_path, tool):
    model = tiny_llama(torch.float32)
    config = config_of(model, "W4:g32", lambda _: "W4:g32")
    quantized = mpq.quantize(model, config)
    mpq.export(config, tool, tmp_path / "fine", quantized)
    name = "model.layers.1.mlp.up_proj"
    quantizer = InputQuantizer(Scheme.parse("W4A8:token").activation, None)
    quantized.get_submodule(name).add_module("input_quantizer", quantizer)
    quantizer.noise = torch.zeros(128)
    with pytest.raises(ConfigError, match=f"layer '{name}' adds noise to its inputs, which no tool holds"):
        mpq.export(config, tool, tmp_path / "x", quantized)


def test_codes_that_data_chose_are_packed(tmp_path):
    model = tiny_llama(torch.float32)
    config = config_of(model, "W4:g32:gptq", lambda name: "W4:g32:gptq")
    with pytest.raises(ExportError, match="codes depend on calibration data"):
        mpq.export(config, "vllm", tmp_path / "packed", model)
    quantized = mpq.quantize(model, config, calib=tokens())
    exported = mpq.export(config, "vllm", tmp_path / "packed", quantized)
    assert {s for s, _ in exported.layers.values()} - {"left float"} == {"exact"}
    found, logits = loaded(tmp_path / "packed", torch.float32)
    for name in config:
        assert torch.equal(found.get_submodule(name).weight.data, quantized.get_submodule(name).weight.data)
    with torch.no_grad():
        assert torch.equal(logits, quantized(**tokens()[0]).logits)


def test_fused_nvfp4_has_one_factor(tmp_path):
    """Of layers that it fuses vLLM takes the largest global scale for all, which would change the others' values."""
    from safetensors.torch import load_file

    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(3)
    config = config_of(model, "Wnvfp4", lambda _: "Wnvfp4")
    exported = mpq.export(config, "vllm", tmp_path / "packed", model)
    stored = load_file(tmp_path / "packed/model.safetensors")
    attention = "model.layers.0.self_attn"
    fused = [f"{attention}.{n}_proj" for n in "qkv"]
    factors = {stored[f"{n}.weight_global_scale"].item() for n in fused}
    assert len(factors) == 1
    assert stored[f"{attention}.o_proj.weight_global_scale"].item() not in factors
    found, _ = loaded(tmp_path / "packed", torch.bfloat16)
    ours = mpq.quantize(model, config)
    for name in config:
        held, rounded, weight = (m.get_submodule(name).weight.data.float() for m in (found, ours, model))
        assert torch.equal(held, rounded) == (exported.layers[name][0] == "exact")
        assert (held - weight).norm() < 1.1 * (rounded - weight).norm()
    assert {n for n in exported.layers if exported.layers[n][0] == "exact"} >= {fused[1], f"{attention}.o_proj"}
    assert "is that of the layers that are loaded with it: values off by" in exported.layers[fused[0]][1]
    exported = mpq.export(config, "compressed-tensors", tmp_path / "unfused", model)
    assert "14 exact" in exported.summary()
