"""End to end: an int8/fp32 ResNet-18 chosen under a latency budget, and what onnxruntime really takes for it.

`python benchmarks/mixed_resnet18.py [--quick]`. The profile is fitted to single layers; what is no layer (additions,
pooling, conversions between the two formats) to random maps that are not scored. No weights are at hand, so the
predicted loss is that of an untrained network: the times do not depend on it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx.helper as h
import onnxruntime as ort
import torch
import torchvision
from onnx import numpy_helper
from scipy.optimize import nnls

import mpq
from mpq.analysis import Analysis
from mpq.cost_models.devices import Device
from mpq.cost_models.latency import latency
from mpq.cost_models.profiling import profile_model

STAGES = [(64, 1), (128, 2), (256, 2), (512, 2)]


class Graph:
    """ResNet-18 in ONNX; layers of ``int8`` have QuantizeLinear and DequantizeLinear around them."""

    def __init__(self, int8: set[str]) -> None:
        self.int8, self.nodes, self.constants = int8, [], []
        self.held: set[str] = set()  # tensors that come out of a DequantizeLinear
        self.rng = np.random.default_rng(0)
        x = self.node("Relu", self.conv("conv1", "x", 64, 3, 7, 2))
        x = self.ready(
            self.node("MaxPool", self.out("conv1", x), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
            "layer1.0.conv1",
        )
        channels = 64
        names = [f"layer{s + 1}.{b}" for s in range(4) for b in range(2)]
        for i, name in enumerate(names):
            width, stride = STAGES[i // 2][0], STAGES[i // 2][1] if i % 2 == 0 else 1
            start = x
            x = self.out(f"{name}.conv1", self.node("Relu", self.conv(f"{name}.conv1", x, width, channels, 3, stride)))
            x = self.out(f"{name}.conv2", self.conv(f"{name}.conv2", x, width, width, 3, 1), zero=128)
            if stride > 1:
                down = f"{name}.downsample.0"
                start = self.out(down, self.conv(down, start, width, channels, 1, stride), zero=128)
            channels = width
            x = self.node("Relu", self.node("Add", x, start))
            x = self.ready(x, f"{names[i + 1]}.conv1" if i < 7 else "fc")
        x = self.ready(self.node("Flatten", self.node("GlobalAveragePool", x)), "fc")
        self.out("fc", self.weighted("fc", "Gemm", x, (1000, 512), transB=1), zero=128, name="y")

    def node(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add an operator; returns its output."""
        name = name or f"t{len(self.nodes)}"
        self.nodes.append(h.make_node(op, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any) -> str:
        """Add a constant; returns its name."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def round_trip(self, x: str, zero: int, name: str = "") -> str:
        """Quantize and dequantize a tensor, unless it already is."""
        if x in self.held:
            return x
        scale, point = self.constant(np.float32(0.05)), self.constant(np.uint8(zero))
        found = self.node("DequantizeLinear", self.node("QuantizeLinear", x, scale, point), scale, point, name=name)
        self.held.add(found)
        return found

    def ready(self, x: str, reader: str) -> str:
        """A tensor as its reader takes it."""
        return self.round_trip(x, 0) if reader in self.int8 else x

    def out(self, layer: str, x: str, zero: int = 0, name: str = "") -> str:
        """A layer's output, in its own format."""
        if layer in self.int8:
            return self.round_trip(x, zero, name)
        return self.node("Identity", x, name=name) if name else x

    def conv(self, name: str, x: str, out: int, channels: int, kernel: int, stride: int) -> str:
        """Add a convolution, padded to keep sizes."""
        shape = out, channels, kernel, kernel
        return self.weighted(name, "Conv", self.ready(x, name), shape, strides=[stride] * 2, pads=[kernel // 2] * 4)

    def weighted(self, name: str, op: str, x: str, shape: tuple[int, ...], **attributes: Any) -> str:
        """Add an operator with a weight and a bias."""
        if name not in self.int8:
            weight = self.constant(self.rng.standard_normal(shape, np.float32) * np.float32(0.02))
            return self.node(op, x, weight, self.constant(np.zeros(shape[0], np.float32)), **attributes)
        scale = self.constant(np.full(shape[0], 1e-3, np.float32))
        codes = self.constant(self.rng.integers(-127, 128, shape, np.int8))
        weight = self.node("DequantizeLinear", codes, scale, self.constant(np.zeros(shape[0], np.int8)), axis=0)
        zeros = self.constant(np.zeros(shape[0], np.int32))
        bias_scale = self.constant(np.full(shape[0], 5e-5, np.float32))
        bias = self.node("DequantizeLinear", zeros, bias_scale, self.constant(np.zeros(shape[0], np.int32)), axis=0)
        return self.node(op, x, weight, bias, **attributes)

    def seconds(self, budget: float) -> float:
        """Measured latency on one thread: its CPU time, which other jobs on the machine add least to.

        The fastest of the runs; one thread that has the machine for itself takes as long by the clock.
        """
        ends = h.make_tensor_value_info("x", 1, [1, 3, 224, 224]), h.make_tensor_value_info("y", 1, [1, 1000])
        graph = h.make_graph(self.nodes, "resnet18", [ends[0]], [ends[1]], self.constants)
        model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = {"x": self.rng.standard_normal((1, 3, 224, 224), np.float32)}
        session.run(None, feed)
        times: list[float] = []
        while len(times) < 20 or sum(times) < budget:
            started = time.thread_time()
            session.run(None, feed)
            times.append(time.thread_time() - started)
        return min(times)


@dataclass
class Model:
    """Latency of maps ``[M, G]`` of whether a group is int8: layers by the profile, the rest by four fitted rates."""

    analysis: Analysis
    layers: np.ndarray[Any, Any]
    edges: list[tuple[int, int, float]]
    rates: np.ndarray[Any, Any]

    def features(self, maps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Elements that turn int8, that turn fp32, whose producer is fp32, and one ``[M, 4]``."""
        into, back, kept = (np.zeros(len(maps)) for _ in range(3))
        for u, v, elements in self.edges:
            into += elements * (~maps[:, u] & maps[:, v])
            back += elements * (maps[:, u] & ~maps[:, v])
            kept += elements * ~maps[:, u]
        return np.stack([into, back, kept, np.ones(len(maps))], 1)

    def of_layers(self, maps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Seconds of the layers alone ``[M]``."""
        return np.where(maps, self.layers[:, 0], self.layers[:, 1]).sum(1)

    def seconds(self, maps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Seconds of everything ``[M]``."""
        found: np.ndarray[Any, Any] = self.of_layers(maps) + self.features(maps) @ self.rates
        return found


def prepare(device: Device) -> Model:
    """Predicted losses and layer times of each group in int8 and fp32, and the edges between groups."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None).eval()
    data = torch.randn(8, 3, 224, 224)
    analysis = mpq.analyze(net, data, "W8A8,W32", device=device, progress=False)
    group = {x.name: i for i, g in enumerate(analysis.space.groups) for x in g.layers}
    flow = analysis.space.graph.dataflow
    sizes = {x.name: float(np.prod(x.input_shape)) for x in analysis.space.graph}
    edges = [(group[u], group[v], sizes[v]) for u, v in flow.edges if group[u] != group[v]]
    return Model(analysis, latency(analysis.space).cost, edges, np.zeros(4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one budget, few random maps, short measurements")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        net = torchvision.models.resnet18(weights=None).eval()
        device = profile_model(
            net, torch.zeros(1, 3, 224, 224), Path(folder) / "p.json", seconds=0.1 if quick else 0.25
        )
    model = prepare(device)
    groups = model.analysis.space.groups
    spent = 0.4 if quick else 1.0

    def measure(chosen: np.ndarray[Any, Any]) -> float:
        return Graph({x.name for g, b in zip(groups, chosen, strict=True) if b for x in g.layers}).seconds(spent)

    rng = np.random.default_rng(0)
    G = len(groups)
    ends = np.array([np.zeros(G, bool), np.ones(G, bool)])
    fitted = np.concatenate([ends, rng.random((6 if quick else 12, G)) < 0.5])
    times = np.array([measure(m) for m in fitted])
    model.rates = nnls(model.features(fitted) / times[:, None], (times - model.of_layers(fitted)) / times)[0]
    print(f"fp32 {times[0] * 1e3:.2f} ms, int8 {times[1] * 1e3:.2f} ms; rates {model.rates}")
    error = np.abs(model.seconds(fitted) / times - 1)
    print(f"on the fitted maps: median error {np.median(error):.1%}, worst {error.max():.1%}")
    results = [
        score(model, measure, share, times, rng, 4 if quick else 5)
        for share in ((0.5,) if quick else (0.35, 0.5, 0.65))
    ]
    goals = {
        "over_budget": {"value": max(r["measured"] / r["budget"] - 1 for r in results), "goal": 0.1},
        "against_fp32": {"value": max(r["measured"] / times[0] for r in results), "goal": 1.0},
        "against_same_size": {"value": max(r["measured"] / r["random_mean"] for r in results), "goal": 1.0},
    }
    for goal in goals.values():
        goal["met"] = bool(goal["value"] <= goal["goal"])
    print(json.dumps({"benchmark": "mixed_resnet18", "results": results, "goals": goals}))


def score(
    model: Model,
    measure: Callable[[Any], float],
    share: float,
    ends: np.ndarray[Any, Any],
    rng: np.random.Generator,
    count: int,
) -> dict[str, float]:
    """Choose under a budget between the two uniform latencies, by looking at all maps; then measure.

    Random maps of the same size (within 2 %) are drawn from all there are.
    """
    analysis, G = model.analysis, len(model.layers)
    maps = (np.arange(2**G)[:, None] >> np.arange(G)) % 2 == 1
    budget = float(ends[1] + share * (ends[0] - ends[1]))
    loss = np.where(maps, analysis.table.loss[:, 0], analysis.table.loss[:, 1]).sum(1)
    predicted = model.seconds(maps)
    best = int(np.where(predicted <= budget, loss, np.inf).argmin())
    size = np.where(maps, analysis.costs["size"].cost[:, 0], analysis.costs["size"].cost[:, 1]).sum(1)
    same = np.flatnonzero(np.abs(size / size[best] - 1) < 0.02)
    drawn = rng.choice(same, min(count, len(same)), replace=False)
    taken, random = measure(maps[best]), np.array([measure(maps[i]) for i in drawn])
    fits = random <= 1.1 * budget
    found = {
        "budget": budget,
        "predicted": float(predicted[best]),
        "measured": taken,
        "int8_groups": int(maps[best].sum()),
        "loss": float(loss[best]),
        "random_mean": float(random.mean()),
        "random_faster": float((random < taken).mean()),
        "random_better": float(((random < taken) & (loss[drawn] < loss[best])).mean()),
        "random_loss_in_budget": float(loss[drawn][fits].min()) if fits.any() else float("inf"),
    }
    print("  ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
    return found


if __name__ == "__main__":
    main()
