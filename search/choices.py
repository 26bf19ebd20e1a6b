"""Global choices, such as granularity or calibration size, as groups of a problem that any search takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mpq.errors import MpqError
from mpq.problem import Floats, PairCosts, Problem


@dataclass(frozen=True)
class Choices:
    """Named choices that hold for a whole network, each with its options, alone or next to a scheme for each group.

    Quantune (Lee et al., 2022) searches calibration size, granularity, symmetry and clipping in this way, EQ-Net
    (Xu et al., 2023) bits of each layer together with granularity and symmetry. Nothing is predicted of them: each
    option adds no loss and no cost.

    Attributes:
        options: Name -> its options.

    Raises:
        MpqError: If there are no choices, or one has no options.

    Example:
        >>> choices = Choices({"granularity": ("tensor", "channel"), "samples": (16, 64, 256)})
        >>> choices.problem().loss.shape
        (2, 3)
        >>> choices.of([1, 0])
        {'granularity': 'channel', 'samples': 16}
    """

    options: Mapping[str, Sequence[Any]]

    def __post_init__(self) -> None:
        empty = [name for name, options in self.options.items() if not len(options)]
        if empty or not self.options:
            raise MpqError(f"choices {empty} have no options" if empty else "choices need at least one name")

    def problem(self, base: Problem | None = None) -> Problem:
        """A problem whose last groups are the choices, one scheme for each option.

        Args:
            base: Groups before them, with their constraints; None for the choices alone.
        """
        base = Problem(np.zeros((0, 0))) if base is None else base
        G, S = len(base.loss) + len(self.options), max(base.loss.shape[1], *map(len, self.options.values()), 1)
        loss = np.full((G, S), np.inf)
        loss[: len(base.loss), : base.loss.shape[1]] = base.loss
        for row, options in zip(loss[len(base.loss) :], self.options.values(), strict=True):
            row[: len(options)] = 0.0
        rows = tuple(replace(c, cost=_grown(c.cost, (G, S)), pairs=_more_schemes(c.pairs, S)) for c in base.constraints)
        pairs = None if base.interactions is None else _grown(base.interactions, (G, S, G, S))
        return Problem(loss, rows, pairs)

    def of(self, pick: ArrayLike) -> dict[str, Any]:
        """Name -> option that a pick ``[G]`` takes; the groups before the choices are left out."""
        taken = np.asarray(pick, np.int64)[-len(self.options) :]
        return {name: options[s] for (name, options), s in zip(self.options.items(), taken, strict=True)}


def _grown(values: Floats, shape: tuple[int, ...]) -> Floats:
    """Zeros behind the ends of the first axes."""
    more = [(0, n - old) for n, old in zip(shape, values.shape, strict=False)]
    return np.pad(values, more + [(0, 0)] * (values.ndim - len(shape)))


def _more_schemes(pairs: PairCosts | None, schemes: int) -> PairCosts | None:
    return None if pairs is None else PairCosts(pairs.groups, _grown(pairs.cost, (len(pairs.cost), schemes, schemes)))
