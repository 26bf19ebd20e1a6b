"""Influence, held to the truth at a few measured configs: the default estimator.

Second order is right for small errors and fails for large ones: two-bit layers, networks that collapse. A few dozen
configs between nearly lossless and nearly destroyed are measured, and the prediction is recalibrated to them
(`mpq.sensitivity.recalibration`). That is a small part of the cost of measuring each layer alone, and sees what layers
do to each other when errors are large.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpq.bank import QuantizerBank
from mpq.calibration import Calibration
from mpq.losses import OutputLoss
from mpq.problem import Ints
from mpq.progress import progress_bar
from mpq.sensitivity.influence import influence, second_order
from mpq.sensitivity.perturbation import quantized
from mpq.sensitivity.recalibration import Recalibration, recalibrate
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace, layer_scheme
from mpq.store import ScoreStore
from mpq.trees import map_tensors
from mpq.view import ModelView

_CANDIDATES = 300  # of each kind
_SMALLEST, _LARGEST = 1e-3, 3.0  # predicted losses that are worth measuring, in ceilings


def anchored(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    anchors: int = 32,
    anchor_samples: int = 256,
    draws: int = 2,
    exact: bool = False,
    executor: Executor | None = None,
    store: ScoreStore | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """Influence recalibrated to measured configs.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        bank: Quantized weights and activation ranges.
        loss: What is protected.
        anchors: Configs to measure; 0 leaves influence as it is.
        anchor_samples: Measure them on the first batches with about this many samples.
        draws: As for `influence`.
        exact: As for `influence`.
        executor: As for `influence`.
        store: As for `influence`; measured configs are kept, too.
        seed: Of the probes and the choice of configs.
        progress: Show bars.

    Returns:
        A table with interactions and a ceiling. Its provenance holds the measured configs and their predictions.

    Raises:
        MpqError: As for `influence`.
    """
    options: dict[str, Any] = {"draws": draws, "exact": exact, "executor": executor, "store": store}
    table = influence(view, space, data, bank, loss, seed=seed, progress=progress, **options)
    if anchors < 1 or not (space.allowed.sum(1) > 1).any():
        return replace(table, provenance={**table.provenance, "estimator": "anchored", "anchors": []})
    truth = _Truth(view, space, data, bank, loss, anchor_samples, store)
    picks = choose(table, space, anchors, truth.ceiling, np.random.default_rng(seed))
    measured = np.array([truth.rise(pick) for pick in progress_bar(picks, "anchors", progress)])
    usable = np.isfinite(measured) & (measured > 0)
    picks, measured = picks[usable], measured[usable]
    assert table.rows is not None
    rows = table.rows[: truth.samples]
    fit = recalibrate(*second_order(rows), picks, measured, truth.ceiling)
    fitted = _corrected(table, fit)
    provenance = {
        **table.provenance,
        "estimator": "anchored",
        "anchors": [
            {"pick": p.tolist(), "measured": m, "second_order": table.predict(p), "predicted": fitted.predict(p)}
            for p, m in zip(picks, measured.tolist(), strict=True)
        ],
        "anchor_error": fit.error,
        "coupling": fit.coupling,
        "ceiling": fit.ceiling,
        "forward_passes": round(
            float(table.provenance["forward_passes"]) + (1 + anchors) * truth.samples / data.num_samples, 2
        ),
    }
    return replace(fitted, provenance=provenance)


def _corrected(table: SensitivityTable, fit: Recalibration) -> SensitivityTable:
    root = np.exp(0.5 * fit.correction)
    assert table.interactions is not None
    assert table.rows is not None
    return replace(
        table,
        loss=table.loss * root**2,
        stderr=table.stderr * root**2,
        interactions=fit.coupling * table.interactions * root[:, :, None, None] * root,
        rows=table.rows * root,
        ceiling=fit.ceiling,
    )


class _Truth:
    """Measures configs on the first batches of the data.

    Attributes:
        samples: How many samples are measured.
        ceiling: Rise of the loss if the output were the same for all samples.
    """

    def __init__(
        self,
        view: ModelView,
        space: SearchSpace,
        data: Calibration,
        bank: QuantizerBank,
        loss: OutputLoss,
        samples: int,
        store: ScoreStore | None,
    ) -> None:
        self._view, self._space, self._bank, self._loss = view, space, bank, loss
        before = np.cumsum([0] + [b.size for b in data.batches])
        self._batches = [b for b, n in zip(data.batches, before, strict=False) if n < samples]
        self.samples = sum(b.size for b in self._batches)
        with torch.no_grad():
            self._references = [view(b) for b in self._batches]
        constant = [
            map_tensors(partial(_without_differences, samples=b.size), r)
            for r, b in zip(self._references, self._batches, strict=True)
        ]
        self._float = self._mean(self._references)
        self.ceiling = max(self._mean(constant) - self._float, 1e-12)
        content = [b.content_hash for b in self._batches]
        self._store = None if store is None else store.within(kind="anchor", batches=content)

    def rise(self, pick: Ints) -> float:
        """How much a config raises the loss."""
        choices = [(g, self._space.schemes[s]) for g, s in zip(self._space.groups, pick, strict=True)]
        layers = [(x, layer_scheme(x, s)) for g, s in choices for x in g.layers]
        about = {"config": [[x.name, str(s), self._bank.range(x, s.activation)] for x, s in layers]}
        known = None if self._store is None else self._store.get(**about)
        if known is not None:
            return float(known["rise"].item())
        with torch.no_grad(), quantized(self._view, self._bank, choices):
            rise = self._mean(self._view(b) for b in self._batches) - self._float
        if self._store is not None:
            self._store.put({"rise": np.array(rise)}, **about)
        return rise

    def _mean(self, outputs: Iterable[Any]) -> float:
        pairs = zip(outputs, self._references, self._batches, strict=True)
        return sum(float(self._loss.value(o, r, b).double().sum()) for o, r, b in pairs) / self.samples


def _without_differences(t: Tensor, samples: int) -> Tensor:
    """Every sample's output replaced by their mean."""
    return t.mean(0, keepdim=True).expand_as(t) if t.is_floating_point() and t.dim() and len(t) == samples else t


def choose(
    table: SensitivityTable, space: SearchSpace, count: int, ceiling: float, generator: np.random.Generator
) -> Ints:
    """Configs to measure ``[K, G]``: half of the kind that a search returns, half random, spread over the losses.

    The first kind minimises the loss plus a price on stored weight bits, with prices from low to high and losses shaken
    by a factor of about e. The second draws each group's scheme from a random distribution over schemes.

    Args:
        table: Predicted losses.
        space: Groups, schemes and what is allowed.
        count: How many.
        ceiling: Losses of about this size mean a network that is destroyed.
        generator: Of everything random.
    """
    G, S = space.allowed.shape
    bits = np.array([[s.weight.bits * g.parameters for s in space.schemes] for g in space.groups], np.float64)

    def priced() -> Ints:
        price = 10 ** generator.uniform(-4, 2) * ceiling / bits.max(1).sum()
        score = table.loss * np.exp(generator.normal(0, 1, (G, S))) + price * bits
        found: Ints = np.where(space.allowed, score, np.inf).argmin(1)
        return found

    def random() -> Ints:
        chances = np.where(space.allowed, generator.dirichlet(np.full(S, generator.uniform(0.3, 1.5))) + 1e-9, 0)
        found: Ints = (chances.cumsum(1) > generator.random((G, 1)) * chances.sum(1, keepdims=True)).argmax(1)
        return found

    candidates = [draw() for _ in range(_CANDIDATES) for draw in (priced, random)]
    picks: Ints = np.unique(np.array(candidates, np.int64), axis=0)
    picks = picks[generator.permutation(len(picks))]
    predicted = np.log(np.maximum(table.predict_all(picks), 1e-12 * ceiling))
    low = max(np.log(_SMALLEST * ceiling), predicted.min())
    high = min(np.log(_LARGEST * ceiling), predicted.max())
    taken: list[int] = []
    for wanted in np.linspace(low, high, min(count, len(picks))):
        order = np.argsort(np.abs(predicted - wanted), kind="stable")
        taken.append(int(next(i for i in order if i not in taken)))
    return picks[taken]
