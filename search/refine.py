"""Refine: start from what sensitivity predicts, measure, correct the prediction, and again."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mpq.problem import Ints, Problem
from mpq.search.evaluations import Evaluations, Trace
from mpq.search.feasible import FeasiblePicks
from mpq.search.interaction import Interaction, separable_solver, symmetric
from mpq.search.local_search import LocalSearch
from mpq.search.logs import logarithms
from mpq.search.measured import MeasuredSearch

if TYPE_CHECKING:
    from mpq.search.residual import ResidualModel

_INCUMBENTS = 3  # best measured picks whose neighbours are looked at
_CANDIDATES, _WORK = 3000, 2e8  # neighbours at most, and times the square of the groups
_AHEAD = 16  # evaluations whose gains together are held against the noise
_SECONDS = 10.0  # limit of an integer program for a corrected problem


@dataclass(frozen=True)
class Refine(MeasuredSearch):
    """Bayesian optimization around the prediction: the search for expensive truth.

    It measures the optimum of the predicted problem, with all of its interactions and with half of them, and then what
    is expected to gain most according to a model of the ratio of measured to predicted losses (`ResidualModel`). It
    chooses among the optima of problems corrected by that model, by its mean and by draws from its posterior, and among
    all that differ from the best measured picks in one or two groups. What the evaluations hold from searches under
    other constraints teaches the model, too.

    Attributes:
        seed: Random seed of the draws.
        least_gain: It ends when less than this share of the loss is expected to be gained by one more evaluation, or
            by all that are left, up to 16, less than the noise of the measurement where that tells it
            (`Evaluations.noise`).
        handful: Evaluations before it may end: a model of fewer can't tell.
        batch: Picks measured at once, for executors.
        drafts: Draws from the posterior for each batch.

    Example:
        The prediction is wrong about the third group; a few measurements say so.

        >>> from mpq.problem import Constraint, Problem
        >>> from mpq.search import Evaluations
        >>> bits = np.array([2.0, 4.0, 8.0])
        >>> size = Constraint("size", "bits", np.tile(bits, (5, 1)), 20.0)
        >>> problem = Problem(np.outer([1.0, 2.0, 4.0, 8.0, 16.0], 4.0**-bits), (size,))
        >>> def measure(pick):
        ...     return float(np.dot([1.0, 2.0, 50.0, 8.0, 16.0], 4.0 ** -bits[pick]))
        >>> found = Refine().search(problem, Evaluations(measure, limit=12))
        >>> found.pick.tolist(), bool(found.loss < found.trace.losses[0])
        ([0, 0, 2, 1, 1], True)
    """

    seed: int = 0
    least_gain: float = 0.002
    handful: int = 8
    batch: int = 1
    drafts: int = 8
    name: ClassVar[str] = "refine"

    def explore(self, problem: Problem, evaluations: Evaluations) -> str:
        """Measure, correct, repeat; see `MeasuredSearch.explore`."""
        proposer = Proposer(problem, np.random.default_rng(self.seed))
        evaluations.measure(proposer.first(evaluations))
        while True:
            gain, picks = proposer.propose(evaluations, self.batch, self.drafts)
            enough = len(evaluations.trace) >= self.handful
            if not len(picks) or (enough and gain < self.least_gain):
                return (
                    f"one more evaluation is expected to gain {gain:.2%} of the loss, less than {self.least_gain:.2%}"
                )
            ahead = int(min(_AHEAD, max(1, evaluations.left)))
            if enough and ahead * gain < (noise := proposer.noise(evaluations)):
                more = f"{ahead} more evaluations can gain {ahead * gain:.2%} of the loss"
                return f"{more}, less than the noise of {noise:.2%}"
            evaluations.measure(picks)


class Proposer:
    """Proposes picks of a problem that are worth measuring.

    Args:
        problem: Constraints and predicted losses.
        rng: Where draws come from.
    """

    def __init__(self, problem: Problem, rng: np.random.Generator) -> None:
        self.problem, self._rng = symmetric(problem), rng
        self._feasible = FeasiblePicks(problem)

    def first(self, evaluations: Evaluations) -> Ints:
        """The optimum of the problem as far as it is known, and that with interactions of half their strength.

        Interactions are less certain than the losses of single groups, and an optimum makes the most of them: a pick
        that trusts them less tells how far to trust them.
        """
        trace, problem = evaluations.trace, self.problem
        if len(trace):
            problem = _fitted(problem, trace).corrected()
        problems = [problem]
        if problem.interactions is not None and not len(trace):
            problems.append(replace(problem, interactions=0.5 * problem.interactions))
        picks = [Interaction().solve(p).pick for p in problems]
        found = [p for p in picks if p is not None] or [self._feasible.anchor]  # where time was too short
        return _distinct(np.array(found))

    def propose(self, evaluations: Evaluations, batch: int, drafts: int) -> tuple[float, Ints]:
        """Picks ``[batch, G]`` or fewer, all new, and the largest gain expected of one; some must be measured already.

        The gain is in logarithms of the loss, about a share of it; it is infinite as long as no feasible pick is
        measured, and zero if no candidate is new.
        """
        trace = evaluations.trace
        model = _fitted(self.problem, trace)
        feasible = np.flatnonzero(self._feasible.fits(trace.picks))
        if not len(feasible):
            return math.inf, self.first(evaluations)
        best = feasible[np.argsort(trace.losses[feasible], kind="stable")][:_INCUMBENTS]
        incumbents = trace.picks[best]
        drawn = [self._optimum(model.corrected(), incumbents)]
        drawn += [self._optimum(model.corrected(self._rng), incumbents[:1]) for _ in range(drafts)]
        near = np.concatenate([self._neighbours(pick) for pick in incumbents])
        candidates = _distinct(np.concatenate([np.array(drawn), near]))
        candidates = candidates[[not evaluations.known(p) for p in candidates]]
        if not len(candidates):
            return 0.0, candidates
        gain = model.gain(candidates, float(model.logs[best[0]]))
        order = np.argsort(-gain, kind="stable")
        # The drafts differ as much as the model is unsure: the best company for a pick that is measured with others.
        drafted = {d.tobytes() for d in drawn}
        own = [i for i, p in enumerate(candidates) if p.tobytes() in drafted]
        chosen = list(dict.fromkeys([int(order[0]), *own, *order.tolist()]))[:batch]
        return float(gain[order[0]]), candidates[chosen]

    def noise(self, evaluations: Evaluations) -> float:
        """Least standard error of a difference from the best loss, in logarithms as gains are; zero if unknown.

        The least, because what is proposed differs little from the best: a pick far off has a noisier difference.
        """
        trace = evaluations.trace
        known = np.flatnonzero(self._feasible.fits(trace.picks) & np.isfinite(trace.losses))
        best = known[np.argsort(trace.losses[known], kind="stable")][:_INCUMBENTS]
        errors = [evaluations.noise(trace.picks[best[0]], trace.picks[other]) for other in best[1:]]
        error = min((e for e in errors if e is not None), default=0.0)
        return error / math.exp(logarithms(trace.losses)[best[0]]) if error else 0.0

    def _optimum(self, problem: Problem, starts: Ints) -> Ints:
        """A good pick of a corrected problem."""
        if problem.interactions is None or len(problem.loss) < 2:
            separable = Problem(problem.loss, problem.constraints)
            found = separable_solver(separable, _SECONDS).solve(separable).pick
            return starts[0] if found is None else found
        search = LocalSearch(problem, math.inf)
        return min((search.descend(p) for p in starts), key=problem.objective)

    def _neighbours(self, pick: Ints) -> Ints:
        """Feasible picks that differ from a pick in one or two groups ``[K, G]``, a random part if there are many."""
        G, S = self.problem.loss.shape
        most = int(min(_CANDIDATES, max(10.0, _WORK / G**2))) // _INCUMBENTS
        single = np.argwhere(self.problem.allowed & (np.arange(S) != pick[:, None]))
        if len(single) ** 2 < 20 * most:
            pairs = np.array(list(combinations(range(len(single)), 2)), np.int64).reshape(-1, 2)
        else:
            pairs = self._rng.integers(len(single), size=(10 * most, 2))
        moves = np.concatenate([np.repeat(np.arange(len(single)), 2).reshape(-1, 2), pairs])
        found = np.repeat(pick[None], len(moves), 0)
        for column in (0, 1):
            g, s = single[moves[:, column]].T
            found[np.arange(len(moves)), g] = s
        found = found[self._feasible.fits(found)]
        return found if len(found) <= most else self._rng.permutation(found)[:most]


def _fitted(problem: Problem, trace: Trace) -> ResidualModel:
    from mpq.search.residual import ResidualModel  # scipy takes long to import

    return ResidualModel(problem, trace.picks, trace.losses)


def _distinct(picks: Ints) -> Ints:
    return np.array(list({p.tobytes(): p for p in picks}.values()), np.int64).reshape(-1, picks.shape[1])
