"""Costs of pairs of groups (conversions between neighbours) in constraints, against exhaustive search."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picks import every_pick

from mpq.errors import MpqError
from mpq.problem import Constraint, PairCosts, Problem, Status
from mpq.search import (
    Evaluations,
    Exhaustive,
    Ilp,
    Interaction,
    Knapsack,
    RandomSearch,
    Sweep,
    auto_solver,
)
from mpq.search.explain import explain_pick
from mpq.search.smallest import smallest_cost


def chain(seed, groups=5, share=0.4, interactions=False):
    """A chain of layers; changing between two kinds of formats costs time, and so do bits."""
    rng = np.random.default_rng(seed)
    bits, kind = np.array([2.0, 4.0, 8.0, 8.0]), np.array([0, 1, 0, 1])
    S = len(bits)
    loss = rng.lognormal(0, 1.5, (groups, 1)) * 4.0**-bits * rng.uniform(0.7, 1.3, (groups, S))
    cost = rng.uniform(1, 3, (groups, 1)) * bits
    change = (kind[:, None] != kind).astype(float)
    edges = np.array([[g, g + 1] for g in range(groups - 1)])
    pairs = PairCosts(edges, rng.uniform(0, 20, (groups - 1, 1, 1)) * change)
    low, high = cost.min(1).sum(), cost.max(1).sum()
    limit = low + share * (high - low)
    joint = None
    if interactions:
        rows = rng.normal(size=(12, groups * S)) * np.sqrt(loss.ravel() / 6)
        joint = (rows.T @ rows).reshape(groups, S, groups, S)
        joint[np.arange(groups), :, np.arange(groups)] = 0
    size = Constraint("size", "B", rng.integers(1, 9, (groups, 1)) * bits, np.array([np.inf]))
    return Problem(loss, (Constraint("latency", "s", cost, np.array([limit]), pairs), size), joint)


@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_ilp_equals_exhaustive_search(seed, share):
    problem = chain(seed, share=share)
    best, found = Exhaustive().solve(problem), Ilp().solve(problem)
    assert found.status is best.status
    if best.pick is not None:
        assert found.objective == pytest.approx(best.objective, rel=1e-6)
        assert problem.feasible(found.pick)
        assert found.bound <= found.objective


@pytest.mark.parametrize("seed", range(6))
def test_interaction_solver_equals_exhaustive_search(seed):
    problem = chain(seed, groups=6, interactions=True)
    best, found = Exhaustive().solve(problem), Interaction().solve(problem)
    assert found.status is Status.OPTIMAL
    assert found.objective == pytest.approx(best.objective, rel=1e-9)


def test_longer_chains_are_proven_and_pairs_count():
    problem = chain(1, groups=60, share=0.2)
    found = auto_solver(problem).solve(problem)
    assert found.status is Status.OPTIMAL
    latency = problem.constraints[0]
    blind = Ilp().solve(Problem(problem.loss, (Constraint("latency", "s", latency.cost, latency.limit),)))
    assert blind.objective <= found.objective
    assert not problem.feasible(blind.pick)  # without them, the limit is missed


def test_interactions_on_a_longer_chain_stay_feasible_with_a_bound():
    problem = chain(2, groups=30, interactions=True)
    found = Interaction(time_limit=2.0).solve(problem)
    assert problem.feasible(found.pick)
    assert found.bound <= found.objective


def test_usage_includes_pairs():
    pairs = PairCosts([[0, 1]], [[[0.0, 2.0], [3.0, 0.0]]])
    made = Constraint("latency", "s", np.ones((2, 2)), np.array([4.0]), pairs)
    assert [made.usage(p)[0] for p in ([0, 0], [0, 1], [1, 0])] == [2.0, 4.0, 5.0]
    problem = Problem(np.zeros((2, 2)), (made,))
    assert problem.feasible([0, 1])
    assert not problem.feasible([1, 0])


def test_what_takes_no_pairs_says_so():
    problem = chain(0)
    with pytest.raises(MpqError, match="use the ilp"):
        Knapsack().solve(Problem(problem.loss, problem.constraints[:1]))


@pytest.mark.parametrize("seed", range(4))
def test_least_cost_with_pairs_equals_exhaustive_search(seed):
    problem = chain(seed)
    picks = every_pick(problem)
    loss, cost = (np.array([f(p) for p in picks]) for f in (problem.objective, problem.constraints[0].usage))
    limit = float(np.quantile(loss, 0.3))
    found = smallest_cost(problem, "latency", limit)
    assert found.status is Status.OPTIMAL
    assert found.objective == pytest.approx(cost[loss <= limit].min(), rel=1e-9)
    assert problem.objective(found.pick) <= limit * (1 + 1e-9)


def test_sweep_begins_at_the_least_with_pairs():
    """Two layers would each like another kind; together one of them has to change, or pays for it."""
    pairs = PairCosts([[0, 1]], [[[0.0, 8.0], [8.0, 0.0]]])
    latency = Constraint("latency", "s", np.array([[1.0, 4.0], [4.0, 1.0]]), np.array([10.0]), pairs)
    problem = Problem(np.array([[1.0, 0.0], [1.0, 0.0]]), (latency,))
    limits = []

    class Noting(RandomSearch):
        def explore(self, problem, evaluations):
            limits.append(float(problem.constraints[0].limit[0]))
            return super().explore(problem, evaluations)

    Sweep(inner=Noting(), points=2).search(problem, Evaluations(problem.objective, limit=4))
    assert limits == [5.0, 10.0]


@pytest.mark.parametrize(
    ("groups", "cost", "match"),
    [
        ([[0, 1]], np.zeros((2, 2, 2)), "for 1 pairs"),
        ([[1, 1]], np.zeros((1, 2, 2)), "two different groups"),
        ([[0, 1]], -np.ones((1, 2, 2)), "not negative"),
    ],
)
def test_bad_pairs_are_refused(groups, cost, match):
    with pytest.raises(MpqError, match=match):
        PairCosts(groups, cost)


@given(seed=st.integers(0, 10_000), share=st.floats(0.1, 0.9), interactions=st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_limit_binds_if_the_loss_would_be_less_without_it(seed, share, interactions):
    problem = chain(seed, groups=4, share=share, interactions=interactions)
    best = Exhaustive().solve(problem)
    if best.pick is None:
        return
    found = explain_pick(problem, best.pick)
    free = Exhaustive().solve(Problem(problem.loss, problem.constraints[1:], problem.interactions))
    assert ("latency" in found.binding) == (free.objective < best.objective - 1e-9)
    price, latency = found.prices["latency"], problem.constraints[0]
    for g, s in np.ndindex(problem.loss.shape):
        pick = best.pick.copy()
        pick[g] = s
        added = latency.usage(pick)[0] - latency.usage(best.pick)[0]
        assert found.margin[g, s] == pytest.approx(found.change[g, s] + price * added, abs=1e-9)


def test_a_conversion_alone_may_bind():
    """The middle layer wants the other kind, which adds two conversions; by its own costs everything fits."""
    change = np.array([[0.0, 1.0], [1.0, 0.0]])
    pairs = PairCosts([[0, 1], [1, 2]], [4 * change, 4 * change])
    loss = np.array([[0.0, 5.0], [1.0, 0.0], [0.0, 5.0]])

    def explained(limit):
        problem = Problem(loss, (Constraint("latency", "s", np.full((3, 2), 1.0), np.array([limit]), pairs),))
        return explain_pick(problem, Ilp().solve(problem).pick), Ilp().solve(problem)

    (tight, solved), (loose, _) = explained(9.0), explained(11.0)
    assert tight.binding == {"latency"}
    assert tight.prices["latency"] == solved.prices["latency"] == pytest.approx(1 / 8)
    assert (loose.binding, loose.prices) == (frozenset(), {"latency": 0.0})


def test_a_limit_that_only_changes_together_can_use_binds_at_no_price():
    """Neither layer gains by the other format alone, both together do."""
    change = np.array([[0.0, 1.0], [1.0, 0.0]])
    pairs = PairCosts([[0, 1]], [9 * change])
    loss, joint = np.array([[0.0, 1.0], [0.0, 1.0]]), np.zeros((2, 2, 2, 2))
    joint[0, 1, 1, 1] = joint[1, 1, 0, 1] = -4.0
    cost = np.array([[1.0, 2.0], [1.0, 2.0]])
    problem = Problem(loss, (Constraint("latency", "s", cost, np.array([3.0]), pairs),), joint)
    found = explain_pick(problem, np.array([0, 0]))
    assert found.prices == {"latency": 0.0}
    assert found.binding == {"latency"}
