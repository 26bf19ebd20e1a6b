import itertools
import re

import numpy as np
import pytest
from pymoo.indicators.hv import HV
from scipy.stats import kendalltau

import mpq
from mpq.errors import MpqError
from mpq.problem import Constraint, Problem
from mpq.search import Choices, Cqap, Evaluations, Linas, Nsga2, RandomSearch
from mpq.search.feasible import FeasiblePicks
from mpq.search.genetic import with_shares
from mpq.search.linas import front_first, most_volume
from mpq.search.predictor import LossPredictor
from mpq.search.surrogate import training_picks
from mpq.testing import tiny_network
from mpq.testing_search import SearchContract, network_like_problem

BITS = {"bits": (2, 3, 4, 8)}


class TestCqap(SearchContract):
    @pytest.fixture
    def search(self):
        return Cqap(population=20, generations=5)


@pytest.mark.parametrize("seeded", [True, False])
class TestLinas(SearchContract):
    @pytest.fixture
    def search(self, seeded):
        return Linas(initial=6, batch=4, population=20, generations=5, seeded=seeded)


def losses_of(measure, picks):
    return np.array([measure(p) for p in picks])


def some(problem, count, crowding=1.0, seed=0):
    feasible = FeasiblePicks(problem)
    return training_picks(feasible, count, np.random.default_rng(seed), crowding)


def with_macs(problem):
    """A second constraint, on other costs."""
    cost = problem.constraints[0].cost[::-1, :, 0]
    return Problem(problem.loss, (*problem.constraints, Constraint("macs", "MAC", cost, cost[:, 3].sum() * 0.5)))


def test_training_picks_are_different_feasible_and_spread_over_the_costs():
    problem, _ = network_like_problem(groups=20, average=6.0)
    size = problem.constraints[0]
    even, crowded = some(problem, 200), some(problem, 200, crowding=4.0)
    for picks in (even, crowded):
        assert len({p.tobytes() for p in picks}) == 200
        assert all(problem.feasible(p) for p in picks)
    least, limit = problem.smallest_usage()["size"][0], size.limit[0]
    places = (np.array([problem.usage(p)["size"][0] for p in even]) - least) / (limit - least)
    assert (np.histogram(places, 4, (0, 1))[0] >= 35).all()
    near = (np.array([problem.usage(p)["size"][0] for p in crowded]) - least) / (limit - least)
    assert np.median(near) > 0.75
    assert (np.bincount(even.ravel(), minlength=4) > 200).all()


def test_training_picks_of_small_spaces_and_of_problems_without_limits():
    assert len(some(Problem(np.zeros((2, 2))), 50)) == 4
    assert (
        len(some(Problem(np.zeros((2, 2)), (Constraint("size", "B", np.ones((2, 2)), np.array([np.inf])),)), 50)) == 4
    )
    zero = Constraint("size", "B", np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([0.0]))
    np.testing.assert_array_equal(some(Problem(np.zeros((2, 2)), (zero,)), 5), [[0, 0]])


@pytest.mark.parametrize("seeded", [True, False])
def test_predictor_ranks_new_picks_as_its_held_out_correlation_says(seeded):
    problem, measure = network_like_problem(average=5.0)
    picks, new = some(problem, 100), some(problem, 200, seed=1)
    predictor = LossPredictor(problem, BITS, seeded=seeded)
    told = predictor.held_out(picks, losses_of(measure, picks), np.random.default_rng(0))
    predictor.learn(picks, losses_of(measure, picks))
    true = kendalltau(predictor.predict(new), losses_of(measure, new)).statistic
    assert true > 0.75
    assert told == pytest.approx(true, abs=0.1)


def test_held_out_correlation_of_noise_is_nought():
    problem, _ = network_like_problem(average=5.0)
    predictor, rng = LossPredictor(problem, seeded=False), np.random.default_rng(0)
    assert abs(predictor.held_out(some(problem, 100), rng.lognormal(size=100), rng)) < 0.25
    assert np.isnan(predictor.held_out(some(problem, 9), np.ones(9), rng))


def test_predictor_equals_kernel_ridge_regression_in_its_own_features():
    problem, measure = network_like_problem(average=5.0)
    picks, new = some(problem, 30), some(problem, 10, seed=1)
    predictor = LossPredictor(problem, {}, seeded=False)
    predictor.learn(picks, losses_of(measure, picks))
    _, choices, pairs, rest = predictor._scales

    def explicit(p):  # offset, choices, and all products of two choices
        one = np.eye(4)[p].reshape(len(p), -1) / np.sqrt(6)
        two = np.einsum("ni,nj->nij", one, one).reshape(len(p), -1)
        return np.concatenate([3 * np.ones((len(p), 1)), choices * one, pairs * two], 1)

    X = explicit(picks)
    normal = X.T @ X + (rest**2 + 1e-9) * np.eye(X.shape[1])
    weights = np.linalg.solve(normal, X.T @ np.log(losses_of(measure, picks)))
    np.testing.assert_allclose(predictor.predict(new), explicit(new) @ weights, rtol=1e-5, atol=1e-5)


def test_schemes_that_share_attributes_share_what_is_learnt():
    # Schemes 0..3 have 2 to 8 bits, tensor-wise, 4..7 the same channel-wise: 4..7 are seen in one group only.
    bits, wise = (2, 3, 4, 8) * 2, ("tensor",) * 4 + ("channel",) * 4
    problem = Problem(np.zeros((5, 8)))
    loss = np.array([-b - (w == "channel") for b, w in zip(bits, wise, strict=True)])
    rng = np.random.default_rng(0)
    picks, new = rng.integers(4, size=(40, 5)), rng.integers(8, size=(300, 5))
    picks[:, 0] = rng.integers(8, size=40)

    def correlation(attributes):
        predictor = LossPredictor(problem, attributes, seeded=False)
        predictor.learn(picks, np.exp(loss[picks].sum(1)))
        return kendalltau(predictor.predict(new), loss[new].sum(1)).statistic

    assert correlation({"bits": bits, "granularity": wise}) > correlation({}) + 0.1


def test_attributes_need_a_value_for_each_scheme():
    with pytest.raises(MpqError, match="'bits' has 3 values for 4 schemes"):
        LossPredictor(network_like_problem()[0], {"bits": (2, 3, 4)})


def test_cqap_finds_the_optimum_and_reports_its_rank_error():
    problem, measure = network_like_problem(average=4.5)
    every = [p for p in itertools.product(range(4), repeat=6) if problem.feasible(p)]
    best = min(measure(np.array(p)) for p in every)
    found = Cqap(seeded=False).search(problem, Evaluations(measure))
    assert found.evaluations == 192
    assert found.loss <= 1.05 * best
    wrong, tau = map(float, re.search(r"([\d.]+)% of held-out .* tau ([\d.]+)\)", found.message).groups())
    assert wrong == pytest.approx(50 * (1 - tau), abs=0.1)
    assert tau > 0.7


def test_cqap_keeps_a_part_of_a_limit_for_its_finalists():
    problem, measure = network_like_problem(average=4.5)
    found = Cqap(population=20, generations=5).search(problem, Evaluations(measure, limit=40))
    assert found.message.startswith("learnt from 30 picks")
    assert len(found.trace) == 40


def test_cqap_is_conditioned_on_global_choices():
    base, true = network_like_problem(average=4.5)
    choices = Choices({"granularity": ("tensor", "channel"), "symmetric": (True, False)})
    gains = {"tensor": 1.0, "channel": 0.5, True: 1.0, False: 0.8}

    def measure(pick):
        chosen = choices.of(pick)
        return true(pick[:-2]) * gains[chosen["granularity"]] * gains[chosen["symmetric"]]

    found = Cqap(training=60, finalists=10).search(choices.problem(base), Evaluations(measure))
    assert choices.of(found.pick) == {"granularity": "channel", "symmetric": False}


@pytest.mark.parametrize("objectives", [2, 3])
def test_linas_reaches_more_hypervolume_than_nsga2_and_random(objectives):
    problem, measure = network_like_problem(groups=8, average=6.0)
    if objectives == 3:
        problem = with_macs(problem)

    def volume(search):
        trace = search.search(problem, Evaluations(measure, limit=48)).trace
        points = with_shares(problem, trace.picks, np.log(trace.losses))
        assert points.shape[1] == objectives
        return HV(ref_point=[2.0, *[1.0] * (objectives - 1)])(points[(points[:, 1:] <= 1).all(1)])

    cold, seeded = volume(Linas(seeded=False)), volume(Linas())
    assert cold > 1.1 * volume(RandomSearch())
    assert cold > 1.1 * volume(Nsga2(seeded=False))
    assert seeded > volume(Nsga2())
    assert seeded >= cold


def test_front_first_orders_by_dominance():
    points = np.array([[2.0, 2.0], [0.0, 1.0], [1.0, 0.0], [3.0, 3.0]])
    np.testing.assert_array_equal(front_first(points), [1, 2, 0, 3])


def test_most_volume_takes_the_best_and_fills_gaps():
    points = np.column_stack([np.linspace(0, 1, 11), np.linspace(1, 0, 11)])
    np.testing.assert_array_equal(most_volume(points, points[10:], 2), [0, 5])
    assert set(most_volume(points, points[10:], 4)) >= {0, 5}
    np.testing.assert_array_equal(most_volume(points[:2] + 1, points, 5), [0, 1])


def test_attributes_of_a_search_space_condition_a_search():
    net, data = tiny_network()
    found = mpq.analyze(net, data, "W4A8,W4:g2,W8:tensor:asymA8", progress=False)
    assert found.space.attributes == {
        "weight_bits": (4, 4, 8),
        "granularity": ("channel", "group:2", "tensor"),
        "symmetric": (True, True, False),
        "activation_bits": (8, 32, 8),
        "activation_symmetric": (False, True, False),
    }
    search = Linas(initial=4, batch=2, population=8, generations=2, attributes=found.space.attributes)
    study = found.search(lambda config: config.predicted_loss, "avg_bits<=6", search, evaluations=8, progress=False)
    assert len(study.solution.trace) == 8
