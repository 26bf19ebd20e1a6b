import itertools

import numpy as np
import pytest
from scipy.stats import kendalltau

from mpq.errors import MpqError
from mpq.problem import Constraint, PairCosts, Problem
from mpq.search import Choices, EarlierStudy, Evaluations, Ledger, Quantune, RandomSearch
from mpq.search.quantune import Trees
from mpq.testing_search import SearchContract, network_like_problem

# What Quantune searches: 96 configs of a network.
GLOBAL = Choices(
    {
        "samples": (1, 8, 64, 512),
        "granularity": ("tensor", "channel"),
        "symmetric": (True, False),
        "clipping": ("none", "mse", "percentile"),
        "mixed": (False, True),
    }
)


def global_losses(seed):
    """Losses of all 96 configs of a network: effects that networks share, their own, and pairs of choices."""
    shared, own = np.random.default_rng(5), np.random.default_rng(seed)
    problem = GLOBAL.problem()
    effects = shared.normal(size=problem.loss.shape) + 0.3 * own.normal(size=problem.loss.shape)
    pairs = 0.3 * shared.normal(size=(problem.loss.size, problem.loss.size))
    scale = own.lognormal(0, 2)

    def measure(pick):
        chosen = np.eye(4)[pick].ravel()
        return float(scale * np.exp(effects.ravel() @ chosen + chosen @ pairs @ chosen))

    return problem, measure


def every(problem):
    return np.array(list(itertools.product(*[np.flatnonzero(row) for row in problem.allowed])))


def study(problem, measure, picks):
    return EarlierStudy(problem, picks, np.array([measure(p) for p in picks]))


@pytest.mark.parametrize("seeded", [True, False])
class TestQuantune(SearchContract):
    @pytest.fixture
    def search(self, seeded):
        return Quantune(initial=8, seeded=seeded)


class TestQuantuneWithEarlierStudies(SearchContract):
    @pytest.fixture
    def search(self):
        problem, measure = network_like_problem(seed=1, groups=5)
        rng = np.random.default_rng(0)
        return Quantune(earlier=(study(problem, measure, rng.integers(4, size=(30, 5))),))


def test_finds_the_optimum_of_per_layer_schemes_sooner_than_random():
    problem, measure = network_like_problem(average=4.5)
    best = min(measure(p) for p in every(problem) if problem.feasible(p))

    def needed(search, limit):
        evaluations = Evaluations(measure, limit=limit)
        found = search.search(problem, evaluations).trace.best(problem) <= 1.05 * best
        return int(found.argmax()) + 1 if found.any() else limit

    cold = np.median([needed(Quantune(seed, seeded=False), 60) for seed in range(3)])
    assert needed(Quantune(), 60) < cold < 60
    assert 3 * cold <= np.median([needed(RandomSearch(seed), 400) for seed in range(5)])


def test_small_spaces_are_searched_to_the_end():
    problem, measure = global_losses(0)
    found = Quantune(batch=16).search(problem, Evaluations(measure))
    assert found.evaluations == 96
    assert found.loss == min(measure(p) for p in every(problem))
    assert found.message == "no new picks are left"


def test_earlier_studies_of_other_networks_rank_global_choices_before_anything_is_measured():
    problem, measure = global_losses(0)
    picks = every(problem)
    earlier = tuple(study(*global_losses(seed), picks) for seed in (1, 2, 3))
    losses = [measure(p) for p in picks]
    assert kendalltau(Trees(problem, earlier).predict(picks), losses).statistic > 0.6
    first = Quantune(earlier=earlier).search(problem, Evaluations(measure, limit=5)).loss
    cold = [Quantune(seed).search(problem, Evaluations(measure, limit=5)).loss for seed in range(5)]
    assert np.mean(first <= np.array(losses)) >= 0.9
    assert first <= np.median(cold)


def test_earlier_studies_of_networks_of_other_sizes_rank_per_layer_schemes():
    rng = np.random.default_rng(0)
    earlier = tuple(
        study(*network_like_problem(seed, groups=g), rng.integers(4, size=(200, g))) for seed, g in ((1, 5), (2, 9))
    )
    problem, measure = network_like_problem(0)
    picks = rng.integers(4, size=(300, 6))
    losses = [measure(p) for p in picks]
    cold = kendalltau(Trees(problem, earlier, seeded=False).predict(picks), losses).statistic
    assert cold > 0.4
    assert kendalltau(Trees(problem, earlier).predict(picks), losses).statistic > cold


def test_measured_losses_correct_wrong_earlier_studies():
    problem, measure = global_losses(0)
    picks = every(problem)
    trees = Trees(problem, (study(problem, lambda p: 1 / measure(p), picks),))
    losses = np.array([measure(p) for p in picks])
    assert kendalltau(trees.predict(picks), losses).statistic < -0.6
    known, new = np.split(np.random.default_rng(0).permutation(96), 2)
    trees.learn(picks[known], losses[known])
    assert kendalltau(trees.predict(picks[new]), losses[new]).statistic > 0.2


def test_earlier_study_from_a_ledger(tmp_path):
    problem, measure = network_like_problem(seed=1, groups=5)
    with Ledger(tmp_path / "ledger.db", "another model") as ledger:
        trace = RandomSearch().search(problem, Evaluations(measure, limit=20, ledger=ledger)).trace
        found = EarlierStudy.from_ledger(problem, ledger)
    np.testing.assert_array_equal(found.losses, trace.losses)
    np.testing.assert_array_equal(found.picks, trace.picks)
    with Ledger(tmp_path / "ledger.db", "nothing") as ledger, pytest.raises(MpqError, match="no evaluations"):
        EarlierStudy.from_ledger(problem, ledger)
    with pytest.raises(MpqError, match="don't fit its problem of 6 groups"):
        EarlierStudy(network_like_problem()[0], found.picks, found.losses)


def test_choices_next_to_schemes():
    base = network_like_problem()[0]
    problem = Choices({"granularity": ("tensor", "channel"), "samples": (1, 2, 3, 4, 5)}).problem(base)
    assert problem.loss.shape == (8, 5)
    np.testing.assert_array_equal(problem.allowed.sum(1), [4] * 6 + [2, 5])
    for pick in np.random.default_rng(0).integers(4, size=(20, 6)):
        whole = [*pick, 1, 4]
        assert problem.objective(whole) == pytest.approx(base.objective(pick), rel=1e-12)
        assert problem.feasible(whole) == base.feasible(pick)
        np.testing.assert_array_equal(problem.usage(whole)["size"], base.usage(pick)["size"])


def test_choices_next_to_schemes_whose_neighbours_cost():
    pairs = PairCosts(np.array([[0, 1]]), np.array([[[0.0, 3.0], [5.0, 0.0]]]))
    base = Problem(np.zeros((2, 2)), (Constraint("latency", "s", np.ones((2, 2)), 4.0, pairs),))
    problem = Choices({"samples": (1, 2, 3)}).problem(base)
    assert [problem.usage([a, b, 2])["latency"] for a, b in ((0, 0), (0, 1), (1, 0))] == [2, 5, 7]


def test_choices_say_what_a_pick_means():
    assert GLOBAL.of([3, 1, 0, 2, 1]) == {
        "samples": 512,
        "granularity": "channel",
        "symmetric": True,
        "clipping": "percentile",
        "mixed": True,
    }
    assert Choices({"a": "xy"}).of([7, 7, 1]) == {"a": "y"}
    with pytest.raises(MpqError, match=r"\['b'\] have no options"):
        Choices({"a": (1,), "b": ()})
    with pytest.raises(MpqError, match="at least one"):
        Choices({})


def test_infinite_losses_and_equal_ones_are_learnt():
    problem = Problem(np.zeros((2, 3)), (Constraint("size", "B", np.ones((2, 3)), np.array([2.0])),))
    found = Quantune(initial=3).search(problem, Evaluations(lambda p: np.inf if p[0] else 1.0))
    assert found.evaluations == 9
    assert found.loss == 1.0
