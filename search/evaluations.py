"""Evaluations of picks: measured within limits, by any executor, none twice, all remembered."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpq.errors import MpqError
from mpq.problem import Floats, Ints, Problem
from mpq.search.ledger import Ledger
from mpq.search.pareto import FrontierPicks

Measure = Callable[[Ints], float]
"""The true loss of a pick ``[G]``."""


class PartialMeasure(Protocol):
    """A measurement that also gives early looks, so that bad picks can be dropped (pruned) before all data is used."""

    def __call__(self, pick: Ints) -> float:
        """The true loss of a pick ``[G]``."""

    def in_parts(self, pick: Ints) -> Iterator[float]:
        """The loss on the first part of the data, then on the first two, and so on; the last is the true loss."""


_TIME = "the time limit is reached"


class Stop(Exception):  # noqa: N818 - a signal, not an error
    """A limit is reached: a search ends here. Raised by `Evaluations`, caught by `MeasuredSearch.search`."""


@dataclass(frozen=True, eq=False)
class Trace:
    """All picks that a search asked for, each once, in order.

    Attributes:
        picks: ``[N, G]``.
        losses: Measured losses ``[N]``.
        reused: Which came out of the ledger ``[N]``.
    """

    picks: Ints
    losses: Floats
    reused: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.losses)

    def best(self, problem: Problem) -> Floats:
        """Least loss of a feasible pick after each evaluation ``[N]``; infinite before the first."""
        feasible = np.array([problem.feasible(p) for p in self.picks], bool)
        return np.minimum.accumulate(np.where(feasible, self.losses, np.inf))

    def frontier(self, cost: Floats) -> FrontierPicks:
        """Picks that no other dominates in loss and a cost ``[G, S]``."""
        used = cost[np.arange(len(cost)), self.picks].sum(1)
        order = np.lexsort((self.losses, used))
        losses = self.losses[order]
        keep = order[losses < np.minimum.accumulate(np.concatenate([[np.inf], losses]))[:-1]]
        return FrontierPicks(self.picks[keep], used[keep], self.losses[keep], exact=False)


class Evaluations:
    """Measures picks within limits, none twice, and remembers all of them.

    Picks of a batch are measured by the executor at once; results come back and are remembered in the order asked, so
    an executor changes no result. An evaluation is in the ledger as soon as it is finished. One that is found in the
    ledger costs no time but counts for the limit: a search that is begun again with the same seed takes its old way
    through the ledger and goes on where it ended.

    Args:
        measure: Gives the true loss of a pick; NaN counts as infinite. For an executor of processes it must pickle.
        limit: Evaluations at most.
        seconds: No evaluation begins when these have passed since the first one began.
        ledger: Where evaluations are kept; by default in memory.
        executor: Measures the picks of a batch, such as ``ProcessPoolExecutor()`` or Dask's ``client.get_executor()``.
        report: Called after each evaluation, such as a progress bar's ``update``.

    Raises:
        MpqError: If a limit is no positive number.

    Attributes:
        limit: As given; infinite for None.
        partial: The measurement is a `PartialMeasure`.
    """

    def __init__(
        self,
        measure: Measure,
        *,
        limit: int | None = None,
        seconds: float | None = None,
        ledger: Ledger | None = None,
        executor: Executor | None = None,
        report: Callable[[], object] | None = None,
    ) -> None:
        self.limit = math.inf if limit is None else limit
        self._measure, self._executor = measure, executor
        self._ledger = Ledger() if ledger is None else ledger
        if limit is not None and not (isinstance(limit, int) and limit >= 1):
            raise MpqError(f"the limit of evaluations must be a whole number of at least 1, not {limit!r}")
        if seconds is not None and not 0 < seconds < math.inf:
            raise MpqError(f"seconds must be a positive number, not {seconds!r}")
        self._seconds, self._until, self._began = seconds, math.inf, False
        self._seen: dict[bytes, int] = {}
        self._picks: list[Ints] = []
        self._losses: list[float] = []
        self._reused: list[bool] = []
        self._report = report
        self._pruned: set[bytes] = set()
        self.partial = hasattr(measure, "in_parts")

    @property
    def left(self) -> float:
        """How many more evaluations the limit allows."""
        return self.limit - len(self._picks) - len(self._pruned)

    @property
    def trace(self) -> Trace:
        """All evaluations so far."""
        G = len(self._picks[0]) if self._picks else 0
        picks = np.array(self._picks, np.int64).reshape(len(self._picks), G)
        return Trace(picks, np.array(self._losses, np.float64), np.array(self._reused, bool))

    def known(self, pick: ArrayLike) -> bool:
        """Whether a pick ``[G]`` was evaluated in this run."""
        return np.asarray(pick, np.int64).tobytes() in self._seen

    def measure(self, picks: ArrayLike) -> Floats:
        """Losses ``[K]`` of picks ``[K, G]``; what was measured before is not measured again.

        Raises:
            Stop: If a limit is reached before all are known, or the measurement of one fails. Those that were finished
                are remembered.
        """
        if not np.size(picks) and np.ndim(picks) == 1:
            return np.zeros(0)
        wanted = np.atleast_2d(np.asarray(picks, np.int64))
        new = list({p.tobytes(): p for p in wanted if p.tobytes() not in self._seen}.values())
        fitting = new[: max(0, int(min(self.left, len(new))))]
        found: dict[int, tuple[float, bool]] = {}
        try:
            for i, loss, reused in self._finished(fitting):
                found[i] = math.inf if math.isnan(loss) else loss, reused
                if not reused:
                    self._ledger.put(fitting[i], found[i][0])
                if self._report is not None:
                    self._report()
        finally:
            for i in sorted(found):
                self._remember(fitting[i], *found[i])
        if len(fitting) < len(new):
            raise Stop(f"the limit of {self.limit:g} evaluations is reached")
        return np.array([self._losses[self._seen[p.tobytes()]] for p in wanted])

    def _late(self) -> bool:
        """Whether no measurement may begin; the first one always may, and starts the clock."""
        if self._began:
            return time.monotonic() > self._until
        self._began = True
        self._until = math.inf if self._seconds is None else time.monotonic() + self._seconds
        return False

    def noise(self, one: Ints, other: Ints) -> float | None:
        """Standard error of the difference of two measured picks' losses; None if the measurement can't tell.

        Raises:
            Stop: If telling it takes a measurement that fails.
        """
        tell = getattr(self._measure, "noise", None)
        try:
            return None if tell is None else tell(one, other)
        except Exception as error:
            raise Stop(_failed(error)) from error

    def recall(self) -> None:
        """Take over all evaluations in the ledger, which may come from other processes and other searches."""
        for pick, loss in zip(*self._ledger.all(), strict=True):
            self.add(pick, float(loss))

    def add(self, pick: ArrayLike, loss: float) -> None:
        """Take over an evaluation that was made elsewhere; counted as out of the ledger."""
        own = np.asarray(pick, np.int64)
        if not self.known(own):
            self._ledger.put(own, loss)
            self._remember(own, loss, True)

    def claim(self, pick: ArrayLike, owner: str, instead_of: str = "") -> str:
        """Claim the measurement of a pick among the processes that share the ledger; see `Ledger.claim`."""
        return self._ledger.claim(pick, owner, instead_of)

    def measure_in_parts(self, pick: Ints, prune: Callable[[int, float], bool]) -> float | None:
        """Loss of a pick ``[G]``, or None if it was pruned; one that was is not tried again.

        Parts are kept in the ledger and come out of it again, so that pruning decides as before in a resumed search.

        Args:
            pick: What to measure, with a measurement that has ``in_parts``.
            prune: Takes the number of a part and the loss so far, and says whether to drop the pick.

        Raises:
            Stop: As `measure`; a pruned pick counts for the limit.
        """
        key = pick.tobytes()
        if key in self._pruned:
            return None
        if key in self._seen or self.left < 1:
            return float(self.measure([pick])[0])
        finished, parts = self._ledger.get(pick) is not None, self._ledger.parts(pick)
        known = [prune(part, loss) for part, loss in enumerate(parts)]
        pruned = any(known)
        if finished or (not pruned and self._late()):
            return float(self.measure([pick])[0])
        if not pruned:
            parts = []
            for part, loss in enumerate(self._parts(pick)):
                parts.append(math.inf if math.isnan(loss) else float(loss))
                if part >= len(known) and prune(part, parts[-1]):
                    pruned = True
                    break
            self._ledger.put_parts(pick, parts)
        if pruned:
            self._pruned.add(key)
            return None
        self._ledger.put(pick, parts[-1])
        self._remember(pick, parts[-1], False)
        if self._report is not None:
            self._report()
        return parts[-1]

    def _parts(self, pick: Ints) -> Iterator[float]:
        try:
            yield from cast(PartialMeasure, self._measure).in_parts(pick)
        except Exception as error:
            raise Stop(_failed(error)) from error

    def _remember(self, pick: Ints, loss: float, reused: bool) -> None:
        self._seen[pick.tobytes()] = len(self._picks)
        self._picks.append(pick.copy())
        self._losses.append(loss)
        self._reused.append(reused)

    def _finished(self, picks: list[Ints]) -> Iterator[tuple[int, float, bool]]:
        """Index, loss and whether it was in the ledger, for each pick as soon as it is known."""
        open_ = []
        for i, pick in enumerate(picks):
            kept = self._ledger.get(pick)
            if kept is None:
                open_.append(i)
            else:
                yield i, kept, True
        if self._executor is not None:
            yield from self._parallel(self._executor, {i: picks[i] for i in open_})
            return
        for i in open_:
            if self._late():
                raise Stop(_TIME)
            try:
                loss = float(self._measure(picks[i]))
            except Exception as error:
                raise Stop(_failed(error)) from error
            yield i, loss, False

    def _parallel(self, executor: Executor, picks: dict[int, Ints]) -> Iterator[tuple[int, float, bool]]:
        if picks and self._late():
            raise Stop(_TIME)
        futures = {executor.submit(self._measure, pick): i for i, pick in picks.items()}
        running, ended = set(futures), None
        try:
            while running:
                first = not self._losses
                seconds = (
                    None if ended or first or math.isinf(self._until) else max(0.0, self._until - time.monotonic())
                )
                done, running = wait(running, seconds, FIRST_COMPLETED)
                if not done:
                    ended = Stop(_TIME)
                for future in done:
                    error = future.exception()
                    if error is None:
                        yield futures[future], float(future.result()), False
                    else:
                        ended = Stop(_failed(error))
                        ended.__cause__ = error
                if ended:  # those that have begun can't be ended: they are waited for and kept
                    running = {f for f in running if not f.cancel()}
        finally:
            for future in futures:
                future.cancel()
        if ended:
            raise ended


def _failed(error: BaseException) -> str:
    return f"a measurement failed ({type(error).__name__}: {error})"
