"""Figures of the T4's profile that can't be looked up, fitted on HAWQ-V3's tuning logs and on nothing else.

    python benchmarks/fit_gpu.py

Achieved shares of the peaks and of the memory's bandwidth, bandwidth of the cache, and seconds of a launch and of the
chain of sums, fitted to the 74 best TVM kernel times (batch 8, int4 and int8) in ``../shared/reference``. The loss is
the mean absolute log error, each kernel weighed by how often its network runs it. Kernels of the logs do not
requantize. Prints the figures for ``cost_models/t4.json``; the last line is JSON.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hawq_layers import SHARED, convolution, linear, load
from scipy.optimize import minimize

from mpq.cost_models.devices import Device, find_device
from mpq.cost_models.gpu import layer_times, levels
from mpq.cost_models.workload import Workload, make_workload
from mpq.layers import LayerSpec
from mpq.problem import Floats
from mpq.quantizers import Scheme

BATCH = 8
SCHEMES = (Scheme.parse("W4A4"), Scheme.parse("W8A8"))
START = {"int4": 0.11, "int8": 0.11, "memory_efficiency": 0.7, "chain": 3e-9, "launch": 2e-6, "l2": 8e11}


@dataclass(frozen=True)
class Logs:
    """Measured kernels: ``seconds[i]`` of layer ``layer[i]`` in format ``scheme[i]``, which runs ``often[i]`` times."""

    work: Workload
    layer: np.ndarray
    scheme: np.ndarray
    seconds: Floats
    often: Floats


def read_logs() -> Logs:
    """The 74 kernels, and how often each runs in the network that it was tuned for."""
    layers: list[LayerSpec] = []
    rows: list[tuple[Any, ...]] = []
    for network, kernels in load("hawqv3_t4_tuning_logs")["kernels"].items():
        data = load(f"hawqv3_{network}")["layers"]
        often = Counter((x["in_ch"], x["out_ch"], x["kernel"], x["stride"], x["out_hw"]) for x in data)
        for kernel in kernels:
            layer, key = _layer(kernel)
            same = [i for i, x in enumerate(layers) if x == layer]
            layers += [] if same else [layer]
            index = same[0] if same else len(layers) - 1
            bits = 0 if kernel["kernel_dtype"] == "int4" else 1
            # Logs also hold strided 3x3 variants that the network does not run: they count once.
            rows.append((index, bits, kernel["measured_ms"] * 1e-3, max(often[key], 1)))
    work = make_workload(layers, find_device("t4").at(batch=BATCH).setting)
    return Logs(work, *(np.array(column) for column in zip(*rows, strict=True)))


def _layer(kernel: Mapping[str, Any]) -> tuple[LayerSpec, tuple[int, ...]]:
    if kernel["task"].startswith("dense"):
        outputs, inputs = kernel["kernel_shape"]
        return linear("fc", inputs, outputs), (inputs, outputs, 1, 1, 1)
    size, _, outputs, inputs = kernel["kernel_shape"]
    stride, out = kernel["stride"][0], kernel["out_hw"]
    return convolution("conv", inputs, outputs, size, stride, out * stride, out), (inputs, outputs, size, stride, out)


def with_figures(device: Device, values: Mapping[str, float]) -> Device:
    """The device with other fitted figures."""
    figures = dict(device.figures)
    figures["efficiency"] = figures["efficiency"] | {k: values[k] for k in ("int4", "int8")}
    figures |= {k: values[k] for k in ("memory_efficiency", "chain", "launch")}
    cache, main_memory = levels(device)
    return replace(device, figures=figures, memory=(replace(cache, bandwidth=values["l2"]), main_memory))


def without_requantization(device: Device) -> Device:
    """The device as the kernels of the logs use it: they write plain sums."""
    return replace(device, figures={**device.figures, "requantize": math.inf})


def error(logs: Logs, device: Device) -> float:
    """Mean of ``|log(predicted / measured)|``, weighed."""
    predicted = layer_times(logs.work, SCHEMES, device).total[logs.layer, logs.scheme]
    return float(np.average(np.abs(np.log(predicted / logs.seconds)), weights=logs.often))


def fit(logs: Logs, device: Device) -> dict[str, float]:
    """The figures with the least loss (Nelder-Mead on their logarithms, restarted)."""

    def loss(z: Floats) -> float:
        return error(logs, with_figures(device, dict(zip(START, np.exp(z).tolist(), strict=True))))

    found = []
    for cache in (5e11, 8e11, 1.2e12):
        best = np.log(list((START | {"l2": cache}).values()))
        for _ in range(2):
            options = {"maxiter": 500, "xatol": 1e-3, "fatol": 1e-6}
            result = minimize(loss, best, method="Nelder-Mead", options=options)
            best = result.x
        found.append((result.fun, best))
    best = min(found, key=lambda pair: pair[0])[1]
    return {name: float(f"{value:.4g}") for name, value in zip(START, np.exp(best), strict=True)}


def main() -> None:
    if not (SHARED / "reference").exists():
        raise SystemExit("needs the reference figures in ../shared")
    logs = read_logs()
    device = without_requantization(find_device(f"t4:batch={BATCH}"))
    values = fit(logs, device)
    fitted, shipped = error(logs, with_figures(device, values)), error(logs, device)
    for name, value in values.items():
        print(f"{name:<20}{value:>12.5g}")
    print(f"{len(logs.seconds)} kernels: mean |log error| {fitted:.4f}; with the shipped profile {shipped:.4f}")
    print(json.dumps({"benchmark": "fit_gpu", "figures": values, "error": fitted, "shipped_error": shipped}))


if __name__ == "__main__":
    main()
