import numpy as np
import pytest

from mpq.problem import Constraint, Problem
from mpq.search import Evaluations, Exhaustive, Genetic, Refine, Sweep
from mpq.search.residual import ResidualModel
from mpq.testing_search import network_like_problem


def true_optimum(problem, measure):
    chunks = Exhaustive().all_picks(problem)
    return min(measure(p) for picks in chunks for p in picks if problem.feasible(p))


def test_comes_near_the_true_optimum_in_few_evaluations():
    """Of 4096 picks; the predicted optimum is up to 1.5 times worse."""
    starts, ends, spent = [], [], []
    for seed in range(8):
        problem, measure = network_like_problem(seed)
        found = Refine(seed).search(problem, Evaluations(measure, limit=24))
        best = true_optimum(problem, measure)
        starts.append(found.trace.losses[0] / best)
        ends.append(found.loss / best)
        spent.append(found.evaluations)
        assert "is expected to gain" in found.message
    assert np.mean(starts) > 1.15
    assert max(ends) < 1.1
    assert np.median(ends) == 1.0
    assert np.mean(spent) < 14


def test_corrects_a_prediction_that_is_wrong_about_one_group():
    """One group's two-bit loss is predicted ten times too low: the predicted optimum is bad, and soon left."""
    problem, _ = network_like_problem(1)
    wrong = problem.loss.copy()
    g = int(problem.loss[:, 0].argmax())
    wrong[g, 0] /= 10
    plain = Problem(wrong, problem.constraints)

    def measure(pick):
        return float(problem.loss[np.arange(6), pick].sum())

    found = Refine().search(plain, Evaluations(measure, limit=16))
    assert found.trace.losses[0] > 1.5 * found.loss
    assert found.loss == pytest.approx(true_optimum(plain, measure), rel=0.01)


def test_several_constraints_other_units_and_losses_below_zero():
    """A drop of accuracy in per cent, say: in other units than the prediction, and negative for good picks."""
    problem, true = network_like_problem(2)
    (size,) = problem.constraints
    few = Constraint("coarse", "", np.repeat([[1.0, 0, 0, 0]], 6, 0), 1.0)
    both = Problem(problem.loss, (size, few), problem.interactions)

    def measure(pick):
        return 40 * np.sqrt(true(pick)) - 8

    best = true_optimum(both, measure)
    assert best < 0
    found = Refine().search(both, Evaluations(measure, limit=24))
    assert both.feasible(found.pick)
    assert found.loss <= best + 0.02 * abs(best)


def test_all_losses_infinite():
    """A network that collapses everywhere: nothing is found, nothing breaks."""
    problem, _ = network_like_problem()
    found = Refine().search(problem, Evaluations(lambda pick: float("nan"), limit=12))
    assert found.pick is None
    assert "no feasible pick with a finite loss" in found.message


def test_ends_when_the_expected_gain_is_below_the_noise():
    """A measurement that tells its noise ends the search sooner, but not before the handful."""
    problem, true = network_like_problem(1)

    class Noisy:
        def __init__(self, error):
            self.error = error

        def __call__(self, pick):
            return true(pick)

        def noise(self, one, other):
            assert true(one) <= true(other)
            return self.error * true(one)

    def run(measure, **settings):
        return Refine(**settings).search(problem, Evaluations(measure, limit=40))

    plain, exact, noisy = run(true), run(Noisy(0.0)), run(Noisy(0.5))
    assert plain.message == exact.message
    assert plain.evaluations == exact.evaluations > noisy.evaluations == 8
    assert "less than the noise of 50.00%" in noisy.message
    assert run(Noisy(0.5), handful=9).evaluations == 9
    with pytest.warns(UserWarning, match="ended early: a measurement failed"):
        assert run(Noisy(None)).evaluations == 8


def test_evaluations_of_one_budget_serve_the_next():
    problem, measure = network_like_problem(3)
    (size,) = problem.constraints
    evaluations = Evaluations(measure)
    Refine().search(problem, evaluations)
    lower = Problem(problem.loss, (Constraint("size", "bits", size.cost, size.limit * 0.9),), problem.interactions)
    second = Refine().search(lower, evaluations)
    assert lower.feasible(second.pick)
    assert len(second.trace) < 24
    assert second.loss < 1.1 * true_optimum(lower, measure)


def test_residual_model_is_calibrated_and_learns_a_factor():
    """Losses that differ from the prediction by a factor of 2 in all and 3 in one choice's share."""
    problem, _ = network_like_problem(0)
    plain = Problem(problem.loss, problem.constraints)
    rng = np.random.default_rng(0)
    picks = rng.integers(1, 4, (40, 6))
    picks[:, 2] = rng.integers(0, 2, 40)
    factor = np.ones_like(problem.loss)
    factor[2, 0] = 3.0
    true = 2 * (problem.loss * factor)[np.arange(6), picks].sum(1)
    known, others = np.arange(20), np.arange(20, 40)
    model = ResidualModel(plain, picks[known], true[known])
    mean, deviation = model.predict(picks[others])
    before = np.log(true[others]) - np.log(plain.loss[np.arange(6), picks[others]].sum(1))
    error = np.log(true[others]) - mean
    assert np.abs(error).mean() < 0.4 * before.std()
    assert (np.abs(error) < 3 * deviation + 1e-3).all()
    at_known, small = model.predict(picks[known])
    np.testing.assert_allclose(at_known, np.log(true[known]), atol=0.1)
    assert small.mean() <= deviation.mean()
    corrected = model.corrected().loss
    assert corrected[2, 0] / plain.loss[2, 0] > 1.5 * corrected[2, 1] / plain.loss[2, 1]


def test_expected_gain_against_many_draws():
    problem, measure = network_like_problem(0)
    rng = np.random.default_rng(0)
    picks = rng.integers(0, 4, (12, 6))
    model = ResidualModel(problem, picks, np.array([measure(p) for p in picks]))
    others = rng.integers(0, 4, (5, 6))
    mean, deviation = model.predict(others)
    best = float(mean.mean())
    draws = rng.normal(mean, deviation, (200_000, 5))
    np.testing.assert_allclose(model.gain(others, best), np.maximum(best - draws, 0).mean(0), atol=0.01)


def test_sweep_measures_a_better_frontier_than_one_search():
    problem, measure = network_like_problem(0)
    (size,) = problem.constraints
    wide = Problem(problem.loss, (Constraint("size", "bits", size.cost, size.cost.max(1).sum()),), problem.interactions)
    sweep = Sweep().search(wide, Evaluations(measure, limit=32)).trace.frontier(size.cost[..., 0])
    other = Genetic().search(wide, Evaluations(measure, limit=32)).trace.frontier(size.cost[..., 0])
    assert len(sweep.cost) > 15
    assert (np.diff(sweep.cost) > 0).all()
    assert (np.diff(sweep.loss) < 0).all()
    worse = [min(sweep.loss[sweep.cost <= c], default=np.inf) > x for c, x in zip(other.cost, other.loss, strict=True)]
    assert np.mean(worse) < 0.2
