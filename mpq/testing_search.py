"""Contract tests for searches that measure: subclass the case, supply one fixture, inherit all checks.

Example::

    class TestMySearch(SearchContract):
        @pytest.fixture
        def search(self):
            return MySearch()
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mpq.problem import Constraint, Ints, Problem, Status
from mpq.search import Evaluations, Ledger, Measure, MeasuredSearch, MeasuredSolution

_LIMIT = 24


def network_like_problem(seed: int = 0, groups: int = 6, average: float = 3.5) -> tuple[Problem, Measure]:
    """Losses as of a network at 2, 3, 4 and 8 bits, predicted and true, under a limit of the average bits.

    Both are quadratic forms; the true one has other factors for each choice, and saturates.

    Args:
        seed: Of everything random.
        groups: How many groups.
        average: The limit.
    """
    rng = np.random.default_rng(seed)
    bits = np.array([2.0, 3.0, 4.0, 8.0])
    effects = rng.normal(size=(24, groups)) * rng.lognormal(0, 0.7, groups)
    rows = np.einsum("ng,s->ngs", effects, 2.0**-bits).reshape(24, -1)
    factors = np.exp(0.3 * rng.normal(size=rows.shape[1]))
    predicted, true = (x.T @ x / len(x) for x in (rows, rows * factors))
    shape = (groups, len(bits), groups, len(bits))
    own = np.arange(groups)
    pairs = predicted.reshape(shape).copy()
    pairs[own, :, own] = 0.0
    loss = 0.5 * np.diag(predicted).reshape(groups, -1)
    cost = rng.integers(1, 20, groups)[:, None] * bits
    limit = average * cost[:, 0].sum() / bits[0]
    problem = Problem(loss, (Constraint("size", "bits", cost, np.array([limit])),), pairs)

    def measure(pick: Ints) -> float:
        x = np.eye(len(bits))[pick].ravel()
        value = 0.5 * float(x @ true @ x)
        return value / (1 + value / 2)

    return problem, measure


class SearchContract:
    """What holds for every search that measures; the fixture is ``search``."""

    def run(self, search: MeasuredSearch, measure: Measure | None = None, **options: object) -> MeasuredSolution:
        """Search the problem of `network_like_problem`."""
        problem, true = network_like_problem()
        limits: dict[str, object] = {"limit": _LIMIT, **options}
        return search.search(problem, Evaluations(measure or true, **limits))  # type: ignore[arg-type]

    def test_pick_is_feasible_and_its_loss_measured(self, search: MeasuredSearch) -> None:
        """It is the best of the feasible picks in the trace, with its true loss."""
        problem, true = network_like_problem()
        found = self.run(search)
        assert found.status is Status.FEASIBLE
        assert found.pick is not None
        assert problem.feasible(found.pick)
        assert found.loss == true(found.pick) == found.trace.best(problem)[-1]
        assert found.predicted == problem.objective(found.pick)

    def test_seed_reproduces(self, search: MeasuredSearch) -> None:
        """Two runs ask for the same picks in the same order."""
        _same(self.run(search), self.run(search))

    def test_never_evaluates_twice(self, search: MeasuredSearch) -> None:
        """Each measurement is of another pick, and the limit holds."""
        _, true = network_like_problem()
        calls = _Calls(true)
        found = self.run(search, calls)
        assert len({p.tobytes() for p in calls.picks}) == len(calls.picks) == found.evaluations <= _LIMIT

    def test_stops_at_the_limit(self, search: MeasuredSearch) -> None:
        """A single evaluation is enough for an answer if it is feasible, and there is never a second."""
        calls = _Calls(network_like_problem()[1])
        found = self.run(search, calls, limit=1)
        assert len(calls.picks) == len(found.trace) == 1

    def test_stops_at_the_time_limit(self, search: MeasuredSearch) -> None:
        """Without time one pick is measured, and no more begin."""
        found = self.run(search, seconds=1e-9)
        assert found.status is Status.FEASIBLE
        assert len(found.trace) == 1

    def test_failed_measurement_keeps_the_best(self, search: MeasuredSearch) -> None:
        """The best before the failure is returned with a warning."""
        calls = _Calls(network_like_problem()[1], fail_after=3)
        with pytest.warns(UserWarning, match="OSError: no more"):
            found = self.run(search, calls)
        assert found.evaluations == 3
        assert found.loss == min(calls.feasible_losses())

    def test_first_measurement_that_fails_is_raised(self, search: MeasuredSearch) -> None:
        """Nothing could be returned."""
        with pytest.raises(OSError, match="no more"):
            self.run(search, _Calls(network_like_problem()[1], fail_after=0))

    def test_resumes_from_a_ledger(self, search: MeasuredSearch, tmp_path: Path) -> None:
        """A run that was cut short and begun again gives what one run gives, and measures nothing twice."""
        _, true = network_like_problem()
        with Ledger(tmp_path / "ledger.db", "first") as ledger, pytest.warns(UserWarning, match="OSError: no more"):
            cut = self.run(search, _Calls(true, fail_after=7), ledger=ledger)
        calls = _Calls(true)
        with Ledger(tmp_path / "ledger.db", "first") as ledger:
            found = self.run(search, calls, ledger=ledger)
        before = {p.tobytes() for p in cut.trace.picks}
        assert found.reused == len(before) == 7
        assert not before & {p.tobytes() for p in calls.picks}
        _same(found, self.run(search))

    def test_executor_changes_nothing(self, search: MeasuredSearch) -> None:
        """Threads give the same bytes as none."""
        with ThreadPoolExecutor(2) as executor:
            _same(self.run(search, executor=executor), self.run(search))

    def test_infeasible_problem(self, search: MeasuredSearch) -> None:
        """It is proven before anything is measured."""
        problem, true = network_like_problem(average=1.5)
        calls = _Calls(true)
        found = search.search(problem, Evaluations(calls, limit=_LIMIT))
        assert found.status is Status.INFEASIBLE
        assert not calls.picks
        assert "smallest reachable" in found.message

    def test_one_choice(self, search: MeasuredSearch) -> None:
        """One scheme each: it is measured once and returned."""
        problem = Problem(np.ones((3, 1)), (Constraint("size", "B", np.ones((3, 1)), np.array([3.0])),))
        found = search.search(problem, Evaluations(lambda pick: 0.5, limit=_LIMIT))
        assert found.pick is not None
        assert found.evaluations == 1

    def test_no_groups(self, search: MeasuredSearch) -> None:
        """Nothing to choose: the float network, if you like, is measured once."""
        problem = Problem(np.zeros((0, 3)), (Constraint("size", "B", np.zeros((0, 3)), np.array([1.0])),))
        found = search.search(problem, Evaluations(lambda pick: 0.5, limit=_LIMIT))
        assert found.pick is not None
        assert found.pick.shape == (0,)
        assert (found.loss, found.evaluations) == (0.5, 1)


class _Calls:
    """Counts what is measured."""

    def __init__(self, measure: Callable[[Ints], float], fail_after: int | None = None) -> None:
        self.measure, self.fail_after = measure, fail_after
        self.picks: list[Ints] = []

    def __call__(self, pick: Ints) -> float:
        if self.fail_after is not None and len(self.picks) >= self.fail_after:
            raise OSError("no more")
        self.picks.append(pick.copy())
        return self.measure(pick)

    def feasible_losses(self) -> list[float]:
        problem, _ = network_like_problem()
        return [self.measure(p) for p in self.picks if problem.feasible(p)] or [np.inf]


def _same(a: MeasuredSolution, b: MeasuredSolution) -> None:
    np.testing.assert_array_equal(a.trace.picks, b.trace.picks)
    np.testing.assert_array_equal(a.trace.losses, b.trace.losses)
    np.testing.assert_array_equal(a.pick, b.pick)
    assert a.message == b.message
