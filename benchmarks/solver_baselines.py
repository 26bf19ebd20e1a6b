"""General solvers that `solvers.py` holds ours against, each as ``(problem, seconds) -> (objective, proven)``."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pulp
import scipy.sparse as sp
from scipy.optimize import Bounds, LinearConstraint, milp

from mpq.problem import Constraint, Problem

Answer = tuple[float, bool]  # objective (infinite without a pick) and whether it is proven


def judged(problem: Problem, pick: np.ndarray, proven: bool) -> Answer:
    """A pick as the problem sees it; a limit that it breaks by no more than the solver's tolerance counts as met."""
    loose = tuple(Constraint(c.name, c.unit, c.cost, c.limit * (1 + 1e-7)) for c in problem.constraints)
    fits = Problem(problem.loss, loose).feasible(pick)
    return (problem.objective(pick), proven) if fits else (np.inf, False)


def by_highs(problem: Problem, seconds: float) -> Answer:
    """Scipy's milp."""
    G, S = problem.loss.shape
    one = sp.kron(sp.eye(G), np.ones((1, S)), format="csr")
    rows = [LinearConstraint(one, 1, 1)]
    for c in problem.constraints:
        rows.append(LinearConstraint(sp.csr_matrix(c.cost[..., 0].reshape(1, -1) / c.limit[0]), -np.inf, 1))
    options = {"time_limit": seconds, "mip_rel_gap": 0.0}
    found = milp(
        problem.loss.ravel(), constraints=rows, integrality=np.ones(G * S), bounds=Bounds(0, 1), options=options
    )
    if found.x is None:
        return np.inf, False
    return judged(problem, found.x.reshape(G, S).argmax(1), found.status == 0)


def by_cbc(problem: Problem, seconds: float) -> Answer:
    """PuLP with CBC."""
    G, S = problem.loss.shape
    model = pulp.LpProblem("baseline", pulp.LpMinimize)
    x = [[model.add_variable(f"x_{g}_{s}", cat="Binary") for s in range(S)] for g in range(G)]
    flat = [v for row in x for v in row]
    model += pulp.LpAffineExpression(list(zip(flat, problem.loss.ravel().tolist(), strict=True)))
    for row in x:
        model += pulp.lpSum(row) == 1
    for c in problem.constraints:
        cost = (c.cost[..., 0] / c.limit[0]).ravel().tolist()
        model += pulp.LpAffineExpression(list(zip(flat, cost, strict=True))) <= 1
    model.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=seconds, threads=1, gapRel=0.0))
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return np.inf, False
    pick = np.array([[v.value() or 0.0 for v in row] for row in x]).argmax(1)
    return judged(problem, pick, model.sol_status == pulp.LpSolutionOptimal)


def by_cpsat(problem: Problem, seconds: float) -> tuple[float, bool, float]:
    """OR-tools CP-SAT; and its CPU seconds, without imports.

    It needs a process of its own: OR-tools carries a HiGHS whose symbols clash with those of highspy.
    """
    arrays = io.BytesIO()
    costs = [c.cost[..., 0] for c in problem.constraints]
    limits = [c.limit[0] for c in problem.constraints]
    np.savez(arrays, loss=problem.loss, cost=np.stack(costs), limit=limits, seconds=seconds)
    worker = Path(__file__).with_name("cpsat_worker.py")
    done = subprocess.run([sys.executable, worker], input=arrays.getvalue(), capture_output=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    if found["pick"] is None:
        return np.inf, False, found["cpu"]
    return *judged(problem, np.array(found["pick"]), found["proven"]), found["cpu"]


def by_nsga2(problem: Problem, seconds: float) -> Answer:
    """Pymoo's NSGA-II, population 100, 200 generations, loss against cost; the best within the limit."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem as Moo
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.optimize import minimize
    from pymoo.termination import get_termination
    from pymoo.termination.collection import TerminationCollection

    G, S = problem.loss.shape
    constraint, groups = problem.constraints[0], np.arange(G)

    class Allocation(Moo):
        def __init__(self) -> None:
            super().__init__(n_var=G, n_obj=2, n_ieq_constr=1, xl=0, xu=S - 1, vtype=int)

        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            picks = x.astype(int)
            spent = constraint.cost[groups, picks, 0].sum(1) / constraint.limit[0]
            out["F"] = np.c_[problem.loss[groups, picks].sum(1), spent]
            out["G"] = spent - 1

    clock = f"{int(seconds // 3600):02}:{int(seconds % 3600 // 60):02}:{int(seconds % 60):02}"
    algorithm = NSGA2(
        pop_size=100,
        sampling=IntegerRandomSampling(),
        crossover=SBX(vtype=float, repair=RoundingRepair()),
        mutation=PM(vtype=float, repair=RoundingRepair()),
    )
    end = TerminationCollection(get_termination("n_gen", 200), get_termination("time", clock))
    found = minimize(Allocation(), algorithm, end, seed=0)
    if found.F is None:
        return np.inf, False
    return judged(problem, np.atleast_2d(found.X)[np.atleast_2d(found.F)[:, 0].argmin()].astype(int), False)


def baselines(G: int) -> dict[str, Callable[[Problem, float], Any]]:
    """Those that are installed and can do anything at this size."""
    found: dict[str, Callable[[Problem, float], Any]] = {"highs": by_highs, "cbc": by_cbc}
    if find_spec("ortools"):
        found["cpsat"] = by_cpsat
    if find_spec("pymoo") and G <= 10_000:
        found["nsga2"] = by_nsga2
    return found


def linearized_by_highs(problem: Problem, seconds: float) -> Answer:
    """HiGHS on the exact linearization: a variable for each pair of choices, tied to both (Adams and Johnson, 1994)."""
    assert problem.interactions is not None
    G, S = problem.loss.shape
    pairs = [(g, h) for g in range(G) for h in range(g + 1, G)]
    n, block = G * S, S * S
    objective = np.concatenate([problem.loss.ravel(), *(problem.interactions[g, :, h].ravel() for g, h in pairs)])
    column, row, value = [], [], []
    for k, (g, h) in enumerate(pairs):
        y = n + k * block + np.arange(block).reshape(S, S)
        for s in range(S):
            for owner, taken in ((g * S + s, y[s]), (h * S + s, y[:, s])):
                index = len(column)
                column.append(np.append(taken, owner))
                row.append(np.full(S + 1, index))
                value.append(np.append(np.ones(S), -1.0))
    shape = len(column), len(objective)
    ties = sp.csr_matrix((np.concatenate(value), (np.concatenate(row), np.concatenate(column))), shape)
    one = sp.hstack([sp.kron(sp.eye(G), np.ones((1, S))), sp.csr_matrix((G, shape[1] - n))], format="csr")
    constraints = [LinearConstraint(ties, 0, 0), LinearConstraint(one, 1, 1)]
    for c in problem.constraints:
        padded = np.concatenate([c.cost[..., 0].ravel() / c.limit[0], np.zeros(shape[1] - n)])
        constraints.append(LinearConstraint(sp.csr_matrix(padded), -np.inf, 1))
    integral = (np.arange(shape[1]) < n).astype(int)
    options = {"time_limit": seconds, "mip_rel_gap": 0.0}
    found = milp(objective, constraints=constraints, integrality=integral, bounds=Bounds(0, 1), options=options)
    if found.x is None:
        return np.inf, False
    return judged(problem, found.x[:n].reshape(G, S).argmax(1), found.status == 0)
