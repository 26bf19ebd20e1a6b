import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.errors import MpqError
from mpq.problem import Constraint, Problem, Status
from mpq.search import Evaluations, Exhaustive, Ledger, RandomSearch
from mpq.search.evaluations import Stop
from mpq.search.feasible import FeasiblePicks, roomiest
from mpq.testing import random_problem


def test_ledger_keeps_contexts_apart_and_first_values(tmp_path):
    path = tmp_path / "ledger.db"
    with Ledger(path, "a") as a, Ledger(path, "b") as b:
        a.put([1, 2], 0.5)
        a.put([1, 2], 0.7)
        a.put(np.array([0, 10]), np.inf)
        b.put([1, 2], 3.0)
        assert (a.get([1, 2]), a.get([0, 10]), b.get([1, 2]), b.get([0, 10])) == (0.5, np.inf, 3.0, None)
        assert (len(a), len(b)) == (2, 1)
        assert a.contexts() == ("a", "b")
        picks, losses = a.all()
    assert picks.tolist() == [[1, 2], [0, 10]]
    assert losses.tolist() == [0.5, np.inf]


def test_ledger_refuses_what_is_none(tmp_path):
    path = tmp_path / "x.db"
    path.write_text("this is no database, but it is long enough to be read as one" * 20)
    with pytest.raises(MpqError, match="can't be used as a ledger"):
        Ledger(path)


def test_processes_write_one_ledger(tmp_path):
    path = tmp_path / "ledger.db"
    script = "import sys; from mpq.search import Ledger; ledger = Ledger(sys.argv[1], 'x')\n"
    script += "for i in range(100): ledger.put([int(sys.argv[2]), i], i)"
    runs = [subprocess.Popen([sys.executable, "-c", script, str(path), str(i)]) for i in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    with Ledger(path, "x") as ledger:
        assert len(ledger) == 300


def test_nothing_is_measured_twice_and_order_is_kept():
    calls = []

    def measure(pick):
        calls.append(tuple(pick))
        return float("nan") if pick[0] == 3 else float(pick.sum())

    evaluations = Evaluations(measure, limit=4)
    assert evaluations.measure([[1, 1], [0, 2], [1, 1], [3, 0]]).tolist() == [2.0, 2.0, 2.0, np.inf]
    assert evaluations.measure([0, 2]).tolist() == [2.0]
    with pytest.raises(Stop, match="limit of 4"):
        evaluations.measure([[2, 2], [5, 5]])
    assert calls == [(1, 1), (0, 2), (3, 0), (2, 2)]
    assert evaluations.trace.picks.tolist() == [[1, 1], [0, 2], [3, 0], [2, 2]]
    assert evaluations.left == 0


def test_executor_keeps_what_is_finished_when_one_fails(tmp_path):
    def measure(pick):
        if pick[0] == 1:
            raise OSError("broken")
        return float(pick[0])

    with Ledger(tmp_path / "x.db") as ledger, ThreadPoolExecutor(1) as executor:
        evaluations = Evaluations(measure, ledger=ledger, executor=executor)
        with pytest.raises(Stop, match="OSError: broken"):
            evaluations.measure([[0], [1], [2], [3]])
        assert evaluations.known([0])
        assert not evaluations.known([1])
        assert len(ledger) == len(evaluations.trace)


def test_time_limit_with_an_executor_waits_for_what_has_begun():
    """The clock is set back by hand: nothing sleeps here."""
    with ThreadPoolExecutor(1) as executor:
        evaluations = Evaluations(lambda pick: float(pick[0]), seconds=1000, executor=executor)
        assert evaluations.measure([[4]]).tolist() == [4.0]
        evaluations._until = time.monotonic() - 1
        with pytest.raises(Stop, match="time limit"):
            evaluations.measure([[5]])


def test_frontier_of_a_trace():
    evaluations = Evaluations(lambda pick: float(10 - pick[0] * pick[1]))
    evaluations.measure([[0, 0], [1, 1], [2, 2], [0, 2], [1, 2]])
    front = evaluations.trace.frontier(np.array([[0.0, 1, 2], [0, 1, 2]]))
    assert front.picks.tolist() == [[0, 0], [1, 1], [1, 2], [2, 2]]
    assert front.cost.tolist() == [0, 2, 3, 4]
    assert front.loss.tolist() == [10, 9, 8, 6]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 2))
def test_draws_and_repairs_are_feasible(seed, rows, constraints):
    problem = random_problem(np.random.default_rng(seed), rows=rows, constraints=constraints, ties=seed % 2 == 0)
    anchor = roomiest(problem).pick
    if anchor is None:
        assert roomiest(problem).status is Exhaustive().solve(problem).status is Status.INFEASIBLE
        with pytest.raises(MpqError, match=r"reachable|not all together"):
            FeasiblePicks(problem)
        return
    rng, feasible = np.random.default_rng(seed), FeasiblePicks(problem)
    picks = feasible.draw(5, rng)
    assert all(problem.feasible(p) for p in [anchor, *picks])
    assert feasible.fits(picks).all()
    anything = rng.integers(problem.loss.shape[1], size=(5, len(problem.loss)))
    assert feasible.fits(anything).tolist() == [problem.feasible(p) for p in anything]
    for p in anything:
        repaired = feasible.repair(p, rng)
        assert problem.feasible(repaired)
        assert not problem.feasible(p) or (repaired == p).all()


def test_random_search_finds_all_picks_of_a_small_problem():
    cost = np.array([[0.0, 1, 2], [0, 1, 2]])
    problem = Problem(np.zeros((2, 3)), (Constraint("size", "B", cost, np.array([2.0])),))
    found = RandomSearch().search(problem, Evaluations(lambda pick: float((pick - [0, 2]) @ (pick - [0, 2]))))
    assert len(found.trace) == 6
    assert found.pick.tolist() == [0, 2]
    assert "no new pick" in found.message
