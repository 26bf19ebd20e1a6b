import numpy as np
import pytest

from mpq.errors import MpqError
from mpq.problem import Constraint, Problem, Status
from mpq.search import Bisection, Evaluations, Exhaustive, Ledger
from mpq.testing_search import network_like_problem


def wide(groups=6):
    """The problem without a limit that binds."""
    problem, true = network_like_problem(groups=groups)
    (size,) = problem.constraints
    most = size.cost.max(1).sum()
    return Problem(problem.loss, (Constraint("size", "bits", size.cost, most),), problem.interactions), true


def path_sizes(problem, passes):
    """Sizes of all picks that are optimal for some limit and pass, by brute force."""
    (size,) = problem.constraints
    cost = size.cost[..., 0]
    found = []
    for limit in np.arange(cost.min(1).sum(), cost.max(1).sum() + 1):
        narrower = Problem(problem.loss, (Constraint("size", "bits", size.cost, limit),), problem.interactions)
        pick = Exhaustive().solve(narrower).pick
        if passes(pick):
            found.append(cost[np.arange(len(pick)), pick].sum())
    return found


@pytest.mark.parametrize("limit", [0.3, 0.05, 0.004])
def test_finds_the_cheapest_of_the_path_where_it_is_monotone(limit):
    problem, _ = wide(4)
    expected = min(path_sizes(problem, lambda pick: problem.objective(pick) <= limit))
    found = Bisection(limit).search(problem, Evaluations(problem.objective))
    assert found.status is Status.FEASIBLE
    assert found.usage["size"] == expected
    assert found.loss == problem.objective(found.pick) <= limit
    assert "falls as the cost rises" in found.message
    assert found.evaluations < 15


def test_goes_on_below_where_the_loss_is_not_monotone():
    """A bump just below the top makes plain bisection stop there."""
    problem, _ = wide(4)
    (size,) = problem.constraints
    low, high = size.cost[:, 0].sum(), size.cost[:, -1].sum()

    def measure(pick):
        used = size.cost[np.arange(4), pick, 0].sum()
        bump = 0.45 < (used - low) / (high - low) < 0.55
        return 1.0 if bump else problem.objective(pick)

    found = Bisection(0.05).search(problem, Evaluations(measure))
    assert found.usage["size"] == min(path_sizes(problem, lambda pick: measure(pick) <= 0.05))
    assert "not monotone" in found.message


def test_negative_and_zero_losses_and_a_zero_limit():
    """A drop of accuracy may be below zero."""
    problem, _ = wide(4)
    found = Bisection(0.0).search(problem, Evaluations(lambda pick: float(np.round(problem.objective(pick) - 0.01, 3))))
    assert found.loss <= 0
    expected = min(path_sizes(problem, lambda pick: np.round(problem.objective(pick) - 0.01, 3) <= 0))
    assert found.usage["size"] == expected


def test_other_constraints_and_the_first_ones_limit_hold():
    problem, true = wide()
    (size,) = problem.constraints
    few_2_bits = Constraint("coarse", "", np.repeat([[1.0, 0, 0, 0]], 6, 0), 2.0)
    capped = Constraint("size", "bits", size.cost, size.limit * 0.6)
    found = Bisection(1.0).search(Problem(problem.loss, (capped, few_2_bits), problem.interactions), Evaluations(true))
    assert (found.pick == 0).sum() <= 2
    assert found.usage["size"] <= size.limit * 0.6


def test_what_can_not_be_met_is_told():
    problem, true = wide()
    found = Bisection(-1.0).search(problem, Evaluations(true))
    assert found.status is Status.NO_SOLUTION
    assert "none of the 4 picks measured passes" in found.message
    assert len(found.trace) == 4
    (size,) = problem.constraints
    tight = Problem(problem.loss, (Constraint("size", "bits", size.cost, 1.0),), problem.interactions)
    assert Bisection(1.0).search(tight, Evaluations(true)).status is Status.INFEASIBLE
    with pytest.raises(MpqError, match="the cost to minimise"):
        Bisection(1.0).search(Problem(problem.loss), Evaluations(true))


def test_limit_of_evaluations_and_ledger(tmp_path):
    problem, true = wide()
    with Ledger(tmp_path / "x.db") as ledger:
        cut = Bisection(0.05).search(problem, Evaluations(true, limit=4, ledger=ledger))
        assert cut.evaluations == 4
        assert cut.status is Status.FEASIBLE
        again = Bisection(0.05).search(problem, Evaluations(true, ledger=ledger))
    assert again.reused == 4
    whole = Bisection(0.05).search(problem, Evaluations(true))
    np.testing.assert_array_equal(again.trace.picks, whole.trace.picks)
    assert whole.usage["size"] <= cut.usage["size"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_losses_without_a_logarithm_are_bisected(bad):
    """A network that collapses under few bits measures nothing finite."""
    problem, _ = wide(4)
    (size,) = problem.constraints
    low, high = size.cost.min(1).sum(), size.cost.max(1).sum()

    def measure(pick):
        return bad if size.usage(pick)[0] < low + 0.4 * (high - low) else problem.objective(pick)

    found = Bisection(0.1).search(problem, Evaluations(measure))
    assert found.usage["size"] == min(path_sizes(problem, lambda pick: measure(pick) <= 0.1))
    assert "falls as the cost rises" in found.message


def test_a_limit_below_zero():
    """A config may have to be better than the float model."""
    problem, _ = wide(4)
    found = Bisection(-1.0).search(problem, Evaluations(lambda pick: problem.objective(pick) - 1.05))
    expected = min(path_sizes(problem, lambda pick: problem.objective(pick) - 1.05 <= -1.0))
    assert found.usage["size"] == expected


def test_cheaper_picks_are_measured_where_the_dearest_fails():
    """Some quantized networks are better than with more bits."""
    problem, _ = wide(4)

    def measure(pick):
        return 1.0 if (pick == 3).all() else problem.objective(pick)

    found = Bisection(0.05).search(problem, Evaluations(measure))
    assert found.trace.losses[0] == 1.0
    assert found.usage["size"] == min(path_sizes(problem, lambda pick: measure(pick) <= 0.05))
