"""Genetic search and NSGA-II on the predicted loss, where trying all picks tells the truth."""

from functools import cache

import numpy as np
import pytest

from mpq.problem import Constraint, Problem
from mpq.search import Evaluations, Exhaustive, Genetic, Nsga2, RandomSearch, convex_frontier, hypervolume
from mpq.search.exhaustive import totals
from mpq.search.genetic import with_shares
from mpq.search.pareto import undominated
from mpq.testing_search import network_like_problem

SEEDS = range(6)


@cache
def predicted(seed):
    problem = network_like_problem(seed)[0]
    return problem, Exhaustive().solve(problem).objective


def search(method, problem, limit):
    return method.search(problem, Evaluations(problem.objective, limit=limit))


def test_genetic_search_comes_to_the_predicted_optimum_by_evolution():
    """From random picks alone: sooner than drawing at random, and far below its own first generation."""
    ratios = {"first": [], "genetic": [], "random": []}
    for seed in SEEDS:
        problem, best = predicted(seed)
        found = search(Genetic(seed, seeded=False), problem, 300)
        assert found.loss == pytest.approx(problem.objective(found.pick), rel=1e-12)
        ratios["first"].append(found.trace.losses[:20].min() / best)
        ratios["genetic"].append(found.loss / best)
        ratios["random"].append(search(RandomSearch(seed), problem, 300).loss / best)
    assert min(ratios["genetic"]) >= 1 - 1e-12
    assert np.median(ratios["genetic"]) < 1.01
    assert np.median(ratios["genetic"]) < np.median(ratios["random"]) < np.median(ratios["first"])
    assert np.median(ratios["first"]) > 1.2


def test_nsga2_comes_to_the_predicted_frontier_by_evolution():
    """Its hypervolume, of all that the limit allows, against that of random picks."""
    shares = {"first": [], "nsga2": [], "random": []}
    for seed in SEEDS:
        problem, _ = predicted(seed)
        picks = np.concatenate(list(Exhaustive().all_picks(problem)))
        picks = picks[[problem.feasible(p) for p in picks]]
        points = with_shares(problem, picks, np.log(totals(problem, picks)))
        low, high = points.min(0), points.max(0)

        def volume(picks, problem=problem, low=low, high=high):
            points = (with_shares(problem, picks, np.log(totals(problem, picks))) - low) / (high - low)
            return hypervolume(points[undominated(points)], np.ones(2))

        true = volume(picks)
        found = search(Nsga2(seed, seeded=False), problem, 300).trace.picks
        shares["first"].append(volume(found[:20]) / true)
        shares["nsga2"].append(volume(found) / true)
        shares["random"].append(volume(search(RandomSearch(seed), problem, 300).trace.picks) / true)
    assert max(shares["nsga2"]) <= 1 + 1e-12
    assert min(shares["nsga2"]) > 0.9
    assert np.median(shares["nsga2"]) > np.median(shares["random"]) > np.median(shares["first"])


@pytest.mark.parametrize("method", [Genetic, Nsga2])
def test_the_first_generation_holds_the_predicted_optimum_and_frontier_points(method):
    problem, best = predicted(0)
    (size,) = problem.constraints
    frontier = [p for p in convex_frontier(problem.loss, size.cost[..., 0]).picks if problem.feasible(p)]
    known = {p.tobytes() for p in frontier}

    def first(seeded):
        return search(method(population=12, seeded=seeded), problem, 12).trace.picks

    seeds, drawn = first(True), first(False)
    on_it = sum(p.tobytes() in known for p in seeds)
    assert on_it >= 4
    assert len(frontier) > 4
    assert len(seeds) == 12
    assert min(map(problem.objective, seeds)) == pytest.approx(best, rel=1e-12)
    assert sum(p.tobytes() in known for p in drawn) < on_it
    assert min(map(problem.objective, drawn)) > 1.001 * best


def test_nsga2_seeds_are_spread_over_the_frontier_and_genetic_ones_near_the_limit():
    problem, _ = predicted(0)
    (size,) = problem.constraints
    used = {
        method: [
            problem.usage(p)["size"][0] / size.limit[0] for p in search(method(population=12), problem, 6).trace.picks
        ]
        for method in (Genetic, Nsga2)
    }
    assert min(used[Genetic]) > min(used[Nsga2])
    assert np.ptp(used[Nsga2]) > 0.3


@pytest.mark.parametrize("method", [Genetic(population=8), Nsga2(population=8)])
def test_evolution_of_several_constraints_meets_all(method):
    problem = network_like_problem(1)[0]
    coarse = Constraint("coarse", "", np.repeat([[1.0, 0, 0, 0]], 6, 0), 2.0)
    both = Problem(problem.loss, (*problem.constraints, coarse), problem.interactions)
    found = search(method, both, 100)
    assert len(found.trace) == 100
    assert all(both.feasible(p) for p in found.trace.picks)
