"""Latency: seconds of each scheme of each layer on a device, by the cost model of its kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module

import numpy as np

from mpq.cost_models.devices import Device
from mpq.cost_models.table import Cost
from mpq.cost_models.workload import Workload, make_workload
from mpq.errors import BudgetError
from mpq.problem import Floats
from mpq.quantizers.formats import Scheme
from mpq.space import SearchSpace

# Kind of device -> the module that times its layers: a function `layer_times(work, schemes, device)`.
KINDS = {
    "gpu": "mpq.cost_models.gpu",
    "cpu": "mpq.cost_models.cpu",
    "dsp": "mpq.cost_models.dsp",
    "fpga": "mpq.cost_models.fpga",
    "array": "mpq.cost_models.array",
    "table": "mpq.cost_models.lookup",
}


@dataclass(frozen=True, eq=False)
class LayerTimes:
    """Where the time of layers goes, each part ``[L, S]`` seconds for all calls over the whole batch.

    Attributes:
        compute: Multiply-accumulates at the rate that the device reaches for the shape.
        memory: Weights, inputs and outputs through the memory that holds them.
        widening: Turning stored weights or activations into what the arithmetic takes, where it adds time.
        overhead: Launches, set-up, requantization.
        total: What the layer takes: the model of the kind decides what overlaps.
    """

    compute: Floats
    memory: Floats
    widening: Floats
    overhead: Floats
    total: Floats

    def bound_by(self, layer: int, scheme: int) -> str:
        """The largest part of one entry: ``compute``, ``memory``, ``widening`` or ``overhead``.

        ``measured`` where only the total is known.
        """
        parts = {f.name: float(getattr(self, f.name)[layer, scheme]) for f in fields(self) if f.name != "total"}
        return max(parts, key=parts.__getitem__) if any(parts.values()) else "measured"


TimesModel = Callable[[Workload, Sequence[Scheme], Device], LayerTimes]


def layer_times(work: Workload, schemes: Sequence[Scheme], device: Device) -> LayerTimes:
    """Time of each layer under each scheme; each scheme has a kernel on the device.

    Activations of embeddings are whole numbers: their format counts for nothing there.

    Raises:
        BudgetError: If the device has no figures for time.
    """
    if device.kind not in KINDS:
        raise BudgetError(f"device {device.name!r} has no figures for latency; `mpq devices` lists those that have")
    model: TimesModel = import_module(KINDS[device.kind]).layer_times
    return model(work, schemes, device)


def latency(space: SearchSpace) -> Cost:
    """Seconds of one run of the searched layers at the device's batch size; the rest as the device runs floats."""
    times = layer_times(make_workload(space.layers, space.device.setting), space.schemes, space.device)
    ends = np.cumsum([len(g.layers) for g in space.groups])
    cost = np.stack([part.sum(0) for part in np.split(times.total, ends[:-1])])
    return Cost("latency", "s", cost, 0.0, 1.0, 0.0)
