"""Measuring a config in the background, so that the notebook stays alive."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from threading import Event, Thread

from mpq.config import BitConfig, Measured
from mpq.errors import MpqError
from mpq.evaluation import Evaluator

Evaluate = Evaluator | Callable[[BitConfig], Measured]


class Measuring:
    """A measurement in a thread of its own, started at once.

    Args:
        evaluate: What measures.
        config: What is measured.
        progress: Told of the share of the samples that is done, and of their figures.
        done: Told of the figures, of None if it was stopped, or of what went wrong.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        config: BitConfig,
        progress: Callable[[float, Measured], None],
        done: Callable[[Measured | Exception | None], None],
    ) -> None:
        self._stopped = Event()
        Thread(target=self._run, args=(evaluate, config, progress, done), daemon=True).start()

    def stop(self) -> None:
        """Stop after the batch in hand."""
        self._stopped.set()

    def _run(
        self,
        evaluate: Evaluate,
        config: BitConfig,
        progress: Callable[[float, Measured], None],
        done: Callable[[Measured | Exception | None], None],
    ) -> None:
        found: Measured | Exception | None = None
        try:
            with closing(_parts(evaluate, config)) as parts:
                for share, found in parts:
                    if self._stopped.is_set():
                        found = None
                        break
                    progress(share, found)
        except Exception as error:  # of the user's model or data: nobody else would show it
            found = error
        done(found)


def _parts(evaluate: Evaluate, config: BitConfig) -> Generator[tuple[float, Measured], None, None]:
    """Share of the samples and figures so far."""
    if isinstance(evaluate, Evaluator):
        for measured in evaluate.measure_in_parts(config):
            yield measured.samples / evaluate.float_measured.samples, measured
        return
    measured = evaluate(config)
    if not isinstance(measured, Measured):
        raise MpqError(f"evaluate must return mpq.Measured, not {type(measured).__name__}")
    yield 1.0, measured
