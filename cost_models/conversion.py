"""Format changes between neighbours: what it costs if a layer's output is not in the format that its reader takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mpq.cost_models.devices import Device
from mpq.cost_models.liveness import tensors
from mpq.cost_models.workload import make_workload
from mpq.errors import BudgetError
from mpq.layers import LayerSpec
from mpq.problem import Floats, Ints
from mpq.quantizers.formats import NumberFormat
from mpq.space import SearchSpace


@dataclass(frozen=True, eq=False)
class Conversions:
    """Seconds of format changes between groups.

    Attributes:
        groups: ``[P, 2]``: groups ``g < h``, each pair once.
        cost: ``[P, S, S]``: scheme of ``g`` x scheme of ``h``.
        own: ``[G, S]``: conversions whose other side is fixed: the model's input and skipped layers, which stay float.
    """

    groups: Ints
    cost: Floats
    own: Floats

    def total(self, pick: ArrayLike) -> float:
        """Seconds of a pick ``[G]``."""
        picks = np.asarray(pick, np.int64)
        g, h = self.groups.T
        pairwise = self.cost[np.arange(len(g)), picks[g], picks[h]].sum()
        return float(pairwise + self.own[np.arange(len(picks)), picks].sum())


def conversions(space: SearchSpace, launch: float = 0.0) -> Conversions:
    """Seconds of all format changes between layers.

    A layer leaves its output in the activation format that it computes in, which can be wider than its scheme's. Where
    the reader takes another, a pass reads the tensor and writes it again, at the bandwidth of the outermost memory; the
    same pass changes the layout. A tensor with several readers is converted once for each format. Of a sum or a
    concatenation each part is converted; what a shortcut carries on costs nothing, as the kernel that adds rescales its
    operands (see `mpq.cost_models.liveness` for what is known of tensors between layers). Activations that are not
    quantized are in the device's float format.

    Args:
        space: With a device that has a bandwidth.
        launch: Seconds to start a pass.

    Raises:
        BudgetError: If the device has no bandwidth.
    """
    device = space.device
    if not device.memory:
        raise BudgetError(f"device {device.name!r} has no memory bandwidth, so conversions have no time")
    graph, G, S = space.graph, len(space.groups), len(space.schemes)
    group_of = {x.name: g for g, group in enumerate(space.groups) for x in group.layers}
    work = make_workload(graph.layers, device.setting)
    plain = NumberFormat.parse(device.float_format)
    formats = [device.computed(s)[1] for s in space.schemes]
    sides = {True: [plain] * S, False: formats}
    passes = {(a, b): _Passes(sides[a], sides[b], launch, device) for a in sides for b in sides}
    found: dict[tuple[int, int], Floats] = defaultdict(lambda: np.zeros((S, S)))
    own = np.zeros((G, S))
    for t in tensors(graph):
        readers = dict.fromkeys(group_of.get(graph.layers[i].name) for i in t.readers)
        for p in t.summands or [None]:  # none: the model's input
            g = None if p is None else _writer(graph.layers[p], group_of)
            elements = work.inputs[t.readers[0]] if p is None else work.outputs[p]
            for h in readers:
                seconds = passes[g is None, h is None].seconds(elements)
                if g is not None and h is not None and g != h:
                    found[min(g, h), max(g, h)] += seconds if g < h else seconds.T
                elif g is None and h is not None:
                    own[h] += seconds[0]
                elif g is not None and h is None:
                    own[g] += seconds[:, 0]
    groups = np.array(list(found), np.int64).reshape(-1, 2)
    return Conversions(groups, np.array(list(found.values())).reshape(-1, S, S), own)


def _writer(layer: LayerSpec, group_of: Mapping[str, int]) -> int | None:
    """The group that decides on the format of an output; None where it stays float.

    An embedding gives floats whatever its scheme, whose activation format would be that of its whole-number input.
    """
    return None if layer.source is None else group_of.get(layer.name)


class _Passes:
    """Turning a tensor from each format into each other ``[S, S]``."""

    def __init__(
        self, written: Sequence[NumberFormat], read: Sequence[NumberFormat], launch: float, device: Device
    ) -> None:
        differs = np.array([[a != b for b in read] for a in written])
        bits = np.add.outer([a.bits for a in written], [b.bits for b in read])
        self._launch = np.where(differs, launch, 0.0)
        self._element = np.where(differs, bits / (8 * device.memory[-1].bandwidth), 0.0)

    def seconds(self, elements: float) -> Floats:
        """For a tensor of some size."""
        found: Floats = self._launch + elements * self._element
        return found
