"""Efficiency figures of the T4's profile, fitted on HAWQ-V3's tuning logs and on nothing else.

    python benchmarks/fit_gpu.py

Two achieved shares of the peak, the share of the memory's bandwidth, the seconds of a launch and of the chain of sums
are fitted to the 74 best TVM kernel times (batch 8, int4 and int8) in ``../shared/reference``. The loss is the mean
absolute log error of the times, each kernel weighed by how often its network runs it, plus that of each network's median
gain of int4 over int8: which format to choose depends on that gain. Kernels of the logs do not requantize. Prints the
figures for ``cost_models/t4.json``; the last line is JSON.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import minimize

from hawq_layers import SHARED, convolution, linear, load
from mpq.cost_models.devices import Device, find_device
from mpq.cost_models.gpu import layer_times
from mpq.cost_models.workload import Workload, make_workload
from mpq.layers import LayerSpec
from mpq.problem import Floats
from mpq.quantizers.formats import Scheme

BATCH = 8
SCHEMES = (Scheme.parse("W4A4"), Scheme.parse("W8A8"))
START = {"int4": 0.11, "int8": 0.11, "memory_efficiency": 0.7, "chain": 3e-9, "launch": 2e-6}


@dataclass(frozen=True)
class Logs:
    """Measured kernels: ``seconds[i]`` of layer ``layer[i]`` in format ``scheme[i]``, which runs ``often[i]`` times."""

    work: Workload
    layer: np.ndarray
    scheme: np.ndarray
    network: np.ndarray
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
            rows.append((index, bits, network, kernel["measured_ms"] * 1e-3, max(often[key], 1)))
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
    return replace(device, figures=figures | {k: v for k, v in values.items() if k not in ("int4", "int8")})


def weighted_median(values: Floats, weights: Floats) -> float:
    """The value below which half of the weight lies."""
    order = np.argsort(values)
    return float(values[order][np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)])


def gains(logs: Logs, seconds: Floats) -> dict[str, float]:
    """Median gain of int4 over int8 of each network's layers."""
    found = {}
    for network in np.unique(logs.network):
        here = np.flatnonzero(logs.network == network)
        time = {(logs.layer[i], logs.scheme[i]): seconds[i] for i in here}
        pairs = [i for i in here if logs.scheme[i] == 0 and (logs.layer[i], 1) in time]
        ratios = np.array([time[logs.layer[i], 1] / time[logs.layer[i], 0] for i in pairs])
        found[str(network)] = weighted_median(ratios, logs.often[pairs])
    return found


def errors(logs: Logs, device: Device) -> tuple[float, float]:
    """Weighed mean of ``|log error|`` of the times, and mean of that of the gains."""
    predicted = layer_times(logs.work, SCHEMES, device).total[logs.layer, logs.scheme]
    times = np.abs(np.log(predicted / logs.seconds))
    real, model = gains(logs, logs.seconds), gains(logs, predicted)
    gain = float(np.mean([abs(math.log(model[n] / real[n])) for n in real]))
    return float(np.average(times, weights=logs.often)), gain


def fit(logs: Logs) -> dict[str, float]:
    """The figures with the least loss (Nelder-Mead on their logarithms, restarted)."""
    raw = find_device("t4").at(batch=BATCH)
    raw = replace(raw, figures=raw.figures | {"requantize": math.inf})

    def loss(z: Floats) -> float:
        values = dict(zip(START, np.exp(z).tolist(), strict=True))
        return sum(errors(logs, with_figures(raw, values)))

    best = np.log(list(START.values()))
    for _ in range(3):
        best = minimize(loss, best, method="Nelder-Mead", options={"maxiter": 600, "xatol": 1e-3, "fatol": 1e-6}).x
    return {name: float(f"{value:.3g}") for name, value in zip(START, np.exp(best), strict=True)}


def main() -> None:
    if not (SHARED / "reference").exists():
        raise SystemExit("needs the reference figures in ../shared")
    logs = read_logs()
    values = fit(logs)
    raw = find_device("t4").at(batch=BATCH)
    raw = replace(raw, figures=raw.figures | {"requantize": math.inf})
    times, gain = errors(logs, with_figures(raw, values))
    for name, value in values.items():
        print(f"{name:<20}{value:>12.4g}")
    print(f"{len(logs.seconds)} kernels: mean |log error| of times {times:.3f}, of the median gain {gain:.3f}")
    print(json.dumps({"benchmark": "fit_gpu", "figures": values, "time_error": times, "gain_error": gain}))


if __name__ == "__main__":
    main()
