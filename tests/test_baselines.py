"""Baselines: what other tools do. They must be feasible, no better than the optimum, and do what their names say."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.errors import MpqError
from mpq.problem import Constraint, Problem, Status
from mpq.search import BASELINES, Exhaustive
from mpq.search.baselines import BeamDp, GreedyPath, GreedyRatio, OrderedEnumeration, Uniform
from mpq.testing import random_problem

LOSS = np.array([[4.0, 1.0, 0.0], [9.0, 2.0, 0.0], [1.0, 0.5, 0.0]])
BITS = np.tile([2.0, 4.0, 8.0], (3, 1))


def problem(limit: float, loss: np.ndarray = LOSS) -> Problem:
    return Problem(loss, (Constraint("size", "bits", BITS, limit),))


@pytest.mark.parametrize("name", BASELINES)
@given(seed=st.integers(0, 10_000), ties=st.booleans())
@settings(max_examples=40, deadline=None)
def test_picks_are_feasible_and_never_better_than_the_optimum(name, seed, ties):
    made = random_problem(np.random.default_rng(seed), ties=ties)
    best = Exhaustive().solve(made)
    if name == "ordered" and (made.allowed.any(0) != made.allowed.all(0)).any():
        with pytest.raises(MpqError, match="same schemes"):
            BASELINES[name]().solve(made)
        return
    found = BASELINES[name]().solve(made)
    assert found.status in (Status.FEASIBLE, Status.NO_SOLUTION)
    if found.pick is not None:
        assert made.feasible(found.pick)
        assert found.objective >= best.objective - 1e-9 * abs(best.objective)


@pytest.mark.parametrize(("limit", "scheme"), [(6, 0), (12, 1), (23, 1), (24, 2)])
def test_uniform_takes_the_best_scheme_that_fits(limit, scheme):
    assert Uniform().solve(problem(limit)).pick.tolist() == [scheme] * 3


def test_no_uniform_pick_is_no_proof_that_there_is_none():
    found = Uniform().solve(problem(5))
    assert found.status is Status.NO_SOLUTION
    assert "another solver may" in found.message


def test_greedy_ratio_moves_the_least_sensitive_groups_first():
    # 8 bits to 2 bits costs 4, 9 and 1: the third goes first, then the first; 8 and 4 bits reach 16 with 3 moves only.
    found = GreedyRatio().solve(problem(18))
    assert found.pick.tolist() == [2, 2, 0]


def test_greedy_path_ranks_every_choice_by_what_it_alone_loses():
    # Rises: group 2 at 4 bits .5, then group 0 at 4 bits and group 2 at 2 bits 1 each (first in order), group 1 2.
    assert GreedyPath().solve(problem(20)).pick.tolist() == [2, 2, 1]
    assert GreedyPath().solve(problem(16)).pick.tolist() == [1, 2, 1]
    assert GreedyPath().solve(problem(14)).pick.tolist() == [1, 2, 0]


@pytest.mark.slow
def test_a_wide_beam_is_exact_and_a_narrow_one_is_not():
    rng = np.random.default_rng(0)
    made = Problem(rng.random((12, 4)), (Constraint("size", "", rng.random((12, 4)), 5.0),))
    best = Exhaustive(max_picks=4**12).solve(made).objective
    assert BeamDp(beam=1_000_000).solve(made).objective == pytest.approx(best)
    assert BeamDp(beam=4).solve(made).objective > best


def test_the_beam_refuses_what_it_cannot_sum():
    with pytest.raises(MpqError, match="one constraint"):
        BeamDp().solve(Problem(LOSS))


def test_ordered_enumeration_equals_the_best_of_all_ordered_picks():
    rng = np.random.default_rng(1)
    loss = np.sort(rng.random((5, 3)), axis=1)[:, ::-1].copy()
    made = Problem(loss, (Constraint("size", "", np.tile([2.0, 4.0, 8.0], (5, 1)), 22.0),))
    order = np.argsort(-loss.sum(1))
    ordered = [p for p in itertools.product(range(3), repeat=5) if (np.diff(np.array(p)[order]) <= 0).all()]
    expected = min(made.objective(p) for p in ordered if made.feasible(p))
    assert OrderedEnumeration().solve(made).objective == pytest.approx(expected)


def test_ordered_enumeration_says_when_there_are_too_many():
    with pytest.raises(MpqError, match="over 2,000,000"):
        OrderedEnumeration().solve(Problem(np.ones((200, 6))))
