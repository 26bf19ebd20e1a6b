"""`Explanation`: why each group got its scheme, what else it might have had, and what another limit would buy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpq.budget import Budget
from mpq.config import BitConfig
from mpq.errors import FormatError, GraphError
from mpq.feasibility import Feasibility, make_feasibility
from mpq.problem import Ints, Problem, Solution, Status
from mpq.quantizers.formats import Scheme
from mpq.search import Solver
from mpq.search.explain import Choices, explain_pick, others, resampled, survivors
from mpq.space import SearchSpace

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
        price: Loss saved per unit of a higher limit, for small changes (dual price of the linear relaxation); 0 where
            the limit does not bind.
        step: A round amount, between 1 and 10 % of the limit.
    """

    used: float
    limit: float
    unit: str
    price: float
    step: float

    @property
    def binding(self) -> bool:
        """A higher limit would lower the loss."""
        return self.price > 0


@dataclass(frozen=True, eq=False)
class WhatIf:
    """The best config with some groups pinned, against that without.

    Attributes:
        pin: As given.
        before: Config without the pins.
        after: Config with them, solved anew.
        loss: Predicted loss of both.
        changes: Group -> scheme before and after, of all groups that change; pinned ones come first.
        pinned: Names of the pinned groups.
        proven: Both are proven optimal, so that this is what the pin costs; else it is what was found.
    """

    pin: Mapping[str, str]
    before: BitConfig = field(repr=False)
    after: BitConfig = field(repr=False)
    loss: tuple[float, float]
    changes: Mapping[str, tuple[str, str]]
    pinned: tuple[str, ...]
    proven: bool

    @property
    def added_loss(self) -> float:
        """What the pins add to the predicted loss."""
        return self.loss[1] - self.loss[0]

    def __repr__(self) -> str:
        pins = ", ".join(f"{k} to {v}" for k, v in self.pin.items())
        before, after = self.loss
        lines = [
            f"WhatIf: pin {pins}: loss {self.added_loss:+.3g} ({before:.4g} -> {after:.4g})"
            + ("" if self.proven else ", not proven: the search of one of the two ended early")
        ]
        metrics = [
            f"{m} {v['value']:,.6g} -> {self.after.metrics[m]['value']:,.6g} {v['unit']}"
            for m, v in self.before.metrics.items()
            if v["value"] != self.after.metrics[m]["value"]
        ]
        lines += [f"  {', '.join(metrics)}"] if metrics else []
        if not self.changes:
            lines.append("  nothing changes: the answer has these schemes anyway")
        width = max(map(len, self.changes), default=0)
        for name, (a, b) in self.changes.items():
            lines.append(f"  {name:<{width}}  {a} -> {b}" + (" (pinned)" if name in self.pinned else ""))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


@dataclass(frozen=True)
class Survival:
    """How often each choice stays the best when the losses are drawn anew from their errors.

    Attributes:
        kept: Group -> share of the draws in which it keeps its scheme.
        schemes: Group -> scheme -> share of the draws in which it has that.
        whole: Share of the draws in which no group changes.
        draws: How many.
        source: ``samples`` (bootstrap over calibration samples) or ``standard errors``.
    """

    kept: Mapping[str, float]
    schemes: Mapping[str, Mapping[str, float]]
    whole: float
    draws: int
    source: str

    def __repr__(self) -> str:
        sure = sum(v >= 0.9 for v in self.kept.values())
        lines = [
            f"Survival over {self.draws} draws from {self.source}: {sure} of {len(self.kept)} groups keep their scheme "
            f"in 90 % or more, the whole map in {self.whole:.0%}"
        ]
        unsure = [n for n in sorted(self.kept, key=lambda n: self.kept[n]) if self.kept[n] < 1]
        width = max(map(len, unsure), default=0)
        for name in unsure[:_SHOWN]:
            shares = sorted(self.schemes[name].items(), key=lambda x: -x[1])
            lines.append(f"  {name:<{width}}  " + ", ".join(f"{s} {v:.0%}" for s, v in shares))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


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
    choices: Choices
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
        ``costs`` holds its part of every metric. ``runner_up`` is the scheme that it would be cheapest to have instead
        at the prices of the limits (None for a group with one scheme), with what the loss (``runner_up_loss``) and the
        metrics (``runner_up_costs``) would change by if nothing else did; ``margin`` is that loss with the change of
        the metrics priced in.
        """
        problem, groups = self._problem(), np.arange(len(self.pick))
        raw = self.solution.objective
        part = (problem.loss + 0.5 * others(problem, self.pick))[groups, self.pick]
        part = part * (self.loss / raw if raw > 0 else 0.0)
        change = self.analysis.table.saturated(raw + self.choices.change) - self.loss
        priced = (self.choices.margin - self.choices.change) * _slope(self.analysis, self.loss)
        names = [str(s) for s in self.analysis.space.schemes]
        metrics = self.analysis.costs.items()
        rows = []
        for g, group in enumerate(self.analysis.space.groups):
            s, r = int(self.pick[g]), int(self.choices.runner_up[g])
            row: dict[str, Any] = {
                "group": group.name,
                "layers": [x.name for x in group.layers],
                "scheme": names[s],
                "loss": float(part[g]),
                "costs": {m: float(c.cost[g, s] / c.divisor) for m, c in metrics},
                "runner_up": None,
                "runner_up_loss": None,
                "runner_up_costs": None,
                "margin": None,
            }
            if r >= 0:
                row["runner_up"] = names[r]
                row["runner_up_loss"] = float(change[g, r])
                row["runner_up_costs"] = {m: float((c.cost[g, r] - c.cost[g, s]) / c.divisor) for m, c in metrics}
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
        allowed, pinned = _pinned(self.analysis.space, pin)
        analysis = replace(self.analysis, space=replace(self.analysis.space, allowed=allowed))
        solution = analysis.solve(self.budgets, self.solver)
        assert solution.pick is not None
        after = analysis.config_for(self.budgets, solution)
        names = [g.name for g in analysis.space.groups]
        moved = [g for g in np.flatnonzero(solution.pick != self.pick).tolist() if names[g] in pinned]
        moved += [g for g in np.flatnonzero(solution.pick != self.pick).tolist() if names[g] not in pinned]
        schemes = [str(s) for s in analysis.space.schemes]
        changes = {names[g]: (schemes[self.pick[g]], schemes[solution.pick[g]]) for g in moved}
        proven = all(s.status is Status.OPTIMAL for s in (self.solution, solution))
        loss = self.loss, analysis.table.predict(solution.pick)
        return WhatIf({k: str(v) for k, v in pin.items()}, self.config, after, loss, changes, pinned, proven)

    def survival(self, draws: int = 50, seed: int = 0, time_limit: float = 10.0) -> Survival:
        """How often each choice survives when the table's losses are drawn anew and the problem is solved again.

        Where the table has effects by sample, samples are drawn anew (bootstrap), interactions included; else losses
        get normal errors of their standard errors. A choice that changes in many draws was settled by noise: another
        would do as well, or more calibration samples would tell.

        Args:
            draws: How many times to solve.
            seed: Of the draws.
            time_limit: Seconds for all of them.

        Raises:
            MpqError: If the table knows no errors (measured on one sample, say).
        """
        table, space = self.analysis.table, self.analysis.space
        drawn = resampled(self._problem(), table.stderr, table.rows, draws, seed)
        counts, whole = np.zeros(space.allowed.shape, np.int64), 0
        groups = np.arange(len(counts))
        for pick in survivors(self.pick, drawn, time_limit / max(draws, 1)):
            counts[groups, pick] += 1
            whole += int((pick == self.pick).all())
        shares = counts / draws
        schemes = {
            group.name: {str(space.schemes[s]): float(shares[g, s]) for s in np.flatnonzero(counts[g])}
            for g, group in enumerate(space.groups)
        }
        kept = {group.name: float(shares[g, self.pick[g]]) for g, group in enumerate(space.groups)}
        source = "standard errors" if table.rows is None or len(table.rows) < 2 else "samples"
        return Survival(kept, schemes, whole / draws, draws, source)

    def to_json(self) -> str:
        """Budgets, prices, reach and the table; same input, same bytes."""
        data = {
            "schema": "mpq/explanation-1",
            "budgets": [b.text for b in self.budgets],
            "loss": self.loss,
            "status": self.solution.status.value,
            "gap": self.solution.gap if math.isfinite(self.solution.gap) else None,
            "prices": {m: {**vars(p), "binding": p.binding} for m, p in self.prices.items()},
            "reach": {m: vars(r) for m, r in self.feasibility.metrics.items()},
            "groups": self.table(),
            "provenance": dict(sorted(self.analysis.provenance.items())),
        }
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write the JSON file."""
        Path(path).write_text(self.to_json(), "utf8")
        return Path(path)

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
            told = (
                f"binds: {show(p.step)} more would save about {p.price * p.step:.2g} of loss"
                if p.binding
                else "does not bind: a higher limit would buy nothing"
            )
            lines.append(f"{m} {show(p.used)} of {show(p.limit)}, {told}")
            lines.append(f"{m} can be anything from {show(reach.least)} to {show(reach.most)}")
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
                f"margins below 0 ({negative}): by price alone the runner-up is better, but it does not fit into what "
                "the limits leave"
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
    assert solution.pick is not None
    choices = explain_pick(analysis.problem(budgets), solution.pick)
    slope = _slope(analysis, analysis.table.predict(solution.pick))
    prices = {}
    for budget in budgets:
        cost = analysis.costs[budget.metric]
        limit = budget.limit(cost.reference)
        step = 10.0 ** math.ceil(math.log10(limit / 100) - 1e-9)
        price = choices.prices[cost.name] * cost.divisor * slope
        prices[budget.metric] = Price(cost.total(solution.pick), limit, cost.unit, price, step)
    config = analysis.config_for(budgets, solution)
    feasibility = make_feasibility(analysis, budgets)
    return Explanation(analysis, budgets, solution, config, prices, feasibility, choices, solver)


def _slope(analysis: Analysis, predicted: float) -> float:
    """How much a predicted loss moves with the loss before saturation."""
    return (1 - predicted / analysis.table.ceiling) ** 2


def _pinned(space: SearchSpace, pin: Mapping[str, str | Scheme]) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Allowed choices with the pins, and the names of the pinned groups."""
    allowed, pinned = space.allowed.copy(), {}
    for pattern, wanted in pin.items():
        scheme = wanted if isinstance(wanted, Scheme) else Scheme.parse(wanted)
        members = {pattern} if any(g.name == pattern for g in space.groups) else set()
        if not members:
            members = {x.name for x in space.graph.match(pattern)}
        found = [g for g, x in enumerate(space.groups) if x.name in members or members & {y.name for y in x.layers}]
        if not found:
            raise GraphError(f"{pattern!r} is not in the search: it was skipped")
        for g in found:
            if scheme not in space.schemes or not space.allowed[g, space.schemes.index(scheme)]:
                names = ", ".join(str(s) for s, ok in zip(space.schemes, space.allowed[g], strict=True) if ok)
                raise FormatError(f"{scheme} is not open to {space.groups[g].name!r}; it may have {names}")
            allowed[g] = [s == scheme for s in space.schemes]
            pinned[space.groups[g].name] = True
    return allowed, tuple(pinned)


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
