"""Size: bytes of the weights with scales and zero points, and the two averages of bits."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from mpq.cost_models.table import Cost
from mpq.cost_models.workload import make_workload
from mpq.problem import Floats
from mpq.quantizers.formats import NumberFormat
from mpq.space import SearchSpace


def stored_bytes(space: SearchSpace, alignment: int = 1, *, loaded: bool = False) -> Floats:
    """Bytes of each group under each scheme ``[G, S]``: tied weights once, activation scales included.

    A weight with its scales is rounded up to a multiple of the alignment, at least to whole bytes.

    Args:
        space: Its groups and schemes.
        alignment: Bytes.
        loaded: Weights as the device holds them, not as the file does.
    """
    tied_once = [(g, x) for g, group in enumerate(space.groups) for x in {x.storage: x for x in group.layers}.values()]
    owners, layers = [g for g, _ in tied_once], [x for _, x in tied_once]
    work = make_workload(layers)
    readers = np.array([sum(x.source is not None for x in g.layers) for g in space.groups], np.float64)

    @cache
    def weights(fmt: NumberFormat) -> Floats:
        return np.ceil(work.storage_bits(fmt) / (8 * alignment)) * alignment

    columns = []
    for scheme in space.schemes:
        act = scheme.activation
        per_input = 0
        if act is not None and act.calibrated:  # others find their scales at run time
            per_input = act.scale_bits // 8 + (0 if act.symmetric else math.ceil(act.bits / 8))
        held = weights(scheme.weight)
        for kind in np.unique(work.kinds) if loaded else ():
            held = np.where(work.kinds == kind, weights(space.device.loaded(scheme, str(kind))), held)
        columns.append(np.bincount(owners, held, len(readers)) + per_input * readers)
    return np.stack(columns, 1)


def size(space: SearchSpace) -> Cost:
    """Bytes of all parameters in a file: formats of the searched layers, everything else as the model stores it.

    What recipes keep beside codes counts; buffers and a file's header do not: `mpq.packed_size` tells of them.
    A device may hold more once it has loaded them: `mpq.cost_models.memory.resident_bytes`.
    """
    return whole_model(space, "size", stored_bytes(space))


def whole_model(space: SearchSpace, name: str, stored: Floats) -> Cost:
    """Bytes of the searched layers ``[G, S]`` with everything else as the model stores it."""
    searched = {x.storage: x.parameters * x.element_bits // 8 for x in space.layers}
    total = space.graph.float_size_bytes
    return Cost(name, "bytes", stored, total - sum(searched.values()), 1.0, total)


def avg_bits(space: SearchSpace) -> Cost:
    """Parameter-weighted mean of the weight formats' bits over the searched layers, as papers report it."""
    cost = np.array([[g.parameters * s.weight.bits for s in space.schemes] for g in space.groups], np.float64)
    return _mean(space, "avg_bits", cost)


def stored_bits(space: SearchSpace) -> Cost:
    """Stored bits per weight over the searched layers: scales, zero points and padding count."""
    return _mean(space, "stored_bits", 8 * stored_bytes(space))


def _mean(space: SearchSpace, name: str, cost: Floats) -> Cost:
    stored = {x.storage: (x.parameters, x.element_bits) for x in space.layers}
    parameters = sum(n for n, _ in stored.values())
    return Cost(name, "bits", cost, 0.0, parameters, sum(n * b for n, b in stored.values()) / parameters)
