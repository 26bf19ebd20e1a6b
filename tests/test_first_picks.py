"""A feasible pick is found wherever there is one, and what was not proven is not claimed."""

import numpy as np
import pytest

from mpq.problem import Constraint, Problem, Status
from mpq.search import Exhaustive, Ilp, Interaction


def conflicting(G, seed=0, S=6):
    """Three rows of which each scheme takes the same sum, and limits that a hidden, balanced pick meets exactly."""
    rng = np.random.default_rng(seed)
    cost = np.round(1000 * rng.dirichlet(np.full(3, 0.5), (G, S)))
    groups, pick = np.arange(G), rng.integers(S, size=G)
    for g in [*groups] * 5:
        without = cost[groups, pick].sum(0) - cost[g, pick[g]]
        pick[g] = (without + cost[g]).max(1).argmin()
    limit = cost[groups, pick].sum(0)
    constraints = tuple(Constraint(f"c{r}", "", cost[..., r], limit[r]) for r in range(3))
    return Problem(rng.lognormal(0, 1, (G, S)), constraints)


def interacting(problem, seed=0):
    G, S = problem.loss.shape
    rows = np.random.default_rng(seed).standard_normal((20, G * S)) / 10
    pairs = (rows.T @ rows).reshape(G, S, G, S)
    pairs[np.arange(G), :, np.arange(G)] = 0
    return Problem(problem.loss, problem.constraints, pairs)


@pytest.mark.parametrize("G", [50, 200])
@pytest.mark.parametrize("seed", range(2))
def test_limits_without_room_are_met_within_a_short_time_limit(G, seed):
    problem = conflicting(G, seed)
    found = Ilp(time_limit=0.1).solve(problem)
    assert problem.feasible(found.pick)
    assert found.bound <= found.objective
    paired = interacting(problem)
    found = Interaction(time_limit=0.1).solve(paired)
    assert paired.feasible(found.pick)
    assert found.status is Status.FEASIBLE


def test_where_swaps_fail_an_integer_program_finds_a_pick(monkeypatch):
    monkeypatch.setattr("mpq.search.repair._SWAPS", 0)
    problem = conflicting(8, seed=1, S=4)
    found = Ilp(time_limit=1e-9).solve(problem)
    assert problem.feasible(found.pick)
    assert found.status is Status.FEASIBLE or found.objective == Exhaustive().solve(problem).objective
    none = Problem(problem.loss, tuple(Constraint(c.name, "", c.cost, c.limit - 40) for c in problem.constraints))
    assert Exhaustive().solve(none).status is Status.INFEASIBLE
    assert Ilp(time_limit=1e-9).solve(none).status is Status.INFEASIBLE
