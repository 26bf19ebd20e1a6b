"""All cost models by the name that budgets use."""

from typing import Protocol

from mpq.cost_models.arithmetic import bops, compute_cost
from mpq.cost_models.bit_ops import bit_ops
from mpq.cost_models.devices import Device
from mpq.cost_models.energy import energy
from mpq.cost_models.latency import latency
from mpq.cost_models.memory import active_bytes, peak_memory, resident_bytes
from mpq.cost_models.size import avg_bits, size, stored_bits
from mpq.cost_models.table import Cost
from mpq.space import SearchSpace


class CostModel(Protocol):
    """What every cost model is."""

    def __call__(self, space: SearchSpace, /) -> Cost:
        """Cost of each scheme of each group."""


COST_MODELS: dict[str, CostModel] = {
    "size": size,
    "avg_bits": avg_bits,
    "stored_bits": stored_bits,
    "bitops": bit_ops,
    "latency": latency,
    "energy": energy,
    "peak_memory": peak_memory,
    "resident_bytes": resident_bytes,
    "active_bytes": active_bytes,
    "compute_cost": compute_cost,
    "bops": bops,
}

_ALWAYS = ("size", "avg_bits", "stored_bits", "bitops")
_ON_A_DEVICE = ("latency", "energy", "peak_memory")


def default_metrics(device: Device) -> tuple[str, ...]:
    """The metrics that every result states: four of any model, and three more where a real device is the target."""
    return _ALWAYS if device.kind == "generic" else _ALWAYS + _ON_A_DEVICE


def default_costs(space: SearchSpace) -> dict[str, Cost]:
    """Their costs."""
    return {name: COST_MODELS[name](space) for name in default_metrics(space.device)}
