"""Searches with measured truth for users: what is measured, the ledger's context, and the `Study` they return."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mpq.accuracy import smallest_within_drop
from mpq.analysis import Analysis, Budgets
from mpq.budget import parse_budgets
from mpq.config import BitConfig, Measured
from mpq.errors import BudgetError, DataError, MpqError
from mpq.problem import Ints, solved
from mpq.progress import open_bar
from mpq.search import SEARCHES, Evaluations, Ledger, MeasuredSearch, MeasuredSolution, Solver
from mpq.space import SearchSpace

_ROWS = 8  # of the trace, in a repr


class MeasuresConfigs(Protocol):
    """What `mpq.Evaluator` offers."""

    data_hash: str
    classifies: bool

    def require_accuracy(self) -> None:
        """Refuse data without usable labels."""

    def measure(self, config: BitConfig) -> Measured:
        """All that is measured of a config."""

    def measure_in_parts(self, config: BitConfig) -> Iterator[Measured]:
        """The same on the first batch, on the first two, and so on."""


Evaluate = MeasuresConfigs | Callable[[BitConfig], float]


class MakesConfigs(Protocol):
    """What is searched: an `Analysis`, or `mpq.global_choices.GlobalChoices`."""

    def config(self, pick: Ints) -> BitConfig:
        """The config of a pick."""


@dataclass(frozen=True, eq=False, repr=False)
class Study:
    """What a search with measured truth found. Made by `mpq.Analysis.search`.

    Attributes:
        config: The best config, with its measured figures where an evaluator measured them.
        quantity: What was measured: ``kl``, ``mse``, ``accuracy_drop`` or ``loss``.
        solution: The search's own answer, with the trace of all picks.
        analysis: What it was started from.
    """

    config: BitConfig
    quantity: str
    solution: MeasuredSolution
    analysis: Analysis = field(repr=False)

    def table(self) -> list[dict[str, Any]]:
        """One row for each evaluation: measured and predicted loss, and metrics; ready for a data frame."""
        trace, names = self.solution.trace, self.analysis.costs
        predicted = self.analysis.table.predict_all(trace.picks)
        return [
            {
                "evaluation": i + 1,
                self.quantity: float(loss),
                "predicted": float(predicted[i]),
                "reused": bool(trace.reused[i]),
                **{name: names[name].total(pick) for name in names},
            }
            for i, (pick, loss) in enumerate(zip(trace.picks, trace.losses, strict=True))
        ]

    def __repr__(self) -> str:
        found, rows = self.solution, self.table()
        at = int((found.trace.picks == found.pick).all(1).argmax())
        lines = [
            f"Study: {found.search} for {', '.join(self.config.budgets)}: {self.quantity} {found.loss:.6g} after "
            f"{found.evaluations} evaluations and {found.reused} from the ledger in {found.seconds:.3g} s",
            f"  {found.message}",
        ]
        shown = sorted({*range(min(_ROWS, len(rows))), at, len(rows) - 1})
        for i in shown:
            row, mark = rows[i], " <- best" if i == at else ""
            size = f"{row['avg_bits']:.3f} bits, {row['size'] / 1e3:,.1f} kB"
            told = f"{self.quantity} {row[self.quantity]:.6g} (predicted {row['predicted']:.6g})"
            lines.append(f"  [{row['evaluation']:>4}] {told} at {size}{mark}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Measure:
    """A user's function of configs as one of picks; pickles if both of its parts do."""

    searched: MakesConfigs
    evaluate: Callable[[BitConfig], float]
    quantity: str

    def __call__(self, pick: Ints) -> float:
        return float(self.evaluate(self.searched.config(pick)))


@dataclass(frozen=True)
class EvaluatorMeasure:
    """What an evaluator measures as a loss of picks, also in parts."""

    searched: MakesConfigs
    evaluator: MeasuresConfigs
    quantity: str
    found: dict[bytes, Measured] = field(default_factory=dict)
    _parts: dict[bytes, list[tuple[int, float]]] = field(default_factory=dict)

    def __call__(self, pick: Ints) -> float:
        """The loss of a pick."""
        *_, loss = self.in_parts(pick)
        return loss

    def in_parts(self, pick: Ints) -> Iterator[float]:
        """Its loss on the first batch, on the first two, and so on."""
        parts = self._parts[pick.tobytes()] = []
        for measured in self.evaluator.measure_in_parts(self.searched.config(pick)):
            loss = self._loss(measured)
            self.found[pick.tobytes()] = measured
            parts.append((measured.samples, loss))
            yield loss

    def noise(self, one: Ints, other: Ints) -> float | None:
        """Standard error of the difference of two picks' losses, by its spread over batches; None with one batch.

        Both are measured on the same samples, so this is far less than the error of either loss. What was measured
        elsewhere is measured again.
        """
        for pick in (one, other):
            if pick.tobytes() not in self._parts:
                self(pick)
        samples, losses = np.transpose([self._parts[p.tobytes()] for p in (one, other)], (2, 0, 1))
        size, total = samples[0], (losses[0] - losses[1]) * samples[0]
        if len(size) < 2:
            return None
        rest = np.diff(total, prepend=0.0) - np.diff(size, prepend=0.0) * total[-1] / size[-1]
        return float(np.sqrt(np.square(rest).sum() * len(size) / (len(size) - 1)) / size[-1])

    def of(self, pick: Ints) -> Measured:
        """All that was measured of a pick, measured again if that was done elsewhere."""
        return self.found.get(pick.tobytes()) or self.evaluator.measure(self.searched.config(pick))

    def _loss(self, measured: Measured) -> float:
        if self.quantity == "accuracy_drop":
            return (measured.float_accuracy or 0.0) - (measured.accuracy or 0.0)
        loss = measured.kl if self.quantity == "kl" else measured.mse
        if loss is None:
            raise DataError("the outputs can't be compared with the float model's sample by sample")
        return loss


def search(
    analysis: Analysis,
    evaluate: Evaluate,
    budget: Budgets,
    method: str | MeasuredSearch = "refine",
    *,
    evaluations: int | None = 16,
    seconds: float | None = None,
    ledger: str | Path | None = None,
    about: str = "",
    executor: Executor | None = None,
    solver: str | Solver = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Study:
    """The config with the least measured loss under budgets; see `mpq.Analysis.search`, whose body this is."""
    budgets = parse_budgets(budget)
    drop = next((b for b in budgets if b.metric == "accuracy_drop"), None)
    chosen = find_search(method, seed, analysis.space)
    if drop is not None and method != "refine":
        raise MpqError(f"{drop.text} is searched by bisection; leave out method={chosen.name!r}")
    measure = measure_of(analysis, evaluate, drop is not None)
    context = "" if ledger is None else ledger_context(analysis, measure, about)
    title = f"measured search for {', '.join(b.text for b in budgets)}"
    with open_bar(title, progress, evaluations) as bar, Ledger(ledger, context) as kept:
        spent = Evaluations(
            measure, limit=evaluations, seconds=seconds, ledger=kept, executor=executor, report=bar.update
        )
        if drop is not None:
            others = tuple(b for b in budgets if b is not drop)
            found = smallest_within_drop(analysis, spent, drop, others, solver)
        else:
            analysis.solve(budgets, solver)  # says what is reachable if nothing is
            found = chosen.search(analysis.problem(budgets), spent)
    if found.pick is None:
        raise BudgetError(f"no config was found: {found.message}; allow more evaluations or seconds")
    answer = solved(analysis.problem(), found.pick, -np.inf, found.seconds, found.search)
    config = analysis.config_for(budgets, answer)
    if isinstance(measure, EvaluatorMeasure):
        config = config.with_measured(measure.of(found.pick))
    return Study(config, measure.quantity, found, analysis)


def measure_of(searched: MakesConfigs, evaluate: Evaluate, accuracy: bool) -> _Measure | EvaluatorMeasure:
    """What measures the loss of a pick, or its accuracy drop."""
    if callable(evaluate):
        return _Measure(searched, evaluate, "accuracy_drop" if accuracy else "loss")
    if accuracy:
        evaluate.require_accuracy()
        return EvaluatorMeasure(searched, evaluate, "accuracy_drop")
    return EvaluatorMeasure(searched, evaluate, "kl" if evaluate.classifies else "mse")


def find_search(method: str | MeasuredSearch, seed: int, space: SearchSpace | None = None) -> MeasuredSearch:
    """A search by name; one that learns from attributes of schemes takes those of the space.

    Raises:
        MpqError: If the name is unknown.
    """
    if isinstance(method, MeasuredSearch):
        return method
    if method not in SEARCHES:
        raise MpqError(f"unknown search {method!r}; known: {', '.join(SEARCHES)}")
    known: dict[str, Any] = {"seed": seed, "attributes": space and space.attributes}
    search = SEARCHES[method]
    return search(**{f.name: known[f.name] for f in fields(search) if f.name in known})  # type: ignore[arg-type]


def ledger_context(analysis: Analysis, measure: _Measure | EvaluatorMeasure, about: str) -> str:
    """All that a measured loss depends on besides the pick: the ledger's key.

    Raises:
        MpqError: If a function measures and nothing is told about it.
    """
    if isinstance(measure, _Measure) and not about:
        raise MpqError("a ledger of what a function measures needs about='...': what it measures, on which data")
    known = ("model_hash", "data_hash", "samples", "weight_range", "activation_range")
    described = {
        **{k: analysis.provenance.get(k) for k in known},
        "groups": [[layer.name for layer in g.layers] for g in analysis.space.groups],
        "schemes": [str(s) for s in analysis.space.schemes],
        "quantity": measure.quantity,
        "measured_on": measure.evaluator.data_hash if isinstance(measure, EvaluatorMeasure) else about,
    }
    return json.dumps(described, sort_keys=True)
