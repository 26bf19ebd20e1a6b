"""HAWQ-V3's published integer programs, where the reference figures are at hand."""

import numpy as np
import pytest

from mpq.problem import Problem, Status
from mpq.search import Ilp, Knapsack, exact_frontier


@pytest.fixture
def hawq(load_benchmark):
    return load_benchmark("search_hawq", reference=True)


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_all_are_solved_to_their_known_optimum(hawq, network):
    """By three ways; all but one are the published configs, bit by bit."""
    data = hawq.load(hawq.SHARED / "reference", f"hawqv3_{network}")
    group, problems = hawq.hawq_problems(data)
    different = []
    for name, problem in problems.items():
        known = data["ilp_results"][name]
        knapsack, ilp = Knapsack().solve(problem), Ilp().solve(problem)
        assert knapsack.status is ilp.status is Status.OPTIMAL
        np.testing.assert_array_equal(knapsack.pick, ilp.pick)
        assert hawq.BITS[knapsack.pick[group]].tolist() == known["optimum_bits"]
        offset = problem.loss[:, 0].sum()
        assert knapsack.objective - offset == pytest.approx(known["optimum_objective"], abs=1e-9)
        front = exact_frontier(problem.loss, problem.constraints[0].cost[..., 0])
        if front is not None:
            within = front.cost <= problem.constraints[0].slack_limit
            assert front.loss[within].min() == pytest.approx(knapsack.objective, rel=1e-12)
        if known["differs_from_published"]:
            different.append(name)
            assert knapsack.objective - offset < known["published_objective"] - 1e-3
    assert different == (["modelsize_0.25"] if network == "resnet50" else [])


def test_all_three_limits_at_once(hawq):
    """No published answer: better than any of the published configs that meets all three."""
    data = hawq.load(hawq.SHARED / "reference", "hawqv3_resnet50")
    group, problems = hawq.hawq_problems(data)
    some = [problems[f"{metric}_0.5"] for metric in hawq.METRICS]
    together = Problem(some[0].loss, tuple(c for p in some for c in p.constraints))
    best = Ilp().solve(together)
    assert best.status is Status.OPTIMAL
    assert set(best.prices) == set(hawq.METRICS)
    assert sum(price > 0 for price in best.prices.values()) >= 2
    for solution in (Knapsack().solve(p) for p in some):
        assert best.objective >= solution.objective
    met = 0
    for name in problems:
        pick = np.zeros(len(together.loss), int)
        pick[group] = np.array(data["configs"][name]["weight_bits"][1:-1]) == 8
        if together.feasible(pick):
            met += 1
            assert best.objective <= together.objective(pick)
    assert met >= 1


def test_haq_strategy_and_ours(hawq):
    found = hawq.run_haq(hawq.SHARED / "reference", 2)
    assert found["published_cost"] == pytest.approx(0.591, abs=1e-3)
    assert found["proven"]
    assert max(found["loss_over_published"].values()) < 0.5
