"""kill -9 in the middle of a search: every finished evaluation is kept, none is made twice."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from mpq.problem import Status
from mpq.search import Evaluations, Genetic, Ledger, Linas, Nsga2, OptunaSearch, Quantune, Refine
from mpq.testing_search import network_like_problem

LIMIT = 24

# Each measurement is logged before its loss is handed back; the process kills itself within another one.
SCRIPT = """
import os, signal, sys
from mpq.search import *
from mpq.testing_search import network_like_problem

folder, search, die_at = sys.argv[1], eval(sys.argv[2]), int(sys.argv[3])
problem, true = network_like_problem()
log = os.open(folder + "/measured.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
count = 0

def measure(pick):
    global count
    if count == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    os.write(log, (",".join(map(str, pick)) + "\\n").encode())
    return true(pick)

with Ledger(folder + "/ledger.db", "test") as ledger:
    print(search.search(problem, Evaluations(measure, limit=24, ledger=ledger)).loss)
"""


def start(folder, search, die_at):
    command = [sys.executable, "-c", SCRIPT, str(folder), repr(search), str(die_at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def measured(folder):
    return (folder / "measured.txt").read_text().split()


SEARCHES = [Refine(least_gain=0.0), Nsga2(population=8), Genetic(population=8), Quantune(initial=8), Linas(initial=6)]


@pytest.mark.parametrize("search", SEARCHES, ids=repr)
def test_killed_search_goes_on(search, tmp_path):
    process = start(tmp_path, search, 9)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    problem, true = network_like_problem()
    with Ledger(tmp_path / "ledger.db", "test") as ledger:
        picks, losses = ledger.all()
        assert [",".join(map(str, p)) for p in picks] == measured(tmp_path)
        assert len(picks) == 9
        found = search.search(problem, Evaluations(true, limit=LIMIT, ledger=ledger))
    assert found.reused == 9
    whole = search.search(problem, Evaluations(true, limit=LIMIT))
    np.testing.assert_array_equal(found.trace.picks, whole.trace.picks)
    np.testing.assert_array_equal(found.trace.losses, whole.trace.losses)
    assert found.loss == whole.loss <= losses[[problem.feasible(p) for p in picks]].min()


def test_two_processes_share_an_optuna_study_and_one_is_killed(tmp_path):
    storage = str(tmp_path / "study.db")
    searches = [OptunaSearch(seed=seed, storage=storage) for seed in (0, 1)]
    killed, other = start(tmp_path, searches[0], 5), start(tmp_path, searches[1], 1000)
    killed.communicate()
    best = float(other.communicate()[0])
    assert (killed.returncode, other.returncode) == (-signal.SIGKILL, 0)
    lines = measured(tmp_path)
    assert len(lines) == len(set(lines))
    problem, true = network_like_problem()
    with Ledger(tmp_path / "ledger.db", "test") as ledger:
        kept, losses = ledger.all()
        assert sorted(lines) == sorted(",".join(map(str, p)) for p in kept)
        assert losses.min() <= best
        joined = searches[0].search(problem, Evaluations(true, limit=LIMIT + 6, ledger=ledger))
    assert joined.status is Status.FEASIBLE
    assert joined.reused == len(kept)
    assert joined.evaluations == LIMIT + 6 - len(kept)
    assert joined.loss <= losses.min()
