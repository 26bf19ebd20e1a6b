"""`Explanation`: why each group got its scheme, what else it might have had, and what another limit would buy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpq.budget import Budget
from mpq.config import BitConfig
from mpq.feasibility import Feasibility, make_feasibility
from mpq.files import write_text
from mpq.problem import Ints, Problem, Solution, Status, solved
from mpq.quantizers import Scheme
from mpq.search import Solver
from mpq.search.explain import Alternatives, explain_pick
from mpq.search.local_search import with_others
from mpq.survival import Survival, count_survivors
from mpq.what_if import WhatIf, solve_pinned

if TYPE_CHECKING:
    from mpq.analysis import Analysis

_SHOWN = 60  # rows of a table in the terminal


@dataclass(frozen=True)
class Price:
    """What one more unit of a budget would buy.

    Attributes:
        used: Metric of the config.
        limit: Of the budget.
        unit: Of both.
        price: Loss saved per unit of a higher limit, for small changes (dual price of the linear relaxation;
            conversions are those with the others' choices); 0 where the limit does not bind.
        step: A round amount, 0.1 to 1 % of the limit.
        binding: A higher limit would lower the loss; with conversions perhaps at no price, where only changes of
            several groups together do.
    """

    used: float
    limit: float
    unit: str
    price: float
    step: float
    binding: bool


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why a config is the answer to its budgets.

    Made by `Analysis.explain`. All losses are predicted ones, saturated as the table says.

    Attributes:
        analysis: What it was made from.
        budgets: The budgets.
        solution: What the solver returned.
        config: The config.
        prices: Metric -> what a higher limit would buy.
        feasibility: What each metric can reach.
        choices: Every choice against the one made, in arrays.
        solver: Solves what-if questions as well.
    """

    analysis: Analysis = field(repr=False)
    budgets: tuple[Budget, ...]
    solution: Solution
    config: BitConfig
    prices: Mapping[str, Price]
    feasibility: Feasibility
    choices: Alternatives
    solver: str | Solver

    @property
    def pick(self) -> Ints:
        """Scheme index of each group ``[G]``."""
        assert self.solution.pick is not None
        return self.solution.pick

    @property
    def loss(self) -> float:
        """Predicted loss, interactions included."""
        return self.analysis.table.predict(self.pick)

    def table(self) -> list[dict[str, Any]]:
        """One row per group.

        ``loss`` is the group's part of the predicted loss: its own and half of its interactions with the others.
        ``costs`` holds its part of every metric, half of its conversions included. ``runner_up`` is the scheme that it
        would be cheapest to have instead at the prices of the limits (None for a group with one scheme), with what the
        loss (``runner_up_loss``) and the metrics (``runner_up_costs``) would change by if nothing else did; ``margin``
        is that loss with the change of the metrics priced in.
        """
        problem, groups = self._problem(), np.arange(len(self.pick))
        raw = self.solution.objective
        part = (problem.loss + 0.5 * with_others(problem, self.pick))[groups, self.pick]
        part = part * (self.loss / raw if raw > 0 else 0.0)
        alone, margin = (np.where(problem.allowed, x, 0.0) for x in (self.choices.change, self.choices.margin))
        change = self.analysis.table.saturated(raw + alone) - self.loss
        priced = (margin - alone) * _slope(self.analysis, self.loss)
        names = [str(s) for s in self.analysis.space.schemes]
        metrics = self.analysis.costs.items()
        between = {m: 0 * alone if c.pairs is None else c.pairs.with_others(self.pick) / c.divisor for m, c in metrics}
        rows = []
        for g, group in enumerate(self.analysis.space.groups):
            s, r = int(self.pick[g]), int(self.choices.runner_up[g])
            row: dict[str, Any] = {
                "group": group.name,
                "layers": [x.name for x in group.layers],
                "scheme": names[s],
                "loss": float(part[g]),
                "costs": {m: c.part(g, s, self.pick) + between[m][g, s] / 2 for m, c in metrics},
                "runner_up": None,
                "runner_up_loss": None,
                "runner_up_costs": None,
                "margin": None,
            }
            if r >= 0:
                row["runner_up"] = names[r]
                row["runner_up_loss"] = float(change[g, r])
                row["runner_up_costs"] = {
                    m: c.part(g, r, self.pick) - c.part(g, s, self.pick) + between[m][g, r] - between[m][g, s]
                    for m, c in metrics
                }
                row["margin"] = float(change[g, r] + priced[g, r])
            rows.append(row)
        return rows

    def what_if(self, pin: Mapping[str, str | Scheme]) -> WhatIf:
        """Solve again under the same budgets with some layers pinned.

        Args:
            pin: Group name, layer name or glob -> scheme. A layer's whole group is pinned; later entries win.

        Raises:
            GraphError: If a name matches no layer in the search.
            FormatError: If a scheme is not open to its group.
            UnreachableError: If the budgets can't be met with the pins.
        """
        return solve_pinned(self.analysis, self.budgets, self.solver, (self.solution, self.config), pin)

    def survival(self, draws: int = 50, seed: int = 0, time_limit: float = 10.0) -> Survival:
        """How often each choice survives when the table's losses are drawn anew and the problem is solved again.

        Where the table has effects by sample, samples are drawn anew (bootstrap), interactions included; else losses
        get normal errors of their standard errors. A choice that changes in many draws was settled by noise: another
        would do as well, or more calibration samples would tell.

        Args:
            draws: How many times to solve.
            seed: Of the draws.
            time_limit: Seconds for all of them, roughly: work is counted, so that the same seed gives the same shares.

        Raises:
            MpqError: If the table knows no errors (measured on one sample, say).
        """
        return count_survivors(self.analysis, self._problem(), self.pick, draws, seed, time_limit)

    def to_json(self) -> str:
        """Budgets, prices, reach and the table; same input, same bytes."""
        data = {
            "schema": "mpq/explanation-1",
            "budgets": [b.text for b in self.budgets],
            "loss": self.loss,
            "status": self.solution.status.value,
            "gap": self.solution.gap if math.isfinite(self.solution.gap) else None,
            "prices": {m: vars(p) for m, p in self.prices.items()},
            "reach": {m: vars(r) for m, r in self.feasibility.metrics.items()},
            "groups": self.table(),
            "provenance": dict(sorted(self.analysis.provenance.items())),
        }
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write the JSON file."""
        return write_text(path, self.to_json())

    def worth(self, metric: str) -> str:
        """Whether a budget binds, and what a higher limit would save, in words."""
        price = self.prices[metric]
        if price.price > 0:
            more = self.analysis.costs[metric].scaled(price.step)
            return f"binds: {more} more would save about {price.price * price.step:.2g} of loss"
        if price.binding:
            return "binds: a higher limit saves loss once several groups can change together"
        return "does not bind: a higher limit would buy nothing"

    def _problem(self) -> Problem:
        return self.analysis.problem(self.budgets)

    def _head(self) -> list[str]:
        """What was asked, the answer in a line, and a line per budget."""
        gap = self.solution.gap
        status = "proven optimal" if self.solution.status is Status.OPTIMAL else f"best found, gap {gap:.2g}"
        loss = self.analysis.provenance.get("loss", "")
        lines = [f"{', '.join(b.text for b in self.budgets)}: predicted {loss} rise {self.loss:.5g} ({status})"]
        for m, p in self.prices.items():
            show, reach = self.analysis.costs[m].scaled, self.feasibility.metrics[m]
            lines.append(f"{m} {show(p.used)} of {show(p.limit)}, {self.worth(m)}")
            lines.append(f"{m} can reach {show(reach.least)} to {show(reach.most)}")
        return lines

    def _columns(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headings and cells of the table for people: costs are of the limited metrics."""
        metrics = {m: self.analysis.costs[m] for m in self.prices}
        heads = ("group", "scheme", "loss", *metrics, "runner-up", "loss", *metrics, "margin")
        rows = []
        for row in self.table():
            name = row["group"] + (f" (+{len(row['layers']) - 1})" if len(row["layers"]) > 1 else "")
            cells = [name, row["scheme"], f"{row['loss']:.2g}"]
            cells += [c.scaled(row["costs"][m]) for m, c in metrics.items()]
            if row["runner_up"] is None:
                cells += ["(only choice)", *[""] * (2 + len(metrics))]
            else:
                cells += [row["runner_up"], f"{row['runner_up_loss']:+.2g}"]
                cells += [_signed(c.scaled(row["runner_up_costs"][m])) for m, c in metrics.items()]
                cells.append(f"{row['margin']:.2g}")
            rows.append(tuple(cells))
        return heads, rows

    def _notes(self) -> list[str]:
        negative = ((self.choices.runner_up >= 0) & (self._margins() < 0)).sum()
        notes = ["margin: what the runner-up would cost in loss, with what it saves or takes priced in"]
        if negative:
            notes.append(
                f"margins below 0 ({negative}): better by price alone, but choices are whole: the runner-up does not "
                "fit, or what it frees buys too little"
            )
        return notes

    def _margins(self) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self.choices.margin[np.arange(len(self.pick)), self.choices.runner_up]
        return found

    def __repr__(self) -> str:
        first, *rest = self._head()
        heads, rows = self._columns()
        return "\n".join([f"Explanation of {first}", *(f"  {x}" for x in rest), *_aligned(heads, rows), *self._notes()])

    def _repr_html_(self) -> str:
        heads, rows = self._columns()
        lines = "<br>".join(map(escape, self._head()))
        top = "".join(f"<th>{escape(h)}</th>" for h in heads)
        body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        notes = "<br>".join(map(escape, self._notes()))
        return (
            f"<div><p><b>Explanation</b> of {lines}</p><div style='max-height:24em;overflow:auto'>"
            f"<table><tr>{top}</tr>{body}</table></div><p>{notes}</p></div>"
        )


def make_explanation(analysis: Analysis, budgets: tuple[Budget, ...], solver: str | Solver) -> Explanation:
    """Solve and explain; see `Analysis.explain`."""
    solution = analysis.solve(budgets, solver)
    return _explained(analysis, budgets, solution, analysis.config_for(budgets, solution), solver)


def explain_config(analysis: Analysis, config: BitConfig, budgets: tuple[Budget, ...]) -> Explanation:
    """Explain a config that was found before, by whatever means.

    Args:
        analysis: Of the same model and schemes.
        config: The config.
        budgets: Those to hold it to.

    Raises:
        ConfigError: If the config is not one of the analysis.
    """
    solution = solved(analysis.problem(budgets), analysis.pick(config), -math.inf, 0.0, str(config.solver["name"]))
    return _explained(analysis, budgets, solution, config, "auto")


def explain_given(analysis: Analysis, metric: str, pick: Ints) -> Explanation:
    """Any pick ``[G]`` against its alternatives, at the prices of a limit that is its own value of a metric.

    Raises:
        BudgetError: If the metric has no cost model here.
    """
    value = analysis.cost(metric).total(pick)
    return explain_config(analysis, analysis.config(pick), (Budget(metric, value, False, f"{metric}<={value:.10g}"),))


def _explained(
    analysis: Analysis, budgets: tuple[Budget, ...], solution: Solution, config: BitConfig, solver: str | Solver
) -> Explanation:
    assert solution.pick is not None
    choices = explain_pick(analysis.problem(budgets), solution.pick)
    slope = _slope(analysis, analysis.table.predict(solution.pick))
    prices = {}
    for budget in budgets:
        cost = analysis.costs[budget.metric]
        limit = budget.limit(cost.reference)
        step = 10.0 ** math.floor(math.log10(limit / 100) + 1e-9)
        price = choices.prices[cost.name] * cost.divisor * slope
        binding = cost.name in choices.binding
        prices[budget.metric] = Price(cost.total(solution.pick), limit, cost.unit, price, step, binding)
    feasibility = make_feasibility(analysis, budgets)
    return Explanation(analysis, budgets, solution, config, prices, feasibility, choices, solver)


def _slope(analysis: Analysis, predicted: float) -> float:
    """How much a predicted loss moves with the loss before saturation."""
    return (1 - predicted / analysis.table.ceiling) ** 2


def _signed(text: str) -> str:
    return text if text.startswith("-") else f"+{text}"


def _aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell; the middle of a long table is left out."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return ("  " + "  ".join(padded)).rstrip()

    shown = [line(r) for r in rows]
    if len(shown) > _SHOWN:
        half = _SHOWN // 2
        shown = [*shown[:half], f"  ... {len(shown) - 2 * half} more groups ...", *shown[-half:]]
    return [line(heads), *shown]
