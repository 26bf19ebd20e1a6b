import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.errors import MpqError
from mpq.problem import Constraint, Problem, Status
from mpq.search import Exhaustive, Ilp, Knapsack, auto_solver, convex_frontier, exact_frontier
from mpq.testing import SolverContract, feasible_picks, random_problem, separable_network


class TestKnapsack(SolverContract):
    @pytest.fixture
    def solver(self):
        return Knapsack()


class TestIlp(SolverContract):
    @pytest.fixture
    def solver(self):
        return Ilp()


class TestIlpSeveralConstraints(SolverContract):
    rows, constraints = 2, 2

    @pytest.fixture
    def solver(self):
        return Ilp()


class TestExhaustive(SolverContract):
    """Held to trying one pick after the other."""

    rows, constraints = 2, 2

    @pytest.fixture
    def solver(self):
        return Exhaustive()

    def least(self, problem):
        return feasible_picks(problem)[1].min(initial=np.inf)


def test_knapsack_agrees_with_exhaustive_on_500_instances():
    """Ties, infeasible limits and forbidden schemes all occur among them."""
    infeasible = forbidden = 0
    for seed in range(500):
        problem = random_problem(np.random.default_rng(seed), ties=seed % 2 == 0)
        expected, found = Exhaustive().solve(problem), Knapsack().solve(problem)
        assert found.status is expected.status, seed
        infeasible += found.pick is None
        forbidden += not problem.allowed.all()
        if found.pick is not None:
            assert problem.feasible(found.pick), seed
            assert found.objective == pytest.approx(expected.objective, rel=1e-12, abs=1e-12), seed
            assert found.bound <= found.objective, seed
    assert 30 < infeasible < 300
    assert forbidden > 60


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 3))
def test_cut_short_knapsack_is_feasible_with_a_valid_bound(seed, states):
    problem = random_problem(np.random.default_rng(seed))
    expected, found = Exhaustive().solve(problem), Knapsack(max_states=states).solve(problem)
    if expected.pick is None:
        assert found.status is Status.INFEASIBLE
    else:
        assert found.bound <= expected.objective * (1 + 1e-12) + 1e-12
        assert expected.objective <= found.objective * (1 + 1e-12) + 1e-12
        assert problem.feasible(found.pick)


def test_large_problem_is_proven_optimal_against_the_ilp():
    problem = separable_network(300)
    knapsack, ilp = Knapsack().solve(problem), Ilp().solve(problem)
    assert knapsack.status is ilp.status is Status.OPTIMAL
    assert knapsack.gap == 0
    assert knapsack.objective == pytest.approx(ilp.objective, rel=1e-9)
    assert knapsack.prices["size"] > 0


def test_ilp_time_limit_is_not_called_optimal():
    rng = np.random.default_rng(0)
    loss = rng.random((400, 6))
    constraints = tuple(Constraint(f"c{i}", "", rng.random((400, 6, 3)), np.full(3, 150.0)) for i in range(2))
    solution = Ilp(time_limit=0.5).solve(Problem(loss, constraints))
    assert solution.status in (Status.FEASIBLE, Status.NO_SOLUTION)
    if solution.pick is not None:
        assert solution.bound < solution.objective
        assert solution.gap > 0


@pytest.mark.parametrize("spread", [3, 8])
def test_ilp_is_exact_when_losses_span_many_orders_of_magnitude(spread):
    """HiGHS's tolerances are absolute: without rescaling, small losses would be noise to it."""
    for seed in range(25):
        rng = np.random.default_rng(seed)
        problem = random_problem(rng, constraints=2)
        loss = rng.lognormal(0, spread, problem.loss.shape)
        problem = Problem(np.where(problem.allowed, loss, np.inf), problem.constraints)
        expected, found = Exhaustive().solve(problem), Ilp().solve(problem)
        assert found.status is expected.status
        if found.pick is not None:
            assert found.objective == pytest.approx(expected.objective, rel=1e-6)
            assert found.bound <= found.objective
    rng, bits = np.random.default_rng(18), np.array([2.0, 3, 4, 6, 8])
    loss = rng.lognormal(0, 3, (40, 1)) * 16.0 ** -(bits - 2) * rng.uniform(0.7, 1.3, (40, 5))
    cost = np.round(rng.lognormal(8, 1, (40, 1))) * bits
    problem = Problem(loss, (Constraint("size", "b", cost, cost.max(1).sum() * 0.93),))
    assert Ilp().solve(problem).objective == pytest.approx(Knapsack().solve(problem).objective, rel=1e-6)


def test_ilp_cuts_off_picks_that_only_its_tolerance_allows():
    cost = np.array([[1 + 1.5e-9, 1.0]])
    constraints = (Constraint("a", "", cost, 1.0), Constraint("b", "", np.zeros((1, 2)), 1.0))
    solution = Ilp().solve(Problem(np.array([[0.0, 1.0]]), constraints))
    assert solution.status is Status.OPTIMAL
    assert solution.pick.tolist() == [1]


@pytest.mark.parametrize("solver", [Knapsack(), Ilp(), Exhaustive()])
def test_no_groups(solver):
    solution = solver.solve(Problem(np.zeros((0, 3)), (Constraint("c", "", np.zeros((0, 3)), 1.0),)))
    assert solution.status is Status.OPTIMAL
    assert solution.pick.tolist() == []


def test_whole_number_costs_have_no_slack():
    cost = np.array([[3e9 + 3, 3e9]])
    problem = Problem(np.array([[0.0, 1.0]]), (Constraint("size", "bytes", cost, 3e9),))
    assert Knapsack().solve(problem).pick.tolist() == [1]


def test_zero_limit_and_equal_costs():
    loss = np.array([[3.0, 1.0], [2.0, 5.0]])
    for solver in (Knapsack(), Ilp(), Exhaustive()):
        solution = solver.solve(Problem(loss, (Constraint("c", "", np.zeros((2, 2)), 0.0),)))
        assert solution.status is Status.OPTIMAL
        assert solution.pick.tolist() == [1, 0]


def test_infeasible_says_what_is_reachable():
    problem = Problem(np.ones((2, 2)), (Constraint("size", "bytes", np.array([[5.0, 9], [7, 8]]), 11.0),))
    for solver in (Knapsack(), Ilp(), Exhaustive()):
        assert solver.solve(problem).message == "size <= 11 bytes: the smallest reachable is 12"


def test_knapsack_refuses_several_constraints_and_auto_takes_the_ilp():
    problem = random_problem(np.random.default_rng(0), constraints=2)
    with pytest.raises(MpqError, match="use the ilp"):
        Knapsack().solve(problem)
    assert isinstance(auto_solver(problem), Ilp)
    assert isinstance(auto_solver(Problem(np.ones((2, 2)))), Knapsack)


def test_no_constraint_picks_the_least_loss():
    assert Knapsack().solve(Problem(np.array([[2.0, 1.0], [0.0, 3.0]]))).pick.tolist() == [1, 0]


def test_exhaustive_refuses_large_problems():
    with pytest.raises(MpqError, match="too many"):
        Exhaustive().solve(Problem(np.ones((40, 4))))


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (np.ones(3), "must be"),
        ([[np.nan, 1.0]], "numbers"),
        ([[-np.inf, 1.0]], "numbers"),
        ([[1.0, 2.0], [np.inf, np.inf]], "group 1 has no allowed"),
    ],
)
def test_bad_losses_are_refused(loss, match):
    with pytest.raises(MpqError, match=match):
        Problem(loss)


def test_constraints_must_fit():
    with pytest.raises(MpqError, match="don't fit"):
        Constraint("c", "", np.ones((2, 3, 2)), np.ones(3))
    with pytest.raises(MpqError, match="but loss"):
        Problem(np.ones((2, 3)), (Constraint("c", "", np.ones((2, 2)), 1.0),))
    with pytest.raises(MpqError, match="finite"):
        Constraint("c", "", np.full((2, 2), np.nan), 1.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_convex_frontier_is_the_lower_hull_of_the_exact_one(seed):
    problem = random_problem(np.random.default_rng(seed))
    cost = problem.constraints[0].cost[..., 0]
    hull, exact = convex_frontier(problem.loss, cost), exact_frontier(problem.loss, cost)
    assert (np.diff(hull.cost) > 0).all()
    assert (np.diff(hull.loss) < 0).all()
    # Every hull point is on the exact frontier, and no exact point lies below the hull's chain.
    for c, x in zip(hull.cost, hull.loss, strict=True):
        assert np.isclose(exact.loss[np.isclose(exact.cost, c)], x).any()
    chain = np.interp(exact.cost, hull.cost, hull.loss)
    assert (exact.loss >= chain - 1e-9).all()
    assert hull.cost[-1] == pytest.approx(exact.cost[-1])


def test_exact_frontier_gives_up_above_its_limit():
    rng = np.random.default_rng(0)
    assert exact_frontier(rng.random((12, 4)), rng.random((12, 4)), max_states=10) is None
