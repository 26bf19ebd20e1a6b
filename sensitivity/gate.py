"""A sanity gate between estimator and solver: what looks wrong in a table is named, and what misleads is taken out.

A solver believes every number: a NaN stops it, and a score that is zero or negative by mistake gives a layer the fewest
bits. `check` finds such scores before any budget is solved. Only allowed schemes are judged. What is done about each
kind of finding:

==================  ==================================================================================================
``not_finite``      NaN or infinite losses, effects of samples or interactions, or infinite standard errors:
                    quarantined. A NaN standard error is legal: one sample has no spread. Where only interactions are
                    broken, the group with the most broken partners goes first, until none is left, so that one sick
                    group does not take all others with it.
``negative``        Negative losses: quarantined. The float model is the reference, so that quantizing can't be
                    predicted to help; a solver would take such a loss as a reward.
``negative_trace``  The estimator says that it cut a negative trace or eigenvalue to zero: quarantined. The estimate
                    has failed (too few probes, or no minimum of the loss), but its zero looks as if the layer were
                    free and would give it the fewest bits: the worst place for an error.
``not_monotone``    More bits with a higher loss than fewer, beyond noise: kept as measured. Coarse formats can be
                    luckier, and smoothing would hide a real effect. Where a standard error is NaN, the noise is unknown
                    and nothing is said.
``below_zero``      The estimator says that it cut measured losses below zero to zero: kept. Quantizing may help a loss
                    of the user's own, by luck or truly; within noise, zero is the best guess. It gets no reward for it.
``zero_gradient``   All losses exactly zero although some scheme rounds: kept. The layer may truly be unused
                    (`mpq.sensitivity.rows.check_reached` refuses one that changes the output without a gradient), so
                    that it gets the fewest bits.
``never_ran``       A layer that no calibration sample reached when the model was traced, such as an unrouted expert: it
                    has no scores, is not searched and stays float.
==================  ==================================================================================================

A quarantined group keeps its widest allowed scheme: the most weight bits, then activation bits (float counts as most),
then bits of scales. Its losses, standard errors, effects and interactions become zero, so that the predicted loss of a
config does not cover it. That may make tight budgets unreachable; skipping or pinning the group are the ways out.

Nothing here imports torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpq.errors import MpqError
from mpq.layers import LayerSpec
from mpq.quantizers import NumberFormat, Scheme
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace, layer_scheme
from mpq.warning import warn

Mask = NDArray[np.bool_]

_QUARANTINE = ("not_finite", "negative", "negative_trace")
# Provenance key -> what the layers listed there have.
_CUT_TO_ZERO = {"negative_traces": "negative Hessian trace", "negative_eigenvalues": "negative largest eigenvalue"}
_STANDARD_ERRORS, _RELATIVE = 3.0, 1e-6
_SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong.

    Attributes:
        group: Name of the group; of the layer for ``never_ran``.
        kind: ``not_finite``, ``negative``, ``negative_trace``, ``not_monotone``, ``below_zero``,
            ``zero_gradient`` or ``never_ran``.
        message: What was seen.
        action: What is done about it.
    """

    group: str
    kind: str
    message: str
    action: str

    @property
    def quarantined(self) -> bool:
        """Whether the group lost its choice."""
        return self.kind in _QUARANTINE

    def __str__(self) -> str:
        return f"{self.group}: {self.message} -> {self.action}"


@dataclass(frozen=True, eq=False, repr=False)
class Gate:
    """What `check` returns: inputs that every solver can take, and what was found.

    Attributes:
        table: Cleaned sensitivities, finite wherever a scheme is allowed.
        space: The space; quarantined groups have one allowed scheme.
        findings: In the order of their kinds in the module's docstring, then of the groups.
    """

    table: SensitivityTable
    space: SearchSpace
    findings: tuple[Finding, ...]

    @property
    def quarantined(self) -> tuple[str, ...]:
        """Names of the groups that lost their choice."""
        return tuple(dict.fromkeys(f.group for f in self.findings if f.quarantined))

    def __repr__(self) -> str:
        lines = [f"Gate: {len(self.findings)} findings, {len(self.quarantined)} groups quarantined"]
        for kind, found in itertools.groupby(self.findings, lambda f: f.kind):
            members = list(found)
            lines += [f"  {f}" for f in members[:_SHOWN]]
            if len(members) > _SHOWN:
                lines.append(f"  and {len(members) - _SHOWN} more: {kind}")
        return "\n".join(lines)

    def warn(self) -> None:
        """Warn once of groups that were quarantined, and once of all other findings."""
        found, others = ([f for f in self.findings if f.quarantined == q] for q in (True, False))
        if found:
            warn(
                f"{len(self.quarantined)} of {len(self.space.groups)} groups have scores that can't be used and are "
                f"not searched: {_listed(found)}. Skip or pin them, or try more data or another estimator"
            )
        if others:
            warn(f"looks wrong, but is kept: {_listed(others)}")

    def provenance(self) -> list[dict[str, str]]:
        """The findings as JSON holds them."""
        return [asdict(f) for f in self.findings]


def _listed(findings: Sequence[Finding]) -> str:
    more = f"; and {len(findings) - _SHOWN} more" if len(findings) > _SHOWN else ""
    return "; ".join(map(str, findings[:_SHOWN])) + more


def check(table: SensitivityTable, space: SearchSpace) -> Gate:
    """Look for scores that would mislead a solver, and take them out.

    Args:
        table: Sensitivities of the groups and schemes of the space.
        space: The search space.

    Raises:
        MpqError: If the table does not belong to the space.
    """
    _check_fits(table, space)
    cut = [*_negative(table, space), *_negative_traces(table, space)]
    unsound = [*_not_finite(table, space, {f.group for f in cut}), *cut]
    named = {f.group for f in unsound}
    quarantined = np.array([g in named for g in table.groups])
    # A zero or an order of schemes means nothing where scores are broken.
    sound = np.flatnonzero(~quarantined)
    measured = [*_not_monotone(table, space, sound), *_below_zero(table, space, sound)]
    kept = [*measured, *_zero_gradient(table, space, sound), *_never_ran(space)]
    return Gate(_cleaned(table, quarantined), _narrowed(space, quarantined), (*unsound, *kept))


def _check_fits(table: SensitivityTable, space: SearchSpace) -> None:
    names = tuple(g.name for g in space.groups), tuple(map(str, space.schemes))
    shape = space.allowed.shape
    if (table.groups, table.schemes) != names or table.loss.shape != shape or table.stderr.shape != shape:
        raise MpqError(
            f"the sensitivity table, loss {table.loss.shape} and stderr {table.stderr.shape}, does not belong to the "
            f"search space of {shape[0]} groups and {shape[1]} schemes; an estimator names them in the space's order"
        )
    for name, found in ("interactions", table.interactions), ("rows", table.rows):
        wanted = shape + shape if name == "interactions" else shape
        if found is not None and (found.ndim != 4 or found.shape[-len(wanted) :] != wanted):
            raise MpqError(f"the sensitivity table's {name} {found.shape} don't fit its losses {shape}")


def _not_finite(table: SensitivityTable, space: SearchSpace, others: Collection[str]) -> Iterator[Finding]:
    """Of broken interactions, those with the ``others``, which are out in any case, don't count."""
    masks = {
        "NaN": np.isnan(table.loss),
        "infinite": np.isinf(table.loss),
        "infinite standard error": np.isinf(table.stderr),
    }
    if table.rows is not None:
        masks["NaN or infinite effects of samples"] = np.asarray(~np.isfinite(table.rows).all((0, 1)))
    broken = np.array([bool(_where(masks, space, g)) or name in others for g, name in enumerate(table.groups)])
    partners = _broken_partners(table, space, broken)
    for g, group in enumerate(table.groups):
        parts = _where(masks, space, g)
        if g in partners:
            first, *others = (table.groups[h] for h in partners[g])
            more = f" and {len(others)} more" if others else ""
            parts.append(f"NaN or infinite interactions with {first}{more}")
        if parts:
            yield Finding(group, "not_finite", "; ".join(parts), _kept(space, g))


def _broken_partners(table: SensitivityTable, space: SearchSpace, broken: Mask) -> dict[int, list[int]]:
    """Few groups that together hold all broken interactions, each with its partners there."""
    if table.interactions is None:
        return {}
    allowed = space.allowed
    entries = ~np.isfinite(table.interactions) & allowed[:, :, None, None] & allowed
    either = entries | entries.transpose(2, 3, 0, 1)
    pairs = np.asarray(either.any((1, 3)))
    found: dict[int, list[int]] = {}
    pairs[broken] = pairs[:, broken] = False
    while pairs.any():
        g = int(pairs.sum(1).argmax())
        found[g] = [int(h) for h in np.flatnonzero(pairs[g])]
        pairs[g] = pairs[:, g] = False
    return found


def _negative(table: SensitivityTable, space: SearchSpace) -> Iterator[Finding]:
    masks = {"negative": np.isfinite(table.loss) & (table.loss < 0)}
    for g, group in enumerate(table.groups):
        parts = _where(masks, space, g)
        if parts:
            yield Finding(group, "negative", parts[0], _kept(space, g))


def _negative_traces(table: SensitivityTable, space: SearchSpace) -> Iterator[Finding]:
    for g, group in enumerate(space.groups):
        for key, what in _CUT_TO_ZERO.items():
            listed = table.provenance.get(key, ())
            names = [x.name for x in group.layers if x.name in listed]
            if names:
                yield Finding(group.name, "negative_trace", f"{what} of {', '.join(names)}", _kept(space, g))


def _where(masks: dict[str, Mask], space: SearchSpace, g: int) -> list[str]:
    """Each label with the allowed schemes where its mask holds."""
    parts = []
    for label, mask in masks.items():
        schemes = [str(space.schemes[s]) for s in np.flatnonzero(mask[g] & space.allowed[g])]
        if schemes:
            parts.append(f"{label} at {', '.join(schemes)}")
    return parts


def _not_monotone(table: SensitivityTable, space: SearchSpace, groups: NDArray[np.intp]) -> Iterator[Finding]:
    wider = [(a, b) for a, b in itertools.permutations(range(len(space.schemes)), 2) if _wider(space.schemes, a, b)]
    for g in groups:
        loss, stderr, allowed = table.loss[g], table.stderr[g], space.allowed[g]
        pairs = [
            (loss[a] - loss[b], a, b)
            for a, b in wider
            if allowed[a]
            and allowed[b]
            and loss[a] - loss[b] > _STANDARD_ERRORS * math.hypot(stderr[a], stderr[b])
            and loss[a] - loss[b] > _RELATIVE * loss[a]
        ]
        if pairs:
            _, a, b = max(pairs)
            more = f", and {len(pairs) - 1} more pairs" if len(pairs) > 1 else ""
            message = f"{table.schemes[a]} ({loss[a]:.3g}) loses more than {table.schemes[b]} ({loss[b]:.3g}){more}"
            yield Finding(table.groups[g], "not_monotone", message, "kept as measured")


def _wider(schemes: tuple[Scheme, ...], a: int, b: int) -> bool:
    """Whether one scheme has more bits than another in one role and the same format in the other role."""
    first, second = schemes[a], schemes[b]
    if first.activation == second.activation:
        return _more_bits(first.weight, second.weight)
    return first.weight == second.weight and _more_bits(first.activation, second.activation)


def _more_bits(a: NumberFormat | None, b: NumberFormat | None) -> bool:
    if a is None or b is None or a.bits <= b.bits:
        return False
    same = ("family", "granularity", "symmetric", "scale", "variant", "recipe")
    return all(getattr(a, name) == getattr(b, name) for name in same)


def _below_zero(table: SensitivityTable, space: SearchSpace, groups: NDArray[np.intp]) -> Iterator[Finding]:
    cut = table.provenance.get("negative_losses", {})
    for g in groups:
        allowed = {table.schemes[s] for s in np.flatnonzero(space.allowed[g])}
        seen = [f"{s} ({loss:.3g})" for s, loss in cut.get(table.groups[g], {}).items() if s in allowed]
        if seen:
            message = f"loses less than the float model at {', '.join(seen)}"
            yield Finding(table.groups[g], "below_zero", message, "taken as zero")


def _zero_gradient(table: SensitivityTable, space: SearchSpace, groups: NDArray[np.intp]) -> Iterator[Finding]:
    for g in groups:
        group, allowed = space.groups[g], np.flatnonzero(space.allowed[g])
        rounds = any(_rounds(x, space.schemes[s]) for x in group.layers for s in allowed)
        if len(allowed) > 1 and rounds and not table.loss[g, allowed].any():
            yield Finding(group.name, "zero_gradient", "all losses are zero", "free: gets the fewest bits")


def _rounds(layer: LayerSpec, scheme: Scheme) -> bool:
    """Whether a scheme may change what the layer computes."""
    meant = layer_scheme(layer, scheme)
    formats = [f for f in (meant.weight, meant.activation) if f is not None]
    return any(not f.plain_float or f.bits < layer.element_bits for f in formats)


def _never_ran(space: SearchSpace) -> Iterator[Finding]:
    for o in space.graph.outside:
        if o.kind == "idle":
            yield Finding(o.name, "never_ran", o.reason, "stays float")


def _widest(space: SearchSpace, g: int) -> int:
    """The allowed scheme of most weight bits, then activation bits, then bits of scales."""

    def width(s: int) -> tuple[float, ...]:
        weight, activation = space.schemes[s].weight, space.schemes[s].activation
        stored = sum(weight.storage_bits(x.rows_shape) for x in space.groups[g].layers)
        return weight.bits, math.inf if activation is None else activation.bits, stored

    return max((int(s) for s in np.flatnonzero(space.allowed[g])), key=width)


def _kept(space: SearchSpace, g: int) -> str:
    return f"kept at {space.schemes[_widest(space, g)]}"


def _cleaned(table: SensitivityTable, quarantined: Mask) -> SensitivityTable:
    """Zeros for quarantined groups, and where schemes that are not allowed were left NaN or infinite."""
    row = quarantined[:, None]
    loss = np.where(row | ~np.isfinite(table.loss), 0.0, table.loss)
    stderr = np.where(row | np.isinf(table.stderr), 0.0, table.stderr)
    rows = None if table.rows is None else np.where(row | ~np.isfinite(table.rows), 0.0, table.rows)
    interactions = table.interactions
    if interactions is not None:
        finite = np.isfinite(interactions)
        finite &= finite.transpose(2, 3, 0, 1)
        interactions = np.where(row | row[..., None, None] | ~finite, 0.0, interactions)
    return replace(table, loss=loss, stderr=stderr, interactions=interactions, rows=rows)


def _narrowed(space: SearchSpace, quarantined: Mask) -> SearchSpace:
    allowed = space.allowed.copy()
    for g in np.flatnonzero(quarantined):
        allowed[g] = np.arange(allowed.shape[1]) == _widest(space, int(g))
    return replace(space, allowed=allowed)
