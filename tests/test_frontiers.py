"""Frontiers held to all picks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.errors import MpqError
from mpq.problem import Constraint, Problem
from mpq.search import (
    Exhaustive,
    Interaction,
    convex_frontier,
    epsilon_surface,
    exact_frontier,
    hypervolume,
    interaction_frontier,
)
from mpq.search.exhaustive import totals
from mpq.search.pareto import undominated
from mpq.testing import KINDS, interacting_network, random_numbers, random_problem


def all_points(problem, costs):
    """Costs and loss of every allowed pick ``[n, D]``."""
    picks = np.concatenate(list(Exhaustive().all_picks(problem)))
    rows = np.arange(len(problem.loss))
    loss = totals(problem, picks)
    picks, loss = picks[np.isfinite(loss)], loss[np.isfinite(loss)]
    return np.stack([*(c[rows, picks].sum(1) for c in costs), loss], 1)


def brute(points):
    """Distinct points that no other dominates, one by one."""
    points = np.unique(np.round(points, 9), axis=0)
    return np.array([p for p in points if not ((points <= p).all(1) & (points < p).any(1)).any()])


def interacting(G, S, seed=0):
    """A network without a limit, and its sizes."""
    problem = interacting_network(G, S, seed, rank=2)
    return Problem(problem.loss, (), problem.interactions), problem.constraints[0].cost[..., 0]


def test_exact_frontier_equals_brute_force_on_200_problems():
    largest = 0
    for seed in range(200):
        problem = random_problem(np.random.default_rng(seed), ties=seed % 2 == 0)
        cost = problem.constraints[0].cost[..., 0]
        found = exact_frontier(problem.loss, cost)
        np.testing.assert_allclose(np.c_[found.cost, found.loss], brute(all_points(problem, [cost])), atol=1e-8)
        rows = np.arange(len(cost))
        np.testing.assert_allclose(cost[rows, found.picks].sum(1), found.cost, atol=1e-9)
        np.testing.assert_allclose(problem.loss[rows, found.picks].sum(1), found.loss, atol=1e-9)
        largest = max(largest, len(found.cost))
    assert largest > 20


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.integers(1, 4), st.sampled_from(KINDS), st.sampled_from(KINDS))
def test_frontiers_of_awkward_numbers(seed, G, S, of_loss, of_cost):
    """Ties, zeros, 24 orders of magnitude, one scheme, no groups: the exact one is every point of brute force."""
    rng = np.random.default_rng(seed)
    loss, cost = random_numbers(rng, of_loss, (G, S)), random_numbers(rng, of_cost, (G, S))
    exact, convex = exact_frontier(loss, cost), convex_frontier(loss, cost)
    points = all_points(Problem(loss), [cost])
    expected = points[[not ((points <= p).all(1) & (points < p).any(1)).any() for p in points]]
    np.testing.assert_array_equal(np.c_[exact.cost, exact.loss], np.unique(expected, axis=0))
    for found in (exact, convex):
        assert found.picks.shape == (len(found.cost), G)
        np.testing.assert_array_equal(cost[np.arange(G), found.picks].sum(1), found.cost)
        np.testing.assert_array_equal(loss[np.arange(G), found.picks].sum(1), found.loss)
    rounding = 1e-9 * np.abs(loss).sum()
    ends = convex.loss[-1], convex.cost[0]
    assert ends == pytest.approx((exact.loss[-1], exact.cost[0]), abs=max(rounding, 1e-9 * np.abs(cost).sum()))
    assert (np.diff(convex.cost) >= 0).all()
    assert (np.diff(convex.loss) <= rounding).all()


def test_frontiers_of_no_groups():
    nothing = np.zeros((0, 3))
    made = tuple(Constraint(name, "", nothing, 1.0) for name in "ab")
    empty = Problem(nothing, made, np.zeros((0, 3, 0, 3)))
    starts = exact_frontier(nothing, nothing)
    assert (starts.cost.tolist(), starts.loss.tolist(), starts.picks.shape) == ([0], [0], (1, 0))
    assert convex_frontier(nothing, nothing).picks.shape == (1, 0)
    assert interaction_frontier(empty, nothing, starts).picks.shape == (1, 0)
    assert epsilon_surface(empty, ["a", "b"]).picks.shape == (1, 0)


def test_a_long_convex_frontier_is_thinned_evenly():
    rng = np.random.default_rng(0)
    loss, cost = np.sort(rng.random((3000, 4)))[:, ::-1], np.sort(rng.random((3000, 4)))
    whole, thin = convex_frontier(loss[:300], cost[:300]), convex_frontier(loss[:300], cost[:300], 50)
    assert 40 < len(thin.cost) <= 50 < len(whole.cost)
    assert (thin.cost[0], thin.cost[-1]) == (whole.cost[0], whole.cost[-1])
    assert np.diff(thin.cost).max() < 0.05 * np.ptp(whole.cost)
    assert np.isin(thin.cost, whole.cost).all()
    assert len(convex_frontier(np.tile(loss, (10, 1)), np.tile(cost, (10, 1))).cost) <= 667  # memory


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4))
def test_undominated_points(seed, D):
    points = np.random.default_rng(seed).integers(0, 5, (30, D)).astype(float)
    np.testing.assert_array_equal(points[undominated(points)], brute(points))
    assert undominated(points[:0]).tolist() == []


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_points_of_the_surface_are_on_the_true_one(seed, ties):
    """And with as many limits as there are costs, none is missing."""
    rng = np.random.default_rng(seed)
    G, S = 4, 3
    loss = rng.integers(0, 9, (G, S)).astype(float) if ties else rng.random((G, S))
    costs = [rng.integers(0, 4, (G, S)).astype(float) for _ in range(2)]
    made = [Constraint(name, "", c, c.max(1).sum()) for name, c in zip("ab", costs, strict=True)]
    problem = Problem(loss, tuple(made))
    points = 1 + max(int(c.max(1).sum() - c.min(1).sum()) for c in costs)
    expected = brute(all_points(problem, costs))
    found = epsilon_surface(problem, ["a", "b"], points)
    assert found.proven.all()
    mine = np.c_[found.cost, found.loss]
    rows = np.arange(G)
    np.testing.assert_array_equal(mine[:, 0], costs[0][rows, found.picks].sum(1))
    for point in mine:
        assert np.isclose(expected, point, atol=1e-8).all(1).any()
    few = epsilon_surface(problem, ["a", "b"], 3)
    for point in np.c_[few.cost, few.loss]:
        assert np.isclose(expected, point, atol=1e-8).all(1).any()
    if len({int(c.max(1).sum() - c.min(1).sum()) for c in costs}) == 1:  # limits are all whole numbers there are
        assert len(mine) == len(expected)


def test_surface_with_interactions_and_a_third_constraint():
    problem, cost = interacting(6, 3)
    rng = np.random.default_rng(1)
    other, third = rng.integers(1, 9, (6, 3)).astype(float), rng.integers(1, 9, (6, 3)).astype(float)
    made = Constraint("size", "", cost, np.inf), Constraint("b", "", other, 30), Constraint("c", "", third, 30)
    problem = Problem(problem.loss, made, problem.interactions)
    found = epsilon_surface(problem, ["size", "b"], 5)
    points = all_points(problem, [cost, other, third])
    expected = brute(points[(points[:, 1] <= 30) & (points[:, 2] <= 30)][:, [0, 1, 3]])
    assert len(found.loss) > 5
    for pick, point in zip(found.picks, np.c_[found.cost, found.loss], strict=True):
        assert problem.feasible(pick)
        assert np.isclose(expected, point, atol=1e-8).all(1).any()


def test_surface_needs_two_constraints():
    problem = random_problem(np.random.default_rng(0))
    with pytest.raises(MpqError, match="must name two constraints"):
        epsilon_surface(problem, ["c0", "nothing"])


def test_hypervolume():
    assert hypervolume(np.zeros((0, 2)), np.ones(2)) == 0
    assert hypervolume(np.array([[2.0, 0.0]]), np.ones(2)) == 0
    assert hypervolume(np.array([[0.25, 0.5], [0.5, 0.25], [0.6, 0.6], [0.25, 0.5]]), np.ones(2)) == 0.5
    assert hypervolume(np.array([[0.5, 0.5, 0.5], [0.0, 0.9, 0.9]]), np.ones(3)) == pytest.approx(0.125 + 0.01 - 0.005)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_hypervolume_equals_the_share_of_cells(seed):
    """Points on a grid: count the cells that one of them dominates."""
    points = np.random.default_rng(seed).integers(0, 12, (6, 2))
    x, y = np.meshgrid(np.arange(10), np.arange(10), indexing="ij")
    dominated = ((points[:, 0, None, None] <= x) & (points[:, 1, None, None] <= y)).any(0)
    assert hypervolume(points, np.array([10, 10])) == dominated.sum()


@pytest.mark.slow
def test_interaction_frontier_is_nearly_the_true_one():
    """Never above the frontier without interactions; on it, or close, at every cost."""
    close = []
    for seed in range(8):
        problem, cost = interacting(6, 4, seed)
        starts = exact_frontier(problem.loss, cost)
        found = interaction_frontier(problem, cost, starts)
        points = all_points(problem, [cost])
        rows = np.arange(6)
        np.testing.assert_allclose(found.cost, cost[rows, found.picks].sum(1))
        np.testing.assert_allclose(found.loss, [problem.objective(p) for p in found.picks], atol=1e-12)
        assert (np.diff(found.cost) > 0).all()
        assert (np.diff(found.loss) < 0).all()
        before = totals(problem, starts.picks)
        for c in starts.cost:
            best = found.loss[found.cost <= c].min()
            assert best <= before[starts.cost <= c].min() + 1e-12
            close.append(best / points[points[:, 0] <= c, 1].min())
        again = interaction_frontier(problem, cost, starts)
        np.testing.assert_array_equal(again.picks, found.picks)
    assert np.median(close) < 1.001
    assert np.mean(close) < 1.03


def test_no_point_of_it_is_bettered_by_another_scheme_of_one_layer(analysis):
    front, cost = analysis.pareto(), analysis.cost("size").rows[..., 0]
    assert len(front.picks) > 100  # more than the limits that are searched
    groups = np.arange(len(cost))
    for pick, loss in zip(front.picks, front.loss, strict=True):
        others = np.repeat(pick[None], cost.size, 0)
        others[np.arange(cost.size), np.repeat(groups, cost.shape[1])] = np.tile(np.arange(cost.shape[1]), len(cost))
        no_dearer = cost[groups, others].sum(1) <= cost[groups, pick].sum()
        assert (analysis.table.predict_all(others[no_dearer]) >= loss - 1e-9).all()


def test_interaction_frontier_at_a_limit_is_what_the_solver_finds():
    problem, cost = interacting(20, 4)
    starts = exact_frontier(problem.loss, cost)
    found = interaction_frontier(problem, cost, starts)
    assert len(found.cost) < len(starts.cost)
    own = np.flatnonzero(~np.isin(found.cost, starts.cost))
    for k in own[[len(own) // 4, len(own) // 2]]:
        limited = Problem(problem.loss, (Constraint("size", "", cost, found.cost[k]),), problem.interactions)
        best = Interaction(time_limit=3).solve(limited)
        assert best.objective * (1 - 1e-9) <= found.loss[k] <= 1.1 * best.objective
    one = Problem(problem.loss[:1], (), np.zeros((1, 4, 1, 4)))
    starts = exact_frontier(one.loss, cost[:1])
    assert interaction_frontier(one, cost[:1], starts) is starts
