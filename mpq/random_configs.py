"""Random mixed configs whose measured losses spread evenly over a range. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mpq.analysis import Analysis
from mpq.config import Measured
from mpq.errors import DataError, MpqError
from mpq.problem import Floats, Ints
from mpq.quantizers.formats import NumberFormat
from mpq.space import SearchSpace
from mpq.warning import warn

FEWEST = 3  # configs for a rank correlation to mean anything
_BINS = 10
_TRIES = 25  # draws for each config asked for
_SPREAD = 0.2, 1.5  # bits around the level that a config's schemes are drawn from
_DRAWS, _FEWEST_TRIED = 20, 12  # random picks to take a promising one of, once that many losses are known
_MOST_BITS = 10  # formats above lose next to nothing, so more bits are not further away


class RandomConfigs:
    """Random configs whose measured losses fill bins of equal width on a log scale.

    Args:
        analysis: Makes configs of picks.
        measure: On all evaluation data.
        glance: On the first batch: rejects cheaply what is far from any bin with room.
        configs: How many to find.
        loss_range: Edges of the bins.
        rng: Where the configs come from.
    """

    def __init__(
        self,
        analysis: Analysis,
        measure: Callable[..., Measured],
        glance: Callable[..., Measured],
        configs: int,
        loss_range: tuple[float, float],
        rng: np.random.Generator,
    ) -> None:
        self._analysis, self._measure, self._glance = analysis, measure, glance
        self._configs, self._range, self._rng = configs, loss_range, rng
        self._room = np.diff(np.rint(np.linspace(0, configs, _BINS + 1)).astype(int))
        self._reached = (math.inf, -math.inf)
        self._tried: list[tuple[Floats, float]] = []
        self.quantity = ""

    def __iter__(self) -> Iterator[tuple[Ints, float]]:
        """Picks with their measured losses."""
        seen = set()
        for _ in range(_TRIES * self._configs):
            if not self._room.any():
                return
            pick = self._promising()
            if pick.tobytes() in seen:
                continue
            seen.add(pick.tobytes())
            glanced = self._loss(pick, self._glance)
            near = self._bin(glanced)
            if near is not None:
                self._tried.append((_average_noise(self._analysis.space, pick), self._place(glanced)))
            if near is None or not self._room[max(0, near - 1) : near + 2].any():
                continue
            loss = self._loss(pick, self._measure)
            place = self._bin(loss)
            if place is not None and 0 <= place < _BINS and self._room[place]:
                self._room[place] -= 1
                yield pick, loss

    def _promising(self) -> Ints:
        """The first of a few random picks whose average noise has given losses in bins with room.

        Nothing but the average decides, so that no estimator is favoured.
        """
        space = self._analysis.space
        drawn = [random_pick(space, self._rng) for _ in range(_DRAWS)]
        if len(self._tried) < _FEWEST_TRIED:
            return drawn[0]
        terms, losses = (np.array(column) for column in zip(*self._tried, strict=True))
        fit = np.linalg.lstsq(terms, losses, rcond=None)[0]
        for pick in drawn:
            bin_ = math.floor(float(_average_noise(space, pick) @ fit))
            if self._room[max(0, bin_ - 1) : bin_ + 2].any() and -1 <= bin_ <= _BINS:
                return pick
        return drawn[-1]

    def report(self, found: int) -> None:
        """Say so if not all configs were found.

        Raises:
            MpqError: If they are too few to compare anything.
        """
        if found == self._configs:
            return
        low, high = self._range
        text = (
            f"only {found} of {self._configs} configs found with a measured {self.quantity} spread over {low:g} to "
            f"{high:g}; those tried reached {self._reached[0]:.3g} to {self._reached[1]:.3g}. Change loss_range or "
            "allow other schemes"
        )
        if found < FEWEST:
            raise MpqError(text)
        warn(text)

    def _loss(self, pick: Ints, measure: Callable[..., Measured]) -> float:
        measured = measure(self._analysis.config(pick))
        loss, self.quantity = (measured.mse, "mse") if measured.kl is None else (measured.kl, "kl")
        if loss is None:
            raise DataError(
                "the outputs can't be compared with the float model's sample by sample: their first axis must be the "
                "batch; pass forward=lambda model, batch: ... that returns such a tensor"
            )
        self._reached = (min(self._reached[0], loss), max(self._reached[1], loss))
        return loss

    def _bin(self, loss: float) -> int | None:
        """Index of a loss's bin, below 0 or from `_BINS` outside the range; None without a logarithm."""
        return math.floor(self._place(loss)) if 0 < loss < math.inf else None

    def _place(self, loss: float) -> float:
        """Where a loss is, in bins above the lowest."""
        low, high = self._range
        return math.log(loss / low) / math.log(high / low) * _BINS


def _average_noise(space: SearchSpace, pick: Ints) -> Floats:
    """Terms of a quadratic in the logarithms of a pick's mean noise of weights and activations ``[5]``.

    Noise has a quarter of the power for each bit more, and the few layers with the fewest bits make most of it.
    """
    formats = zip(*((s.weight, s.activation) for s in space.schemes), strict=True)
    w, a = (float(np.log(np.exp2(-2 * _bits(s)[pick]).mean())) for s in formats)
    return np.array([1.0, w, a, w * w, a * a])


def random_pick(space: SearchSpace, rng: np.random.Generator) -> Ints:
    """A random pick ``[G]``: schemes in random (Dirichlet) shares around a random bit width, close to it or less so.

    The same shares for all groups let configs differ in their total; one scheme at a time, drawn evenly, would give
    configs that are all alike in it. A network that can't bear a few bits anywhere needs picks without them.
    """
    spread = rng.uniform(*_SPREAD)
    weight = np.ones(len(space.schemes))
    for bits in _bits(s.weight for s in space.schemes), _bits(s.activation for s in space.schemes):
        level = rng.uniform(bits.min(), bits.max())
        weight *= np.exp(-0.5 * np.square((bits - level) / spread))
    shares = rng.dirichlet(3 * weight / weight.max() + 1e-3)
    rows = space.allowed * (shares + 1e-12)  # groups that are pinned to a scheme of no share still get it
    return np.array([rng.choice(len(row), p=row / row.sum()) for row in rows])


def _bits(formats: Iterable[NumberFormat | None]) -> Floats:
    return np.array([_MOST_BITS if f is None else min(f.bits, _MOST_BITS) for f in formats], np.float64)
