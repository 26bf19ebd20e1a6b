"""Scores of layers become scores of groups; shared by the estimators that score one layer at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpq.bank import QuantizerBank
from mpq.layers import LayerSpec
from mpq.problem import Floats
from mpq.quantizers import Scheme
from mpq.space import SearchSpace, layer_scheme
from mpq.view import ModelView


def distinct_layers(space: SearchSpace) -> list[LayerSpec]:
    """The searched layers with tied weights once."""
    return list({x.storage: x for x in space.layers}.values())


def by_group(space: SearchSpace, score: Callable[[LayerSpec, Scheme], float], *, tied_once: bool = True) -> Floats:
    """Sum a score of (layer, scheme) over the layers of each group ``[G, S]``.

    Args:
        space: Groups and schemes.
        score: Of one layer under what the scheme means for it.
        tied_once: Layers with one stored weight count once; False where each use of a weight counts.
    """
    members = [{x.storage: x for x in g.layers}.values() if tied_once else g.layers for g in space.groups]
    return np.array([[sum(score(x, layer_scheme(x, s)) for x in m) for s in space.schemes] for m in members])


def squared_error(view: ModelView, bank: QuantizerBank, layer: LayerSpec, scheme: Scheme) -> float:
    """Squared norm of a weight's quantization error, ``||Q(w) - w||^2``."""
    error = bank.weight(layer, scheme.weight) - view.weight(layer.name)
    return float(error.double().square().sum())
