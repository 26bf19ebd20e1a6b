"""Prices, changes and reach of arrays, held to all picks and to finite differences."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picks import every_pick

from mpq.errors import MpqError
from mpq.problem import Constraint, Problem, Status
from mpq.search import Exhaustive, convex_frontier, explain
from mpq.search.exhaustive import totals
from mpq.search.explain import explain_pick, resampled, survivors
from mpq.search.feasibility import intervals, least_usage, smallest_relaxation
from mpq.search.lagrangian import relax
from mpq.search.smallest import smallest_cost
from mpq.testing import random_problem


def used(constraint, picks):
    """Row sums of picks ``[n, R]``."""
    return constraint.cost[np.arange(constraint.cost.shape[0]), picks].sum(1)


def with_pairs(problem, seed):
    rng = np.random.default_rng(seed)
    G, S = problem.loss.shape
    pairs = 0.2 * rng.standard_normal((G, S, G, S))
    pairs = pairs + pairs.transpose(2, 3, 0, 1)
    pairs[np.arange(G), :, np.arange(G)] = 0.0
    return replace(problem, interactions=pairs)


def test_dual_prices_are_finite_differences_between_neighbours_on_the_hull():
    """At a corner of the hull the optimum of the relaxation is a pick: one edge more saves price times its cost."""
    rng = np.random.default_rng(0)
    loss, cost = rng.random((5, 4)), rng.random((5, 4))
    hull = convex_frontier(loss, cost)
    assert len(hull.cost) > 6
    for i in range(len(hull.cost) - 1):
        problem = Problem(loss, (Constraint("size", "", cost, hull.cost[i]),))
        found = explain_pick(problem, hull.picks[i])
        slope = (hull.loss[i] - hull.loss[i + 1]) / (hull.cost[i + 1] - hull.cost[i])
        assert found.prices["size"] == pytest.approx(slope, rel=1e-6)
        assert np.nanmin(found.margin) >= -1e-9
    assert explain_pick(Problem(loss, (Constraint("size", "", cost, 9.0),)), loss.argmin(1)).prices == {"size": 0.0}


def test_a_price_that_is_rounding_does_not_bind(monkeypatch):
    loss, cost = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 2.0], [1.0, 2.0]])
    problem = Problem(loss, (Constraint("size", "", cost, 3.0), Constraint("time", "", 2 * cost, 7.0)))

    def relaxed(*args):
        return replace(relax(*args), prices=np.array([1.0, 1e-46]))

    monkeypatch.setattr(explain, "relax", relaxed)
    found = explain_pick(problem, np.array([0, 1]))
    assert (found.prices, found.binding) == ({"size": 1.0, "time": 0.0}, {"size"})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_changes_and_runner_up_of_a_pick(seed, interacting):
    problem = random_problem(np.random.default_rng(seed))
    problem = with_pairs(problem, seed) if interacting else problem
    solution = Exhaustive().solve(problem)
    if solution.pick is None:
        return
    found = explain_pick(problem, solution.pick)
    price = found.prices["c0"]
    for g in range(len(problem.loss)):
        margins = {}
        for s in np.flatnonzero(problem.allowed[g]):
            pick = solution.pick.copy()
            pick[g] = s
            change = problem.objective(pick) - solution.objective
            assert found.change[g, s] == pytest.approx(change, abs=1e-12)
            added = used(problem.constraints[0], pick[None]) - used(problem.constraints[0], solution.pick[None])
            margins[s] = change + price * added[0, 0]
            assert found.margin[g, s] == pytest.approx(margins[s], abs=1e-9)
        del margins[solution.pick[g]]
        if margins:
            assert margins[found.runner_up[g]] == pytest.approx(min(margins.values()), abs=1e-9)
        else:
            assert found.runner_up[g] == -1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.booleans())
def test_reach_and_relaxation_equal_trying_all_picks(seed, constraints, ties):
    problem = random_problem(np.random.default_rng(seed), constraints=constraints, ties=ties)
    picks = every_pick(problem)
    for c in problem.constraints:
        low, high = intervals(problem)[c.name]
        np.testing.assert_allclose([low, high], [used(c, picks).min(0), used(c, picks).max(0)], atol=1e-12)
        others = Problem(problem.loss, tuple(o for o in problem.constraints if o is not c))
        fits = [p for p in picks if others.feasible(p)]
        found = least_usage(problem, c.name)
        assert (found.pick is not None) == bool(fits)
        if fits:
            assert found.objective == pytest.approx(used(c, np.array(fits)).min(), abs=1e-9)
    units = {c.name: float(i + 1) for i, c in enumerate(problem.constraints)}
    over = np.stack([(used(c, picks)[:, 0] - c.limit[0]) / units[c.name] for c in problem.constraints])
    found = smallest_relaxation(problem, units)
    assert found.proven
    assert found.share == pytest.approx(max(0.0, over.max(0).min()), abs=1e-8)

    def loosened(share):
        moved = [Constraint(c.name, "", c.cost, c.limit + share * units[c.name]) for c in problem.constraints]
        return Problem(problem.loss, tuple(moved))

    assert loosened(found.share * (1 + 1e-9)).feasible(found.pick)
    assert (found.share == 0) == (Exhaustive().solve(problem).pick is not None)
    if found.share > 1e-6:
        assert Exhaustive().solve(loosened(found.share - 1e-6)).pick is None


def test_relaxation_of_rows_and_its_unit():
    problem = Problem(np.zeros((2, 1)), (Constraint("peak", "", np.ones((2, 1, 2)), np.array([1.0, 4.0])),))
    assert smallest_relaxation(problem).share == 1.0  # 1 of the first row, by default in units of the limit
    assert smallest_relaxation(problem, {"peak": 0.5}).share == 2.0
    assert smallest_relaxation(Problem(np.zeros((2, 1)))).share == 0.0
    with pytest.raises(MpqError, match="'peak': the unit of a relaxation must be positive, not 0"):
        smallest_relaxation(problem, {"peak": 0.0})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_smallest_cost_equals_trying_all_picks(seed, interacting, ties):
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, constraints=2, ties=ties)
    problem = with_pairs(problem, seed) if interacting else problem
    picks, loss = every_pick(problem), None
    loss = totals(problem, picks)
    limit = float(np.quantile(loss, 0.3)) + 1e-6
    others = Problem(problem.loss, problem.constraints[1:])
    fits = [p for p, x in zip(picks, loss, strict=True) if x <= limit and others.feasible(p)]
    found = smallest_cost(problem, "c0", limit)
    if not fits:
        assert found.status is Status.INFEASIBLE
        return
    least = used(problem.constraints[0], np.array(fits)).min()
    assert found.objective == pytest.approx(least, rel=1e-6, abs=1e-6)
    assert found.bound <= least + 1e-9
    assert found.bound == pytest.approx(least, rel=1e-5, abs=1e-6)
    assert others.feasible(found.pick)
    assert problem.objective(found.pick) <= limit * (1 + 1e-8) + 1e-9
    if ties or not interacting:
        assert found.status is Status.OPTIMAL


def test_smallest_cost_claims_no_proof_it_lacks(monkeypatch):
    """A solver whose bound tells nothing leaves the answer as feasible, with a bound that holds."""
    from mpq.search import smallest

    cost = np.round(10 * np.sort(np.random.default_rng(0).random((4, 3))))
    loss = -np.sort(-np.random.default_rng(1).random((4, 3)))
    problem = with_pairs(Problem(loss, (Constraint("c0", "", cost, np.inf),)), 3)
    limit = float(np.median(totals(problem, every_pick(problem))))

    class Blind(smallest.Interaction):
        def solve(self, problem):
            found = super().solve(problem)
            return replace(found, bound=-np.inf) if found.pick is not None else found

    proven = smallest_cost(problem, "c0", limit)
    monkeypatch.setattr(smallest, "Interaction", Blind)
    found = smallest_cost(problem, "c0", limit)
    assert proven.status is Status.OPTIMAL
    assert proven.objective > used(problem.constraints[0], every_pick(problem)).min()
    assert (found.status, found.objective) == (Status.FEASIBLE, proven.objective)
    assert found.bound < found.objective
    assert smallest_cost(problem, "c0", -1e9).status is Status.NO_SOLUTION


def test_bootstrap_of_rows_follows_their_spread():
    """Mean and spread of drawn losses and interactions are those of the samples."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 2, 2, 2)) + 1
    flat = rows.reshape(40, 2, 4)
    shares = 0.5 * np.square(flat).sum(1)
    products = np.einsum("nda,ndb->nab", flat, flat)
    pairs = products.mean(0).reshape(2, 2, 2, 2)
    pairs[np.arange(2), :, np.arange(2)] = 0.0
    problem = Problem(shares.mean(0).reshape(2, 2), (), 0.5 * pairs)  # shrunk by half
    drawn = list(resampled(problem, np.zeros((2, 2)), rows, 2000, 1))
    losses = np.array([p.loss for p in drawn]).reshape(2000, 4)
    np.testing.assert_allclose(losses.mean(0), shares.mean(0), rtol=0.02)
    np.testing.assert_allclose(losses.std(0), shares.std(0) / 40**0.5, rtol=0.1)
    one = np.array([p.interactions[0, 0, 1, 1] for p in drawn])
    assert one.std() == pytest.approx(0.5 * products[:, 0, 3].std() / 40**0.5, rel=0.1)
    assert not any(p.interactions[0, :, 0].any() for p in drawn)


def test_survivors_are_the_optima_of_each_draw():
    rng = np.random.default_rng(5)
    problem = Problem(rng.random((4, 3)), (Constraint("size", "", rng.random((4, 3)), 2.0),))
    for p in (problem, with_pairs(problem, 1)):
        pick = Exhaustive().solve(p).pick
        drawn = list(resampled(p, np.full(p.loss.shape, 0.3), None, 20, 0))
        found = list(survivors(pick, iter(drawn), 0.2))
        for q, kept in zip(drawn, found, strict=True):
            assert q.objective(kept) == pytest.approx(Exhaustive().solve(q).objective, abs=1e-12)
        assert any((kept != pick).any() for kept in found)
