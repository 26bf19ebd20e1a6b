"""What a tool can't load is refused with the rule and the fix, and a search with ``runtime=`` never yields it."""

from __future__ import annotations

import json
import re
import warnings
from collections import OrderedDict
from dataclasses import replace
from importlib.util import find_spec

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import nn

import mpq
from mpq.analysis import Analysis
from mpq.cost_models.devices import find_device
from mpq.cost_models.registry import COST_MODELS
from mpq.errors import ExportError, FormatError, GraphError, UnreachableError
from mpq.export import RUNTIMES
from mpq.export.check import check
from mpq.layers import LayerGraph, LayerSpec, Outside
from mpq.quantizers import Scheme
from mpq.sensitivity.table import SensitivityTable
from mpq.space import make_space

NAMES = [
    *("W2:g32", "W3", "W4", "W4:g32", "W4:g64", "W4:g128", "W4:g48", "W4:g32:asym", "W5:g32", "W6:g16", "W3:g16", "W8"),
    *("W2:g16:asym", "W8:g32", "W8A8", "W8A8:token", "W4A8", "W8A8:token:sym", "Wnvfp4", "Wmxfp4", "Wnf4", "W16"),
    *("Wfp8_e4m3", "Wfp8_e4m3Afp8_e4m3:token", "W4:g32:p2", "W7:g64", "W4:g32A8:token", "Wternary", "W8:tensor"),
    *("W4:tensor:p2A8:sym:p2", "W6:tensor:p2", "W3:tensor:p2", "W8Aint16", "W4:tensor:asymA8"),
    *("Wfp10_e5m4", "Wfp12_e8m3A8"),
]
ROUTED = {"vllm", "compressed-tensors", "mlx", "gptqmodel", "autoround", "modelopt", "llama.cpp"}
EMBEDDINGS = ("mlx", "llama.cpp", "coreml", "onnx-qdq")
JSON_ONLY = ["vllm", "compressed-tensors", "mlx", "gptqmodel", "autoround", "modelopt", "openvino"]
if find_spec("gguf"):
    JSON_ONLY.append("llama.cpp")


def spec(name, op, shape, storage, source):
    size = shape[0] * shape[1]
    return LayerSpec(name, op, shape, shape, (8, shape[1]), (8, shape[0]), 8 * size, size, 1, storage, source)


def llama_like(features, mlp, keys, tied, experts):
    """One block of a Llama, with a mixture of experts if there are any."""
    names = ["model.embed_tokens"]
    shapes = {"model.embed_tokens": (96, features)}
    sources = {"model.embed_tokens": None}
    block = "model.layers.0"
    attention = {"q_proj": (features, features), "k_proj": (keys, features), "v_proj": (keys, features)}
    parts = {f"{block}.self_attn.{k}": (s, 1) for k, s in attention.items()}
    parts[f"{block}.self_attn.o_proj"] = ((features, features), 2)
    if experts:
        parts[f"{block}.mlp.gate"] = ((64, features), 3)
    for e in range(max(experts, 1)):
        where = f"{block}.mlp.experts.{e}" if experts else f"{block}.mlp"
        parts[f"{where}.gate_proj"] = ((mlp, features), 3)
        parts[f"{where}.up_proj"] = ((mlp, features), 3)
        parts[f"{where}.down_proj"] = ((features, mlp), 10 + e)
    parts["lm_head"] = ((96, features), 5)
    for name, (shape, source) in parts.items():
        names.append(name)
        shapes[name], sources[name] = shape, source
    storages = {name: i for i, name in enumerate(names)}
    if tied:
        storages["lm_head"] = storages["model.embed_tokens"]
    layers = tuple(
        spec(n, "embedding" if "embed" in n else "linear", shapes[n], storages[n], sources[n]) for n in names
    )
    flow = nx.DiGraph()
    nx.add_path(flow, names)
    return LayerGraph(layers, (), flow, "hooks", sum(x.macs for x in layers))


@st.composite
def searches(draw, runtime):
    loaded = [n for n in NAMES if runtime.supports(Scheme.parse(n))]
    graph = llama_like(
        draw(st.sampled_from([64, 96, 128, 256])),
        draw(st.sampled_from([128, 200, 256])),
        draw(st.sampled_from([32, 64])),
        draw(st.booleans()),
        draw(st.sampled_from([0, 0, 2])),
    )
    schemes = draw(st.lists(st.sampled_from(loaded), min_size=2, max_size=5, unique=True))
    schemes += draw(st.lists(st.sampled_from([n for n in NAMES if n not in loaded]), max_size=2, unique=True))
    skip = draw(st.lists(st.sampled_from([x.name for x in graph]), max_size=2, unique=True))
    pin = draw(st.dictionaries(st.sampled_from([x.name for x in graph]), st.sampled_from(loaded), max_size=1))
    return graph, [Scheme.parse(s) for s in schemes], skip, pin, draw(st.integers(0, 2**32 - 1))


def analysed(graph, schemes, skip, runtime, seed, pin=None):
    """An analysis with random losses."""
    space = make_space(graph, schemes, pin=pin, skip=skip, device=find_device("generic"), runtime=runtime)
    loss = np.random.default_rng(seed).random(space.allowed.shape)
    names = tuple(g.name for g in space.groups), tuple(map(str, space.schemes))
    ranges = {(x.name, str(s)): (-1.0, 1.0) for x in space.layers for s in space.schemes if _calibrated(s)}
    table = SensitivityTable(*names, loss, np.zeros_like(loss))
    return Analysis(space, table, {m: COST_MODELS[m](space) for m in ("size",)}, ranges, {})


def _calibrated(scheme):
    return scheme.activation is not None and scheme.activation.calibrated


@pytest.mark.parametrize("name", sorted(RUNTIMES))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from([10, 20, 30, 50, 80]))
def test_whatever_a_search_finds_is_loaded(name, tmp_path, data, share):
    graph, schemes, skip, pin, seed = data.draw(searches(RUNTIMES[name]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            analysis = analysed(graph, schemes, skip, RUNTIMES[name], seed, pin)
            config = analysis.allocate(f"size<={share}%")
        except (FormatError, GraphError, UnreachableError):
            reject()  # no layer that the tool loads, not this one as it is pinned, or nothing that small
    check(config, RUNTIMES[name])
    _check_by_hand(name, graph, config)
    if name in JSON_ONLY:
        options = {"architecture": "llama"} if name == "llama.cpp" else {}
        exported = mpq.export(config, name, tmp_path / "exported", **options)
        assert [n for n, (status, _) in exported.layers.items() if status != "left float"] == list(config)


def _check_by_hand(name, graph, config):
    """The rules again, by other means than those of the search and the exporters."""
    together = [[x.name for x in graph if x.storage == storage] for storage in {x.storage for x in graph}]
    for members in together:  # layers with one weight
        assert len({config[n].weight if n in config else None for n in members}) == 1
    if name == "vllm":
        ends = [("q_proj", "k_proj", "v_proj"), ("mlp.gate_proj", "mlp.up_proj")]
        together = [[x.name for x in graph if x.name.endswith(e)] for e in ends]
        together.append([x.name for x in graph if ".experts." in x.name])
        for members in together:  # layers that are loaded as one
            assert len({str(config[n].scheme) if n in config else None for n in members}) <= 1
    if name in ("mlx", "llama.cpp"):
        for part in ("gate_proj", "up_proj", "down_proj"):
            experts = [x.name for x in graph if ".experts." in x.name and x.name.endswith(part)]
            assert len({str(config[n].scheme) if n in config else None for n in experts}) <= 1
    if name in ROUTED:
        assert not [n for n in config if n.endswith("mlp.gate")]
    for choice in config.values():
        size = choice.weight.group_size
        assert size is None or name == "onnx-matmulnbits" or choice.weight_shape[1] % size == 0
        assert choice.op == "linear" or name in EMBEDDINGS


def legal_config(runtime):
    """A config for a runtime of a block with two experts."""
    schemes = [s for s in map(Scheme.parse, NAMES) if runtime.supports(s)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return analysed(llama_like(256, 256, 64, True, 2), schemes, [], runtime, 0).allocate("size<=60%")


@pytest.fixture(params=sorted(RUNTIMES))
def legal(request):
    """A runtime and a config for it."""
    runtime = RUNTIMES[request.param]
    return runtime, legal_config(runtime)


def changed(config, name, **fields):
    return replace(config, layers={**config.layers, name: replace(config[name], **fields)})


def refused(config, runtime, match, **options):
    with pytest.raises(ExportError, match=match):
        check(config, runtime, **options)


UP = "model.layers.0.mlp.experts.1.up_proj"


def test_pairs_that_a_tool_has_not_are_refused(legal):
    runtime, config = legal
    scheme = next(s for s in map(Scheme.parse, NAMES) if not runtime.supports(s))
    refused(
        changed(config, UP, scheme=scheme),
        runtime,
        re.escape(f"layer {UP!r} has {scheme}, but {runtime.name} has no {scheme}; choose one that it loads, such as ")
        + rf".*, or allocate with runtime='{re.escape(runtime.name)}'",
    )


def test_where_inputs_alone_are_in_the_way_the_scheme_without_them_is_named_first():
    runtime = RUNTIMES["mlx"]
    config = changed(legal_config(runtime), UP, scheme=Scheme.parse("W4:g32:weighted:gptqA16"))
    refused(config, runtime, "mlx has no W4:g32:weighted:gptqA16; .* such as W4:g32:weighted:gptq, ")


@pytest.mark.parametrize("name", sorted(RUNTIMES.keys() - {"hls4ml", "onnx-matmulnbits"}))
def test_groups_that_do_not_divide_are_refused(name):
    runtime = RUNTIMES[name]
    grouped = [s for s in map(Scheme.parse, NAMES) if runtime.supports(s) and s.weight.group_size in (32, 64)]
    refused(
        changed(legal_config(runtime), UP, scheme=grouped[0], weight_shape=(256, 264)),
        runtime,
        rf"layer '{UP}' has .*needs groups that divide the 264 input features; \d+ does not: choose another size",
    )


def test_one_runtime_has_no_groups():
    runtime = RUNTIMES["hls4ml"]
    refused(changed(legal_config(runtime), UP, scheme=Scheme.parse("W4:g32")), runtime, "hls4ml has no W4:g32")


def test_one_runtime_fills_up_its_last_group():
    runtime = RUNTIMES["onnx-matmulnbits"]
    check(changed(legal_config(runtime), UP, scheme=Scheme.parse("W4:g32"), weight_shape=(256, 264)), runtime)


def test_tied_heads_are_not_split(legal):
    runtime, config = legal
    model = nn.Module()
    for name in {*config, "lm_head", "model.embed_tokens"}:
        parent = model
        *path, last = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(1, 1, bias=False))
    model.lm_head.weight = model.model.embed_tokens.weight
    check(config, runtime, model)
    head = replace(config[UP], weight_shape=(96, 256))
    layers = {n: c for n, c in config.layers.items() if n != "model.embed_tokens"}
    for known in (model, None):  # a config remembers which layers were tied
        refused(
            replace(config, layers={**layers, "lm_head": head}),
            runtime,
            "layers lm_head are quantized and model.embed_tokens not, but they share one weight; a tied head can't be "
            "split: skip both, or untie them",
            model=known,
        )


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.mlp.experts.1.gate_proj",
        "model.layers.0.mlp.experts.0.down_proj",  # of vLLM's mixtures all projections are one
    ],
)
def test_fused_layers_and_experts_are_not_split(name):
    runtime = RUNTIMES["vllm"]
    schemes = [Scheme.parse("W4:g32"), Scheme.parse("W8")]
    config = analysed(llama_like(256, 256, 64, False, 2), schemes, ["*embed*"], runtime, 0).allocate("size<=60%")
    check(config, runtime)
    other = next(s for s in schemes if s != config[name].scheme)
    fix = r"must have one scheme because vllm loads them as one tensor, not .*; allocate with runtime=.*groups=\["
    refused(changed(config, name, scheme=other), runtime, f"{name}.*{fix}")
    apart = replace(config, layers={n: c for n, c in config.layers.items() if n != name})
    apart = replace(apart, outside=(*apart.outside, Outside(name, 1, 1, 1, "skipped by the user", "skipped")))
    refused(
        apart, runtime, f"are quantized and {name} not, but vllm loads them as one tensor; skip all of them or none"
    )


@pytest.mark.parametrize("name", ["mlx", "llama.cpp"])
def test_experts_are_stacked_by_projection(name):
    runtime = RUNTIMES[name]
    config = legal_config(runtime)
    block = "model.layers.0.mlp.experts"
    assert runtime.fused_sets(config) == [[f"{block}.{e}.{p}_proj" for e in (0, 1)] for p in ("gate", "up", "down")]
    other = next(s for s in map(Scheme.parse, NAMES) if runtime.supports(s) and s != config[UP].scheme)
    refused(changed(config, UP, scheme=other), runtime, f"{UP} must have one scheme because {name} loads them as one")


@pytest.mark.parametrize("name", sorted(ROUTED))
def test_routers_stay_float(name):
    runtime = RUNTIMES[name]
    config = legal_config(runtime)
    gate = "model.layers.0.mlp.gate"
    assert gate not in config
    assert next(o for o in config.outside if o.name == gate)
    quantized = replace(config, layers={**config.layers, gate: config[UP]})
    refused(quantized, runtime, f"{name} leaves layer '{gate}' float, being a router; skip it, or allocate with")


def test_a_search_leaves_routers_float(tmp_path):
    model = nn.Sequential(OrderedDict(mlp=nn.Sequential(OrderedDict(gate=nn.Linear(64, 64), up=nn.Linear(64, 64)))))
    options = {"estimator": "weight_sqnr", "progress": False}
    why = r"1 layers \(50% of the parameters\) stay float, such as 'mlp.gate': .*, being a router"
    with pytest.warns(UserWarning, match=why):
        analysis = mpq.analyze(model, [torch.randn(4, 64)], "W4,W8", runtime="vllm", **options)
    assert [x.name for x in analysis.space.layers] == ["mlp.up"]
    found = mpq.export(analysis.allocate("avg_bits<=8"), "vllm", tmp_path / "x")
    assert found.layers["mlp.gate"] == ("left float", "vllm leaves it float, being a router")
    assert json.loads(found.path.read_text())["quantization_config"]["ignore"] == ["mlp.gate"]
    assert len(mpq.analyze(model, [torch.randn(4, 64)], "W4,W8", runtime="torchao", **options).space.layers) == 2


def test_layers_outside_of_blocks_are_not_gptqmodels():
    gptqmodel = RUNTIMES["gptqmodel"]
    names = ["model.layers.0.mlp.up_proj", "model.score", "multi_modal_projector.linear_1", "lm_head"]
    assert list(gptqmodel.stay_float(names)) == names[1:3]
    config = legal_config(gptqmodel)
    why = "gptqmodel leaves layer 'model.score' float, being in none of the model's numbered blocks"
    refused(replace(config, layers={**config.layers, "model.score": config[UP]}), gptqmodel, why)


@pytest.mark.parametrize("name", ["mlp.gate", "layers.0.block_sparse_moe.gate", "router", "a.feed_forward.router"])
def test_names_of_routers(name):
    assert RUNTIMES["vllm"].stay_float([name, "mlp.gate_proj", "mlp.gate.up", "router.proj"]) == {name: "a router"}


def test_groups_of_convolutions_are_not_modelopts():
    """Ours go over all inputs of a channel, ModelOpt's over the last axis, which is a kernel's width."""
    modelopt = RUNTIMES["modelopt"]
    for scheme in ("W4:g32", "Wnvfp4", "Wmxfp4"):
        assert "modelopt has no groups in conv2d layers" in modelopt.refusal(
            "conv2d", (64, 64, 3, 3), Scheme.parse(scheme)
        )
        assert modelopt.refusal("linear", (64, 64), Scheme.parse(scheme)) is None
    assert modelopt.refusal("conv2d", (64, 64, 3, 3), Scheme.parse("W4")) is None


def test_latent_attention_is_fused_too():
    names = [f"model.layers.0.self_attn.{n}" for n in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")]
    assert RUNTIMES["vllm"].fused_sets(names) == [[names[0], names[2]]]


@pytest.mark.parametrize("name", sorted(RUNTIMES))
def test_searches_are_not_empty(name):
    """The property would hold for searches that find nothing."""
    graph = llama_like(256, 256, 64, False, 0)
    schemes = [s for s in map(Scheme.parse, NAMES) if RUNTIMES[name].supports(s)]
    assert len(schemes) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        config = analysed(graph, schemes, [], RUNTIMES[name], 0).allocate("size<=60%")
    assert len({str(c.scheme) for c in config.values()}) > 1
