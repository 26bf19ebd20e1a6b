"""`WhatIf`: the same budgets solved again with some layers pinned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mpq.budget import Budget
from mpq.config import BitConfig
from mpq.errors import FormatError, GraphError
from mpq.problem import Solution, Status
from mpq.quantizers import Scheme
from mpq.search import Solver
from mpq.space import SearchSpace
from mpq.units import show

if TYPE_CHECKING:
    from mpq.analysis import Analysis


@dataclass(frozen=True, eq=False)
class WhatIf:
    """The best config with some groups pinned, against that without.

    Attributes:
        pin: As given.
        before: Config without the pins.
        after: Config with them, solved anew.
        loss: Predicted loss of both.
        changes: Group -> scheme before and after, of all groups that change; pinned ones come first.
        pinned: Names of the pinned groups.
        proven: Both are proven optimal, so that this is what the pin costs; else it is what was found.
    """

    pin: Mapping[str, str]
    before: BitConfig = field(repr=False)
    after: BitConfig = field(repr=False)
    loss: tuple[float, float]
    changes: Mapping[str, tuple[str, str]]
    pinned: tuple[str, ...]
    proven: bool

    @property
    def added_loss(self) -> float:
        """What the pins add to the predicted loss."""
        return self.loss[1] - self.loss[0]

    def __repr__(self) -> str:
        pins = ", ".join(f"{k} to {v}" for k, v in self.pin.items())
        before, after = self.loss
        lines = [
            f"WhatIf: pin {pins}: loss {self.added_loss:+.3g} ({before:.4g} -> {after:.4g})"
            + ("" if self.proven else ", not proven: the search of one of the two ended early")
        ]
        metrics = [
            f"{m} {show(v['value'], v['unit'])} -> {show(self.after.metrics[m]['value'], v['unit'])}"
            for m, v in self.before.metrics.items()
            if v["value"] != self.after.metrics[m]["value"]
        ]
        lines += [f"  {', '.join(metrics)}"] if metrics else []
        if not self.changes:
            lines.append("  nothing changes: the answer has these schemes anyway")
        width = max(map(len, self.changes), default=0)
        for name, (a, b) in self.changes.items():
            lines.append(f"  {name:<{width}}  {a} -> {b}" + (" (pinned)" if name in self.pinned else ""))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def solve_pinned(
    analysis: Analysis,
    budgets: tuple[Budget, ...],
    solver: str | Solver,
    answer: tuple[Solution, BitConfig],
    pin: Mapping[str, str | Scheme],
) -> WhatIf:
    """See `Explanation.what_if`; ``answer`` is that without the pins."""
    before, config = answer
    assert before.pick is not None
    allowed, pinned = _pinned(analysis.space, pin)
    analysis = replace(analysis, space=replace(analysis.space, allowed=allowed))
    solution = analysis.solve(budgets, solver)
    assert solution.pick is not None
    names = [g.name for g in analysis.space.groups]
    schemes = [str(s) for s in analysis.space.schemes]
    moved = sorted(np.flatnonzero(solution.pick != before.pick).tolist(), key=lambda g: names[g] not in pinned)
    changes = {names[g]: (schemes[before.pick[g]], schemes[solution.pick[g]]) for g in moved}
    return WhatIf(
        {k: str(v) for k, v in pin.items()},
        config,
        analysis.config_for(budgets, solution),
        (analysis.table.predict(before.pick), analysis.table.predict(solution.pick)),
        changes,
        pinned,
        all(s.status is Status.OPTIMAL for s in (before, solution)),
    )


def _pinned(space: SearchSpace, pin: Mapping[str, str | Scheme]) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Allowed choices with the pins, and the names of the pinned groups."""
    allowed, pinned = space.allowed.copy(), {}
    for pattern, wanted in pin.items():
        scheme = wanted if isinstance(wanted, Scheme) else Scheme.parse(wanted)
        members = {pattern} if any(g.name == pattern for g in space.groups) else set()
        if not members:
            members = {x.name for x in space.graph.match(pattern)}
        found = [g for g, x in enumerate(space.groups) if x.name in members or members & {y.name for y in x.layers}]
        if not found:
            raise GraphError(f"{pattern!r} is not in the search: it was skipped")
        for g in found:
            if scheme not in space.schemes or not space.allowed[g, space.schemes.index(scheme)]:
                names = ", ".join(str(s) for s, ok in zip(space.schemes, space.allowed[g], strict=True) if ok)
                raise FormatError(f"{scheme} is not open to {space.groups[g].name!r}; it may have {names}")
            allowed[g] = [s == scheme for s in space.schemes]
            pinned[space.groups[g].name] = True
    return allowed, tuple(pinned)
