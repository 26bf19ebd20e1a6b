"""`compare`: which sensitivity estimator predicts best what random mixed configs of a model really lose."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from mpq.config import BitConfig, Measured
from mpq.errors import MpqError
from mpq.problem import Floats, Ints
from mpq.progress import progress_bar
from mpq.quantizers import Scheme, parse_schemes
from mpq.random_configs import FEWEST, RandomConfigs

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from mpq.sensitivity import Estimator

    Choice = str | Estimator | tuple[str | Estimator, Mapping[str, Any]]

_RESAMPLES = 1000
_FEWEST_FOR_INTERVAL = 10


@dataclass(frozen=True)
class EstimatorScore:
    """How well one estimator's predictions follow what was measured.

    Attributes:
        name: The estimator's label.
        spearman: Rank correlation of predicted and measured losses; NaN if all predictions are equal.
        low: Lower end of its bootstrap confidence interval; NaN for fewer than ten configs.
        high: Upper end.
        kendall: Kendall's tau-b.
        log10_error: Median of ``|log10(predicted / measured)|``, infinite where most predictions are not above zero;
            None where the prediction is not in the unit of what is measured.
        forward_passes: Cost in forward passes of the calibration data; a backward pass counts as two.
        cpu_seconds: CPU time of the analysis, calibration of activation ranges included.
    """

    name: str
    spearman: float
    low: float
    high: float
    kendall: float
    log10_error: float | None
    forward_passes: float
    cpu_seconds: float


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Predicted against measured loss of the same random configs, for several estimators. Made by `compare`.

    Attributes:
        groups: Names of the groups ``[G]``.
        schemes: Names of the schemes ``[S]``.
        picks: Scheme index per group of each config ``[C, G]``.
        quantity: What was measured: ``kl`` (nats) or ``mse``, against the float model.
        measured: Loss of each config on the evaluation data ``[C]``.
        predictions: Label -> predicted loss of each config ``[C]``, interactions included.
        scores: One for each estimator, the best rank correlation first.
        confidence: Of the intervals. They are percentiles over resampled configs (Efron, 1979), so they tell what other
            configs of this model would give, not other data or models.
        provenance: Model, calibration data, seed, versions and how much data there was.
    """

    groups: tuple[str, ...]
    schemes: tuple[str, ...]
    picks: Ints
    quantity: str
    measured: Floats
    predictions: Mapping[str, Floats]
    scores: tuple[EstimatorScore, ...]
    confidence: float
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def table(self) -> list[dict[str, Any]]:
        """One row for each estimator, the best first; ready for a data frame."""
        return [asdict(score) for score in self.scores]

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw predicted against measured loss, one panel for each estimator.

        Args:
            path: Also write the figure there; the ending gives the format.
        """
        from mpq.viz.comparison import plot_comparison

        figure = plot_comparison(self)
        if path is not None:
            figure.savefig(path)
        return figure

    def to_json(self) -> str:
        """Everything in it; numbers that are not finite become null."""
        data = {
            "schema": "mpq/comparison-1",
            "quantity": self.quantity,
            "confidence": self.confidence,
            "groups": self.groups,
            "schemes": self.schemes,
            "scores": [{k: _json_number(v) for k, v in row.items()} for row in self.table()],
            "picks": self.picks.tolist(),
            "measured": self.measured.tolist(),
            "predictions": {name: found.tolist() for name, found in self.predictions.items()},
            "provenance": dict(sorted(self.provenance.items())),
        }
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    def __repr__(self) -> str:
        low, high = self.measured.min(), self.measured.max()
        width = max(len("estimator"), *(len(score.name) for score in self.scores))
        rows = [
            f"Comparison: {len(self.measured)} random configs of {len(self.groups)} groups, "
            f"measured {self.quantity} {low:.3g} to {high:.3g}",
            f"  {'estimator':<{width}} {'Spearman':>8} {f'{self.confidence:.0%} interval':>16} {'Kendall':>8} "
            f"{'off by':>8} {'passes':>8} {'CPU s':>7}",
        ]
        for s in self.scores:
            factor = "" if s.log10_error is None else f"x{10**s.log10_error:.3g}"
            interval = "" if math.isnan(s.low) else f"{s.low:.3f} to {s.high:.3f}"
            rows.append(
                f"  {s.name:<{width}} {s.spearman:>8.3f} {interval:>16} {s.kendall:>8.3f} "
                f"{factor:>8} {s.forward_passes:>8.5g} {s.cpu_seconds:>7.1f}"
            )
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def compare(
    model: nn.Module,
    calib: Iterable[Any],
    eval_data: Iterable[Any],
    schemes: str | Iterable[str | Scheme] = "W2A8,W3A8,W4A8,W8A8",
    *,
    estimators: Iterable[str] | Mapping[str, Choice] = ("anchored", "influence", "hessian_trace"),
    configs: int = 40,
    loss_range: tuple[float, float] = (0.001, 1.0),
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Score sensitivity estimators by how they rank random mixed configs whose real loss is measured.

    All estimators see the same calibration data and predict the same configs. Those are drawn so that their measured
    losses spread evenly, on a log scale, over ``loss_range``: a bit width as level, random shares of the schemes
    around it, then a scheme for each group.

    Args:
        model: A trained network; never touched.
        calib: Calibration batches, as for `mpq.analyze`.
        eval_data: What configs are measured on: batches as for `mpq.evaluate`; no labels are needed.
        schemes: What each layer may have.
        estimators: Names in `mpq.sensitivity.ESTIMATORS`, or label -> name, estimator or (either, its options), such as
            ``{"one draw": ("influence", {"draws": 1})}``.
        configs: How many to measure.
        loss_range: Lowest and highest measured loss of a config: KL to the float model in nats, or the mean squared
            error where outputs are not class scores. Second-order predictions can't hold far above the default.
        confidence: Of the intervals of the rank correlations.
        seed: Of the estimators, the configs and the intervals.
        progress: Show bars for what takes over two seconds.
        **options: As for `mpq.analyze`.

    Raises:
        MpqError: Before long work, if an estimator or number is unknown or wrong, or data is empty; later, if fewer
            than three configs within ``loss_range`` are found.
    """
    from mpq.allocation import analyze, kept_batches
    from mpq.evaluation import Evaluator
    from mpq.space import make_space

    chosen = _read_estimators(estimators)
    schemes = parse_schemes(schemes)
    if len(schemes) < 2:
        raise MpqError(f"configs that differ take two schemes or more, not only {schemes[0]}")
    _check_numbers(configs, loss_range, confidence)
    read = {k: options[k] for k in ("max_samples", "forward") if k in options}
    batches = kept_batches(model, calib, seed=seed, **read)
    evaluator = Evaluator(model, eval_data, forward=options.get("forward"), calib=batches, progress=progress)

    def glance(config: BitConfig) -> Measured:
        with closing(evaluator.measure_in_parts(config)) as parts:
            return next(parts)

    analyses, seconds = {}, {}
    for label, (estimator, own) in chosen.items():
        start = time.process_time()
        analyses[label] = analyze(
            model,
            batches,
            schemes,
            estimator=estimator,
            estimator_options=own,
            seed=seed,
            progress=progress,
            **options,
        )
        seconds[label] = time.process_time() - start

    analysis = next(iter(analyses.values()))
    # Not the analysis's own space: what its estimator could not score is narrowed there, and others could.
    narrowed, given = analysis.space, analysis.provenance
    space = make_space(narrowed.graph, given["schemes"], **given["constraints"], device=narrowed.device)
    rng = np.random.default_rng(seed)
    drawing = RandomConfigs(replace(analysis, space=space), evaluator.measure, glance, configs, loss_range, rng)
    found = list(progress_bar(drawing, "configs", progress, configs))
    drawing.report(len(found))
    picks = np.array([pick for pick, _ in found])
    measured = np.array([loss for _, loss in found])
    predictions = {k: a.table.predict_all(picks) for k, a in analyses.items()}
    units = {k: a.table.provenance.get("unit", a.provenance["loss"]) for k, a in analyses.items()}
    intervals = bootstrap(measured, predictions, confidence, seed)
    scores = [
        EstimatorScore(
            name,
            float(rank_correlation(predicted, measured)),
            *intervals[name],
            float(stats.kendalltau(predicted, measured).statistic),
            log10_error(predicted, measured) if units[name] == drawing.quantity else None,
            analyses[name].provenance["forward_passes"],
            seconds[name],
        )
        for name, predicted in predictions.items()
    ]
    kept = ("model_hash", "data_hash", "samples", "seed", "loss", "model_class", "device", "constraints", "versions")
    provenance = {k: analysis.provenance[k] for k in kept}
    provenance |= {"eval_samples": evaluator.float_measured.samples, "loss_range": list(loss_range)}
    return Comparison(
        analysis.table.groups,
        analysis.table.schemes,
        picks,
        drawing.quantity,
        measured,
        predictions,
        tuple(sorted(scores, key=lambda s: -math.inf if math.isnan(s.spearman) else s.spearman, reverse=True)),
        confidence,
        provenance,
    )


def rank_correlation(a: Floats, b: Floats) -> Floats:
    """Spearman's correlation along the last axis, ``[..., C]`` -> ``[...]``; NaN where all values are equal."""
    x, y = (stats.rankdata(v, axis=-1) for v in (a, b))
    x, y = (v - v.mean(-1, keepdims=True) for v in (x, y))
    norm = np.sqrt(np.square(x).sum(-1) * np.square(y).sum(-1))
    found: Floats = np.divide((x * y).sum(-1), norm, out=np.full(norm.shape, np.nan), where=norm > 0)
    return found


def bootstrap(
    measured: Floats, predictions: Mapping[str, Floats], confidence: float, seed: int
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of the rank correlations over resampled configs, the same resamples for all estimators.

    NaN where there are fewer than ten configs: resamples of so few are too much alike.

    Args:
        measured: Loss of each config ``[C]``.
        predictions: Label -> prediction of each config ``[C]``.
        confidence: Share of the resamples within the interval.
        seed: Of the resamples.
    """
    C = len(measured)
    drawn = np.random.default_rng(seed).integers(0, C, (_RESAMPLES, C))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    intervals = dict.fromkeys(predictions, (math.nan, math.nan))
    for name, predicted in predictions.items() if C >= _FEWEST_FOR_INTERVAL else ():
        found = rank_correlation(predicted[drawn], measured[drawn])
        found = found[~np.isnan(found)]  # resamples of one value only
        low, high = np.quantile(found, tails).tolist() if len(found) else (math.nan, math.nan)
        intervals[name] = (low, high)
    return intervals


def log10_error(predicted: Floats, measured: Floats) -> float:
    """Median of ``|log10(predicted / measured)|``; a prediction that is not above zero is infinitely far off."""
    with np.errstate(divide="ignore"):
        return float(np.median(np.abs(np.log10(np.maximum(predicted, 0) / measured))))


def _read_estimators(
    estimators: Iterable[str] | Mapping[str, Choice],
) -> dict[str, tuple[str | Estimator, dict[str, Any]]]:
    """Label -> (estimator, its options).

    Raises:
        MpqError: If there is none, or a name or an option is unknown or wrong.
    """
    from mpq.sensitivity import ESTIMATORS
    from mpq.sensitivity.options import find_estimator

    if isinstance(estimators, str):
        estimators = (estimators,)
    named = estimators if isinstance(estimators, Mapping) else {name: name for name in estimators}
    if not named:
        raise MpqError(f"no estimators given; known: {', '.join(ESTIMATORS)}")
    chosen: dict[str, tuple[str | Estimator, dict[str, Any]]] = {}
    for label, choice in named.items():
        estimator, own = choice if isinstance(choice, tuple) else (choice, {})
        find_estimator(estimator, own, str(label))
        chosen[str(label)] = (estimator, dict(own))
    return chosen


def _check_numbers(configs: int, loss_range: tuple[float, float], confidence: float) -> None:
    if configs < FEWEST:
        raise MpqError(f"configs must be at least {FEWEST}, not {configs}")
    if not 0 < loss_range[0] < loss_range[1] < math.inf:
        raise MpqError(f"loss_range must be two rising numbers above 0, such as (0.001, 1.0), not {loss_range}")
    if not 0 < confidence < 1:
        raise MpqError(f"confidence must be between 0 and 1, not {confidence}")


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
