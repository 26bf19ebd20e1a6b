"""What all searches share that measure the loss: how they begin and end, and their `MeasuredSolution`."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpq._lazy import require
from mpq.errors import MpqError
from mpq.problem import Floats, Ints, Problem, Status
from mpq.search.evaluations import Evaluations, Stop, Trace
from mpq.search.feasible import roomiest
from mpq.warning import warn


@dataclass(frozen=True, eq=False, repr=False)
class MeasuredSolution:
    """What a search with measured losses returns.

    Attributes:
        status: `FEASIBLE` with a pick: no search proves that none is better. Else `INFEASIBLE` if it is proven that
            there is none, or `NO_SOLUTION`.
        pick: The feasible pick of the least measured loss ``[G]``, or None.
        loss: Its measured loss (infinite without one).
        predicted: Its predicted loss: the problem's objective.
        usage: Constraint name -> row sums of the pick.
        trace: All that was evaluated.
        seconds: Time taken.
        search: Name of the search.
        message: Why it ended.
    """

    status: Status
    pick: Ints | None
    loss: float
    predicted: float
    usage: Mapping[str, Floats]
    trace: Trace
    seconds: float
    search: str
    message: str = ""

    @property
    def evaluations(self) -> int:
        """How many picks were measured in this run."""
        return len(self.trace) - self.reused

    @property
    def reused(self) -> int:
        """How many more came out of the ledger."""
        return int(self.trace.reused.sum())

    def __repr__(self) -> str:
        spent = f"{self.evaluations} evaluations + {self.reused} from the ledger in {self.seconds:.3g} s"
        if self.pick is None:
            return f"MeasuredSolution({self.search}: {self.status.value} after {spent}; {self.message})"
        at = int((self.trace.picks == self.pick).all(1).argmax()) + 1
        used = ", ".join(f"{name} {np.array2string(u, precision=6)[1:-1]}" for name, u in self.usage.items())
        found = f"loss {self.loss:.6g} measured, {self.predicted:.6g} predicted, at evaluation {at}"
        return f"MeasuredSolution({self.search}: {found}; {used or 'no constraint'}; {spent}; {self.message})"


class MeasuredSearch(ABC):
    """Base of searches: settings in the constructor of a frozen dataclass, `explore` is all that one adds.

    Attributes:
        name: Its name in `mpq.search.SEARCHES`.
        needs: Packages of the extra ``search`` that it imports.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()

    def search(self, problem: Problem, evaluations: Evaluations) -> MeasuredSolution:
        """Search for the feasible pick of the least measured loss.

        Args:
            problem: Constraints, and predicted losses to start from.
            evaluations: Measures picks, and ends the search when a limit is reached.

        Returns:
            The best that was measured, also if a limit or a failed measurement ended the search (which then is warned
            about). Two runs with one seed give the same picks and losses.

        Raises:
            MpqError: If a package that it needs is not installed.
            Exception: What the measurement raises, if it fails before any is finished.
        """
        require(self.needs, "search")
        started = time.perf_counter()
        first = roomiest(problem)
        if first.pick is None:
            none, seconds = evaluations.trace, time.perf_counter() - started
            return MeasuredSolution(first.status, None, np.inf, np.inf, {}, none, seconds, self.name, first.message)
        try:
            if (problem.allowed.sum(1) > 1).any():
                message = self.explore(problem, evaluations)
            else:
                evaluations.measure([[row.argmax() for row in problem.allowed]])
                message = "there is only one pick"
        except Stop as stop:
            message = str(stop)
            if stop.__cause__ is not None:
                if not len(evaluations.trace):
                    raise stop.__cause__ from None
                warn(f"{self.name} ended early: {message}; the best so far is returned")
        return _solution(evaluations.trace, problem, self.name, time.perf_counter() - started, message)

    @abstractmethod
    def explore(self, problem: Problem, evaluations: Evaluations) -> str:
        """Measure picks of a problem that has feasible ones, and a choice between some; returns why it ended.

        All that is measured counts: nothing else is handed back. `Stop` passes through.
        """


def check_batch(batch: int) -> None:
    """Refuse batches that nothing would ever be measured in.

    Raises:
        MpqError: If a batch has no picks.
    """
    if batch < 1:
        raise MpqError(f"batch must be at least 1, not {batch}")


def _solution(trace: Trace, problem: Problem, search: str, seconds: float, message: str) -> MeasuredSolution:
    """The best of all feasible picks so far; of equal ones the first."""
    best = trace.best(problem)
    if not len(trace) or not np.isfinite(best[-1]):
        nothing = f"no feasible pick with a finite loss was measured: {message}"
        return MeasuredSolution(Status.NO_SOLUTION, None, np.inf, np.inf, {}, trace, seconds, search, nothing)
    pick = trace.picks[int((best == best[-1]).argmax())]
    loss, predicted, usage = float(best[-1]), problem.objective(pick), problem.usage(pick)
    return MeasuredSolution(Status.FEASIBLE, pick, loss, predicted, usage, trace, seconds, search, message)
