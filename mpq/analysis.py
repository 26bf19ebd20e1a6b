"""`Analysis`: everything measured about a model, from which any budget is solved at once. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from mpq.budget import Budget, parse_budgets
from mpq.config import BitConfig, LayerChoice
from mpq.cost_models.devices import Device
from mpq.cost_models.registry import COST_MODELS, default_metrics
from mpq.cost_models.table import Cost
from mpq.errors import BudgetError, ConfigError, FormatError, UnreachableError
from mpq.layers import LayerSpec, Outside
from mpq.problem import Ints, Problem, Solution, Status
from mpq.quantizers import Scheme
from mpq.search import SOLVERS, Solver, auto_solver
from mpq.space import SearchSpace, layer_scheme

if TYPE_CHECKING:
    from mpq.explanation import Explanation
    from mpq.feasibility import Feasibility
    from mpq.frontier import Frontier
    from mpq.search import MeasuredSearch
    from mpq.sensitivity.table import SensitivityTable
    from mpq.studies import Evaluate, Study

Budgets = str | Budget | Iterable[str | Budget]


@dataclass(frozen=True, eq=False)
class Analysis:
    """A measured model: layer graph, search space, sensitivities and costs.

    Made by `mpq.analyze`. Solving is fast and never measures again: ``analysis.allocate("size<=25%")``.

    Attributes:
        space: Groups, schemes and the layer graph.
        table: Predicted loss of each choice.
        costs: Metric -> cost of each choice; `cost` adds others when they are asked for.
        ranges: (layer, scheme name) -> calibrated activation range.
        provenance: What goes into every config made from it.
    """

    space: SearchSpace
    table: SensitivityTable
    costs: dict[str, Cost]
    ranges: Mapping[tuple[str, str], tuple[float, float]] = field(repr=False)
    provenance: Mapping[str, Any] = field(repr=False)

    def problem(self, budgets: Iterable[Budget] = ()) -> Problem:
        """The arrays of an allocation under budgets.

        Raises:
            BudgetError: If a metric has no cost model here.
        """
        constraints = []
        for budget in budgets:
            cost = self.cost(budget.metric)
            constraints.append(cost.constraint(budget.limit(cost.reference)))
        loss = np.where(self.space.allowed, self.table.loss, np.inf)
        return Problem(loss, tuple(constraints), self.table.interactions)

    def on(self, device: str | Device, *, drop_useless: bool = False) -> Analysis:
        """The same measurements for another device: nothing is measured again.

        Args:
            device: Name (``t4:batch=8``), profile or path of one. Schemes without a kernel there leave the space.
            drop_useless: Leave out, group by group, schemes that are no faster there than a wider one (see
                `mpq.cost_models.quantization_friendliness`); they may still save memory.

        Raises:
            FormatError: If there is no such device, or a layer is left without a scheme.
            BudgetError: If useless schemes are to be dropped and the device has no figures for time.
        """
        from mpq.retarget import retarget

        return retarget(self, device, drop_useless)

    def allocate(self, budget: Budgets, solver: str | Solver = "auto") -> BitConfig:
        """The config with the least predicted loss under budgets.

        Args:
            budget: One or several, such as ``"size<=25%"`` or ``["avg_bits<=4", "bitops<=2G"]``.
            solver: ``auto``, a name in `mpq.search.SOLVERS`, or a solver.

        Raises:
            BudgetError: If a budget does not parse, needs measuring, or can't be reached.
        """
        budgets = self.parse(budget)
        return self.config_for(budgets, self.solve(budgets, solver))

    @staticmethod
    def parse(budget: Budgets) -> tuple[Budget, ...]:
        """Read budgets that need no measuring.

        Raises:
            BudgetError: If a budget does not parse or needs measuring.
        """
        budgets = parse_budgets(budget)
        if any(b.metric == "accuracy_drop" for b in budgets):
            raise BudgetError("accuracy_drop is measured: use mpq.allocate(..., eval_data=labelled batches)")
        return budgets

    def smallest(
        self, metric: str, loss_limit: float, budget: Budgets | None = None, time_limit: float = 60.0
    ) -> BitConfig:
        """The config with the least of a metric whose predicted loss stays under a limit.

        Proven without interactions (status ``optimal``). With them, bisection: the solver's record says which least
        value is proven; see `mpq.search.smallest`.

        Args:
            metric: What is to be least, such as ``size`` or ``latency``.
            loss_limit: Of the predicted loss, interactions included, in the unit of the table.
            budget: Further budgets.
            time_limit: Seconds.

        Raises:
            BudgetError: If the metric has no cost model here, or no config meets the limits.
        """
        from mpq.smallest import smallest_config

        return smallest_config(self, metric, loss_limit, () if budget is None else self.parse(budget), time_limit)

    def explain(self, budget: Budgets, solver: str | Solver = "auto") -> Explanation:
        """The config under budgets and why it is what it is: prices, runners-up, what-if, survival.

        Args:
            budget: As for `allocate`.
            solver: As for `allocate`.

        Raises:
            BudgetError: As for `allocate`.
        """
        from mpq.explanation import make_explanation

        return make_explanation(self, self.parse(budget), solver)

    def feasibility(self, budget: Budgets) -> Feasibility:
        """What each metric can reach, alone and under the budgets, and the smallest relaxation that meets them.

        Raises:
            BudgetError: If a budget does not parse or needs measuring.
        """
        from mpq.feasibility import make_feasibility

        return make_feasibility(self, self.parse(budget))

    def solve(self, budgets: tuple[Budget, ...], solver: str | Solver = "auto") -> Solution:
        """The solution under budgets.

        Raises:
            BudgetError: If they can't be reached; says what can.
        """
        problem = self.problem(budgets)
        chosen = auto_solver(problem) if solver == "auto" else find_solver(solver)
        solution = chosen.solve(problem)
        if solution.pick is None:
            if solution.status is not Status.INFEASIBLE:
                raise BudgetError(solution.message)
            raise UnreachableError(self.feasibility(budgets).message)
        return solution

    def config_for(self, budgets: tuple[Budget, ...], solution: Solution) -> BitConfig:
        """The config of a solution."""
        assert solution.pick is not None
        bound = solution.bound if math.isfinite(solution.bound) else None
        record = {
            "name": solution.solver,
            "status": solution.status.value,
            "objective": solution.objective,
            "bound": bound,
            "gap": None if bound is None else solution.gap,
        }
        return self._config(solution.pick, tuple(b.text for b in budgets), record)

    def config(self, pick: ArrayLike) -> BitConfig:
        """The config of any pick ``[G]`` of scheme indices."""
        picks = np.asarray(pick, np.int64)
        record = {
            "name": "given",
            "status": "given",
            "objective": self.table.total(picks)[0],
            "bound": None,
            "gap": None,
        }
        return self._config(picks, (), record)

    def pick(self, config: BitConfig) -> Ints:
        """The scheme index of each group ``[G]`` that makes a config.

        Raises:
            ConfigError: If the config is of another model, or has a scheme that its group may not have here.
        """
        if config.provenance.get("model_hash") != self.provenance["model_hash"]:
            raise ConfigError("the config is of another model than the analysis: their model_hash differs")
        return self.space.pick({name: choice.scheme for name, choice in config.items()})

    def uniform(self, scheme: str | Scheme) -> BitConfig:
        """The same scheme everywhere, pinned groups excepted.

        Raises:
            FormatError: If some group that is not pinned may not have it.
        """
        wanted = scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)
        if wanted not in self.space.uniform_schemes:
            known = ", ".join(map(str, self.space.uniform_schemes)) or "none"
            raise FormatError(f"{wanted} is not open to every group; uniform schemes here: {known}")
        column = self.space.schemes.index(wanted)
        pick = [column if row[column] else int(row.argmax()) for row in self.space.allowed]
        return self.config(pick)

    def pareto(self, metric: str = "size") -> Frontier:
        """The best trade-offs between predicted loss and a metric; with interactions where they are known.

        Raises:
            BudgetError: If the metric has no cost model here.
        """
        from mpq.frontier import make_frontier

        return make_frontier(self, self.cost(metric))

    def search(
        self, evaluate: Evaluate, budget: Budgets, method: str | MeasuredSearch = "refine", **options: Any
    ) -> Study:
        """The config with the least *measured* loss under budgets, in few evaluations.

        Args:
            evaluate: A `mpq.Evaluator`, whose KL (or squared error, without classes) is the loss; or a function of a
                `BitConfig` that returns a loss to minimise, measured in any way.
            budget: As for `allocate`; or with ``"accuracy_drop<=1%"``, then the smallest config is searched for whose
                accuracy, measured by the evaluator (or the drop, returned by the function), is within it.
            method: ``refine``, ``random``, ``sweep``; or with the extra ``mpq[search]`` ``genetic``, ``nsga2``,
                ``optuna``, ``quantune``, ``cqap``, ``linas``; or a search (`mpq.search.MeasuredSearch`). Accuracy
                budgets have their own, `Bisection`.
            **options: ``evaluations=16`` and ``seconds=None``: limits. ``ledger=path``: file that keeps each
                evaluation at once, so that a search that was ended goes on where it was; with a function also
                ``about="what it measures"``. ``executor``: measures several configs at once (methods that ask for
                batches; functions that pickle). ``solver="auto"``, ``seed=0``, ``progress=True``.

        Raises:
            MpqError: If a budget can't be reached, or nothing could be measured within the limits.
        """
        from mpq.studies import search

        return search(self, evaluate, budget, method, **options)

    def cost(self, metric: str) -> Cost:
        """The cost of a metric.

        Raises:
            BudgetError: If it has no cost model here.
        """
        if metric not in COST_MODELS:
            raise BudgetError(f"no cost model for {metric!r}; known: {', '.join(COST_MODELS)}")
        if metric not in self.costs:
            self.costs[metric] = COST_MODELS[metric](self.space)
        return self.costs[metric]

    def metrics(self, pick: Ints, also: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
        """Metric -> value, unit and the float model's value, of the metrics that every result states and of others."""
        names = dict.fromkeys([*default_metrics(self.space.device), *(m for m in also if m in COST_MODELS)])
        costs = {name: self.cost(name) for name in names}
        return {n: {"value": c.total(pick), "unit": c.unit, "float": float(c.reference)} for n, c in costs.items()}

    def _config(self, pick: Ints, budgets: tuple[str, ...], solver: dict[str, Any]) -> BitConfig:
        layers: dict[str, LayerChoice] = {}
        for g, group in enumerate(self.space.groups):
            for layer in group.layers:
                layers[layer.name] = self._choice(layer, group.name, g, int(pick[g]))
        predicted = {
            "loss": self.table.total(pick)[0],
            "stderr": _number(self.table.stderr_of(pick)),
            "with_interactions": None if self.table.interactions is None else self.table.predict(pick),
        }
        metrics = self.metrics(pick, [b.partition("<=")[0] for b in budgets])
        order = [x.name for x in self.space.graph if x.name in layers]
        tied = self.space.graph.tied()
        first_use = {x.storage: x.name for x in reversed(self.space.skipped)}
        skipped = tuple(
            Outside(
                x.name,
                kept,
                kept * x.element_bits // 8,
                x.macs,
                self.space.unfit.get(x.name, "skipped by the user"),
                "skipped",
            )
            for x in self.space.skipped
            for kept in [x.parameters if first_use[x.storage] == x.name else 0]
        )
        return BitConfig(
            {name: layers[name] for name in order},
            skipped + self.space.graph.outside,
            metrics,
            predicted,
            None,
            budgets,
            solver,
            {
                **self.provenance,
                "cost_notes": {n: list(self.costs[n].notes) for n in metrics if self.costs[n].notes},
                **({"tied": tied} if tied else {}),
            },
        )

    def _choice(self, layer: LayerSpec, group: str, g: int, s: int) -> LayerChoice:
        scheme = layer_scheme(layer, self.space.schemes[s])
        return LayerChoice(
            scheme,
            self.ranges.get((layer.name, str(scheme))),
            group,
            layer.op,
            layer.weight_shape,
            layer.parameters,
            layer.macs,
            float(self.table.loss[g, s]),
            _number(self.table.stderr[g, s]),
        )

    def __repr__(self) -> str:
        cost = self.table.provenance.get("forward_passes")
        return (
            f"Analysis({self.space!r}, {self.provenance['estimator']} at {cost} forward passes of the calibration set)"
        )


def find_solver(solver: str | Solver) -> Solver:
    """A solver by name.

    Raises:
        BudgetError: If the name is unknown.
    """
    if not isinstance(solver, str):
        return solver
    if solver not in SOLVERS:
        raise BudgetError(f"unknown solver {solver!r}; known: auto, {', '.join(SOLVERS)}")
    return SOLVERS[solver]()


def _number(value: float) -> float | None:
    """A float that JSON can hold, or None."""
    return float(value) if math.isfinite(value) else None
