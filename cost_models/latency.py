"""Latency: seconds of each scheme of each layer on a device, by the cost model of its kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module

from mpq.cost_models.conversion import conversions
from mpq.cost_models.devices import Device
from mpq.cost_models.kv_cache import asked_cache
from mpq.cost_models.table import Cost, group_sums
from mpq.cost_models.workload import Workload, make_workload
from mpq.errors import BudgetError
from mpq.problem import Floats, PairCosts
from mpq.quantizers import NumberFormat, Scheme
from mpq.space import SearchSpace
from mpq.units import si

_CONVERTING = ("gpu", "cpu", "dsp")  # pipelines and arrays have their converters on the way
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
        compute: Multiply-accumulates at the rate that the device reaches for the shape; on GPUs with requantization.
        memory: Weights, inputs and outputs through the memory that holds them.
        widening: Turning stored weights or activations into what the arithmetic takes, where it adds time.
        overhead: Launches and set-up; on CPUs and DSPs requantization too.
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
    """Seconds of one run at the device's setting: searched layers, format changes between them, and the rest as floats.

    On an FPGA it is the interval between two results of a pipeline, not the time from input to result.

    Skipped layers run in the device's float format. Products outside the layers (attention scores) are taken to be as
    fast, for each multiply-accumulate, as the network's layers are as floats, and to grow with the square of the
    tokens; a device without such a kernel times none of them. A setting with a context, or that decodes, pays for the
    traffic of the key-value cache, in the float format too. Element-wise operations are not timed. The notes of the
    cost say what was left out.

    Raises:
        BudgetError: If the device has no figures for time, or a skipped layer has no kernel there.
    """
    device = space.device
    found = group_sums(space, layer_times(make_workload(space.layers, device.setting), space.schemes, device).total)
    pairs, notes = None, ["element-wise operations and normalisation are not timed"]
    if device.kind == "fpga":
        notes += import_module(KINDS["fpga"]).notes(space)
    if device.kind in _CONVERTING:
        between = conversions(space, device.figures.get("launch", 0.0))
        pairs, found = PairCosts(between.groups, between.cost), found + between.own
    constant, reference, said = _floats(space)
    cached, said_of_cache = _cache_seconds(space)
    return Cost(
        "latency",
        "s",
        found,
        constant + cached,
        1.0,
        reference + cached if reference else 0.0,
        pairs,
        (*notes, *said, *said_of_cache),
    )


def _floats(space: SearchSpace) -> tuple[float, float, list[str]]:
    """Seconds of what stays float, of the whole network as floats (0 without a kernel), and notes."""
    device, graph = space.device, space.graph
    plain = Scheme(NumberFormat.parse(device.float_format))
    outside = sum(o.macs for o in graph.outside)
    if not device.supports(plain):
        if space.skipped:
            name = space.skipped[0].name
            raise BudgetError(
                f"layer {name!r} is skipped, but {device.name} runs no {device.float_format} layers: pin it"
            )
        note = f"{outside:,} multiply-accumulates outside the layers: no {device.float_format} kernel, not timed"
        return 0.0, 0.0, [note] if outside else []
    work = make_workload(graph.layers, device.setting)
    seconds = dict(zip((x.name for x in graph), layer_times(work, [plain], device).total[:, 0], strict=True))
    # With more tokens, attention's products grow by the square of what the layers grow by.
    growth = float(work.macs.sum()) / (graph.macs * device.setting.batch) if graph.macs else 0.0
    others = outside / graph.macs * sum(seconds.values()) * growth if graph.macs else 0.0
    grown = round(outside * growth**2)
    note = f"{grown:,} multiply-accumulates outside the layers are taken to be as fast as those inside"
    constant = sum(seconds[x.name] for x in space.skipped) + others
    return constant, sum(seconds.values()) + others, [note] if others else []


def _cache_seconds(space: SearchSpace) -> tuple[float, list[str]]:
    """Seconds of the key-value cache's traffic, and notes."""
    device = space.device
    cache, missing = asked_cache(space.graph, device.setting)
    if cache is None:
        return 0.0, [missing] if missing else []
    if not device.memory:
        return 0.0, [f"the key-value cache is not timed: {device.name} has no memory in its profile"]
    seconds = cache.seconds(NumberFormat.parse(device.float_format), device)
    note = f"{si(seconds, 's')} of it are traffic of the key-value cache in {device.float_format}"
    return seconds, [f"{note}; attention's products over the context are not timed"]
