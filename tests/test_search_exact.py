"""Exact solvers held to trying all picks, and at sizes where only a certificate tells."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import mpq.search.interaction as interaction
from mpq.errors import MpqError
from mpq.problem import Constraint, Problem, Status
from mpq.search import Exhaustive, Ilp, Interaction, Knapsack
from mpq.search.hull import hull_sweep, linear_optimum
from mpq.search.lagrangian import relax
from mpq.search.repair import Repair
from mpq.search.rows import binding_rows, fitting, named_prices
from mpq.testing import KINDS, random_numbers, separable_network


@st.composite
def problems(draw, rows=3, constraints=2):
    """Small problems, one in some that can't be met; limits often are exactly what some pick uses."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    G, S = draw(st.integers(0, 6)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from(KINDS))
    loss = random_numbers(rng, kind, (G, S))
    if draw(st.booleans()):
        forbidden = rng.random((G, S)) < 0.4
        forbidden[np.arange(G), rng.integers(0, S, G)] = False
        loss = np.where(forbidden, np.inf, loss)
    made = []
    for i in range(draw(st.integers(0, constraints))):
        cost = random_numbers(rng, draw(st.sampled_from(KINDS)), (G, S, draw(st.integers(1, rows))))
        limit = cost[np.arange(G), rng.integers(0, S, G)].sum(0)
        if draw(st.booleans()):
            low, high = cost.min(1).sum(0), cost.max(1).sum(0)
            limit = low + rng.uniform(-0.1, 1, cost.shape[2]) * (high - low)
        made.append(Constraint(f"c{i}", "", cost, limit))
    return Problem(loss, tuple(made))


def check(problem, solution):
    """Same status and objective as trying all picks, and a true account of it."""
    expected = Exhaustive().solve(problem)
    assert solution.status is expected.status
    if expected.pick is None:
        assert solution.message
        return
    assert problem.feasible(solution.pick)
    assert solution.objective == problem.objective(solution.pick)
    tolerance = 1e-9 * np.abs(problem.loss[np.arange(len(problem.loss)), solution.pick]).sum()
    assert solution.objective <= expected.objective + tolerance
    assert solution.bound == solution.objective
    assert all(price >= 0 for price in solution.prices.values())


@settings(max_examples=150, deadline=None)
@given(problems())
def test_ilp_equals_trying_all_picks(problem):
    check(problem, Ilp().solve(problem))


@settings(max_examples=200, deadline=None)
@given(problems(rows=1, constraints=1))
def test_knapsack_equals_trying_all_picks(problem):
    check(problem, Knapsack().solve(problem))


def interacting(problem, seed):
    """The problem with interactions as large as its losses, and what rounding may add to an objective."""
    rng = np.random.default_rng(seed)
    G, S = problem.loss.shape
    scale = np.abs(problem.loss[problem.allowed]).max(initial=0)
    pairs = rng.standard_normal((G, S, G, S)) * scale
    pairs = pairs + pairs.transpose(2, 3, 0, 1)
    pairs[np.arange(G), :, np.arange(G)] = 0.0
    return Problem(problem.loss, problem.constraints, pairs), 1e-9 * scale * G**2


@settings(max_examples=40, deadline=None)
@given(problems(rows=2, constraints=1), st.integers(0, 2**32 - 1))
def test_interaction_solver_equals_trying_all_picks(problem, seed):
    problem, rounding = interacting(problem, seed)
    expected, found = Exhaustive().solve(problem), Interaction().solve(problem)
    assert found.status is expected.status
    if found.pick is not None:
        assert problem.feasible(found.pick)
        assert found.objective <= expected.objective + rounding


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.9])
def test_relaxation_equals_the_linear_program(rows, share):
    """Bound and prices, against HiGHS on the linear relaxation."""
    problem = separable_network(300, rows=rows, share=share)
    cost, limit = binding_rows(problem)
    found = relax(problem.loss, cost, limit)
    G, S = problem.loss.shape
    units = np.abs(limit)
    reference = linprog(
        problem.loss.ravel(),
        A_ub=cost.reshape(G * S, -1).T / units[:, None],
        b_ub=limit / units,
        A_eq=np.kron(np.eye(G), np.ones(S)),
        b_eq=np.ones(G),
    )
    assert found.bound == pytest.approx(reference.fun, rel=1e-8)
    np.testing.assert_allclose(found.prices, -reference.ineqlin.marginals / units, rtol=1e-5, atol=1e-12)
    assert found.reduced.min() >= 0
    np.testing.assert_array_equal(found.reduced.min(1), 0)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_relaxation_is_below_every_feasible_pick(problem):
    """Also of those with a choice that its reduced cost rules out."""
    if not len(problem.loss):
        return
    cost, limit = binding_rows(problem)
    keep = fitting(problem.allowed, cost, limit)
    picks = np.concatenate(list(Exhaustive().all_picks(problem)))
    picks = picks[[problem.feasible(p) for p in picks]]
    assert keep[np.arange(len(problem.loss)), picks].all()
    if not keep.any(1).all():
        assert not len(picks)
        return
    found = relax(np.where(keep, problem.loss, np.inf), cost, limit)
    rows = np.arange(len(problem.loss))
    for pick in picks:
        least = found.bound + found.reduced[rows, pick].sum()
        assert least <= problem.objective(pick) + 10 * found.rounding + 1e-9 * found.reduced[rows, pick].sum()


def test_repaired_picks_are_feasible():
    tried = repaired = 0

    @settings(max_examples=60, deadline=None)
    @given(problems())
    def run(problem):
        nonlocal tried, repaired
        cost, limit = binding_rows(problem)
        if not len(problem.loss) or not fitting(problem.allowed, cost, limit).any(1).all():
            return
        found = relax(problem.loss, cost, limit)
        if np.isfinite(found.bound):
            pick = Repair(problem.loss, cost, limit, found.reduced, found.prices, np.inf).best()
            assert pick is None or problem.feasible(pick)
            tried, repaired = tried + 1, repaired + (pick is not None)

    run()
    assert tried > 10
    assert repaired > 0.7 * tried


def test_linear_optimum_of_many_groups_equals_the_whole_sweep():
    problem = separable_network(30_000)
    cost, limit = problem.constraints[0].cost[..., 0], float(problem.constraints[0].limit[0])
    price, pick = linear_optimum(problem.loss, cost, limit)
    sweep = hull_sweep(problem.loss, cost)
    rows = np.arange(len(cost))
    total = cost[rows, sweep.start].sum() + np.cumsum(sweep.added_cost)
    cut = int(np.searchsorted(total, limit, side="right"))
    assert price == sweep.slope[cut]
    whole = sweep.pick(cut)
    assert (pick != whole).sum() < 50  # those that use the room left
    assert limit - cost[rows, whole].sum() >= limit - cost[rows, pick].sum() >= 0
    assert linear_optimum(problem.loss, cost, np.inf)[0] == 0


@pytest.mark.parametrize("G", [2000, 30_000])
def test_large_knapsack_is_proven_and_equals_the_ilp(G):
    """Two ways to the same proof."""
    problem = separable_network(G)
    knapsack, ilp = Knapsack().solve(problem), Ilp(time_limit=20).solve(problem)
    assert knapsack.status is Status.OPTIMAL
    assert knapsack.gap == 0
    assert knapsack.objective == pytest.approx(ilp.objective, rel=1e-7)
    assert knapsack.objective <= ilp.objective * (1 + 1e-12)
    assert ilp.bound <= knapsack.objective * (1 + 1e-12)
    assert knapsack.prices["size"] == pytest.approx(ilp.prices["size"], rel=1e-3)


@pytest.mark.slow
def test_a_million_groups():
    solution = Knapsack().solve(separable_network(1_000_000))
    assert solution.gap < 1e-6


def test_prices_say_what_a_looser_limit_saves():
    """The slope of the optimum between limits a little apart."""
    problem = separable_network(150, rows=2)
    best = Ilp().solve(problem)
    for i, c in enumerate(problem.constraints):
        looser = Constraint(c.name, c.unit, c.cost, c.limit * 1.02)
        constraints = (looser, problem.constraints[1]) if i == 0 else (problem.constraints[0], looser)
        saved = best.objective - Ilp().solve(Problem(problem.loss, constraints)).objective
        assert saved / float(c.limit[0] * 0.02) == pytest.approx(best.prices[c.name], rel=0.15)


def test_prices_of_several_rows_add_up():
    cost = np.zeros((2, 2, 3)) + np.arange(3)
    constraints = Constraint("a", "", cost, [0, 1, 3]), Constraint("b", "", cost[..., 0], 1)
    problem = Problem(np.ones((2, 2)), constraints)
    assert binding_rows(problem)[1].tolist() == pytest.approx([1, 3])
    assert named_prices(problem, np.array([5.0, 7.0])) == {"a": 12.0, "b": 0.0}


def test_least_size_under_a_loss_limit():
    """There and back: the least size for the loss of the best pick is its size."""
    problem = separable_network(60, rows=2)
    best = Ilp().solve(problem)
    back = Ilp().solve(problem.least("size", best.objective))
    assert back.status is Status.OPTIMAL
    assert back.objective <= best.usage["size"][0]
    assert problem.objective(back.pick) == pytest.approx(best.objective, rel=1e-8)
    assert set(back.usage) == {"latency", "loss"}
    assert back.usage["latency"] <= problem.constraints[1].slack_limit
    small = separable_network(6, 3, rows=2)
    for limit in np.linspace(small.loss.min(1).sum(), small.loss.max(1).sum(), 7):
        swapped = small.least("latency", limit)
        check(swapped, Ilp().solve(swapped))
    forbidden = Problem(np.where(small.loss > small.loss.mean(), np.inf, small.loss), small.constraints)
    assert np.isinf(forbidden.least("size", 1.0).loss).any()


def test_least_of_what_is_not_there_is_refused():
    problem = separable_network(3, rows=1)
    with pytest.raises(MpqError, match="'latency' is not a constraint with one row; there are: size"):
        problem.least("latency", 1.0)
    pairs = np.zeros((3, 6, 3, 6))
    with pytest.raises(MpqError, match="no sum over groups"):
        Problem(problem.loss, problem.constraints, pairs).least("size", 1.0)


@pytest.mark.parametrize("G", [50, 1000, 20_000])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_short_time_limit_gives_a_feasible_pick(G, rows):
    """And a bound, and no status that it has not proven."""
    problem = separable_network(G, rows=rows, share=0.3)
    for solver in [Ilp(time_limit=0.1)] + [Knapsack(time_limit=0.1)] * (rows == 1):
        solution = solver.solve(problem)
        assert problem.feasible(solution.pick)
        assert np.isfinite(solution.bound)
        assert solution.bound > 0
        if G <= 1000:  # what more time finds contradicts neither bound nor proof
            longer = Ilp(time_limit=2).solve(problem).objective
            assert solution.bound <= longer * (1 + 1e-9)
            assert solution.status is Status.FEASIBLE or solution.objective <= longer * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_time_limits_never_lose_a_feasible_pick(problem):
    """However short, where a pick exists one is found, and no proof is claimed that is none."""
    expected, found = Exhaustive().solve(problem), Ilp(time_limit=1e-9).solve(problem)
    assert found.status in (Status.FEASIBLE, expected.status)
    if expected.pick is not None:
        assert problem.feasible(found.pick)
        assert found.bound <= expected.objective + 1e-9 * abs(expected.objective)
    else:
        assert found.pick is None


@settings(max_examples=60, deadline=None)
@given(problems(rows=2), st.integers(0, 2**32 - 1))
def test_time_limits_never_lose_a_feasible_pick_with_interactions(problem, seed):
    problem, rounding = interacting(problem, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interaction, "_LISTED", 1)  # else all picks are tried, whatever the limit
        expected, found = Exhaustive().solve(problem), Interaction(time_limit=1e-9).solve(problem)
    assert found.status in (Status.FEASIBLE, expected.status)
    if expected.pick is not None:
        assert problem.feasible(found.pick)
        assert found.bound <= expected.objective + rounding
        assert found.status is Status.FEASIBLE or found.objective <= expected.objective + rounding
    else:
        assert found.pick is None


def test_equal_bytes_of_two_runs():
    for rows in (1, 2, 3):
        problem = separable_network(60, rows=rows)
        for solver in [Ilp(), Ilp(seed=3)] + [Knapsack()] * (rows == 1):
            a, b = solver.solve(problem), solver.solve(problem)
            assert a.pick.tobytes() == b.pick.tobytes()
            assert (a.objective, a.bound, a.prices) == (b.objective, b.bound, b.prices)
