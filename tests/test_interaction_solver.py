import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpq.search.interaction as interaction
import mpq.search.local_search as local_search
from mpq.errors import MpqError
from mpq.problem import Constraint, Problem, Status
from mpq.search import SOLVERS, Exhaustive, Ilp, Interaction, Knapsack, auto_solver
from mpq.search.exhaustive import totals
from mpq.search.local_search import LocalSearch
from mpq.search.psd_bound import PsdBound, separable_bound
from mpq.testing import SolverContract, feasible_picks, interacting_network, random_problem

KINDS = ("gram", "indefinite", "whole")


def interacting(problem, rng, kind):
    """The problem with interactions: of a Gram matrix with its diagonal as loss, of any sign, or whole numbers."""
    G, S = problem.loss.shape
    loss = problem.loss
    if kind == "gram":
        factor = rng.standard_normal((int(rng.integers(1, 2 * G + 1)), G, S)) * rng.lognormal(0, 1, (G, 1))
        pairs = np.einsum("rgs,rht->gsht", factor, factor)
        loss = np.einsum("gsgs->gs", pairs) / 2
    elif kind == "indefinite":
        pairs, loss = rng.standard_normal((G, S, G, S)), rng.standard_normal((G, S))
    else:
        pairs = rng.integers(-2, 3, (G, S, G, S)).astype(float)
    pairs = pairs + pairs.transpose(2, 3, 0, 1)
    pairs[np.arange(G), :, np.arange(G)] = 0.0
    return Problem(np.where(problem.allowed, loss, np.inf), problem.constraints, pairs)


def random_interacting(seed, **size):
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % 3]
    return interacting(random_problem(rng, ties=kind == "whole", **size), rng, kind)


class InteractionContract(SolverContract):
    def problems(self, count=40):
        size = {"rows": self.rows, "constraints": self.constraints}
        return [random_interacting(seed, **size) for seed in range(count)]

    def test_tighter_limit_never_lowers_the_optimum(self, solver):
        for problem in self.problems(12):
            best = -np.inf
            for share in (1.0, 0.8, 0.6):
                tighter = tuple(Constraint(c.name, c.unit, c.cost, c.limit * share) for c in problem.constraints)
                objective = solver.solve(Problem(problem.loss, tighter, problem.interactions)).objective
                assert objective >= best - 1e-9
                best = objective

    def test_permuted_groups_permute_the_answer(self, solver):
        for problem in self.problems(12):
            order = np.random.default_rng(1).permutation(len(problem.loss))
            permuted = tuple(Constraint(c.name, c.unit, c.cost[order], c.limit) for c in problem.constraints)
            pairs = problem.interactions[order][:, :, order]
            a, b = solver.solve(problem), solver.solve(Problem(problem.loss[order], permuted, pairs))
            assert a.status is b.status
            if a.pick is not None:
                np.testing.assert_allclose(a.objective, b.objective, rtol=1e-9, atol=1e-12)


class TestListing(InteractionContract):
    """Problems this small are solved by trying all picks."""

    @pytest.fixture
    def solver(self):
        return Interaction()


class TestListingSeveralConstraints(InteractionContract):
    rows, constraints = 2, 2

    @pytest.fixture
    def solver(self):
        return Interaction()


class TestBranching(InteractionContract):
    """The same problems by branch and bound down to single picks."""

    @pytest.fixture
    def solver(self, monkeypatch):
        monkeypatch.setattr(interaction, "_LISTED", 1)
        return Interaction(restarts=2)


class TestBranchingManyRows(InteractionContract):
    """More rows than the relaxation takes."""

    rows, constraints = 5, 2

    @pytest.fixture
    def solver(self, monkeypatch):
        monkeypatch.setattr(interaction, "_LISTED", 1)
        monkeypatch.setattr(interaction, "_MAX_ROWS", 3)
        return Interaction(restarts=2)


class TestExhaustive(InteractionContract):
    """Held to trying one pick after the other."""

    rows, constraints = 2, 2

    @pytest.fixture
    def solver(self):
        return Exhaustive()

    def least(self, problem):
        return feasible_picks(problem)[1].min(initial=np.inf)


def test_exhaustive_search_is_the_least_of_all_picks():
    found = 0
    for seed in range(30):
        problem = random_interacting(seed)
        picks, objectives = feasible_picks(problem)
        solution = Exhaustive().solve(problem)
        if len(picks):
            np.testing.assert_allclose(totals(problem, picks), objectives, atol=1e-9)
            assert solution.objective == pytest.approx(objectives.min(), abs=1e-9)
            found += 1
    assert found > 15


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(0, 2), st.integers(0, 60))
def test_bounds_hold_after_any_number_of_iterations(seed, rows, constraints, iterations):
    """Of the whole problem, with each choice forced, and after dropping choices."""
    problem = random_interacting(seed, rows=rows, constraints=constraints)
    picks, objectives = feasible_picks(problem)
    cost, limit = local_search.binding_rows(problem)
    scale = np.abs(objectives).mean() + 1e-3 if len(picks) else 1.0
    bound = PsdBound(problem.loss / scale, problem.interactions / scale, cost, limit, problem.allowed)
    bound.iterate(iterations)
    for _ in range(2):
        value, forced = bound.bound()
        assert np.isinf(forced[~bound.keep]).all()
        kept = bound.keep[np.arange(bound.keep.shape[0]), picks].all(1)
        rounding = 1e-9 * max(1, abs(value))
        assert value <= (objectives[kept] / scale).min(initial=np.inf) + rounding
        for g, s in np.argwhere(bound.keep):
            taking = objectives[kept & (picks[:, g] == s)] / scale
            assert value - rounding <= forced[g, s] <= taking.min(initial=np.inf) + rounding
        keep = bound.keep.copy()
        keep[0] = np.arange(keep.shape[1]) == keep[0].argmax()
        bound = bound.narrowed(keep)
        bound.iterate(5)


def test_the_relaxation_is_close_on_gram_matrices_and_the_simple_bound_is_not():
    problem = interacting_network(14)
    best = Interaction().solve(problem)
    assert best.status is Status.OPTIMAL
    cost, limit = local_search.binding_rows(problem)
    bound = PsdBound(problem.loss / best.objective, problem.interactions / best.objective, cost, limit, problem.allowed)
    bound.iterate(200)
    assert 0.9 < bound.bound()[0] <= 1 + 1e-9
    share = bound.share()
    np.testing.assert_allclose(share.sum(1), 1, atol=0.05)
    assert share.min() > -0.05
    halves = problem.interactions.min(3).sum(2) / 2
    simple, _ = separable_bound(problem.loss + halves, cost, limit)
    assert simple < 0.5 * best.objective


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_separable_bound_holds(seed, rows):
    problem = random_problem(np.random.default_rng(seed), rows=rows)
    solution = Exhaustive().solve(problem)
    if solution.pick is None:
        return
    cost, limit = problem.constraints[0].cost, problem.constraints[0].slack_limit
    value, forced = separable_bound(problem.loss, cost, limit)
    assert value <= solution.objective + 1e-12
    assert forced[np.arange(len(problem.loss)), solution.pick].max() <= solution.objective + 1e-12
    if rows == 1:
        assert value == pytest.approx(Knapsack(max_states=0).solve(problem).bound, abs=1e-9)


@pytest.mark.parametrize("chunk", [local_search._CHUNK, 40])
def test_descent_ends_where_no_change_of_one_or_two_groups_helps(chunk, monkeypatch):
    monkeypatch.setattr(local_search, "_CHUNK", chunk)
    moved = 0
    for seed in range(40):
        problem = random_interacting(seed, rows=2)
        start = Ilp().solve(Problem(problem.loss, problem.constraints)).pick
        if start is None or len(problem.loss) < 2:
            continue
        search = LocalSearch(problem, np.inf)
        pick = search.descend(start)
        assert problem.feasible(pick)
        assert problem.objective(pick) <= problem.objective(start)
        moved += problem.objective(pick) < problem.objective(start)
        picks, objectives = feasible_picks(problem)
        near = (picks != pick).sum(1) <= 2
        assert problem.objective(pick) <= objectives[near].min() + 1e-9
    assert moved > 5


def test_equal_to_highs_on_the_exact_linearization(load_benchmark):
    """With a variable for each pair of choices; signs, ties and two limits occur."""
    count, highs = 0, load_benchmark("solver_baselines").linearized_by_highs
    for problem in [
        interacting_network(8, 3),
        interacting_network(6, 4, 1),
        *(random_interacting(seed, constraints=2) for seed in range(8)),
    ]:
        if np.isinf(problem.loss).any() or any(c.limit[0] <= 0 for c in problem.constraints):
            continue
        objective, proven = highs(problem, 60)
        best = Interaction().solve(problem)
        assert proven == (best.status is Status.OPTIMAL)
        if proven:
            assert best.objective == pytest.approx(objective, abs=1e-6 * max(1, abs(objective)))
            count += 1
    assert count > 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_trying_a_million_picks(seed):
    problem = interacting_network(10, 4, seed)
    best, expected = Interaction().solve(problem), Exhaustive().solve(problem)
    assert best.status is Status.OPTIMAL
    np.testing.assert_array_equal(best.pick, expected.pick)


@pytest.mark.slow
def test_never_worse_than_highs_given_a_minute(load_benchmark):
    """Ours in a third of that, with a bound that HiGHS does not contradict."""
    problem, highs = interacting_network(60), load_benchmark("solver_baselines").linearized_by_highs
    best = Interaction(time_limit=20).solve(problem)
    objective, _ = highs(problem, 60)
    assert problem.feasible(best.pick)
    assert best.objective <= objective
    assert 0 < best.bound < best.objective
    separable = Knapsack().solve(Problem(problem.loss, problem.constraints)).pick
    assert best.objective < 0.9 * problem.objective(separable)


@pytest.mark.parametrize("limits", [1, 2])
def test_a_short_time_limit_gives_a_feasible_pick(limits):
    problem = interacting_network(60)
    other = Constraint("other", "", np.tile([2.0, 3, 4, 5, 1], (60, 1)), 150.0)
    problem = Problem(problem.loss, (*problem.constraints, other)[:limits], problem.interactions)
    solution = Interaction(time_limit=0.1).solve(problem)
    assert problem.feasible(solution.pick)
    assert solution.status is Status.FEASIBLE
    assert solution.bound < solution.objective


def test_local_search_alone_finds_the_optimum(monkeypatch):
    """Its answer, cut off from the proof."""
    problem = interacting_network(14)
    best = Interaction().solve(problem)
    monkeypatch.setattr(interaction.BranchAndBound, "run", lambda self: False)
    found = Interaction(restarts=50).solve(problem)
    assert found.status is Status.FEASIBLE
    assert found.bound == -np.inf
    np.testing.assert_array_equal(found.pick, best.pick)


def test_prices_are_those_of_changing_one_group_at_a_time():
    """Of the separable problem with the interactions that each choice has with the answer."""
    problem = interacting_network(14)
    best = Interaction().solve(problem)
    pairs = problem.interactions[:, :, np.arange(14), best.pick].sum(2)
    expected = Ilp().solve(Problem(problem.loss + pairs, problem.constraints))
    assert best.prices == expected.prices
    assert best.prices["size"] > 0
    loose = Constraint("loose", "", np.ones((14, 5)), 100.0)
    both = Interaction().solve(Problem(problem.loss, (loose, *problem.constraints), problem.interactions))
    assert both.prices == {"loose": 0.0, **best.prices}


def test_several_constraints_are_met_and_proven():
    problem = interacting_network(10)
    rng = np.random.default_rng(1)
    latency = np.sort(rng.random((10, 5, 2)), axis=1)
    limits = latency.min(1).sum(0) + 0.3
    problem = Problem(
        problem.loss, (*problem.constraints, Constraint("latency", "s", latency, limits)), problem.interactions
    )
    best = Interaction().solve(problem)
    assert best.status is Status.OPTIMAL
    assert best.gap == 0
    assert best.objective == best.bound == problem.objective(best.pick)
    loose = Interaction().solve(Problem(problem.loss, problem.constraints[:1], problem.interactions))
    assert loose.objective < best.objective
    assert set(best.usage) == {"size", "latency"}


def test_work_that_ends_early_is_not_called_optimal(monkeypatch):
    """And is reproducible, pick and bound."""
    monkeypatch.setattr(interaction, "_CUBES", 2e7)
    problem = interacting_network(16, rank=1)
    a, b = (Interaction(restarts=5).solve(problem) for _ in range(2))
    assert a.status is Status.FEASIBLE
    assert 0 < a.bound < a.objective
    assert a.gap == pytest.approx(1 - a.bound / a.objective)
    np.testing.assert_array_equal(a.pick, b.pick)
    assert a.bound == b.bound
    monkeypatch.undo()
    best = Interaction().solve(problem)
    assert best.status is Status.OPTIMAL
    assert a.bound <= best.objective <= a.objective


def test_seeds_differ_only_in_the_kicks():
    problem = interacting_network(22)
    a, b = Interaction(seed=0).solve(problem), Interaction(seed=1).solve(problem)
    assert a.status is b.status is Status.OPTIMAL
    np.testing.assert_array_equal(a.pick, b.pick)


@pytest.mark.parametrize(("G", "S"), [(300, 5), (90, 5)])
def test_time_limit_is_kept(G, S):
    """With 300 groups the relaxation is not begun; with 90 it is cut short."""
    problem = interacting_network(G, S)
    separable = Knapsack().solve(Problem(problem.loss, problem.constraints)).pick
    started = time.perf_counter()
    solution = Interaction(time_limit=1.5).solve(problem)
    assert time.perf_counter() - started < 2.5
    assert solution.status is Status.FEASIBLE
    assert problem.feasible(solution.pick)
    assert solution.objective < problem.objective(separable)
    assert np.isfinite(solution.bound)
    assert solution.bound < solution.objective
    assert solution.gap > 0


@pytest.mark.parametrize("pairs", [None, np.zeros((12, 5, 12, 5))])
def test_without_interactions_the_separable_solvers_answer(pairs):
    problem = interacting_network(12)
    one = Problem(problem.loss, problem.constraints, pairs)
    assert Interaction().solve(one).solver == "knapsack"
    assert Interaction().solve(one).objective == Knapsack().solve(Problem(problem.loss, problem.constraints)).objective
    two = Problem(problem.loss, (*problem.constraints, Constraint("c", "", np.ones((12, 5)), 12.0)), pairs)
    assert Interaction().solve(two).solver == "ilp"
    assert Interaction().solve(Problem(np.zeros((0, 3)), (), np.zeros((0, 3, 0, 3)))).pick.tolist() == []


def test_other_solvers_refuse_interactions():
    problem = interacting_network(4)
    for solver in (Knapsack(), Ilp()):
        with pytest.raises(MpqError, match="use the interaction solver"):
            solver.solve(problem)
    assert isinstance(auto_solver(problem), Interaction)
    assert SOLVERS["interaction"] is Interaction


def test_infeasible_says_what_is_reachable():
    cost = np.array([[5.0, 9], [7, 8]])
    pairs = np.array([[[[0, 0], [1, 2]], [[0, 0], [3, 4]]], [[[1, 3], [0, 0]], [[2, 4], [0, 0]]]], float)
    solution = Interaction().solve(Problem(np.ones((2, 2)), (Constraint("size", "bytes", cost, 11.0),), pairs))
    assert solution.status is Status.INFEASIBLE
    assert solution.message == "size <= 11 bytes: the smallest reachable is 12"
    assert solution.solver == "interaction"


def test_interactions_symmetric_but_for_rounding_are_taken():
    problem = interacting_network(8)
    skew = problem.interactions * (1 + 1e-10 * np.random.default_rng(0).standard_normal(problem.interactions.shape))
    solution = Interaction().solve(Problem(problem.loss, problem.constraints, skew))
    np.testing.assert_array_equal(solution.pick, Interaction().solve(problem).pick)
    assert solution.status is Status.OPTIMAL
