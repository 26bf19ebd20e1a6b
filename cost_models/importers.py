"""Tables that other profilers write, as rows of a `table` device.

Each importer returns rows (`mpq/schema/device-1.json`, ``table``); `table_profile` makes a profile of them, which
`mpq.cost_models.profiling.write_profile` checks and saves. What can't be matched to a layer is reported by name, with
its share of the time: pooling and layout changes are no layers, but a latency budget should know of them.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mpq.errors import FormatError
from mpq.layers import LayerSpec
from mpq.warning import warn

Rows = list[dict[str, Any]]
_TVM_FORMATS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "int8", "uint4": "int4"}


def table_profile(name: str, rows: Rows, source: str, *, interpolate: bool = False) -> dict[str, Any]:
    """A profile of kind ``table``.

    Args:
        name: Name of the device.
        rows: From an importer.
        source: Where the times come from.
        interpolate: Take shapes that are not in the table from the nearest one.
    """
    pairs = dict.fromkeys((r["weight"], r["activation"]) for r in rows)
    figures: dict[str, Any] = {"rows": rows} | ({"interpolate": "nearest"} if interpolate else {})
    return {
        "schema": "mpq/device-1",
        "name": name,
        "kind": "table",
        "description": f"{len(rows)} measured times: {source}",
        "kernels": [{"weight": w, "activation": a} for w, a in pairs],
        "figures": figures,
        "sources": {"rows": source},
    }


def from_rows(path: str | Path) -> Rows:
    """A CSV or JSON file whose columns or keys are those of the schema's rows; shapes in CSV as ``64x3x7x7``.

    Raises:
        FormatError: If it can't be read that way.
    """
    path = Path(path)
    text = path.read_text("utf8")
    try:
        found = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
        return [{k: _value(k, v) for k, v in row.items() if v not in ("", None)} for row in found]
    except (ValueError, AttributeError) as error:
        raise FormatError(
            f"{path}: no table of times: {error}; columns are layer or shapes, formats, seconds"
        ) from None


def _value(key: str, value: Any) -> Any:
    if key.endswith("_shape") and isinstance(value, str):
        return [int(n) for n in value.split("x")]
    return {"seconds": float, "batch": int}.get(key, lambda same: same)(value)


def from_bit_table(
    values: ArrayLike,
    layers: Sequence[str],
    *,
    unit: float = 1.0,
    weight_bits: Sequence[int] = range(1, 9),
    activation_bits: Sequence[int] = range(1, 9),
    batch: int = 1,
) -> Rows:
    """A table by layer, weight bits and activation bits, as HAQ has them (Wang et al., 2019).

    Args:
        values: ``[L, weight bits, activation bits]``, such as ``np.load`` of HAQ's lookup table.
        layers: Name of each layer in the model that it will be used on.
        unit: Seconds of one unit of the table, such as one over the clock.
        weight_bits: What the second axis stands for.
        activation_bits: What the third axis stands for.
        batch: Batch size of the measurement.

    Raises:
        FormatError: If the numbers of layers or bits differ from the table's.
    """
    table = np.asarray(values, np.float64)
    expected = len(layers), len(weight_bits), len(activation_bits)
    if table.shape != expected:
        raise FormatError(f"the table has the shape {table.shape}, the layers and bits make {expected}")
    return [
        {
            "layer": layer,
            "weight": f"int{w}",
            "activation": f"int{a}",
            "seconds": float(table[i, j, k]) * unit,
            "batch": batch,
        }
        for i, layer in enumerate(layers)
        for j, w in enumerate(weight_bits)
        for k, a in enumerate(activation_bits)
    ]


def from_trtexec(path: str | Path, layers: Iterable[LayerSpec], weight: str, activation: str, batch: int = 1) -> Rows:
    """Layer times of ``trtexec --exportProfile`` for an engine in one pair of formats.

    Engine layers are named after the ONNX nodes fused in them (``/layer1/layer1.0/conv1/Conv + /layer1/...``).

    Args:
        path: The JSON file.
        layers: Layers of the model.
        weight: Format of the engine's weights, such as ``int8``.
        activation: Format of its activations.
        batch: Batch size of the engine.

    Raises:
        FormatError: If the file is no such profile.
    """
    try:
        times = {e["name"]: e["averageMs"] * 1e-3 for e in json.loads(Path(path).read_text("utf8")) if "name" in e}
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: not written by trtexec --exportProfile: {error}") from None
    known = {_squeezed(layer.name): layer.name for layer in layers}
    return _named_rows(times, {name: _in_engine(name, known) for name in times}, weight, activation, batch)


def from_qnn(path: str | Path, layers: Iterable[LayerSpec], weight: str, activation: str, batch: int = 1) -> Rows:
    """Cycles of each operator in the text of ``qnn-profile-viewer`` at detailed profiling.

    The clock is the accelerator's cycles over its microseconds, both of which the same text holds.

    Args:
        path: The text.
        layers: Layers of the model; an operator belongs to the longest name that it begins with.
        weight: Format of the network's weights.
        activation: Format of its activations.
        batch: Batch size.

    Raises:
        FormatError: If there are no operators, or no totals to get the clock from.
    """
    text = Path(path).read_text("utf8")
    cycles: dict[str, float] = {}
    for name, count in re.findall(r"^\s*(\S+?):OpId_\d+ \(cycles\)\s*:\s*(\d+)", text, re.M):
        cycles[name] = cycles.get(name, 0.0) + float(count)
    total = re.search(r"Accelerator \(execute\) time \(cycles\)\s*:\s*(\d+)", text)
    spent = re.search(r"accelerator \(execute\) time\s*:\s*(\d+) us", text)
    if not cycles or not total or not spent:
        raise FormatError(f"{path}: no operators or no accelerator times; profile with --profiling_level detailed")
    clock = float(total[1]) / (float(spent[1]) * 1e-6)
    known = sorted(((_squeezed(x.name), x.name) for x in layers), key=lambda pair: -len(pair[0]))
    owner = {op: next((name for key, name in known if _squeezed(op).startswith(key)), None) for op in cycles}
    return _named_rows({op: n / clock for op, n in cycles.items()}, owner, weight, activation, batch)


def from_tvm(path: str | Path) -> Rows:
    """Best kernel of each workload in an AutoTVM log (``conv2d`` in NCHW and ``dense``).

    Raises:
        FormatError: If a line is no record of AutoTVM, or none holds a workload that is understood.
    """
    best: dict[str, dict[str, Any]] = {}
    other: set[str] = set()
    for number, line in enumerate(Path(path).read_text("utf8").splitlines(), 1):
        try:
            found = _tvm_record(line)
        except (ValueError, LookupError, TypeError) as error:
            raise FormatError(f"{path}, line {number}: no record of AutoTVM: {error!r}") from None
        if found is None:
            continue
        task, row = found
        if row is None:
            other.add(task)
            continue
        key = json.dumps({k: v for k, v in row.items() if k != "seconds"})
        if key not in best or row["seconds"] < best[key]["seconds"]:
            best[key] = row
    if other:
        warn(f"{path}: left out, no layers in NCHW: {', '.join(sorted(other))}")
    if not best:
        raise FormatError(f"{path}: no conv2d in NCHW and no dense workload in this AutoTVM log")
    return list(best.values())


def _tvm_record(line: str) -> tuple[str, dict[str, Any] | None] | None:
    """Task and row of a line, no row for a workload of another kind; None for a run that failed, or other text."""
    record = json.loads(line) if line.startswith("{") else {}
    if "input" not in record or record["result"][1] != 0:
        return None
    task, args = record["input"][1:3]
    row = _tvm_row(task, args)
    return task, row and row | {"seconds": float(np.mean(record["result"][0]))}


def _tvm_row(task: str, args: list[Any]) -> dict[str, Any] | None:
    """A row without its time; None for a workload of another kind."""
    tensors = [a for a in args if isinstance(a, list) and a and a[0] == "TENSOR"]
    if len(tensors) < 2:
        return None
    (_, data, data_type), (_, weight, weight_type) = tensors[:2]
    formats = {
        "weight": _TVM_FORMATS.get(weight_type, weight_type),
        "activation": _TVM_FORMATS.get(data_type, data_type),
    }
    if task.startswith("dense"):
        shapes = [data[-1]], [weight[0]]
        op = "linear"
    elif "conv2d" in task and "NCHW" in args and "transpose" not in task:
        strides, padding = args[2], args[3]
        sides = [_out(data[2 + i], weight[2 + i], strides[i], _pads(padding, i)) for i in range(2)]
        channels = weight[0] * (weight[1] if task.startswith("depthwise") else 1)
        weight = [channels, 1, *weight[2:]] if task.startswith("depthwise") else weight
        shapes, op = (data[1:], [channels, *sides]), "conv2d"
    else:
        return None
    return {
        "op": op,
        "weight_shape": weight,
        "input_shape": shapes[0],
        "output_shape": shapes[1],
        **formats,
        "batch": data[0],
    }


def _pads(padding: list[int], axis: int) -> int:
    """Both sides of an axis: TVM writes top, left, bottom, right, or one number for both of each axis."""
    return int(padding[axis] + padding[axis + 2] if len(padding) == 4 else 2 * padding[axis])


def _out(size: int, kernel: int, stride: int, pad: int) -> int:
    return int((size + pad - kernel) // stride + 1)


def _in_engine(name: str, known: Mapping[str, str]) -> str | None:
    """The layer whose node is part of an engine layer."""
    for node in name.split(" + "):
        path: list[str] = []
        for part in node.strip("/").split("/")[:-1]:
            if path and part.startswith(f"{path[-1]}."):
                path.pop()
            path.append(part)
        for candidate in (".".join(path), node):
            if _squeezed(candidate) in known:
                return known[_squeezed(candidate)]
    return None


def _squeezed(name: str) -> str:
    """A name as tools rewrite it: one underscore for each run of other signs."""
    return re.sub(r"[^0-9a-z]+", "_", name.lower()).strip("_")


def _named_rows(
    times: Mapping[str, float], owner: Mapping[str, str | None], weight: str, activation: str, batch: int
) -> Rows:
    """One row for each layer; what belongs to none is reported."""
    sums: dict[str, float] = {}
    for name, seconds in times.items():
        layer = owner[name]
        if layer is not None:
            sums[layer] = sums.get(layer, 0.0) + seconds
    outside = [n for n, layer in owner.items() if layer is None and times[n] > 0]
    if outside:
        share = sum(times[n] for n in outside) / sum(times.values())
        more = f" and {len(outside) - 5} more" if len(outside) > 5 else ""
        listed = f"{', '.join(outside[:5])}{more}"
        warn(f"{share:.1%} of the time is in no layer and left out: {listed}")
    found = {n: t for n, t in sums.items() if t > 0}
    if not found:
        raise FormatError("no name in the profile is that of a layer; was it made from another model?")
    return [
        {"layer": n, "weight": weight, "activation": activation, "seconds": t, "batch": batch} for n, t in found.items()
    ]
