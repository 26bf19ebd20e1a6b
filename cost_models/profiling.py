"""A device profile from measurements: real kernels of this machine, timed one by one, then a curve fitted to them.

As OHQ (2023) does on its target: what is searched over is measured on the hardware, not on paper. The profile has the
same figures as shipped ones, so it also predicts layers that were not measured.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from mpq._lazy import require
from mpq.cost_models.cpu import layer_times
from mpq.cost_models.devices import Device, Kernel, Memory, check_name, parse_device
from mpq.cost_models.kernels import measurable, measure, shape_key
from mpq.cost_models.roofline import OPS, Shapes
from mpq.cost_models.workload import make_workload
from mpq.errors import DataError
from mpq.layers import LayerSpec
from mpq.problem import Floats
from mpq.quantizers import Scheme
from mpq.warning import warn

SCHEMES = ("W32", "W8A8", "W4:g32")
_PAIRS = {"W32": ("fp32", "fp32"), "W8A8": ("int8", "int8"), "W4:g32": ("fp32", "fp32")}
# Starting points of the fit: numbers of a curve, then those of the device.
_CURVE = {"efficiency": 0.8, "tail": 4.0, "gather": 1e-9, "pack": 1e-10, "output": 1e-10, "overhead": 2e-6}
_FITTED = _CURVE | {"bandwidth": 5e10, "widen": 2e10}
_WEIGHT = 0.003  # of an e-fold away from there, against as much error of one kernel
_SMALLEST = {"efficiency": 1e-3, "tail": 1.0, "gather": 1e-13, "pack": 1e-13, "output": 1e-13, "overhead": 1e-8}


@dataclass(frozen=True)
class Measurement:
    """What one kernel took.

    Attributes:
        layer: The layer.
        scheme: ``W32``, ``W8A8`` or ``W4:g32``.
        seconds: Of one call at batch 1.
    """

    layer: LayerSpec
    scheme: str
    seconds: float


def measure_layers(
    layers: Iterable[LayerSpec],
    schemes: Sequence[str] = SCHEMES,
    seconds: float = 0.25,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Measurement]:
    """Measure every distinct shape among layers under every scheme that has a kernel.

    Args:
        layers: The layers.
        schemes: Some of `SCHEMES`.
        seconds: Spent on each kernel.
        progress: Told the name of each layer before it is measured.
    """
    found = []
    for layer in {shape_key(x): x for x in layers}.values():
        progress(layer.name)
        found += [Measurement(layer, s, measure(layer, s, seconds)) for s in schemes if measurable(layer, s)]
    return found


def save_measurements(measurements: Iterable[Measurement], path: Path) -> None:
    """Write measurements, to fit them again later."""
    path.write_text(json.dumps([asdict(m) for m in measurements]), "utf8")


def load_measurements(path: Path) -> list[Measurement]:
    """Read what `save_measurements` wrote."""
    rows = json.loads(path.read_text("utf8"))
    return [Measurement(_layer(r["layer"]), r["scheme"], r["seconds"]) for r in rows]


def _layer(values: dict[str, Any]) -> LayerSpec:
    frozen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return LayerSpec(**frozen)


def fit_profile(measurements: Sequence[Measurement], name: str = "this_cpu") -> dict[str, Any]:
    """A CPU profile whose predictions come closest to measurements, in log time with outliers damped.

    The vector width is the one of 4, 8 and 16 that fits best. Everything is fitted with the model itself,
    `mpq.cost_models.cpu`.

    Args:
        measurements: At least of one kernel in ``W32``.
        name: Name of the profile.

    Raises:
        DataError: If no ``W32`` kernel was measured.
    """
    if not any(m.scheme == "W32" for m in measurements):
        raise DataError("a profile needs W32 kernels: every other kernel is set against them")
    _, best = min((_Fit(measurements, lanes).solve() for lanes in (4, 8, 16)), key=lambda found: found[0])
    return _profile(best, measurements, name)


class _Fit:
    """Least squares over the figures of a CPU profile."""

    def __init__(self, measurements: Sequence[Measurement], lanes: int) -> None:
        self.schemes = [s for s in SCHEMES if any(m.scheme == s for m in measurements)]
        self.works = [make_workload([m.layer for m in measurements if m.scheme == s]) for s in self.schemes]
        self.times = [np.array([m.seconds for m in measurements if m.scheme == s]) for s in self.schemes]
        self.lanes, self.levels = lanes, caches()
        self.peaks = dict.fromkeys(_PAIRS.values(), 1.0)
        self.keys: list[tuple[Any, str]] = []
        for scheme, work, times in zip(self.schemes, self.works, self.times, strict=True):
            pair = _PAIRS[scheme]
            if scheme == "W4:g32":
                self.keys.append(("widen", scheme))
                continue
            self.peaks[pair] = float((work.macs / times).max())
            self.keys += [((*pair, OPS[i]), f) for i in np.unique(Shapes(work).op) for f in _names(pair, OPS[i])]
        self.keys += [("bandwidth", level.name) for level in self.levels]
        self.start = np.log([_FITTED[owner if isinstance(owner, str) else field] for owner, field in self.keys])

    def solve(self) -> tuple[float, Device]:
        """Cost of the best fit, and the device that has it."""
        low = np.log([_SMALLEST.get(f, 1e7) for _, f in self.keys])
        high = np.array([0.0 if f == "efficiency" else np.inf for _, f in self.keys])
        start = np.clip(self.start, low, high)
        result = least_squares(self.errors, start, bounds=(low, high), loss="soft_l1", f_scale=0.1, max_nfev=30)
        return float(result.cost), self.device(result.x)

    def errors(self, x: Floats) -> Floats:
        """Log of predicted over measured time of every kernel; what they don't determine stays where it starts."""
        device = self.device(x)
        found = [_WEIGHT * (x - self.start)]
        for scheme, work, times in zip(self.schemes, self.works, self.times, strict=True):
            predicted = layer_times(work, [Scheme.parse(scheme)], device).total[:, 0]
            found.append(np.log(predicted / times))
        return np.concatenate(found)

    def device(self, x: Floats) -> Device:
        """The profile with these figures; speeds of outer levels of memory never exceed those of inner ones."""
        values = dict(zip(self.keys, np.exp(x).tolist(), strict=True))
        curves: dict[Any, dict[str, Any]] = {}
        for (owner, field), value in values.items():
            if isinstance(owner, tuple):
                weight, activation, op = owner
                fixed = {"columns": self.lanes, **_padding(owner[:2], op, self.lanes)}
                row = curves.setdefault(owner, {"weight": weight, "activation": activation, "op": op, **fixed})
                row[field] = value
        bandwidths = np.minimum.accumulate([values["bandwidth", level.name] for level in self.levels])
        memory = tuple(Memory(m.name, m.size_bytes, b) for m, b in zip(self.levels, bandwidths.tolist(), strict=True))
        kernels = [Kernel("fp32", "float", self.peaks["fp32", "fp32"])]
        if "W8A8" in self.schemes:
            kernels.append(Kernel("int8", "int8", self.peaks["int8", "int8"]))
        if "W4:g32" in self.schemes:
            kernels.append(Kernel("int4", "float", None, ("fp32", "fp32"), values["widen", "W4:g32"]))
        figures = {"packed_ops": ["matmul"], "curves": list(curves.values())}
        return Device("fit", "cpu", "fit", tuple(kernels), "fp32", memory, figures, {"kernels": "measured"})


def _names(pair: tuple[str, str], op: str) -> list[str]:
    """What is fitted for a curve: only what its kernels do."""
    skipped = {"conv": {"tail"}, "depthwise": {"pack"}, "matmul": {"tail", "gather"}}[op]
    if pair[0] == "fp32":
        skipped |= {"tail"}  # blocked layouts pad channels
    return [f for f in _CURVE if f not in skipped]


def _padding(pair: tuple[str, str], op: str, lanes: int) -> dict[str, int]:
    """What the kernels of onnxruntime pad: float convolutions channels to blocks, int8 products to groups of four."""
    if op == "depthwise":
        return {}
    if pair[0] == "int8":
        return {"depth": 4}
    return {"channels": lanes} if op == "conv" else {}


def caches() -> list[Memory]:
    """Levels of memory of this machine, innermost first, with their sizes; speeds are not known."""
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, size = ((index / f).read_text("utf8").strip() for f in ("type", "size"))
        if kind != "Instruction":
            number = float(size.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(size[-1], 1)
            found.append(Memory(f"l{(index / 'level').read_text('utf8').strip()}", number, 5e10))
    return [*found[1:], Memory("dram", np.inf, 5e10)]  # layers never fit the first level


def _profile(device: Device, measurements: Sequence[Measurement], name: str) -> dict[str, Any]:
    """The JSON of a fitted device."""
    host = f"{platform.processor() or platform.machine()}, {platform.system()}"
    release = f" {version('onnxruntime')}" if find_spec("onnxruntime") else ""
    what = f"{len(measurements)} kernels of onnxruntime{release} on one thread of this machine ({host})"
    error = np.median(
        [abs(p / m.seconds - 1) for p, m in zip(predict(device, measurements), measurements, strict=True)]
    )
    source = f"Fitted to {what}; median error on them {error:.1%}."
    kernels = [
        {k: v for k, v in asdict(kernel).items() if v is not None}
        | ({"runs_as": list(kernel.runs_as)} if kernel.runs_as else {})
        for kernel in device.kernels
    ]
    memory = [{k: v for k, v in asdict(m).items() if v != np.inf} for m in device.memory]
    return {
        "schema": "mpq/device-1",
        "name": name,
        "kind": "cpu",
        "description": f"Measured: {host}, one thread.",
        "float_format": device.float_format,
        "kernels": kernels,
        "memory": memory,
        "figures": device.figures,
        "sources": {"kernels": source, "figures": source, "memory": f"Sizes from the system; speeds: {source}"},
    }


def predict(device: Device, measurements: Sequence[Measurement]) -> list[float]:
    """What a profile says of measured kernels, in seconds."""
    return [
        float(layer_times(make_workload([m.layer]), [Scheme.parse(m.scheme)], device).total[0, 0]) for m in measurements
    ]


def write_profile(profile: dict[str, Any], path: str | Path) -> Device:
    """Check a profile and save it.

    Raises:
        FormatError: If it is not valid; then nothing is written.
    """
    text = json.dumps(profile, indent=2) + "\n"
    device = parse_device(text, str(path))
    Path(path).write_text(text, "utf8")
    return device


def profile_model(
    model: Any,
    data: Any,
    path: str | Path,
    *,
    name: str = "this_cpu",
    seconds: float = 0.25,
    progress: Callable[[str], None] = lambda name: None,
) -> Device:
    """Measure this machine's kernels for every distinct layer of a model and write a profile fitted to them.

    Dilated convolutions are left out with a warning: their shapes don't tell which kernel runs.

    Args:
        model: A torch model.
        data: Batches of calibration data, for the shapes.
        path: Where to write the profile.
        name: Name of the device.
        seconds: Spent on each kernel.
        progress: Told the name of each layer before it is measured.

    Raises:
        MpqError: If the name is no name for a profile, onnxruntime is not installed, or the model has no layer that it
            runs.
    """
    from mpq.calibration import Calibration
    from mpq.trace import trace
    from mpq.view import ModelView

    check_name(name)
    require(("onnx", "onnxruntime"), "profile")
    view = ModelView(model)
    graph = trace(view, Calibration.load(data, view.read, 1).batches[0])
    dilated = {x.name for x in graph if max(getattr(view.layers[x.name], "dilation", (1,))) > 1}
    if dilated:
        warn(f"not measured, as they are dilated: {', '.join(sorted(dilated))}")
    found = measure_layers([x for x in graph if x.name not in dilated], seconds=seconds, progress=progress)
    return write_profile(fit_profile(found, name), Path(path))
