"""Influence, held to the truth at a few measured configs: the default estimator.

Second order is right for small errors and fails for large ones: two-bit layers, networks that collapse. A few dozen
configs between nearly lossless and nearly destroyed are measured, and the prediction is recalibrated to them
(`mpq.sensitivity.recalibration`). That is a small part of the cost of measuring each layer alone, and sees what layers
do to each other when errors are large.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpq.bank import QuantizerBank
from mpq.calibration import Calibration
from mpq.losses import OutputLoss
from mpq.problem import Floats, Ints
from mpq.progress import progress_bar
from mpq.sensitivity.anchors import candidates, fewest_bits, solved, unlike
from mpq.sensitivity.influence import influence
from mpq.sensitivity.perturbation import quantized
from mpq.sensitivity.recalibration import Recalibration, Recalibrator
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace, layer_scheme
from mpq.store import ScoreStore
from mpq.trees import map_tensors, tensors_in
from mpq.view import ModelView

_ROUNDS, _SEARCHED = 4, 0.5
_ROUNDING = 1e-6  # of the loss predicted for the fewest bits: a rise below is none


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
        anchors: Configs to measure, at most; 0 leaves influence as it is.
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
    picks, measured, fit = _anchors(table, space, truth, anchors, np.random.default_rng(seed), progress)
    fitted = _corrected(table, fit)
    provenance = {
        **table.provenance,
        "estimator": "anchored",
        "anchors": [
            {"pick": p.tolist(), "measured": m, "second_order": table.predict(p), "predicted": fitted.predict(p)}
            for p, m in zip(picks, measured.tolist(), strict=True)
            if np.isfinite(m)
        ],
        "anchor_error": fit.error,
        "coupling": fit.coupling,
        "ceiling": fit.ceiling,
        "forward_passes": round(
            float(table.provenance["forward_passes"]) + truth.runs * truth.samples / data.num_samples, 2
        ),
    }
    return replace(fitted, provenance=provenance)


def _anchors(
    table: SensitivityTable,
    space: SearchSpace,
    truth: _Truth,
    anchors: int,
    generator: np.random.Generator,
    progress: bool,
) -> tuple[Ints, Floats, Recalibration]:
    """Measured configs ``[K, G]``, their losses ``[K]``, and the fit to them."""
    assert table.interactions is not None
    ceiling = truth.ceiling(table)
    model = Recalibrator(table.loss, table.interactions, ceiling, _shared(space))
    picks, losses = np.zeros((0, len(space.groups)), np.int64), np.zeros(0)

    def fit() -> Recalibration:
        usable = np.isfinite(losses) & (losses > 0)
        return model.fit(picks[usable], losses[usable])

    def chosen() -> Iterator[Ints]:
        # Half of them tell most about all others. The rest come in rounds: what a search would return with the fit so
        # far is measured, because a search finds the very configs whose losses are predicted too low.
        pool = candidates(table, space, ceiling, generator)
        yield from pool[model.informative(pool, anchors - int(anchors * _SEARCHED))]
        for left in range(_ROUNDS, 0, -1):
            fitted = _corrected(table, fit())
            count = -(-(anchors - len(picks)) // left)
            yield from unlike(fitted, solved(fitted, space, ceiling), picks, count, ceiling)

    for pick in progress_bar(chosen(), "anchors", progress, anchors):
        losses = np.append(losses, truth.rise(pick))
        picks = np.concatenate([picks, pick[None]])
    return picks, losses, fit()


def _shared(space: SearchSpace) -> list[list[int]]:
    """Number of each scheme's weight and activation format, if both differ between schemes ``[2, S]`` or none."""
    found = []
    for formats in ([s.weight for s in space.schemes], [s.activation for s in space.schemes]):
        known = list(dict.fromkeys(formats))
        found.append([known.index(f) for f in formats])
    return found if all(1 < len(set(f)) < len(space.schemes) for f in found) else []


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
        runs: Passes over them.
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
        self._batches = data.first(samples)
        self.samples = sum(b.size for b in self._batches)
        with torch.no_grad():
            self._references = [view(b) for b in self._batches]
        self._float = self._mean(self._references)
        self.runs = 1
        content = [b.content_hash for b in self._batches]
        self._store = None if store is None else store.within(kind="anchor", batches=content)

    def ceiling(self, table: SensitivityTable) -> float:
        """About the loss of a network that is destroyed: its rise if the output were the same for all samples.

        Where that is no rise (one sample, or outputs of different shapes in batches of one), the lowest schemes tell:
        as measured, else as predicted.
        """
        lowest = fewest_bits(self._space)
        predicted = table.predict(lowest)

        def rises() -> Iterator[float]:
            yield self._mean(constant_outputs(self._references, [b.size for b in self._batches])) - self._float
            yield self.rise(lowest)
            yield predicted

        return next((r for r in rises() if _ROUNDING * predicted < r < math.inf), 1.0)

    def rise(self, pick: Ints) -> float:
        """How much a config raises the loss."""
        self.runs += 1
        choices = [(g, self._space.schemes[s]) for g, s in zip(self._space.groups, pick, strict=True)]
        layers = [(x, layer_scheme(x, s)) for g, s in choices for x in g.layers]
        about: dict[str, Any] = {"config": [[x.name, str(s), self._bank.range(x, s.activation)] for x, s in layers]}
        if rounded_for := next(filter(None, (self._bank.about(s) for _, s in layers)), ""):
            about["rounded_for"] = rounded_for
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


def constant_outputs(outputs: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
    """Every sample's output replaced by the mean over all batches; over its own batch where their shapes differ.

    Args:
        outputs: Of each batch.
        sizes: Samples in each batch.
    """
    constant: dict[int, Tensor] = {}
    for parts in zip(*map(tensors_in, outputs), strict=False):
        if not all(t.is_floating_point() and t.dim() and len(t) == n for t, n in zip(parts, sizes, strict=True)):
            continue
        means = [t.mean(0) for t in parts]
        if len({m.shape for m in means}) == 1:
            shares = [n / sum(sizes) for n in sizes]
            joint = torch.stack([m * share for m, share in zip(means, shares, strict=True)]).sum(0)
            means = [joint] * len(parts)
        constant |= {id(t): m.expand_as(t) for t, m in zip(parts, means, strict=True)}
    return [map_tensors(lambda t: constant.get(id(t), t), output) for output in outputs]
