"""Random search: the baseline that any other must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpq.problem import Problem
from mpq.search.evaluations import Evaluations
from mpq.search.feasible import FeasiblePicks
from mpq.search.measured import MeasuredSearch, check_batch

_TRIES = 1000  # draws without a new pick after which all are taken to be known


@dataclass(frozen=True)
class RandomSearch(MeasuredSearch):
    """Measures random feasible picks until a limit ends it, or until it finds no new ones.

    Attributes:
        seed: Random seed.
        batch: Picks measured at once, for executors.

    Raises:
        MpqError: If the batch is empty.
    """

    seed: int = 0
    batch: int = 16
    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        check_batch(self.batch)

    def explore(self, problem: Problem, evaluations: Evaluations) -> str:
        """Measure random picks; see `MeasuredSearch.explore`."""
        rng, feasible, idle = np.random.default_rng(self.seed), FeasiblePicks(problem), 0
        while idle < _TRIES:
            picks = feasible.draw(self.batch, rng)
            known = all(evaluations.known(p) for p in picks)
            idle = idle + len(picks) if known else 0
            evaluations.measure(picks)
        return f"{_TRIES} draws gave no new pick"
