"""End to end: an int8/fp32 ResNet-18 that mpq chooses under a latency budget, and what onnxruntime takes for it.

`python benchmarks/mixed_resnet18.py [--quick]`. The profile is the one of `mpq profile`, fitted to single layers; no
run of a whole network goes into a prediction. No weights are at hand, so the predicted loss is that of an untrained
network: the times do not depend on it. Goals are about CPU time; the time by the clock, which other jobs on the machine
lengthen, is printed too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx.helper as h
import onnxruntime as ort
import torch
import torchvision
from onnx import numpy_helper

import mpq
from mpq.analysis import Analysis
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

    def seconds(self, budget: float) -> Run:
        """Latency on one thread."""
        ends = h.make_tensor_value_info("x", 1, [1, 3, 224, 224]), h.make_tensor_value_info("y", 1, [1, 1000])
        graph = h.make_graph(self.nodes, "resnet18", [ends[0]], [ends[1]], self.constants)
        model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = {"x": self.rng.standard_normal((1, 3, 224, 224), np.float32)}
        session.run(None, feed)
        busy: list[float] = []
        wall: list[float] = []
        while len(busy) < 20 or sum(busy) < budget:
            started = time.thread_time(), time.perf_counter()
            session.run(None, feed)
            busy.append(time.thread_time() - started[0])
            wall.append(time.perf_counter() - started[1])
        return Run(min(busy), float(np.median(wall)))


class Run(NamedTuple):
    """What runs of a network took.

    Attributes:
        cpu: Least CPU time, which other jobs on the machine add least to: an idle machine takes as long by the clock.
        wall: Median time by the clock.
    """

    cpu: float
    wall: float


def measure(analysis: Analysis, int8: Any, spent: float) -> Run:
    """Latency of a map ``[G]`` of whether a group is int8."""
    groups = analysis.space.groups
    return Graph({x.name for g, b in zip(groups, int8, strict=True) if b for x in g.layers}).seconds(spent)


def prepare(seconds: float) -> Analysis:
    """Predicted losses of the network, on a profile fitted to its layers on this machine."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None).eval()
    with tempfile.TemporaryDirectory() as folder:
        device = profile_model(net, torch.zeros(1, 3, 224, 224), Path(folder) / "p.json", seconds=seconds)
    data = torch.randn(4, 3, 224, 224)
    return mpq.analyze(net, data, "W8A8,W32", estimator="influence", progress=False).on(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one budget, few random maps, short measurements")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    analysis = prepare(0.1 if quick else 0.25)
    G, spent = len(analysis.space.groups), 0.4 if quick else 1.0
    fp32, int8 = (measure(analysis, np.full(G, b), spent) for b in (False, True))
    predicted = [analysis.uniform(s).metrics["latency"]["value"] for s in ("W32", "W8A8")]
    for name, run, told in (("fp32", fp32, predicted[0]), ("int8", int8, predicted[1])):
        print(f"{name} {run.cpu * 1e3:.2f} ms, by the clock {run.wall * 1e3:.2f} ms, predicted {told * 1e3:.2f} ms")
    shares = (0.5,) if quick else (0.35, 0.5, 0.65)
    budgets = [int8.cpu + share * (fp32.cpu - int8.cpu) for share in shares]
    results = [score(analysis, b, spent, 4 if quick else 5) for b in budgets]
    goals = {
        "over_budget": {"value": max(r["cpu"] / r["budget"] - 1 for r in results), "goal": 0.1},
        "against_fp32": {"value": max(r["cpu"] / fp32.cpu for r in results), "goal": 1.0},
        "against_same_size": {"value": max(r["cpu"] / r["random_cpu"] for r in results), "goal": 1.0},
    }
    for goal in goals.values():
        goal["met"] = bool(goal["value"] <= goal["goal"])
    uniform = {"fp32": fp32._asdict(), "int8": int8._asdict()}
    print(json.dumps({"benchmark": "mixed_resnet18", "uniform": uniform, "results": results, "goals": goals}))


def score(analysis: Analysis, budget: float, spent: float, count: int) -> dict[str, float]:
    """Let mpq choose under a budget, and measure what it chose and random maps of the same size (within 2 %)."""
    solution = analysis.solve(analysis.parse(f"latency<={budget * 1e6:.6f}us"))
    pick, G = solution.pick, len(analysis.space.groups)
    narrow = [str(s) for s in analysis.space.schemes].index("W8A8")
    size = analysis.cost("size")
    rng = np.random.default_rng(0)
    drawn = [p for p in rng.integers(0, 2, (20_000, G)) if abs(size.total(p) / size.total(pick) - 1) < 0.02][:count]
    taken = measure(analysis, pick == narrow, spent)
    random = np.array([measure(analysis, p == narrow, spent) for p in drawn])
    loss = analysis.table.predict_all(np.array(drawn))
    found = {
        "budget": budget,
        "predicted": analysis.cost("latency").total(pick),
        **taken._asdict(),
        "int8_groups": int((pick == narrow).sum()),
        "loss": analysis.table.predict(pick),
        "random_cpu": float(random[:, 0].mean()),
        "random_wall": float(random[:, 1].mean()),
        "random_faster": float((random[:, 0] < taken.cpu).mean()),
        "random_better": float(((random[:, 0] < taken.cpu) & (loss < analysis.table.predict(pick))).mean()),
    }
    print("  ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
    return found


if __name__ == "__main__":
    main()
