"""Optuna studies that are shared, and those that are resumed with pruning."""

import sqlite3

import numpy as np
import pytest

from mpq.errors import MpqError
from mpq.problem import Constraint, Problem, Status
from mpq.search import EarlierStudy, Evaluations, Ledger, OptunaSearch, RandomSearch
from mpq.search.optuna_search import _Run
from mpq.testing_search import network_like_problem


def one_choice():
    return Problem(np.ones((3, 1)), (Constraint("size", "B", np.ones((3, 1)), np.array([3.0])),))


def test_equal_suggestions_of_a_batch_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr("mpq.search.optuna_search._TRIES", 4)
    search = OptunaSearch(batch=2, storage=str(tmp_path / "study.db"))
    found = search.search(one_choice(), Evaluations(lambda pick: 0.5, limit=24))
    assert found.status is Status.FEASIBLE
    assert found.evaluations == 1


def test_batches_of_a_shared_study_spend_the_limit(tmp_path):
    problem, measure = network_like_problem()
    search = OptunaSearch(batch=4, storage=str(tmp_path / "study.db"))
    with Ledger(tmp_path / "ledger.db") as ledger:
        found = search.search(problem, Evaluations(measure, limit=8, ledger=ledger))
    assert found.evaluations == 8


def two_processes(folder, ledgers):
    """The parts of two processes in a study of one choice, which both have just said that they will measure it."""
    runs = []
    for seed, ledger in enumerate(ledgers):
        search = OptunaSearch(seed=seed, storage=str(folder / "study.db"), seeded=False)
        runs.append(_Run(search, one_choice(), Evaluations(lambda pick: 0.5, ledger=ledger)))
    trials = [run._study.ask() for run in runs]
    picks = [run._pick(trial) for run, trial in zip(runs, trials, strict=True)]
    return list(zip(runs, trials, picks, strict=True))


@pytest.mark.parametrize("first", [0, 1])
def test_exactly_one_of_two_processes_measures_what_both_suggest(tmp_path, first):
    with Ledger(tmp_path / "l.db") as a, Ledger(tmp_path / "l.db") as b:
        turns = two_processes(tmp_path, (a, b))
        new = [run._is_new(trial, pick) for run, trial, pick in (turns[first], turns[1 - first])]
    assert sum(new) == 1


def test_without_a_shared_ledger_at_least_one_does(tmp_path):
    turns = two_processes(tmp_path, (Ledger(), Ledger()))
    assert [run._is_new(trial, pick) for run, trial, pick in turns] == [True, False]


def test_what_a_dead_process_claimed_is_taken_over_in_time(tmp_path):
    """Not before a trial has shown how long one takes, nor at once."""
    with Ledger(tmp_path / "l.db") as a, Ledger(tmp_path / "l.db") as b:
        (dead, trial, pick), (run, own, _) = two_processes(tmp_path, (a, b))
        assert dead._is_new(trial, pick)
        assert not run._is_new(own, pick)
        run._rivals = {rival: seen - 1000 for rival, seen in run._rivals.items()}
        assert not run._is_new(own, pick)
        run._study.tell(run._study.ask(), 1.0)
        assert not run._is_new(own, pick)  # the claim, seen for the first time
        run._rivals = {rival: seen - 1000 for rival, seen in run._rivals.items()}
        assert run._is_new(own, pick)
        assert not dead._is_new(trial, pick)


def test_schemes_are_ordered_by_cost_under_a_limit_that_does_not_bind():
    cost = np.tile([8.0, 2.0, 4.0], (2, 1))
    problem = Problem(np.ones((2, 3)), (Constraint("size", "bits", cost, 100.0),))
    assert _Run(OptunaSearch(), problem, Evaluations(lambda pick: 1.0))._options == [[1, 2, 0]] * 2


class InParts:
    """The loss in four parts, each nearer to the true one; fails in the middle of one measurement."""

    def __init__(self, fail_at=None):
        self.true, self.fail_at, self.begun = network_like_problem()[1], fail_at, []

    def __call__(self, pick):
        return list(self.in_parts(pick))[-1]

    def in_parts(self, pick):
        self.begun.append(tuple(pick))
        for part in range(1, 5):
            if len(self.begun) == self.fail_at and part == 3:
                raise OSError("killed")
            yield self.true(pick) * (1 + 0.3 / part - 0.3 / 4)


def test_a_resumed_search_prunes_as_the_whole_one(tmp_path):
    problem, _ = network_like_problem(average=5)
    search = OptunaSearch(seeded=False)
    whole = search.search(problem, Evaluations(InParts(), limit=24))
    assert 5 <= len(whole.trace) < 20
    with Ledger(tmp_path / "l.db") as ledger:
        with pytest.warns(UserWarning, match="a measurement failed .OSError: killed"):
            search.search(problem, Evaluations(cut := InParts(16), limit=24, ledger=ledger))
        found = search.search(problem, Evaluations(rest := InParts(), limit=24, ledger=ledger))
    np.testing.assert_array_equal(found.trace.picks, whole.trace.picks)
    np.testing.assert_array_equal(found.trace.losses, whole.trace.losses)
    assert not {*cut.begun[:-1]} & {*rest.begun}  # neither the finished nor the pruned ones are measured again
    assert len(cut.begun) - 1 + len(rest.begun) == 24


def test_an_error_of_the_pruner_is_not_one_of_the_measurement():
    def prune(part, loss):
        raise KeyError("pruner")

    with pytest.raises(KeyError, match="pruner"):
        Evaluations(InParts()).measure_in_parts(np.zeros(6, np.int64), prune)


def test_a_ledger_is_not_kept_in_another_database(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE trials (number INTEGER)")
    with pytest.raises(MpqError, match="a database of something else; give the path of a new file"):
        Ledger(path)


def test_bad_settings_are_refused():
    for search in (RandomSearch, OptunaSearch):
        with pytest.raises(MpqError, match="batch must be at least 1, not 0"):
            search(batch=0)
    problem, _ = network_like_problem()
    for bad in (-1, 4):
        with pytest.raises(MpqError, match="don't fit"):
            EarlierStudy(problem, np.full((1, 6), bad), np.ones(1))
    with pytest.raises(MpqError, match="without picks"):
        EarlierStudy(problem, np.zeros((0, 6), np.int64), np.zeros(0))


def test_no_picks_are_no_evaluation():
    evaluations = Evaluations(lambda pick: 1.0)
    assert evaluations.measure([]).tolist() == []
    assert not len(evaluations.trace)
    assert evaluations.measure(np.zeros((1, 0))).tolist() == [1.0]
