"""Fits the curves of the phone profiles to published times: `python benchmarks/phone_profiles.py` rewrites them.

Fitted are four to six numbers of a profile, to times of whole networks; `fidelity_cpu.py` scores on other ones. Peaks
and memory stay what the sources of the profile say.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
from hawq_layers import SHARED
from scipy.optimize import least_squares

from mpq.cost_models.devices import Device, find_device
from mpq.cost_models.latency import layer_times
from mpq.cost_models.workload import Workload, make_workload
from mpq.quantizers import Scheme

REFERENCE = SHARED / "reference"
PROFILES = Path(__file__).parents[1] / "cost_models"
OPS = ("conv", "depthwise", "matmul")
SIZES, WIDTHS = (128, 160, 192, 224), (0.25, 0.5, 0.75, 1.0)
# MobileNet V1 at every other resolution, and one large network; all other rows are left for the score.
FITTED_PIXEL3 = [
    *(f"Mobilenet_V1_{w:.2f}_{s}" if w < 1 else f"Mobilenet_V1_1.0_{s}" for w in WIDTHS for s in SIZES[::2]),
    "Inception_V3",
]


def workloads() -> dict[str, Workload]:
    """Work of each network by its published name."""
    nets = {
        f"Mobilenet_V1_{w:.2f}_{s}" if w < 1 else f"Mobilenet_V1_1.0_{s}": networks.mobilenet_v1(w, s)
        for w in WIDTHS
        for s in SIZES
    }
    nets["Mobilenet_V2_1.0_224"] = networks.mobilenet_v2()
    nets["Inception_V3"], nets["Inception_V4"] = networks.inception_v3(), networks.inception_v4()
    nets["Mobilenet_v1_1_224_SSD"] = networks.mobilenet_v1_ssd()
    for depth, blocks in networks.RESNETS.items():
        nets[f"Resnet_v1_{depth}"] = networks.resnet(blocks, 224)
        nets[f"Resnet_v2_{depth}"] = networks.resnet(blocks, 299)  # TF-Slim evaluates V2 at the larger size
    aliases = {
        "Mobilenet_v1_1_224": "Mobilenet_V1_1.0_224",
        "Mobilenet_v2_1_224": "Mobilenet_V2_1.0_224",
        "Inception_v3": "Inception_V3",
    }
    works = {name: make_workload(net.layers) for name, net in nets.items()}
    return works | {name: works[same] for name, same in aliases.items()}


WORKS = workloads()


def milliseconds(device: Device, network: str, scheme: str) -> float:
    """Predicted time of all layers of a network at batch 1."""
    return float(layer_times(WORKS[network], [Scheme.parse(scheme)], device).total.sum()) * 1e3


def read(name: str) -> Any:
    """A reference file."""
    return json.loads((REFERENCE / name).read_text("utf8"))


def cpu_curves(x: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """Efficiency in fp32 and int8, depthwise relative to it, seconds per output in each, seconds per call."""
    fp32, int8, depthwise, out32, out8, overhead = np.exp(x).tolist()
    rows = [("fp32", fp32, out32, 4), ("int8", int8, out8, 8)]
    return [
        _curve(w, e * (depthwise if op == "depthwise" else 1), op, o, overhead, n) for w, e, o, n in rows for op in OPS
    ]


def dsp_curves(x: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """Efficiency, depthwise relative to it, seconds per output, seconds per call; channels in vectors."""
    dense, depthwise, out, overhead = np.exp(x).tolist()
    shares = {op: dense * (depthwise if op == "depthwise" else 1) for op in OPS}
    return [_curve(f, shares[op], op, out, overhead, n) for f, n in (("int8", 32), ("int16", 16)) for op in OPS]


def _curve(fmt: str, efficiency: float, op: str, output: float, overhead: float, columns: int) -> dict[str, Any]:
    numbers = {"efficiency": efficiency, "output": output, "overhead": overhead}
    return {"weight": fmt, "activation": fmt, "op": op, "columns": columns, **numbers}


def fit(
    device: Device,
    curves: Callable[[Any], list[dict[str, Any]]],
    start: list[float],
    times: list[tuple[str, str, float]],
) -> Device:
    """The device with the curves that come closest to times (network, scheme, ms), in log time.

    Numbers that the times don't determine stay near their starting points: one part in thirty per e-fold.
    """

    def with_curves(x: np.ndarray[Any, Any]) -> Device:
        return replace(device, figures={**device.figures, "curves": curves(x)})

    def errors(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        changed = with_curves(x)
        off = [np.log(milliseconds(changed, network, scheme) / ms) for network, scheme, ms in times]
        return np.array([*off, *(0.03 * (x - np.log(start)))])

    upper = [0.0 if i < 3 else np.inf for i in range(len(start))]
    return with_curves(least_squares(errors, np.log(start), bounds=(-30, upper)).x)


def pixel2_times() -> list[tuple[str, str, float]]:
    """Network, scheme and ms on TensorFlow Lite's own page, which the Pixel 2's profile is fitted to."""
    rows = read("tflite_reference.json")["pixel2_single_big_core"]
    names = {"Mobilenet-v1-1-224": "Mobilenet_v1_1_224", "Mobilenet-v2-1-224": "Mobilenet_v2_1_224"}
    return [
        (names.get(n, n), s, r[k])
        for n, r in rows.items()
        for s, k in (("W32", "ms_fp"), ("W8A8", "ms_qat_int8"))
        if r[k]
    ]


def pixel2_cpu() -> Device:
    """Fitted to TensorFlow Lite's own page, scored on Krishnamoorthi's table of the same phone."""
    start = [0.5, 0.5, 0.5, 1e-9, 1e-9, 1e-5]
    return fit(find_device("pixel2_cpu"), cpu_curves, start, pixel2_times())


def fitted_on_pixel2(network: str) -> bool:
    """Whether TensorFlow Lite's page has the network too, by whatever name."""
    return any(WORKS[network] is WORKS[n] for n, _, _ in pixel2_times())


def pixel3_cpu() -> Device:
    """Fitted to `FITTED_PIXEL3`."""
    rows = read("tflite_reference.json")["pixel3_android10"]["rows"]
    times = [(n, s, rows[n][f]["cpu4_ms"]) for n in FITTED_PIXEL3 for s, f in (("W32", "fp32"), ("W8A8", "int8"))]
    return fit(find_device("pixel3_cpu"), cpu_curves, [0.5, 0.5, 0.5, 1e-9, 1e-9, 1e-5], times)


def pixel3_hvx() -> Device:
    """Fitted to `FITTED_PIXEL3`."""
    rows = read("tflite_reference.json")["pixel3_android10"]["rows"]
    times = [(n, "W8A8", rows[n]["int8"]["nnapi_dsp_ms"]) for n in FITTED_PIXEL3]
    return fit(find_device("pixel3_hvx"), dsp_curves, [0.3, 0.3, 1e-10, 5e-5], times)


def slowed(device: Device, factor: float) -> Device:
    """A device whose every part of a curve takes so many times as long."""
    slower = {"efficiency": 1 / factor, "output": factor, "overhead": factor}
    curves = [{k: v * slower[k] if k in slower else v for k, v in c.items()} for c in device.figures["curves"]]
    return replace(device, figures={**device.figures, "curves": curves})


def pixel2_hvx(network: str = "Mobilenet_v1_1_224") -> Device:
    """The Pixel 3's curves with one rate, fitted to one network on the Pixel 2."""
    base = replace(find_device("pixel2_hvx"), figures=pixel3_hvx().figures)
    published = read("krishnamoorthi_2018.json")["table7_latency_ms"]["rows"][network]["hvx_int8"]
    return slowed(base, published / milliseconds(base, network, "W8A8"))


def fits() -> list[Device]:
    """Every device that is fitted here."""
    larger = replace(find_device("hexagon_690"), figures=pixel3_hvx().figures)
    return [pixel2_cpu(), pixel3_cpu(), pixel3_hvx(), pixel2_hvx(), larger]


def main() -> None:
    for device in fits():
        path = PROFILES / f"{device.name}.json"
        profile = json.loads(path.read_text("utf8"))
        profile["figures"]["curves"] = [
            {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in c.items()}
            for c in device.figures["curves"]
        ]
        path.write_text(json.dumps(profile, indent=2) + "\n", "utf8")
        print(device.name, *device.figures["curves"], sep="\n  ")


if __name__ == "__main__":
    main()
