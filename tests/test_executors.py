import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from threading import Lock

import numpy as np
import pytest

from mpq.search import Cqap, Evaluations, Genetic, Ledger, Linas, OptunaSearch, Quantune, RandomSearch, Refine, Sweep
from mpq.testing_search import network_like_problem


def measure(pick):
    """Pickles, and makes its problem in the worker."""
    return network_like_problem()[1](pick)


def measure_or_die(folder, pick):
    """The worker that makes the fourth measurement dies within it."""
    for number in range(4):
        try:
            os.close(os.open(f"{folder}/{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        break
    return measure(pick)


def run(search, ledger=None, executor=None, measure=measure):
    problem, _ = network_like_problem()
    return search.search(problem, Evaluations(measure, limit=24, ledger=ledger, executor=executor))


def same(a, b):
    np.testing.assert_array_equal(a.trace.picks, b.trace.picks)
    np.testing.assert_array_equal(a.trace.losses, b.trace.losses)


def test_processes_change_nothing():
    search = Refine(batch=4, least_gain=0.0)
    with ProcessPoolExecutor(2, get_context("spawn")) as executor:
        same(run(search, executor=executor), run(search))


@pytest.mark.parametrize(
    "search",
    [
        Refine(batch=4, least_gain=0.0),
        OptunaSearch(batch=4),
        OptunaSearch("nsga3", batch=4),
        RandomSearch(),
        Sweep(inner=Refine(batch=4), points=2),
        Quantune(initial=8),
        Cqap(),
        Linas(initial=8),
    ],
    ids=lambda search: search.name,
)
def test_picks_of_a_batch_are_measured_at_once(search):
    """And give the same bytes as one after the other."""
    lock, running, most = Lock(), 0, 0

    def slow(pick):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return measure(pick)

    with ThreadPoolExecutor(4) as executor:
        same(run(search, executor=executor, measure=slow), run(search))
    assert most >= 2


def test_dead_process_ends_the_search_with_what_was_measured(tmp_path):
    """A pool of processes breaks if one dies; the next run goes on.

    Of the three measurements begun before, at most one runs in the other worker when the pool breaks.
    """
    search = Genetic(population=8)
    with Ledger(tmp_path / "ledger.db") as ledger, ProcessPoolExecutor(2, get_context("spawn")) as executor:
        with pytest.warns(UserWarning, match="genetic ended early: a measurement failed"):
            cut = run(search, ledger, executor, partial(measure_or_die, str(tmp_path)))
        assert (tmp_path / "3").exists()
        kept = len(ledger)
        assert 2 <= kept == cut.evaluations < 8
        found = run(search, ledger)
    assert found.reused == kept
    same(found, run(search))


@pytest.mark.slow
def test_dask_worker_is_killed(tmp_path):
    """Dask gives the lost measurement to another worker: same bytes, nothing lost."""
    distributed = pytest.importorskip("distributed", reason="needs dask.distributed: pip install 'mpq[dask]'")
    search = Genetic(population=8)
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path)
    )
    with cluster, distributed.Client(cluster) as client, Ledger(tmp_path / "ledger.db") as ledger:
        before = set(client.scheduler_info()["workers"])
        flagged = partial(measure_or_die, str(tmp_path))
        found = run(search, ledger, client.get_executor(), flagged)
        assert len(before) == 2
        assert (tmp_path / "3").exists()
        assert len(ledger) == found.evaluations == 24
    same(found, run(search))
