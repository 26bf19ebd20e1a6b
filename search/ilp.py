"""Integer linear program for several constraints at once, by PuLP with HiGHS."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pulp

from mpq.errors import MpqError
from mpq.problem import Floats, Ints, Problem, Solution, Status, infeasible, solved

# HiGHS works with absolute tolerances, here on numbers scaled to about one.
_FEASIBILITY = 1e-9
_SCALE_SLACK = 10.0
_MAX_CUTS = 100


@dataclass(frozen=True)
class Ilp:
    """Exact solver for any number of constraints and rows.

    Two things make the answer of a floating-point solver trustworthy. A pick that violates a limit by HiGHS's tolerance
    is cut off and the model solved again. And losses of one problem span many orders of magnitude, while HiGHS's
    tolerances are absolute: after each solution, schemes that alone cost more than the whole pick are dropped and the
    losses scaled to it, until the scale fits. `OPTIMAL` holds within about 1e-6 of the objective.

    Attributes:
        time_limit: Seconds; after that the best pick found is returned as `FEASIBLE` with its bound.
        seed: Random seed of HiGHS.
    """

    time_limit: float = 60.0
    seed: int = 0

    def solve(self, problem: Problem) -> Solution:
        """Solve a problem.

        Raises:
            MpqError: If the problem has interactions.
        """
        started = time.perf_counter()
        if problem.interactions is not None:
            raise MpqError("the ilp takes no interactions; use the interaction solver")
        if not len(problem.loss):
            return solved(problem, [], 0.0, 0.0, "ilp", proven=True)
        least = problem.loss.min(1, keepdims=True)
        excess = problem.loss - least
        scale = float(excess[problem.allowed].max()) or 1.0
        best, bound, cuts = None, float(least.sum()), list[Ints]()
        while True:
            remaining = self.time_limit - (time.perf_counter() - started)
            keep = problem.allowed & (excess <= scale * (1 + 1e-9))
            status, pick, low = self._run(problem, excess, keep, scale, cuts, max(0.1, remaining))
            seconds = time.perf_counter() - started
            if pick is None:
                if best is not None:
                    return solved(problem, best, bound, seconds, "ilp")
                if status == pulp.LpSolutionInfeasible:
                    return infeasible(problem, seconds, "ilp")
                return self._nothing(seconds, status)
            if not problem.feasible(pick):
                cuts.append(pick)
                if len(cuts) > _MAX_CUTS or remaining <= 0:
                    return (
                        self._nothing(seconds, status) if best is None else solved(problem, best, bound, seconds, "ilp")
                    )
                continue
            bound = max(bound, float(least.sum()) + low * scale)
            if best is None or problem.objective(pick) <= problem.objective(best):
                best = pick
            spent = float(excess[np.arange(len(pick)), best].sum())
            optimal = status == pulp.LpSolutionOptimal
            if not optimal or scale <= _SCALE_SLACK * spent or spent == 0:
                return solved(problem, best, bound, seconds, "ilp", proven=optimal)
            scale = spent

    def _run(
        self, problem: Problem, excess: Floats, keep: Any, scale: float, cuts: list[Ints], seconds: float
    ) -> tuple[int, Ints | None, float]:
        """PuLP's solution status, the pick if any, and the lower bound of the scaled excess loss."""
        model, choose = _build(problem, excess / scale, keep, cuts)
        options = {
            "mip_feasibility_tolerance": _FEASIBILITY,
            "primal_feasibility_tolerance": _FEASIBILITY,
            "dual_feasibility_tolerance": _FEASIBILITY,
            "random_seed": self.seed,
        }
        model.solve(pulp.HiGHS(msg=False, timeLimit=seconds, gapRel=0.0, gapAbs=0.0, threads=1, **options))
        # PuLP's `status` says Optimal at a time limit; `sol_status` does not.
        if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            return model.sol_status, None, 0.0
        pick = np.array([max(row, key=lambda s: row[s].value() or 0.0) for row in choose])
        return model.sol_status, pick, float(model.solverModel.getInfo().mip_dual_bound)

    def _nothing(self, seconds: float, status: int) -> Solution:
        if status == pulp.LpSolutionNoSolutionFound:
            message = f"no pick found within {self.time_limit:g} s; raise the time limit"
        else:
            message = "HiGHS finds only picks that violate a limit by its tolerance; loosen the limit slightly"
        return Solution(Status.NO_SOLUTION, None, np.inf, -np.inf, {}, seconds, "ilp", {}, message)


def _build(problem: Problem, loss: Floats, keep: Any, cuts: list[Ints]) -> tuple[Any, list[dict[int, Any]]]:
    """The PuLP model and its binary variables, one dict of kept schemes per group."""
    model = pulp.LpProblem("mpq", pulp.LpMinimize)
    choose = [
        {int(s): model.add_variable(f"x_{g}_{s}", cat="Binary") for s in np.flatnonzero(kept)}
        for g, kept in enumerate(keep)
    ]
    model += pulp.lpSum(loss[g, s] * x for g, row in enumerate(choose) for s, x in row.items())
    for row in choose:
        model += pulp.lpSum(row.values()) == 1
    for c in problem.constraints:
        for r, limit in enumerate(c.slack_limit):
            if np.isposinf(limit):
                continue
            scale = max(abs(limit), float(np.abs(c.cost[..., r]).max())) or 1.0
            total = pulp.lpSum(c.cost[g, s, r] / scale * x for g, row in enumerate(choose) for s, x in row.items())
            model += total <= limit / scale
    for pick in cuts:
        if all(int(s) in row for s, row in zip(pick, choose, strict=True)):
            model += pulp.lpSum(row[int(s)] for s, row in zip(pick, choose, strict=True)) <= len(pick) - 1
    return model, choose
