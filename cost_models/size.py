"""Size: bytes of the weights with scales and zero points, and the two averages of bits."""

from __future__ import annotations

import math

import numpy as np

from mpq.cost_models.table import Cost
from mpq.layers import LayerGroup
from mpq.quantizers.formats import Scheme
from mpq.space import SearchSpace


def group_bytes(group: LayerGroup, scheme: Scheme, alignment: int = 1) -> int:
    """Bytes of a group under a scheme: tied weights once, each tensor in whole bytes, activation scales included.

    A weight with its scales is rounded up to a multiple of the alignment.
    """
    bits = {x.storage: scheme.weight.storage_bits(x.rows_shape) for x in group.layers}
    weights = {storage: math.ceil(n / (8 * alignment)) * alignment for storage, n in bits.items()}
    act = scheme.activation
    if act is None:
        return sum(weights.values())
    per_input = act.scale_bits // 8 + (0 if act.symmetric else math.ceil(act.bits / 8))
    return sum(weights.values()) + per_input * sum(x.source is not None for x in group.layers)


def size(space: SearchSpace) -> Cost:
    """Bytes of all parameters: formats of the searched layers, everything else as the model stores it."""
    cost = np.array([[group_bytes(g, s) for s in space.schemes] for g in space.groups], np.float64)
    searched = {x.storage: x.parameters * x.element_bits // 8 for x in space.layers}
    total = space.graph.float_size_bytes
    return Cost("size", "bytes", cost, total - sum(searched.values()), 1.0, total)


def avg_bits(space: SearchSpace) -> Cost:
    """Parameter-weighted mean of the weight formats' bits over the searched layers, as papers report it."""
    cost = np.array([[g.parameters * s.weight.bits for s in space.schemes] for g in space.groups], np.float64)
    return _mean(space, "avg_bits", cost)


def stored_bits(space: SearchSpace) -> Cost:
    """Stored bits per weight over the searched layers: scales, zero points and padding count."""
    cost = np.array([[8 * group_bytes(g, s) for s in space.schemes] for g in space.groups], np.float64)
    return _mean(space, "stored_bits", cost)


def _mean(space: SearchSpace, name: str, cost: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Cost:
    stored = {x.storage: (x.parameters, x.element_bits) for x in space.layers}
    parameters = sum(n for n, _ in stored.values())
    return Cost(name, "bits", cost, 0.0, parameters, sum(n * b for n, b in stored.values()) / parameters)
