"""Compute cost without a device: metrics of published tables."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mpq.cost_models.table import Cost
from mpq.layers import LayerSpec
from mpq.space import SearchSpace


def compute_cost(space: SearchSpace) -> Cost:
    """MACs x the larger of the two bit widths, as hardware with one multiplier of few widths takes them.

    Pareto-Optimal Quantized ResNet (Abdolrashidi et al., 2021) counts cost like this: linear in the bits of a layer
    whose operands have the same. `bit_ops`, with the product of the bits, is PokeBNN's arithmetic computation effort
    (ACE; Zhang et al., 2022).
    """
    return _cost(space, "compute_cost", lambda layer, w, a: layer.macs * max(w, a))


def bops(space: SearchSpace) -> Cost:
    """Bit operations with accumulation: ``macs (b_w b_a + b_w + b_a + log2 n)`` for ``n`` products of an output.

    Baskin et al. (2021); as reported for hls4ml (Hawks et al., 2021), whose pruned weights are none here.
    """

    def of(layer: LayerSpec, w: int, a: int) -> float:
        return layer.macs * (w * a + w + a + math.log2(math.prod(layer.rows_shape[1:])))

    return _cost(space, "bops", of)


def _cost(space: SearchSpace, name: str, of: Callable[[LayerSpec, int, int], float]) -> Cost:
    """Of each choice, and of the float model."""
    cost = [
        [
            sum(of(x, s.weight.bits, s.activation.bits if s.activation else x.element_bits) for x in g.layers)
            for s in space.schemes
        ]
        for g in space.groups
    ]
    reference = sum(of(x, x.element_bits, x.element_bits) for x in space.layers)
    return Cost(name, "bit operations", np.array(cost, np.float64), 0.0, 1.0, reference)
