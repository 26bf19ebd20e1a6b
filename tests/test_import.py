"""Configs of other tools as ours: round trips, files as those tools write them, and what does not fit."""

import json

import pytest
import torch
from llama import analysed, mixed, tiny_llama, tokens
from typer.testing import CliRunner

import mpq
from mpq.cli import app
from mpq.errors import ConfigError, DataError, ExportError
from mpq.export import RUNTIMES

pytest.importorskip("transformers", reason="needs transformers")

SCHEMES = {
    "gptqmodel": ("W4:g32", "W8:g64", "W3", "W4:g128:asym"),
    "autoround": ("W4:g32", "W8:g64", "W3", "W4:g128:asym"),
    "compressed-tensors": ("W4:g32", "W8A8:token", "Wnvfp4", "Wfp8_e4m3Afp8_e4m3:token"),
    "mlx": ("W4:g32:asym", "W8:g64:asym", "Wmxfp4", "W3:g128:asym"),  # it makes no others
    "torchao": ("W4:g32", "W8:g64:asym", "W3", "W5:asym"),
    "modelopt": ("W4:g32", "Wfp8_e4m3:tensor", "Wmxfp4", "W3:tensor"),
    "json": ("W4:g32", "Wnf4:g64", "Wternary", "W5:asym"),
}
PARTS = ("q", "v", "gate", "down")


@pytest.fixture(scope="module")
def model():
    return tiny_llama(torch.float32)


def import_quickly(name, path, model, **options):
    return mpq.import_config(name, path, model, tokens(), estimator="weight_sqnr", progress=False, **options)


@pytest.mark.parametrize("tool", SCHEMES)
def test_round_trip(tool, model, tmp_path):
    by_part = dict(zip(PARTS, SCHEMES[tool], strict=True))

    def choose(name):
        return by_part.get(name.rpartition(".")[2].removesuffix("_proj"), SCHEMES[tool][0])

    searched = {"skip": ["lm_head", "model.embed_tokens", "model.layers.1.self_attn.o_proj"]}
    shared = {s for s in SCHEMES[tool] if "A8" in s or "Afp8" in s}
    if shared:  # layers with one input then have one scheme
        config = mixed(
            analysed(model, "W8A8:token,W4:g32", tool, **searched), lambda n: "W8A8:token" if "q_" in n else "W4:g32"
        )
    else:
        runtime = tool if tool in RUNTIMES else None
        config = mixed(analysed(model, ",".join(SCHEMES[tool]), runtime, **searched), choose)
    path = tmp_path / "exported.json"
    mpq.export(config, tool, path)
    again = import_quickly(tool, path, model)
    assert again.schemes() == config.schemes()
    assert again.metrics["size"] == config.metrics["size"]
    assert again.solver["status"] == "given"
    assert again.provenance["imported_from"] == tool
    assert mpq.load(again.save(tmp_path / "bits.json")) == again


def write(path, data):
    path.write_text(json.dumps(data))
    return path


def test_our_own_files_are_called_so(model, tmp_path):
    analysed(model, "W4:g32").allocate("avg_bits<=4").save(tmp_path / "bits.json")
    with pytest.raises(ConfigError, match=r"bits\.json is a file of mpq's own, with schema 'mpq/bitconfig-1'"):
        mpq.import_config("json", tmp_path / "bits.json", model, tokens())


def test_gptqmodel_rules_as_people_write_them(model, tmp_path):
    dynamic = {
        r"-:.*\.gate_proj": {},
        r"+:.*\.layers\.0\..*": {"bits": 8, "group_size": 64},
        r".*down": {"bits": 3, "sym": False},
    }
    path = write(tmp_path / "quantize_config.json", {"bits": 4, "group_size": 32, "dynamic": dynamic})
    found = import_quickly("gptqmodel", tmp_path, model).schemes()
    assert path.parent == tmp_path
    assert found["model.layers.0.mlp.down_proj"] == "W8:g64"  # the first match
    assert found["model.layers.1.mlp.down_proj"] == "W3:g32:asym"
    assert found["model.layers.1.self_attn.q_proj"] == "W4:g32"
    assert not {"lm_head", "model.embed_tokens", "model.layers.0.mlp.gate_proj"} & set(found)


def test_autoround_checkpoints(model, tmp_path):
    extra = {"model.layers.0.self_attn.q_proj": {"bits": 8}, r".*layers\.1\.mlp.*": {"bits": 2, "group_size": 64}}
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "extra_config": extra}
    write(tmp_path / "config.json", {"model_type": "llama", "quantization_config": settings})
    found = import_quickly("autoround", tmp_path, model).schemes()
    assert found["model.layers.0.self_attn.q_proj"] == "W8:g32:asym"
    assert found["model.layers.1.mlp.up_proj"] == "W2:g64:asym"
    assert found["model.layers.0.mlp.up_proj"] == "W4:g32:asym"
    assert "lm_head" not in found
    with pytest.raises(ConfigError, match="only integer weights with float inputs"):
        import_quickly("autoround", write(tmp_path / "x.json", {"model.layers.0.mlp.up_proj": {"act_bits": 8}}), model)


def test_compressed_tensors_patterns_and_classes(model, tmp_path):
    weights = {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group"}
    groups = {
        "a": {"targets": ["Linear"], "weights": weights},
        "b": {"targets": [r"re:.*layers\.1\..*proj"], "weights": {"num_bits": 8, "strategy": "channel"}},
        "c": {"targets": ["model.layers.1.mlp.up_proj"], "weights": {"num_bits": 3, "group_size": -1}},
    }
    path = write(tmp_path / "r.json", {"quantization_config": {"config_groups": groups, "ignore": ["lm_head"]}})
    found = import_quickly("compressed-tensors", path, model).schemes()
    assert found["model.layers.0.mlp.up_proj"] == "W4:g32"
    assert found["model.layers.1.mlp.down_proj"] == "W8"
    assert found["model.layers.1.mlp.up_proj"] == "W3"
    assert not {"lm_head", "model.embed_tokens"} & set(found)
    groups["a"]["weights"] = {"num_bits": 6, "type": "float", "strategy": "group", "group_size": 32}
    path = write(tmp_path / "r.json", {"config_groups": groups})
    with pytest.raises(ConfigError, match="group 'a': mpq has no format for"):
        import_quickly("compressed-tensors", path, model)


def test_mlx_defaults_hold_for_layers_without_an_entry(model, tmp_path):
    settings = {
        "group_size": 64,
        "bits": 4,
        "lm_head": False,
        "model.layers.0.mlp.up_proj": {"bits": 8, "group_size": 32},
    }
    write(tmp_path / "config.json", {"quantization": settings})
    found = import_quickly("mlx", tmp_path, model).schemes()
    assert found["model.embed_tokens"] == "W4:g64:asym"
    assert found["model.layers.0.mlp.up_proj"] == "W8:g32:asym"
    assert "lm_head" not in found


def test_mlx_leaves_layers_float_that_the_common_groups_do_not_divide(tmp_path):
    narrow = tiny_llama(torch.float32, intermediate_size=160)
    settings = {"group_size": 64, "bits": 4, "lm_head": False, "model.layers.0.mlp.down_proj": {"group_size": 32}}
    found = import_quickly("mlx", write(tmp_path / "q.json", settings), narrow).schemes()
    assert found["model.layers.0.mlp.down_proj"] == "W4:g32:asym"
    assert "model.layers.1.mlp.down_proj" not in found
    assert found["model.layers.1.mlp.up_proj"] == "W4:g64:asym"


def test_autoround_leaves_layers_float_whose_features_are_no_multiples(tmp_path):
    narrow = tiny_llama(torch.float32, intermediate_size=200)
    settings = {"bits": 4, "group_size": 8, "sym": True, "extra_config": {"model.layers.0.mlp.up_proj": {"bits": 8}}}
    found = import_quickly("autoround", write(tmp_path / "q.json", settings), narrow).schemes()
    assert len(found) == 8
    assert all("self_attn" in name for name in found)


def test_dynamic_inputs_are_not_taken_for_calibrated_ones(model, tmp_path):
    inputs = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": True}
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}, "input_activations": inputs}
    path = write(tmp_path / "r.json", {"config_groups": {"a": group}})
    with pytest.raises(ConfigError, match="group 'a': mpq has one scale a tensor for inputs only where it is calibr"):
        import_quickly("compressed-tensors", path, model)
    inputs["dynamic"] = False
    found = import_quickly("compressed-tensors", write(path, {"config_groups": {"a": group}}), model).schemes()
    assert set(found.values()) == {"W8A8:sym"}


def test_torchao_parameters_win_over_modules(model, tmp_path):
    def weights_of(bits):
        data = {"weight_dtype": {"_data": f"int{bits}"}, "granularity": {"_type": "PerAxis", "_data": {"axis": 0}}}
        return {"_type": "IntxWeightOnlyConfig", "_data": {**data, "mapping_type": {"_data": "SYMMETRIC"}}}

    block = "model.layers.0.mlp"
    rules = {
        f"{block}.up_proj": weights_of(2),
        f"{block}.up_proj.weight": weights_of(3),
        f"re:{block}.gate_proj": weights_of(2),
        rf"re:{block}\.(gate|down)_proj\.weight": weights_of(5),
        f"{block}.down_proj": weights_of(6),
        "model.layers.1.mlp.up_proj.weight": None,
        "_default": weights_of(8),
    }
    path = write(tmp_path / "t.json", {"_type": "FqnToConfig", "_data": {"fqn_to_config": rules}})
    found = import_quickly("torchao", path, model).schemes()
    assert [found[f"{block}.{n}_proj"] for n in ("up", "gate", "down")] == ["W3", "W5", "W6"]
    assert "model.layers.1.mlp.up_proj" not in found
    assert found["model.layers.1.mlp.gate_proj"] == "W8"


def test_torchao_patterns_and_configs_for_all(model, tmp_path):
    four = {"weight_dtype": {"_data": "int4"}, "granularity": {"_type": "PerGroup", "_data": {"group_size": 32}}}
    four = {"_type": "IntxWeightOnlyConfig", "_data": {**four, "mapping_type": {"_data": "SYMMETRIC"}}}
    eight = {"weight_dtype": {"_data": "int8"}, "weight_granularity": {"_type": "PerAxis", "_data": {"axis": 0}}}
    eight = {**eight, "weight_mapping_type": {"_data": "ASYMMETRIC"}}
    eight = {"_type": "Int8DynamicActivationIntxWeightConfig", "_data": eight}
    symmetric = {**eight, "_data": {**eight["_data"], "act_mapping_type": {"_data": "SYMMETRIC"}}}
    rules = {
        "model.layers.0.mlp.gate_proj": symmetric,
        r"re:.*layers\.0\..*_proj": eight,
        "model.layers.0.mlp.up_proj": None,
        "_default": four,
    }
    settings = {"_type": "FqnToConfig", "_data": {"fqn_to_config": rules}}
    found = import_quickly("torchao", write(tmp_path / "t.json", settings), model).schemes()
    assert found["model.layers.0.mlp.down_proj"] == "W8:asymA8:token"
    assert found["model.layers.0.mlp.gate_proj"] == "W8:asymA8:token:sym"
    assert found["model.layers.1.mlp.down_proj"] == found["lm_head"] == "W4:g32"
    assert not {"model.layers.0.mlp.up_proj", "model.embed_tokens"} & set(found)
    hosted = {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": four}}}
    found = import_quickly("torchao", write(tmp_path / "t.json", hosted), model).schemes()
    assert set(found.values()) == {"W4:g32"}
    assert len(found) == 14  # transformers leaves the head float


def test_modelopt_entries_override_each_other(model, tmp_path):
    entries = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {"-1": 32}}},
        {"quantizer_name": "*.mlp.[gu]*_proj.*_quantizer", "cfg": {"num_bits": [4, 3], "axis": None}},
        {"quantizer_name": "*lm_head*", "enable": False},
        {"quantizer_name": "*layers.0.mlp*", "enable": False},
        {"quantizer_name": "*layers.0.mlp.up*", "enable": True},  # with what it had
        {"quantizer_name": "*", "parent_class": "nn.BatchNorm1d", "enable": False},
        {"quantizer_name": "*q_proj.*", "parent_class": "nn.Linear", "enable": False},
    ]
    found = import_quickly("modelopt", write(tmp_path / "m.json", {"quant_cfg": entries}), model).schemes()
    assert found["model.layers.1.mlp.up_proj"] == found["model.layers.0.mlp.up_proj"] == "Wfp8_e4m3:tensorAfp8_e4m3"
    assert not [n for n in found if n.endswith("q_proj")]
    assert "model.layers.0.mlp.gate_proj" not in found
    assert found["model.layers.1.mlp.down_proj"] == "W4:g32"
    assert "lm_head" not in found


@pytest.mark.parametrize(
    ("tool", "settings", "match"),
    [
        ("gptqmodel", {}, r"the rule of layer 'model\.layers.*' has no 'bits'"),
        ("gptqmodel", {"bits": "4"}, r"'bits' of the rule of layer 'model\..*' must be a whole number, not '4'"),
        ("gptqmodel", {"bits": 40}, r"the rule of layer 'model\..*: .*int40"),
        ("gptqmodel", {"bits": 4, "dynamic": []}, "'dynamic' of the config must be an object, not "),
        ("gptqmodel", {"bits": 4, "dynamic": {"*up": {}}}, r"'dynamic' has '\*up', which is no regular expression"),
        ("gptqmodel", {"bits": 4, "dynamic": {".*": 8}}, r"'\.\*' in 'dynamic' must be an object, not 8"),
        ("autoround", {"bits": 4, "group_size": "32", "sym": True}, "'group_size' of the entry of layer 'model"),
        ("autoround", {"model.layers.0.mlp.up_proj": 4}, "the entry 'model.layers.0.mlp.up_proj' must be an object"),
        ("compressed-tensors", {"ignore": []}, "the config has no 'config_groups'"),
        ("compressed-tensors", {"config_groups": {"a": {"weights": {"num_bits": 4}}}}, "group 'a' has no 'targets'"),
        (
            "compressed-tensors",
            {"config_groups": {"a": {"targets": ["re:("], "weights": {"num_bits": 4}}}},
            r"the config has '\(', which is no regular expression",
        ),
        ("mlx", {"model_type": "llama", "hidden_size": 64}, "it holds no quantization settings of MLX"),
        ("mlx", {"bits": 4, "group_size": -1}, "group_size must be positive, not -1"),
        ("mlx", {"bits": 4, "group_size": 64, "mode": "mxfp5"}, "the entry of layer 'model.embed_tokens': .*mxfp5"),
        (
            "mlx",
            {"bits": 4, "model.embed_tokens": "8"},
            "the entry of layer 'model.embed_tokens' must be an object, not '8'",
        ),
        (
            "torchao",
            {"_type": "Float8WeightOnlyConfig", "_data": {}},
            "the rule '_default': .* for torchao's Float8W",
        ),
        ("torchao", {"_type": "FqnToConfig"}, "the config has no '_data'"),
        ("modelopt", {"quant_cfg": {}}, "'quant_cfg' of the config must be a list"),
        (
            "modelopt",
            {"quant_cfg": [{"quantizer_name": "*", "cfg": {"num_bits": 11}}]},
            r"the entry of model\..*: mpq has no format",
        ),
        ("json", {"nowhere": {"weight": "int4"}}, "the model has no layer 'nowhere'"),
        ("json", {"lm_head": {"weight": "int4", "activation": "int99"}}, "layer 'lm_head': .*int99"),
    ],
)
def test_wrong_files_are_named_with_the_field(model, tmp_path, tool, settings, match):
    path = write(tmp_path / "wrong.json", settings)
    with pytest.raises(ConfigError, match=rf"wrong\.json: {match}"):
        import_quickly(tool, path, model)


def test_models_of_transformers_need_no_data(model, tmp_path):
    path = write(tmp_path / "q.json", {"bits": 4, "group_size": 32})
    found = mpq.import_config("gptqmodel", path, model, progress=False)
    assert len(found) == 14
    assert found.provenance["estimator"] == "weight_sqnr"


def test_imported_configs_are_compared_and_measured(model, tmp_path):
    first = import_quickly("gptqmodel", write(tmp_path / "a.json", {"bits": 4, "group_size": 32}), model)
    second = import_quickly("gptqmodel", write(tmp_path / "b.json", {"bits": 8, "group_size": 32}), model)
    paths = [str(c.save(tmp_path / f"{i}.bits.json")) for i, c in enumerate((first, second))]
    result = CliRunner().invoke(app, ["compare", *paths])
    assert result.exit_code == 0, result.output
    assert "14 of 14 layers differ" in result.output
    measure = mpq.Evaluator(model, tokens(), progress=False).measure
    kl = [measure(c).kl for c in (first, second)]
    assert kl[0] > kl[1] > 0


def test_import_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "import torch\nfrom llama import tiny_llama, tokens\nmodel = tiny_llama(torch.float32)\nbatches = tokens()\n"
    (tmp_path / "net.py").write_text(code)
    write(tmp_path / "q.json", {"bits": 4, "group_size": 32})
    command = "import q.json --from gptqmodel --model net.py:model --calib net.py:batches --out bits.json"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    assert len(mpq.load("bits.json")) == 14


def test_what_does_not_fit(model, tmp_path):
    path = write(tmp_path / "q.json", {"bits": 4, "group_size": 32})
    with pytest.raises(ExportError, match="unknown importer 'exl2'; known: gptqmodel, autoround"):
        mpq.import_config("exl2", path, model)
    with pytest.raises(ConfigError, match="can't be read"):
        mpq.import_config("mlx", tmp_path / "absent.json", model)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3))
    with pytest.raises(ConfigError, match="quantizes no layer of Sequential"):
        mpq.import_config("gptqmodel", path, net, [torch.zeros(1, 1, 4, 4)])
    with pytest.raises(DataError, match="Sequential has no inputs of its own"):
        mpq.import_config("gptqmodel", path, net)
    with pytest.raises(DataError, match="calib has no batches"):
        mpq.import_config("gptqmodel", path, model, [])
    tied = tiny_llama(torch.float32, tie_word_embeddings=True)
    split = write(tmp_path / "m.json", {"group_size": 32, "bits": 4, "lm_head": False})
    with pytest.raises(ConfigError, match=r"'model.embed_tokens' shares its weight with a layer that stays float"):
        import_quickly("mlx", split, tied)
    halves = write(tmp_path / "m.json", {"group_size": 32, "bits": 4, "lm_head": {"bits": 8}})
    with pytest.raises(ConfigError, match=r"layers model.embed_tokens, lm_head must have one scheme \(tied\)"):
        import_quickly("mlx", halves, tied)
