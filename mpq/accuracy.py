"""Accuracy budgets: the cheapest config whose measured accuracy drop stays within a limit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mpq.analysis import Analysis
from mpq.budget import Budget
from mpq.config import BitConfig
from mpq.errors import UnreachableError
from mpq.evaluation import Evaluator
from mpq.progress import progress_bar
from mpq.search import Solver

_STEPS = 12  # bisection halves the range of sizes: 12 steps reach 1/4096 of it


def smallest_within_drop(
    analysis: Analysis,
    evaluator: Evaluator,
    drop: Budget,
    others: tuple[Budget, ...],
    solver: str | Solver,
    progress: bool,
) -> BitConfig:
    """Bisection over the size limit, each step an exact optimum that is measured.

    The answer has been measured to be within the limit. Accuracy need not be monotone in size, so a smaller config that
    happens to be within it may exist.

    Args:
        analysis: The measured model.
        evaluator: Measures configs.
        drop: The accuracy budget.
        others: Further budgets; all are met as well.
        solver: Solver of each step.
        progress: Show a bar.

    Raises:
        UnreachableError: If even the config with the least predicted loss under the other budgets exceeds the limit.
    """
    size = analysis.costs["size"]
    limit_drop = drop.value + 1e-12  # shares of whole counts differ by rounding
    if any(b.metric == "size" for b in others):
        others_without = tuple(b for b in others if b.metric != "size")
        cap = next(b for b in others if b.metric == "size").limit(size.reference)
    else:
        others_without, cap = others, np.inf

    def solve(limit: float) -> BitConfig:
        budgets = others_without
        if np.isfinite(limit):
            budgets = (*budgets, Budget("size", limit, False, f"size<={limit:.0f}B"))
        config = analysis.config_for((drop, *others), analysis.solve(budgets, solver))
        # Each step is a proven optimum of its size, but nothing proves that no smaller size would do.
        record = {**config.solver, "name": "bisection", "status": "feasible", "bound": None, "gap": None}
        return replace(config, solver=record)

    best = solve(cap)
    low = size.metric(size.cost_floor(analysis.space.allowed))
    measured_drop, measured = evaluator.accuracy_drop(best)
    best = best.with_measured(measured)
    if measured_drop > limit_drop:
        raise UnreachableError(
            f"{drop.text} can't be met: the config with the least predicted loss under the other budgets measures a "
            f"drop of {measured_drop:.2%} at {best.size_bytes / 1e3:,.1f} kB; allow higher bits or a larger drop"
        )
    high = best.size_bytes
    for _ in progress_bar(range(_STEPS), "accuracy budget", progress):
        if high - low < 1:
            break
        middle = (low + high) / 2
        try:
            candidate = solve(middle)
        except UnreachableError:  # the other budgets can't be met at this size
            low = middle
            continue
        measured_drop, measured = evaluator.accuracy_drop(candidate)
        if measured_drop <= limit_drop:
            best, high = candidate.with_measured(measured), candidate.size_bytes
        else:
            low = middle
    return best
