"""A feasible pick is found wherever there is one, and what was not proven is not claimed."""

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from mpq.problem import Constraint, Problem, Solution, Status
from mpq.search import SEARCHES, Bisection, Evaluations, Exhaustive, Ilp, Interaction, Knapsack, Sweep
from mpq.search.core import Core
from mpq.search.feasible import roomiest
from mpq.testing_search import network_like_problem


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


def out_of_time(self, problem):
    return Solution(Status.NO_SOLUTION, None, np.inf, -np.inf, {}, 0.0, "slow", {}, "out of time")


def with_conflict():
    """Two limits that need some of either kind of scheme: what uses least of both shares violates one."""
    problem, measure = network_like_problem()
    (size,) = problem.constraints
    rest = Constraint("rest", "bits", 10 - size.cost / size.cost[:, :1] * 2, 42.0)
    return Problem(problem.loss, (size, rest), problem.interactions), measure


def test_running_out_of_time_is_no_proof_that_there_is_nothing(monkeypatch):
    problem, measure = conflicting(50), lambda pick: 0.0
    monkeypatch.setattr(Ilp, "solve", out_of_time)
    assert roomiest(problem).status is Status.NO_SOLUTION
    for name, search in SEARCHES.items():
        found = search().search(problem, Evaluations(measure))
        assert (found.status, found.message) == (Status.NO_SOLUTION, "out of time"), name
    found = Bisection(1.0).search(problem, Evaluations(measure))
    assert (found.status, found.message) == (Status.NO_SOLUTION, "out of time")


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_start_from_any_pick_where_the_predicted_optimum_takes_too_long(name, monkeypatch):
    problem, measure = network_like_problem()
    monkeypatch.setattr(Interaction, "solve", out_of_time)
    found = SEARCHES[name]().search(problem, Evaluations(measure, limit=6))
    assert found.status is Status.FEASIBLE
    assert len(found.trace) == 6


def test_sweep_begins_at_what_the_other_limits_allow():
    problem, measure = with_conflict()
    size = problem.constraints[0]
    sizes = sorted(
        size.usage(p)[0] for p in np.concatenate(list(Exhaustive().all_picks(problem))) if problem.feasible(p)
    )
    assert problem.smallest_usage()["size"] < sizes[0] < sizes[-1]
    found = Sweep(points=4).search(problem, Evaluations(measure, limit=12))
    assert found.status is Status.FEASIBLE
    assert min(size.usage(p)[0] for p in found.trace.picks) == sizes[0]


@pytest.mark.parametrize("name", ["nsga2", "linas"])
def test_seeds_are_spread_where_the_limit_does_not_bind(name):
    """A whole frontier is searched under a limit that every pick meets."""
    problem, measure = network_like_problem()
    (size,) = problem.constraints
    loose = Constraint("size", "bits", size.cost, size.cost.max(1).sum())
    wide = Problem(problem.loss, (loose,), problem.interactions)
    found = SEARCHES[name]().search(wide, Evaluations(measure, limit=8))
    seeds = {p.tobytes(): size.usage(p)[0] for p in found.trace.picks}
    assert len(seeds) == 8
    share = (np.array(list(seeds.values())) - size.cost.min(1).sum()) / np.ptp(size.cost, axis=1).sum()
    assert share.min() < 0.2
    assert share.max() > 0.8


def test_knapsack_bound_is_below_the_optimum_to_the_last_bit(monkeypatch):
    """In exact arithmetic, where sums of floats are rounded upwards."""
    monkeypatch.setattr("mpq.search.knapsack._Run.prove", lambda self, states, deadline: False)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        loss = rng.integers(1, 40, (6, 3)) / 10
        cost = rng.integers(1, 6, (6, 3)).astype(float)
        limit = cost[np.arange(6), rng.integers(3, size=6)].sum()
        problem = Problem(loss, (Constraint("size", "B", cost, limit),))
        exact = sum(Fraction(float(x)) for x in loss[np.arange(6), Exhaustive().solve(problem).pick])
        assert Fraction(Knapsack().solve(problem).bound) <= exact, seed


SCRIPT = """
import mpq.search.interaction as interaction
from mpq.search import Ilp, Interaction
from mpq.problem import Problem
from mpq.testing_search import network_like_problem
interaction._CUBES = 2e7
problem, _ = network_like_problem(groups=24)
plain = Problem(problem.loss, problem.constraints)
for found in (Interaction(restarts=5).solve(problem), Ilp().solve(plain)):
    print(found.status, found.pick.tobytes().hex(), found.objective.hex(), found.bound.hex(), found.prices)
"""


def test_equal_bytes_of_two_processes():
    """Also where work ends before there is a proof."""
    runs = [subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True).stdout for _ in range(2)]
    assert runs[0] == runs[1]
    assert b"FEASIBLE" in runs[0]


def test_a_limit_of_nodes_keeps_the_best_pick(monkeypatch):
    monkeypatch.setattr("mpq.search.ilp._FIRST_CORES", (5,))
    monkeypatch.setattr("mpq.search.ilp._NODES", 0)
    statuses = []
    solve = Core.solve

    def recorded(self, start, cuts, seconds, seed, nodes=None):
        found = solve(self, start, cuts, seconds, seed, nodes)
        statuses.append((nodes, found[0], found[1] is not None))
        return found

    monkeypatch.setattr(Core, "solve", recorded)
    problem = conflicting(60)
    assert problem.feasible(Ilp(time_limit=1).solve(problem).pick)
    assert (0, Status.FEASIBLE, True) in statuses
