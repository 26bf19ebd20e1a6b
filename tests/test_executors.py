import os
import signal
import warnings
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest

from mpq.search import Evaluations, Genetic, Ledger, Refine
from mpq.testing_search import network_like_problem


def measure(pick):
    """Pickles, and makes its problem in the worker."""
    return network_like_problem()[1](pick)


def measure_or_die(flag, pick):
    """The first worker that comes here dies within its measurement."""
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return measure(pick)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it lives")


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


def test_dead_process_ends_the_search_with_what_was_measured(tmp_path):
    """A pool of processes breaks if one dies; the next run goes on."""
    search = Genetic(population=8)
    with Ledger(tmp_path / "ledger.db") as ledger, ProcessPoolExecutor(2, get_context("spawn")) as executor:
        # The error itself if nothing was measured before, else a warning.
        with suppress(BrokenExecutor), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(search, ledger, executor, partial(measure_or_die, str(tmp_path / "flag")))
        assert (tmp_path / "flag").exists()
        kept = len(ledger)
        assert kept < 8
        found = run(search, ledger)
    assert found.reused == kept
    same(found, run(search))


def test_dask_worker_is_killed(tmp_path):
    """Dask gives the lost measurement to another worker: same bytes, nothing lost."""
    distributed = pytest.importorskip("distributed", reason="needs dask.distributed: pip install 'mpq[dask]'")
    search = Genetic(population=8)
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path)
    )
    with cluster, distributed.Client(cluster) as client, Ledger(tmp_path / "ledger.db") as ledger:
        before = set(client.scheduler_info()["workers"])
        flagged = partial(measure_or_die, str(tmp_path / "flag"))
        found = run(search, ledger, client.get_executor(), flagged)
        assert len(before) == 2
        assert (tmp_path / "flag").exists()
        assert len(ledger) == found.evaluations == 24
    same(found, run(search))
