"""Optuna's samplers over picks, with pruning, in studies that several processes may share."""

from __future__ import annotations

import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mpq.errors import MpqError
from mpq.problem import Floats, Ints, Problem
from mpq.search.evaluations import Evaluations
from mpq.search.feasible import FeasiblePicks
from mpq.search.genetic import predicted_optimum, used_shares
from mpq.search.measured import MeasuredSearch, check_batch
from mpq.search.rows import limit_shares

if TYPE_CHECKING:
    from optuna import Study, Trial

_TRIES = 200  # trials without a new pick after which the search ends
_PATIENCE = 60.0  # seconds to wait for another process that writes
_DEAD = 10.0  # a trial that is seen for so many times the longest finished one was left by a dead process


@dataclass(frozen=True)
class OptunaSearch(MeasuredSearch):
    """Trials of an Optuna study (Akiba et al., 2019); infeasible suggestions are repaired before they are measured.

    With a storage, several processes or machines share the study, each with the same problem, and may join or die at
    any time: give all of them the same ledger, too, where their file system allows it. The limit of evaluations then
    counts those of all, and none is made twice; without it, two that begin at once may make the same one.

    If the measurement is a `PartialMeasure`, bad picks are dropped after a part of the data (median pruning; not with
    several objectives, nor in batches).

    Attributes:
        sampler: ``tpe``, ``cmaes`` (needs the package cmaes) or ``nsga3`` (Deb and Jain, 2014: loss against how much
            of each constraint's limit is used).
        seed: Random seed of the sampler; give each process its own.
        batch: Picks measured at once, for executors.
        seeded: The first trial is the predicted optimum.
        storage: SQLite file or URL of an Optuna storage; None keeps the study in memory.
        study: Name of the study in the storage.

    Raises:
        MpqError: If the sampler is unknown, or its package is missing, or the batch is empty.
    """

    sampler: str = "tpe"
    seed: int = 0
    batch: int = 1
    seeded: bool = True
    storage: str | None = None
    study: str = "mpq"
    name: ClassVar[str] = "optuna"
    needs: ClassVar[tuple[str, ...]] = ("optuna",)

    def __post_init__(self) -> None:
        check_batch(self.batch)

    def explore(self, problem: Problem, evaluations: Evaluations) -> str:
        """Ask for trials, measure and tell; see `MeasuredSearch.explore`."""
        with _quiet():
            return _Run(self, problem, evaluations).run()


class _Run:
    """One process's part in a study."""

    def __init__(self, search: OptunaSearch, problem: Problem, evaluations: Evaluations) -> None:
        self._search, self._problem, self._evaluations = search, problem, evaluations
        self._feasible = FeasiblePicks(problem)
        self._several = search.sampler == "nsga3"
        # By rising cost, for samplers that take neighbouring values for similar ones.
        order = limit_shares(problem).argsort(1, kind="stable")
        self._options = [
            [int(s) for s in row if allowed[s]] for row, allowed in zip(order, problem.allowed, strict=True)
        ]
        self._study = self._open()
        self._name = uuid.uuid4().hex  # of this process, in claims
        self._own: set[int] = set()  # trials of this process
        self._rivals: dict[object, float] = {}  # trials and claims of others, and when they were first seen

    def run(self) -> str:
        """Measure trials until nothing new comes up."""
        if self._search.storage is not None:
            self._evaluations.recall()
        idle = 0
        while idle < _TRIES:
            if self._search.storage is not None:
                self._adopt()
            trials, picks = zip(*(self._next() for _ in range(self._search.batch)), strict=True)
            new = [self._is_new(trial, pick) for trial, pick in zip(trials, picks, strict=True)]
            idle = 0 if any(new) else idle + len(trials)
            if self._evaluations.partial and not self._several and self._search.batch == 1:
                self._measure_in_parts(trials[0], picks[0], new[0])
                continue
            try:
                if any(new):
                    self._evaluations.measure([p for p, wanted in zip(picks, new, strict=True) if wanted])
            finally:
                for trial, pick in zip(trials, picks, strict=True):
                    self._tell(trial, pick)
        return f"{_TRIES} trials in a row gave no new pick"

    def _measure_in_parts(self, trial: Trial, pick: Ints, new: bool) -> None:
        from optuna.trial import TrialState

        def prune(part: int, loss: float) -> bool:
            trial.report(loss, part)
            return trial.should_prune()

        pruned = False
        try:
            pruned = new and self._evaluations.measure_in_parts(pick, prune) is None
        finally:
            if pruned:
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                self._tell(trial, pick)

    def _open(self) -> Study:
        import optuna

        storage = self._search.storage
        objectives = 1 + (len(self._problem.constraints) if self._several else 0)
        return optuna.create_study(
            storage=None if storage is None else _open_storage(storage),
            sampler=self._sampler(),
            study_name=self._search.study,
            directions=["minimize"] * objectives,
            load_if_exists=True,
        )

    def _next(self) -> tuple[Trial, Ints]:
        """The next trial and its pick; a seeded study begins with the predicted optimum.

        That is not enqueued, since two processes may take one waiting trial from an SQLite file.
        """
        from optuna.exceptions import ExperimentalWarning
        from optuna.samplers import PartialFixedSampler

        sampler = self._study.sampler
        if self._search.seeded and not self._own:
            best = predicted_optimum(self._feasible)
            start = {f"g{g}": self._options[g].index(int(s)) for g, s in enumerate(best)}
            if not any(trial.params == start for trial in self._study.get_trials(deepcopy=False)):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ExperimentalWarning)
                    self._study.sampler = PartialFixedSampler(start, sampler)
        try:
            trial = self._study.ask()
            pick = self._pick(trial)
        finally:
            self._study.sampler = sampler
        self._own.add(trial.number)
        return trial, pick

    def _sampler(self) -> Any:
        from optuna import samplers
        from optuna.exceptions import ExperimentalWarning

        if self._search.sampler == "tpe":
            return samplers.TPESampler(seed=self._search.seed)
        if self._search.sampler == "nsga3":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                return samplers.NSGAIIISampler(seed=self._search.seed)
        if self._search.sampler != "cmaes":
            raise MpqError(f"unknown sampler {self._search.sampler!r}; known: tpe, cmaes, nsga3")
        try:
            return samplers.CmaEsSampler(seed=self._search.seed, warn_independent_sampling=False)
        except ImportError as error:
            raise MpqError("the sampler 'cmaes' needs a package: pip install cmaes") from error

    def _pick(self, trial: Trial) -> Ints:
        values = [trial.suggest_int(f"g{g}", 0, len(row) - 1) for g, row in enumerate(self._options)]
        suggested = [row[v] for row, v in zip(self._options, values, strict=True)]
        # The same suggestion is always repaired in the same way.
        pick = self._feasible.repair(suggested, np.random.default_rng([self._search.seed, *values]))
        trial.set_user_attr("pick", pick.tolist())
        return pick

    def _tell(self, trial: Trial, pick: Ints) -> None:
        from optuna.trial import TrialState

        if not self._evaluations.known(pick):
            self._study.tell(trial, state=TrialState.FAIL)
            return
        loss = min(float(self._evaluations.measure([pick])[0]), float(np.finfo(float).max))
        trial.set_user_attr("loss", loss)
        shares: Floats = used_shares(self._problem, pick) if self._several else np.zeros(0)
        self._study.tell(trial, [loss, *shares.tolist()])

    def _adopt(self) -> None:
        """Take over what other processes have finished."""
        for trial in self._study.get_trials(deepcopy=False):
            if "loss" in trial.user_attrs:
                self._evaluations.add(trial.user_attrs["pick"], trial.user_attrs["loss"])

    def _is_new(self, trial: Trial, pick: Ints) -> bool:
        """Whether a pick is not known and no living process measures it.

        Each process says what it will measure before it looks at earlier trials, and then claims it in the ledger: of
        those that share one, exactly one gets it.
        """
        from optuna.trial import TrialState

        if self._evaluations.known(pick) or self._search.storage is None:
            return not self._evaluations.known(pick)
        trials = self._study.get_trials(deepcopy=False)
        durations = [t.duration.total_seconds() for t in trials if t.duration is not None and t.values]
        for t in trials[: trial.number]:
            rival = t.state is TrialState.RUNNING and t.number not in self._own
            if rival and t.user_attrs.get("pick") == pick.tolist() and not self._dead(t.number, durations):
                return False
        owner = self._evaluations.claim(pick, self._name)
        if owner != self._name and self._dead((pick.tobytes(), owner), durations):
            owner = self._evaluations.claim(pick, self._name, instead_of=owner)
        return owner == self._name

    def _dead(self, rival: object, durations: list[float]) -> bool:
        """Whether a rival is seen for so long that it can't be measuring; before any trial is finished, none is.

        Only this machine's clock counts, as those of others may differ.
        """
        seen = time.monotonic() - self._rivals.setdefault(rival, time.monotonic())
        return bool(durations) and seen > max(_PATIENCE, _DEAD * max(durations))


def _open_storage(storage: str) -> Any:
    from optuna.storages import RDBStorage

    if "://" in storage:
        return RDBStorage(storage)
    path = Path(storage)
    if not path.exists():
        # Optuna makes its tables one by one, which two processes that begin at once can't do: make the file whole.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / "study.db"
            RDBStorage(f"sqlite:///{made}").engine.dispose()
            with suppress(FileExistsError):
                path.hardlink_to(made)
    return RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": _PATIENCE}})


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines for each trial."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
