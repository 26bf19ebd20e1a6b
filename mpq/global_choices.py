"""Searches of choices that hold for a whole network: granularity, symmetry, clipping and calibration size."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, nn

from mpq.allocation import DEFAULT_SCHEMES, analyze
from mpq.analysis import Analysis, Budgets
from mpq.budget import Budget
from mpq.config import BitConfig
from mpq.cost_models import COST_MODELS
from mpq.errors import BudgetError, FormatError, MpqError
from mpq.problem import Constraint, Ints, PairCosts, Problem, Status, solved
from mpq.progress import open_bar
from mpq.quantizers import Scheme, parse_schemes
from mpq.search import Choices, Evaluations, Ledger, MeasuredSearch, MeasuredSolution, Stop
from mpq.search.interaction import solver_for
from mpq.sensitivity import SensitivityTable
from mpq.studies import Evaluate, EvaluatorMeasure, find_search, ledger_context, measure_of

_SECONDS = 10.0  # for what is predicted to be best
_OF_WEIGHTS = ("granularity", "symmetric")  # fields of a number format
_OF_ANALYSES = {"weight_range": "weight_range", "activation_range": "activation_range", "samples": "max_samples"}


@dataclass(frozen=True, eq=False, repr=False)
class GlobalStudy:
    """What a search of global choices found. Made by `GlobalChoices.search`.

    Attributes:
        config: The best config.
        settings: The global choices that it was made with.
        quantity: What was measured: ``kl``, ``mse`` or ``loss``.
        solution: The search's own answer, with the trace of all picks.
        problem: What was searched. With the trace it makes an `mpq.search.EarlierStudy` for another network.
    """

    config: BitConfig
    settings: Mapping[str, Any]
    quantity: str
    solution: MeasuredSolution
    problem: Problem
    choices: GlobalChoices = field(repr=False)

    def table(self) -> list[dict[str, Any]]:
        """One row for each evaluation: its global choices and its measured loss; ready for a data frame."""
        trace = self.solution.trace
        return [
            {"evaluation": i + 1, **self.choices.settings(pick), self.quantity: float(loss)}
            for i, (pick, loss) in enumerate(zip(trace.picks, trace.losses, strict=True))
        ]

    def __repr__(self) -> str:
        chosen = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"GlobalStudy({chosen}; {self.config.avg_bits:.3f} bits; {self.quantity} {self.solution.loss:.4g})"


class GlobalChoices:
    """A network with choices that hold for all of its layers, searched by measured loss next to their schemes.

    Quantune (Lee et al., 2022) and EQ-Net (Xu et al., 2023) search such choices. Losses are predicted once, with the
    first option of each choice: what the others change is for the search to find out. Each combination that is measured
    is calibrated once, when a search first asks for it. Budgets hold for every combination: a choice of schemes counts
    with the largest cost that it has under any granularity and symmetry.

    Args:
        model: A trained network; never touched.
        calib: Calibration batches, as for `mpq.analyze`; they are kept.
        options: Name -> its options. ``granularity`` (``tensor``, ``channel`` or ``group:G``) and ``symmetric`` are of
            weights; ``weight_range`` and ``activation_range`` are range rules as for `mpq.analyze`; ``samples`` is the
            calibration size, in whole batches.
        schemes: What each layer may have; ``granularity`` and ``symmetric`` replace theirs.
        uniform: All layers have the same scheme, pinned ones excepted.
        **analysis: Further options of `mpq.analyze`.

    Attributes:
        reference: The analysis with the first options.

    Raises:
        MpqError: If a choice is unknown, or no kernel runs one of its options.

    Example:
        >>> from mpq.bundled import load_example
        >>> from mpq.evaluation import Evaluator
        >>> model, calib, test = load_example()
        >>> options = {"granularity": ("tensor", "channel"), "activation_range": ("percentile:90", "mse")}
        >>> choices = GlobalChoices(model, [calib[0][0][:32]], options, "W4A8", estimator="weight_sqnr", progress=False)
        >>> evaluator = Evaluator(model, [(x[:64], y[:64]) for x, y in test[:1]], progress=False)
        >>> choices.search(evaluator, evaluations=4, progress=False).settings
        {'granularity': 'channel', 'activation_range': 'mse'}
    """

    def __init__(
        self,
        model: nn.Module,
        calib: Iterable[Any],
        options: Mapping[str, Sequence[Any]],
        schemes: str | Iterable[str | Scheme] = DEFAULT_SCHEMES,
        *,
        uniform: bool = False,
        **analysis: Any,
    ) -> None:
        unknown = [name for name in options if name not in (*_OF_WEIGHTS, *_OF_ANALYSES)]
        if unknown:
            known = ", ".join((*_OF_WEIGHTS, *_OF_ANALYSES))
            raise MpqError(f"unknown global choices {', '.join(unknown)}; known: {known}")
        self._model, self._uniform, self._analysis = model, uniform, analysis
        self._calib = [calib] if isinstance(calib, Tensor | Mapping) else list(calib)
        self._choices, self._schemes = Choices(options), parse_schemes(schemes)
        self._known: dict[tuple[Any, ...], Analysis] = {}
        self._first = {name: values[0] for name, values in options.items()}
        self.reference = self._analyzed(self._first)
        self._known[tuple(self._first.values())] = self.reference
        self._costed = [self._with_costs(dict(zip(_OF_WEIGHTS, o, strict=True))) for o in self._weight_options()]

    def settings(self, pick: ArrayLike) -> dict[str, Any]:
        """Name -> option that a pick of the `problem` takes."""
        return self._choices.of(pick)

    def analysis(self, settings: Mapping[str, Any]) -> Analysis:
        """The network calibrated with an option for each choice, its losses predicted with the first options."""
        key = tuple(settings[name] for name in self._first)
        if key not in self._known:
            self._known[key] = self._analyzed(settings, estimator=self._predicted_with_first_options)
        return self._known[key]

    def problem(self, budgets: Iterable[Budget] = ()) -> Problem:
        """Schemes of groups (or one for all), then the choices, as groups of one problem.

        Raises:
            BudgetError: If a metric has no cost model here.
        """
        wanted = tuple(budgets)
        problems = [a.problem(wanted) for a in self._costed]
        rows = tuple(_dearest(same) for same in zip(*(p.constraints for p in problems), strict=True))
        base = Problem(problems[0].loss, rows, problems[0].interactions)
        return self._choices.problem(self._merged(base) if self._uniform else base)

    def config(self, pick: ArrayLike) -> BitConfig:
        """The config of any pick of the `problem`."""
        return self.analysis(self.settings(pick)).config(self._of_groups(pick))

    def search(
        self,
        evaluate: Evaluate,
        budget: Budgets | None = None,
        method: str | MeasuredSearch = "quantune",
        *,
        evaluations: int | None = 16,
        seconds: float | None = None,
        ledger: str | Path | None = None,
        about: str = "",
        seed: int = 0,
        progress: bool = True,
    ) -> GlobalStudy:
        """The config and the settings of the least measured loss under budgets.

        The first evaluations change one option at a time of what is predicted to be best; then the search begins.

        Args:
            evaluate: A `mpq.Evaluator`, or a function of a `BitConfig` that returns a loss; as for
                `mpq.Analysis.search`.
            budget: Any number, such as ``"size<=25%"``, but of no accuracy.
            method: A name in `mpq.search.SEARCHES` or a search, such as ``Quantune(earlier=...)``.
            evaluations: At most so many.
            seconds: No evaluation begins after these.
            ledger: File that keeps each evaluation.
            about: What a function measures, for the ledger.
            seed: Of everything random.
            progress: Show a bar.

        Raises:
            BudgetError: If no config meets the budgets with every option, or none was measured within the limits.
        """
        budgets = () if budget is None else Analysis.parse(budget)
        problem, measure = self.problem(budgets), measure_of(self, evaluate, False)
        described = "" if ledger is None else ledger_context(self.reference, measure, about)
        context = described and json.dumps([described, {k: list(v) for k, v in self._choices.options.items()}])
        title = "measured search of global choices"
        with open_bar(title, progress, evaluations) as bar, Ledger(ledger, context) as kept:
            spent = Evaluations(measure, limit=evaluations, seconds=seconds, ledger=kept, report=bar.update)
            with suppress(Stop):  # the search meets the same limit, and says so
                spent.measure(self._one_changed(problem))
            found = find_search(method, seed).search(problem, spent)
        if found.status is Status.INFEASIBLE:
            asked = ", ".join(b.text for b in budgets)
            raise BudgetError(f"{asked} can't be met with every option; raise the budgets or take options out")
        if found.pick is None:
            raise BudgetError(f"no config was found: {found.message}; allow more evaluations or seconds")
        settings, pick = self.settings(found.pick), self._of_groups(found.pick)
        analysis = self.analysis(settings)
        answer = solved(analysis.problem(), pick, -np.inf, found.seconds, found.search)
        config = analysis.config_for(budgets, answer)
        if isinstance(measure, EvaluatorMeasure):
            config = config.with_measured(measure.of(found.pick))
        return GlobalStudy(config, settings, measure.quantity, found, problem, self)

    def _one_changed(self, problem: Problem) -> Ints:
        """The pick that is predicted to be best with the first options, and the same with each other option of one."""
        best = solver_for(problem, _SECONDS).solve(problem).pick
        if best is None:
            return np.zeros((0, len(problem.loss)), np.int64)
        counts = [len(values) for values in self._choices.options.values()]
        first = np.append(best[: -len(counts)], np.zeros(len(counts), np.int64))
        changed = [(len(first) - len(counts) + i, option) for i, n in enumerate(counts) for option in range(1, n)]
        picks = np.repeat(first[None], 1 + len(changed), 0)
        for row, (place, option) in enumerate(changed, 1):
            picks[row, place] = option
        return picks

    def _analyzed(self, settings: Mapping[str, Any], **options: Any) -> Analysis:
        own = {**self._analysis, **{_OF_ANALYSES[k]: v for k, v in settings.items() if k in _OF_ANALYSES}, **options}
        pins = (own.pop("pin", None) or {}).items()
        parsed = {name: s if isinstance(s, Scheme) else Scheme.parse(s) for name, s in pins}
        pin = {name: _changed(s, settings) for name, s in parsed.items()}
        return analyze(self._model, self._calib, [_changed(s, settings) for s in self._schemes], pin=pin, **own)

    def _predicted_with_first_options(self, _view: Any, space: Any, *_: Any, **__: Any) -> SensitivityTable:
        """An estimator that measures nothing."""
        return replace(self.reference.table, schemes=tuple(map(str, space.schemes)), provenance={})

    def _weight_options(self) -> Iterable[tuple[Any, ...]]:
        return product(*(self._choices.options.get(name, (None,)) for name in _OF_WEIGHTS))

    def _with_costs(self, settings: Mapping[str, Any]) -> Analysis:
        """The reference with the costs that its schemes have with other settings."""
        space = self.reference.space
        schemes = tuple(_changed(s, settings) for s in space.schemes)
        missing = [str(s) for s in schemes if not space.device.supports(s)]
        if missing:
            raise FormatError(f"{missing[0]} has no kernel on {space.device.name}; take that option out")
        own = replace(space, schemes=schemes)
        return replace(self.reference, space=own, costs={name: COST_MODELS[name](own) for name in self.reference.costs})

    def _merged(self, problem: Problem) -> Problem:
        """One group for all, whose schemes are uniform ones."""
        schemes = self.reference.space.schemes
        open_ = [s in self.reference.space.uniform_schemes for s in schemes]
        picks = [self._everywhere(s) for s in range(len(schemes))]
        loss = [problem.objective(p) if ok else np.inf for p, ok in zip(picks, open_, strict=True)]
        rows = [
            Constraint(c.name, c.unit, np.array([[c.usage(p) for p in picks]]), c.limit) for c in problem.constraints
        ]
        return Problem(np.array([loss]), tuple(rows))

    def _of_groups(self, pick: ArrayLike) -> Ints:
        own = np.asarray(pick, np.int64)[: -len(self._first)]
        return self._everywhere(int(own[0])) if self._uniform else own

    def _everywhere(self, scheme: int) -> Ints:
        allowed = self.reference.space.allowed
        return np.where(allowed[:, scheme], scheme, allowed.argmax(1))


def _changed(scheme: Scheme, settings: Mapping[str, Any]) -> Scheme:
    """A scheme with the weight format that settings ask for."""
    weight = scheme.weight
    if settings.get("granularity") is not None:
        weight = weight.regrouped(settings["granularity"])
    if settings.get("symmetric") is not None:
        weight = replace(weight, symmetric=settings["symmetric"])
    return replace(scheme, weight=weight)


def _dearest(same: Sequence[Constraint]) -> Constraint:
    """The largest costs and the least limits of one constraint under several settings."""
    cost = np.max([c.cost for c in same], axis=0)
    pairs = [c.pairs for c in same if c.pairs is not None]
    most = PairCosts(pairs[0].groups, np.max([p.cost for p in pairs], axis=0)) if pairs else None
    return replace(same[0], cost=cost, limit=np.min([c.limit for c in same], axis=0), pairs=most)
