"""Which configs to measure: what tells most about all others, and what a search would return."""

from __future__ import annotations

import numpy as np

from mpq.layers import LayerSpec
from mpq.problem import Floats, Ints
from mpq.quantizers import Scheme
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace, layer_scheme

_CANDIDATES = 300  # of each kind
_UNIFORM = 200
_SPREAD = 200  # candidates left, evenly spread over the losses
_PRICES = np.logspace(-4, 2, 49)  # of all bits together, in ceilings
_SMALLEST, _LARGEST = 1e-3, 3.0  # predicted losses that are worth measuring, in ceilings
_SWEEPS = 10


def candidates(table: SensitivityTable, space: SearchSpace, ceiling: float, generator: np.random.Generator) -> Ints:
    """Configs ``[C, G]`` whose predicted losses spread from nearly none to a destroyed network.

    Half of them minimise the loss plus a price on bits, with prices from low to high and losses shaken by
    a factor of about e. The others draw each group's scheme from a random distribution over schemes.

    Args:
        table: Predicted losses.
        space: Groups, schemes and what is allowed.
        ceiling: Losses of about this size mean a network that is destroyed.
        generator: Of everything random.
    """
    G, S = space.allowed.shape
    bits = _bits(space)

    def priced() -> Ints:
        price = 10 ** generator.uniform(-4, 2) * ceiling
        score = table.loss * np.exp(generator.normal(0, 1, (G, S))) + price * bits
        found: Ints = np.where(space.allowed, score, np.inf).argmin(1)
        return found

    def random() -> Ints:
        chances = np.where(space.allowed, generator.dirichlet(np.full(S, generator.uniform(0.3, 1.5))) + 1e-9, 0)
        found: Ints = (chances.cumsum(1) > generator.random((G, 1)) * chances.sum(1, keepdims=True)).argmax(1)
        return found

    drawn = [draw() for _ in range(_CANDIDATES) for draw in (priced, random)]
    picks: Ints = np.unique(np.array(drawn, np.int64), axis=0)
    picks = picks[generator.permutation(len(picks))]
    spread = picks[_spread(table.predict_all(picks), ceiling, _SPREAD)]
    uniform = np.argsort(generator.random((_UNIFORM, G, S)) - ~space.allowed * 2.0)[..., -1]
    joined: Ints = np.unique(np.concatenate([spread, uniform]), axis=0)
    return joined


def solved(table: SensitivityTable, space: SearchSpace, ceiling: float) -> Ints:
    """Configs ``[C, G]`` that minimise the predicted loss plus a price on bits, found by descent."""
    bits, pick = _bits(space), np.where(space.allowed, table.loss, np.inf).argmin(1)
    found = []
    for price in _PRICES:
        pick = _descend(np.where(space.allowed, table.loss + price * ceiling * bits, np.inf), table.interactions, pick)
        found.append(pick)
    picks: Ints = np.unique(np.array(found, np.int64), axis=0)
    return picks


def unlike(table: SensitivityTable, picks: Ints, taken: Ints, count: int, ceiling: float) -> Ints:
    """Up to ``count`` of the picks that are not taken yet, evenly spread over the predicted losses."""
    known = {p.tobytes() for p in taken}
    fresh = np.array([p for p in picks if p.tobytes() not in known], np.int64).reshape(-1, picks.shape[1])
    return fresh[_spread(table.predict_all(fresh), ceiling, count)] if len(fresh) else fresh


def fewest_bits(space: SearchSpace) -> Ints:
    """Each group's allowed scheme of the fewest bits ``[G]``."""
    found: Ints = np.where(space.allowed, _bits(space), np.inf).argmin(1)
    return found


def _bits(space: SearchSpace) -> Floats:
    """Weight bits of each choice, as a share of the most that all groups can take ``[G, S]``.

    Where schemes differ in their activations, too, the share of the activations' bits, weighed by MACs, is added.
    """
    share = _share([[s.weight.bits * g.parameters for s in space.schemes] for g in space.groups])
    if len({s.activation for s in space.schemes}) > 1:
        share += _share(
            [[sum(_activation_bits(x, s) * x.macs for x in g.layers) for s in space.schemes] for g in space.groups]
        )
    return share


def _activation_bits(layer: LayerSpec, scheme: Scheme) -> float:
    activation = layer_scheme(layer, scheme).activation
    return layer.element_bits if activation is None else activation.bits


def _share(bits: list[list[float]]) -> Floats:
    found = np.array(bits, np.float64)
    share: Floats = found / (found.max(1).sum() or 1.0)
    return share


def _spread(losses: Floats, ceiling: float, count: int) -> Ints:
    """Indices of up to ``count`` losses, each the nearest to one of as many even steps of the logarithm."""
    logs = np.log(np.maximum(losses, 1e-12 * ceiling))
    low, high = max(np.log(_SMALLEST * ceiling), logs.min()), min(np.log(_LARGEST * ceiling), logs.max())
    taken: list[int] = []
    for wanted in np.linspace(low, high, min(count, len(logs))):
        order = np.argsort(np.abs(logs - wanted), kind="stable")
        taken.append(int(next(i for i in order if i not in taken)))
    return np.array(taken, np.int64)


def _descend(score: Floats, interactions: Floats | None, pick: Ints) -> Ints:
    """Best scheme of one group after the other, until nothing changes."""
    pick, groups = pick.copy(), np.arange(len(score))
    for _ in range(_SWEEPS):
        before = pick.copy()
        for g in groups:
            between = 0.0 if interactions is None else interactions[g][:, groups, pick].sum(1)
            pick[g] = int((score[g] + between).argmin())
        if (pick == before).all():
            break
    return pick
