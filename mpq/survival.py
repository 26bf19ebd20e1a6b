"""`Survival`: how much of a config was settled by noise of the calibration samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from mpq.errors import MpqError
from mpq.problem import Ints, Problem
from mpq.search.explain import resampled, survivors

if TYPE_CHECKING:
    from mpq.analysis import Analysis

_SHOWN = 60  # groups in the terminal


@dataclass(frozen=True)
class Survival:
    """How often each choice stays the best when the losses are drawn anew from their errors.

    Attributes:
        kept: Group -> share of the draws in which it keeps its scheme.
        schemes: Group -> scheme -> share of the draws in which it has that.
        whole: Share of the draws in which no group changes.
        draws: How many.
        source: ``samples`` (bootstrap over calibration samples) or ``standard errors``.
    """

    kept: Mapping[str, float]
    schemes: Mapping[str, Mapping[str, float]]
    whole: float
    draws: int
    source: str

    def __repr__(self) -> str:
        sure = sum(v >= 0.9 for v in self.kept.values())
        lines = [
            f"Survival over {self.draws} draws from {self.source}: {sure} of {len(self.kept)} groups keep their scheme "
            f"in 90 % or more, the whole map in {self.whole:.0%}"
        ]
        unsure = [n for n in sorted(self.kept, key=lambda n: self.kept[n]) if self.kept[n] < 1]
        width = max(map(len, unsure), default=0)
        for name in unsure[:_SHOWN]:
            shares = sorted(self.schemes[name].items(), key=lambda x: -x[1])
            lines.append(f"  {name:<{width}}  " + ", ".join(f"{s} {v:.0%}" for s, v in shares))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def count_survivors(
    analysis: Analysis, problem: Problem, pick: Ints, draws: int, seed: int, time_limit: float
) -> Survival:
    """See `Explanation.survival`."""
    if draws < 1:
        raise MpqError(f"draws must be at least 1, not {draws}")
    table, space = analysis.table, analysis.space
    drawn = resampled(problem, table.stderr, table.rows, draws, seed)
    counts, whole = np.zeros(space.allowed.shape, np.int64), 0
    groups = np.arange(len(counts))
    for found in survivors(pick, drawn, time_limit / draws):
        counts[groups, found] += 1
        whole += int((found == pick).all())
    shares = counts / draws
    schemes = {
        group.name: {str(space.schemes[s]): float(shares[g, s]) for s in np.flatnonzero(counts[g])}
        for g, group in enumerate(space.groups)
    }
    kept = {group.name: float(shares[g, pick[g]]) for g, group in enumerate(space.groups)}
    source = "standard errors" if table.rows is None or len(table.rows) < 2 else "samples"
    return Survival(kept, schemes, whole / draws, draws, source)
