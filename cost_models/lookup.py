"""Latency by a measured table: what others timed, looked up by layer name or by shape. Nothing is guessed.

A layer that is not in the table is an error that names it. A profile that says ``"interpolate": "nearest"`` takes, for
such a layer, the nearest shape of the same operator and formats instead, scaled by multiply-accumulates: crude, but
what a table of a few dozen kernels can say about another network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpq.cost_models.devices import Device, base_name
from mpq.cost_models.latency import LayerTimes
from mpq.cost_models.workload import Workload, make_workload
from mpq.errors import BudgetError
from mpq.layers import LayerSpec
from mpq.problem import Floats
from mpq.quantizers import Scheme

Shape = tuple[object, ...]
Pair = tuple[str, str]


def layer_times(work: Workload, schemes: Sequence[Scheme], device: Device) -> LayerTimes:
    """Seconds of each layer under each scheme from the device's table; what they go to is not known ``[L, S]``.

    Raises:
        BudgetError: If a layer is not in the table under a scheme, or not at the device's batch size; or the setting
            changes the number of tokens, of which a table knows only its own.
    """
    setting = device.setting
    if setting.phase == "decode" or setting.tokens is not None:
        raise BudgetError(
            f"the table of {device.name!r} holds times of the shapes that were measured, none for decoding or other "
            "numbers of tokens; leave these settings out and trace the model with such a batch"
        )
    table = _Table(device)
    total = np.full((len(work), len(schemes)), np.nan)
    missing: dict[str, list[str]] = {}
    for s, scheme in enumerate(schemes):
        pair = table.pair(scheme, device.float_format)
        for i, layer in enumerate(work.layers):
            found = table.seconds(layer, pair)
            if found is None and table.nearest:
                found = table.scaled(layer, work.macs[i] / work.calls[i], pair)
            if found is None:
                missing.setdefault(layer.name, []).append(str(scheme))
            else:
                total[i, s] = found * work.calls[i]
    if missing:
        raise BudgetError(_explain(missing, device))
    zero = np.zeros_like(total)
    return LayerTimes(zero, zero, zero, zero, total)


class _Table:
    """The rows of a profile that hold at its batch size."""

    def __init__(self, device: Device) -> None:
        self.nearest = device.figures.get("interpolate") == "nearest"
        self.by_name: dict[tuple[str, Pair], float] = {}
        self.by_shape: dict[tuple[Shape, Pair], float] = {}
        near: dict[tuple[object, Pair], list[tuple[dict[str, Any], float]]] = {}
        self.pairs: set[Pair] = set()
        for row in device.figures["rows"]:
            pair = row["weight"], row["activation"]
            self.pairs.add(pair)
            if row.get("batch", 1) != device.setting.batch:
                continue
            if "layer" in row:
                self.by_name[row["layer"], pair] = row["seconds"]
            else:
                self.by_shape[_row_shape(row), pair] = row["seconds"]
                near.setdefault((row["op"], pair), []).append((row, row["seconds"]))
        self._known = {k: _Known([_layer(r) for r, _ in v], [t for _, t in v], device) for k, v in near.items()}

    def pair(self, scheme: Scheme, float_format: str) -> Pair:
        """A scheme's formats as the table has them: activations that stay float go by either name."""
        weight, activation = base_name(scheme.weight), base_name(scheme.activation)
        other = {"float": float_format, float_format: "float"}.get(activation, activation)
        return (weight, other) if (weight, activation) not in self.pairs else (weight, activation)

    def seconds(self, layer: LayerSpec, pair: Pair) -> float | None:
        """Of one call; None where the table has neither the name nor the shape."""
        by_name = self.by_name.get((layer.name, pair))
        return by_name if by_name is not None else self.by_shape.get((_shape(layer), pair))

    def scaled(self, layer: LayerSpec, macs: float, pair: Pair) -> float | None:
        """From the nearest shape; None where there is none of the operator and formats, or nothing is multiplied."""
        known = self._known.get((layer.op, pair))
        return None if known is None or macs == 0 else known.nearest(layer, macs)


class _Known:
    """Shapes of one operator and one pair of formats."""

    def __init__(self, layers: list[LayerSpec], seconds: list[float], device: Device) -> None:
        self.setting = device.setting
        work = make_workload(layers, self.setting)
        self.where, self.rate = _coordinates(work), np.array(seconds) / work.macs

    def nearest(self, layer: LayerSpec, macs: float) -> float:
        """Seconds at the rate of the shape whose rows, columns, depth and blocks differ least, in factors."""
        here = _coordinates(make_workload([layer], self.setting))
        return float(self.rate[np.abs(self.where - here).sum(1).argmin()] * macs)


def _coordinates(work: Workload) -> Floats:
    return np.log(np.stack([work.rows, work.columns, work.depth, work.blocks], 1))


def _shape(layer: LayerSpec) -> Shape:
    return layer.op, layer.rows_shape, layer.input_shape, layer.output_shape


def _row_shape(row: dict[str, Any]) -> Shape:
    return row["op"], tuple(row["weight_shape"]), tuple(row["input_shape"]), tuple(row["output_shape"])


def _layer(row: dict[str, Any]) -> LayerSpec:
    """A layer of a row's shape."""
    op, weight, inputs, outputs = row["op"], *(tuple(row[k]) for k in ("weight_shape", "input_shape", "output_shape"))
    positions = np.prod(outputs) / (outputs[0] if op.startswith("conv") else outputs[-1])
    if op.startswith("conv_transpose"):
        positions = np.prod(inputs[1:])
    parameters = int(np.prod(weight))
    return LayerSpec(op, op, weight, weight, inputs, outputs, int(parameters * positions), parameters, 1, 0, 0)


def _explain(missing: dict[str, list[str]], device: Device) -> str:
    names = [f"{name} ({', '.join(schemes)})" for name, schemes in list(missing.items())[:5]]
    more = f" and {len(missing) - 5} more layers" if len(missing) > 5 else ""
    return (
        f"the table of {device.name!r} has no time for {', '.join(names)}{more} at batch {device.setting.batch}; "
        'measure them, skip them, or let the profile say "interpolate": "nearest"'
    )
