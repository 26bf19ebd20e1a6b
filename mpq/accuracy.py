"""Accuracy budgets: the cheapest config whose measured accuracy drop stays within a limit. No torch in here."""

from __future__ import annotations

import numpy as np

from mpq.analysis import Analysis, find_solver
from mpq.budget import Budget
from mpq.errors import UnreachableError
from mpq.problem import Constraint, Problem, Solution, Status
from mpq.search import Bisection, Evaluations, MeasuredSolution, Solver, auto_solver

ROUNDING = 1e-12  # shares of whole counts differ by rounding


def smallest_within_drop(
    analysis: Analysis,
    evaluations: Evaluations,
    drop: Budget,
    others: tuple[Budget, ...],
    solver: str | Solver,
) -> MeasuredSolution:
    """Bisection over the size limit (`mpq.search.Bisection`), each step an optimum that is measured.

    Args:
        analysis: The measured model.
        evaluations: Measure the accuracy drop of picks.
        drop: The accuracy budget.
        others: Further budgets; all are met as well.
        solver: Solver of each step.

    Returns:
        A pick that has been measured to be within the limit, with the trace of all that was measured.

    Raises:
        UnreachableError: If the other budgets can't be met, or all that was measured exceeds the limit.
    """
    analysis.solve(others, solver)  # says what is reachable if nothing is

    def solve(problem: Problem) -> Solution:
        return (auto_solver(problem) if solver == "auto" else find_solver(solver)).solve(problem)

    problem, size = analysis.problem(others), analysis.costs["size"]
    first = next((c for c in problem.constraints if c.name == "size"), None)
    if first is None:
        first = Constraint("size", size.unit, size.cost, np.array([size.cost.max(1).sum()]))
    rest = tuple(c for c in problem.constraints if c.name != "size")
    problem = Problem(problem.loss, (first, *rest), problem.interactions)
    found = Bisection(drop.value + ROUNDING, solve=solve).search(problem, evaluations)
    if found.status is Status.NO_SOLUTION and len(found.trace):
        trace = found.trace
        least = int(trace.losses.argmin())
        raise UnreachableError(
            f"{drop.text} is met by none of the {len(trace)} configs measured, that of the least predicted loss under "
            f"the other budgets included: the least drop is {trace.losses[least]:.2%} at "
            f"{size.total(trace.picks[least]) / 1e3:,.1f} kB; allow higher bits, a larger drop or more evaluations"
        )
    return found
