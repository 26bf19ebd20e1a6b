"""HAWQ-V3's published figures against mpq's cost models: size, BitOps, and times of single layers on a T4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx as nx
import numpy as np
from fidelity import Row
from hawq_layers import load, network_layers
from scipy.stats import spearmanr

from mpq.cost_models import COST_MODELS, find_device
from mpq.cost_models.latency import layer_times
from mpq.cost_models.workload import make_workload
from mpq.layers import LayerGraph
from mpq.problem import Floats
from mpq.quantizers import Scheme
from mpq.space import make_space

NETWORKS = ("resnet18", "resnet50")
UNIFORM = ("fp32", "uniform8", "uniform4")
# Metric -> cost model, its unit in the table, and the goals for the uniform rows and for the mixed ones.
COLUMNS = {
    "size": ("published_size_mb", 2.0**20, "MiB", 0.01, 0.035),
    "bitops": ("published_bops_g", 1e9, "G", 0.025, 0.035),
}


def at_most(name: str, predicted: str, published: str, score: float, bound: float) -> Row:
    """A row whose score must not exceed a bound."""
    return Row(name, predicted, published, float(score), f"<= {bound:g}", bool(score <= bound))


def at_least(name: str, predicted: str, published: str, score: float, bound: float) -> Row:
    """A row whose score must reach a bound."""
    return Row(name, predicted, published, float(score), f">= {bound:g}", bool(score >= bound))


def published_graph(data: dict[str, Any]) -> LayerGraph:
    """The published layers; pytorchcv's ResNet50 has its strides elsewhere than torchvision's."""
    layers = tuple(network_layers(data))
    return LayerGraph(layers, (), nx.DiGraph(), "hooks", sum(x.macs for x in layers))


def config_costs(data: dict[str, Any], metric: str) -> dict[str, float]:
    """Config name -> what mpq's cost model says of it.

    One scale for each tensor: HAWQ's table counts none.
    """
    options = ["W4:tensorA4", "W8:tensorA8", "W32A32"]
    space = make_space(published_graph(data), options, device=find_device("generic"))
    index = {(s.weight.bits, s.activation.bits): i for i, s in enumerate(space.schemes) if s.activation}
    cost = COST_MODELS[metric](space)
    return {
        name: cost.total([index[pair] for pair in zip(config["weight_bits"], config["input_act_bits"], strict=True)])
        for name, config in data["configs"].items()
    }


def table_columns() -> list[Row]:
    """Size and BitOps of the 24 published configs; each row is the worst of its kind."""
    rows = []
    for network in NETWORKS:
        data = load(f"hawqv3_{network}")
        for metric, (key, unit, label, uniform_goal, mixed_goal) in COLUMNS.items():
            costs = {name: total / unit for name, total in config_costs(data, metric).items()}
            for kind, goal in (("uniform", uniform_goal), ("mixed", mixed_goal)):
                names = [n for n in data["configs"] if (n in UNIFORM) == (kind == "uniform")]
                error = {n: abs(costs[n] / data["configs"][n][key] - 1) for n in names}
                worst = max(names, key=error.__getitem__)
                published = f"{data['configs'][worst][key]:g} {label} ({worst})"
                title = f"HAWQ-V3 {network} {metric}, {len(names)} {kind} rows, worst error"
                rows.append(at_most(title, f"{costs[worst]:.4g} {label}", published, error[worst], goal))
    return rows


def traced_networks() -> list[Row]:
    """Torchvision's networks as mpq traces them against the published arrays."""
    import torch
    import torchvision

    from mpq.trace import trace_model

    rows = []
    for network in NETWORKS:
        graph = trace_model(getattr(torchvision.models, network)().eval(), torch.zeros(1, 3, 224, 224))
        totals = load(f"hawqv3_{network}")["totals"]
        counts = [("parameters", graph.parameters, totals["params_conv_fc"])]
        if network == "resnet18":  # the published ResNet50 has its strides in the 1x1 convolutions
            counts.append(("MACs", graph.macs, totals["macs"]))
        for what, ours, theirs in counts:
            rows.append(at_most(f"{network} traced, {what}", f"{ours:,}", f"{theirs:,}", abs(ours / theirs - 1), 0))
    return rows


def t4_times(data: dict[str, Any]) -> tuple[Floats, Floats]:
    """Predicted seconds and published latencies (unit not stated) ``[layers, (int4, int8)]`` at batch 8."""
    searched = [(x, y) for x, y in zip(network_layers(data), data["layers"], strict=True) if y["ilp_index"] is not None]
    device = find_device("t4:batch=8")
    schemes = [Scheme.parse("W4A4"), Scheme.parse("W8A8")]
    predicted = layer_times(make_workload([x for x, _ in searched], device.setting), schemes, device).total
    return predicted, np.array([[y["t4_latency_int4"], y["t4_latency_int8"]] for _, y in searched])


def t4_latencies() -> list[Row]:
    """Per-layer latencies of HAWQ-V3's integer programs; the profile is fitted on other measurements (tuning logs)."""
    rows = []
    for network, goal in zip(NETWORKS, (0.95, 0.97), strict=True):
        predicted, published = t4_times(load(f"hawqv3_{network}"))
        title = f"T4 {network}, {len(predicted)} layers"
        rank = spearmanr(predicted.ravel(), published.ravel()).statistic
        times = f"{predicted.min() * 1e6:.0f}-{predicted.max() * 1e6:.0f} us"
        theirs = f"{published.min():.3g}-{published.max():.3g}"
        rows.append(at_least(f"{title}, int4 and int8, Spearman", times, theirs, rank, goal))
        ours, real = (x[:, 1] / x[:, 0] for x in (predicted, published))
        span = [f"{x.min():.2f}-{x.max():.2f}" for x in (ours, real)]
        rows.append(at_least(f"{title}, int8/int4 ratio, least", *span, ours.min(), 1.0))
        rows.append(at_most(f"{title}, int8/int4 ratio, largest", *span, ours.max(), 2.1))
        middle = [float(np.median(x)) for x in (ours, real)]
        error = abs(middle[0] / middle[1] - 1)
        rows.append(at_most(f"{title}, median ratio, error", f"{middle[0]:.3f}", f"{middle[1]:.3f}", error, 0.1))
    return rows


COMPARISONS: dict[str, Callable[[], list[Row]]] = {
    "hawq table": table_columns,
    "traced networks": traced_networks,
    "t4 latencies": t4_latencies,
}
SLOW = {"traced networks"}
