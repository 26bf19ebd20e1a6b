"""BitOps: multiply-accumulates x weight bits x activation bits."""

from __future__ import annotations

import numpy as np

from mpq.cost_models.table import Cost
from mpq.space import SearchSpace


def bit_ops(space: SearchSpace) -> Cost:
    """BitOps of the searched layers for one sample; what stays float counts with the model's own bits.

    As in the tables of HAWQ-V3 (Yao et al., 2021) and BRECQ (Li et al., 2021): sum of MACs x weight bits x activation
    bits. Skipped layers are left out of the sum.
    """
    cost = [
        [
            sum(x.macs * s.weight.bits * (s.activation.bits if s.activation else x.element_bits) for x in g.layers)
            for s in space.schemes
        ]
        for g in space.groups
    ]
    reference = sum(x.macs * x.element_bits**2 for x in space.layers)
    return Cost("bitops", "bit operations", np.array(cost, np.float64), 0.0, 1.0, reference)
