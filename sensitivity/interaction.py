"""Dependency between layers, measured: losses of pairs (CLADO), of whole configs (IMPQ), and what to read in them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from mpq.bank import QuantizerBank
from mpq.calibration import Calibration
from mpq.errors import MpqError
from mpq.layers import LayerGroup
from mpq.losses import OutputLoss
from mpq.problem import Floats, Ints
from mpq.progress import progress_bar
from mpq.quantizers import Scheme
from mpq.sensitivity.capture import cut_below_zero, table_of
from mpq.sensitivity.options import check_values
from mpq.sensitivity.perturbation import check_finite, float_recording, mean_rise, names_of, quantized, rise_meter
from mpq.sensitivity.prefix import Recording
from mpq.sensitivity.spread import standard_error
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace
from mpq.view import ModelView

# Scheme number of each group; float stands for none.
Config = tuple[int, ...]
_FLOAT = -1


def measured_pairs(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    psd: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """Measured losses of all single choices and of all pairs of choices.

    CLADO (Deng et al., 2023, arXiv:2307.05657): the interaction of two choices is what the loss of both together
    exceeds the sum of their own by, ``L(g,s,h,t) - L(g,s) - L(h,t)``. For ``G`` groups and ``S`` schemes that is
    ``G * S + G * (G - 1) / 2 * S**2`` passes over the data, shortened by reuse: only what runs after the later one of
    two changes is computed for each pair (`mpq.sensitivity.prefix`).

    Args:
        view: The model.
        space: Groups and schemes; pairs with a choice that is not allowed are left out.
        data: Calibration data.
        bank: Quantized weights and activation ranges.
        loss: What is protected.
        psd: Replace the matrix of CLADO's quadratic form (interactions, twice the losses on its diagonal, zero between
            schemes of one group) by the nearest positive semidefinite one, as CLADO does for its convex solver. This
            changes losses too.
        seed: Unused: the measure is deterministic.
        progress: Show a bar.

    Returns:
        A table in the unit of ``loss`` whose prediction of every pair is what was measured (without ``psd``). Losses
        are zero where the loss fell (``provenance["negative_losses"]``); standard errors as those of `perturbation`.

    Raises:
        DataError: If a measured loss is NaN or infinite.
    """
    G, S = space.allowed.shape
    rows = [np.zeros((batch.size, G, S)) for batch in data.batches]
    pairs = np.zeros((G, S, G, S))
    steps = ((number, g, s) for number in range(len(rows)) for g in range(G) for s in range(S))
    by_sample: list[bool] = []
    measured = zip(steps, _pair_losses(view, space, data, bank, loss, by_sample), strict=True)
    bar = progress_bar(measured, "pairs", progress, len(rows) * G * S)
    for (number, g, s), (single, others) in bar:
        rows[number][:, g, s] = single
        pairs[g, s] += others / data.num_samples
    mean, stderr = mean_rise(rows, all(by_sample))
    losses, negative = cut_below_zero(space, mean)
    known = _later_pairs(space)
    above = np.where(known, pairs - losses[..., None, None] - losses, 0.0)
    interactions = above + above.transpose(2, 3, 0, 1)
    if psd:
        losses, interactions = _semidefinite(losses, interactions)
    passes = 1 + G * S + int(known.sum())
    options = {"loss": loss.name, "psd": psd, "negative_losses": negative}
    table = table_of(space, losses, stderr, "measured_pairs", passes, **options)
    return replace(table, interactions=interactions)


def _later_pairs(space: SearchSpace) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Which pairs ``[G, S, G, S]`` are measured: allowed ones, the second of a later group."""
    allowed = space.allowed
    later = np.triu(np.ones((len(allowed), len(allowed)), bool), 1)
    return later[:, None, :, None] & allowed[:, :, None, None] & allowed


def _pair_losses(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    by_sample: list[bool],
) -> Iterator[tuple[Floats, Floats]]:
    """For each batch and choice: its loss by sample ``[B]``, and with each later choice, summed over samples.

    Adds to ``by_sample`` for each batch whether the loss tells its samples apart.
    """
    known = _later_pairs(space)
    for batch in data.batches:
        float_pass = float_recording(view, batch)
        by_sample.append(loss.by_sample(float_pass.output, batch))
        meter = rise_meter(loss, float_pass.output, batch)
        for g, s in np.ndindex(*space.allowed.shape):
            first = _choice(space, g, s)
            with quantized(view, bank, [first]):
                one = Recording(view, batch, float_pass, names_of(first[0]))
            single = _checked(meter(one.output), [first])
            others = np.zeros(space.allowed.shape)
            for h, t in np.argwhere(known[g, s]):
                second = _choice(space, h, t)
                with quantized(view, bank, [first, second]):
                    others[h, t] = _checked(meter(one.run(names_of(second[0]))), [first, second]).sum()
            yield single, others


def _choice(space: SearchSpace, g: int, s: int) -> tuple[LayerGroup, Scheme]:
    return space.groups[g], space.schemes[s]


def _checked(values: Tensor, choices: Iterable[tuple[LayerGroup, Scheme]]) -> Floats:
    check_finite(values, choices)
    found: Floats = values.numpy()
    return found


def _semidefinite(losses: Floats, interactions: Floats) -> tuple[Floats, Floats]:
    """Losses and interactions of the quadratic form without its negative eigenvalues."""
    G, S = losses.shape
    values, vectors = np.linalg.eigh(interactions.reshape(G * S, G * S) + np.diag(2 * losses.ravel()))
    form = ((vectors * np.maximum(values, 0)) @ vectors.T).reshape(G, S, G, S)
    form = (form + form.transpose(2, 3, 0, 1)) / 2
    halves: Floats = np.einsum("gsgs->gs", form) / 2
    # Two schemes of one group never meet.
    form[np.arange(G), :, np.arange(G)] = 0
    return np.maximum(halves, 0), form


def shapley(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    permutations: int = 8,
    baseline: str | None = None,
    shrinkage: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """What each group's step down costs among the others: its Shapley value.

    Progressive estimation of IMPQ (Zhao et al., 2025, arXiv:2509.15455): all groups are quantized to a baseline scheme,
    then one after the other, in random order, to a lower one; the rise of the loss at a group's step is its marginal
    effect, and the mean over orders its Shapley value. The step from float to the baseline is shared out in the same
    way, so that the losses of a scheme sum to the measured loss of the model with that scheme everywhere (before those
    below zero are cut off): groups share their interactions evenly. Every order is also run in reverse, which cancels
    the part of pairs in the noise.

    Args:
        view: The model.
        space: Groups and schemes. Where a scheme is not allowed, the group stays at its widest one.
        data: Calibration data.
        bank: Quantized weights and activation ranges.
        loss: What is protected.
        permutations: Random orders for each scheme, each also in reverse. Where there are no more than that, all.
        baseline: Name of the scheme to step down from; None takes the one of the most bits.
        shrinkage: Add IMPQ's quadratic form: with ``C`` the covariance of the marginal effects over orders, ``K = (1 -
            shrinkage) C + shrinkage diag(C)`` has the interactions ``2 K_ij`` and the losses ``phi_i - sum_j K_ij +
            K_ii``. IMPQ takes 0.5. None leaves the Shapley values alone: a covariance has the unit of the loss
            squared, and that of two groups alone is negative whether they amplify or cancel each other.
        seed: Of the orders.
        progress: Show a bar.

    Returns:
        A table in the unit of ``loss``, zero where a group's steps lowered it (``provenance["negative_losses"]``).
        Standard errors are those over orders, with the data taken as given: zero if all of them were run.

    Raises:
        DataError: If a measured loss is NaN or infinite.
        MpqError: If an option is out of range or the baseline is no scheme of the space.
    """
    check_values(permutations=permutations, shrinkage=shrinkage)
    start, ends = _ladder(space, baseline)
    orders, complete = _orders(len(start), permutations, np.random.default_rng(seed))
    unquantized = (_FLOAT,) * len(start)
    journeys = [(unquantized, start), *((start, end) for end in ends)]
    configs = list(dict.fromkeys(c for a, b in journeys for order in orders for c in _path(a, b, order)))
    values = dict(zip(configs, _config_losses(view, space, data, bank, loss, configs, progress), strict=True))
    shared = marginals(values, unquantized, start, orders)
    steps = np.stack([marginals(values, start, end, orders) for end in ends], -1)
    effects = (shared[..., None] + steps).reshape(len(orders) // 2, 2, *space.allowed.shape)
    losses = effects.mean((0, 1))
    stderr = np.zeros_like(losses) if complete else standard_error(effects.mean(1))
    interactions = None
    if shrinkage is not None:
        change, interactions = _covariances(steps, shrinkage)
        losses = losses + change
    losses, negative = cut_below_zero(space, losses)
    options = {
        "loss": loss.name,
        "negative_losses": negative,
        "permutations": len(orders),
        "baseline": baseline or str(max(space.schemes, key=_width)),
        "shrinkage": shrinkage,
    }
    table = table_of(space, losses, stderr, "shapley", len(configs), **options)
    return replace(table, interactions=interactions)


def _width(scheme: Scheme) -> tuple[float, float]:
    return scheme.weight.bits, math.inf if scheme.activation is None else scheme.activation.bits


def _ladder(space: SearchSpace, baseline: str | None) -> tuple[Config, list[Config]]:
    """Where every group starts, and where it ends for each scheme."""
    names = [str(s) for s in space.schemes]
    if baseline is not None and baseline not in names:
        raise MpqError(f"baseline {baseline!r} is no scheme of the space; it has {', '.join(names)}")
    widest_first = sorted(range(len(names)), key=lambda s: _width(space.schemes[s]), reverse=True)
    if baseline is not None:
        widest_first.insert(0, names.index(baseline))
    start = tuple(next(s for s in widest_first if row[s]) for row in space.allowed)
    ends = [tuple(s if row[s] else b for row, b in zip(space.allowed, start, strict=True)) for s in range(len(names))]
    return start, ends


def _orders(count: int, pairs: int, generator: np.random.Generator) -> tuple[Ints, bool]:
    """Orders ``[2 * pairs, G]``, each followed by its reverse, and whether these are all there are."""
    complete = math.factorial(count) <= 2 * pairs
    if complete:
        each = np.array([p for p in itertools.permutations(range(count)) if p[0] <= p[-1]], np.int64)
    else:
        each = np.stack([generator.permutation(count) for _ in range(pairs)])
    return np.stack([each, each[:, ::-1]], 1).reshape(-1, count), complete


def _path(start: Config, end: Config, order: Ints) -> Iterator[Config]:
    """Configs from start to end, one group after the other."""
    config = list(start)
    yield start
    for g in order:
        config[g] = end[g]
        yield tuple(config)


def marginals(values: Mapping[Config, float], start: Config, end: Config, orders: Ints) -> Floats:
    """What each group's step adds in each order.

    Args:
        values: Loss of every config on the way.
        start: Scheme of each group at first.
        end: Scheme of each group at last.
        orders: Of the steps ``[R, G]``.

    Returns:
        Marginal effects ``[R, G]``.
    """
    found = np.zeros(orders.shape)
    for row, order in zip(found, orders, strict=True):
        row[order] = np.diff([values[c] for c in _path(start, end, order)])
    return found


def _covariances(steps: Floats, shrinkage: float) -> tuple[Floats, Floats]:
    """IMPQ's change of the losses ``[G, S]`` and its interactions, from marginal effects ``[R, G, S]``."""
    _, G, S = steps.shape
    centred = (steps - steps.mean(0)).reshape(len(steps), G * S)
    square = centred.T @ centred / len(steps)
    own = np.diag(square).reshape(G, S)
    others = (1 - shrinkage) * square.reshape(G, S, G, S)
    others[np.arange(G), :, np.arange(G)] = 0
    return own - np.einsum("gshs->gs", others), 2 * others


def _config_losses(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    configs: Sequence[Config],
    progress: bool,
) -> list[float]:
    """Mean rise of the loss in each config; each starts from where it differs from the one before."""
    sums = np.zeros(len(configs))
    steps = [(batch, number) for batch in data.batches for number in range(len(configs))]
    for batch, number in progress_bar(steps, "configs", progress):
        config = configs[number]
        if number == 0:
            last, known = float_recording(view, batch), (_FLOAT,) * len(config)
            meter = rise_meter(loss, last.output, batch)
        changed = [g for g, s in enumerate(config) if s != known[g]]
        choices = [_choice(space, g, s) for g, s in enumerate(config) if s != _FLOAT]
        with quantized(view, bank, choices):
            last = Recording(view, batch, last, [name for g in changed for name in names_of(space.groups[g])])
        sums[number] += _checked(meter(last.output), choices).sum()
        known = config
    return list(sums / data.num_samples)


@dataclass(frozen=True, eq=False)
class Dependency:
    """How groups depend on each other at given schemes.

    Attributes:
        groups: Names of the groups ``[G]``.
        schemes: Name of each group's scheme ``[G]``.
        correlation: ``I_gh / (2 sqrt(L_g L_h))`` ``[G, G]``, ones on the diagonal: for losses that are a quadratic form
            of the errors, the cosine between two groups' errors. 1 means that they add up like one error twice as
            large, -1 that they cancel; 0 where a loss is zero.
        amplification: ``sum_h I_gh / L_g`` ``[G]``: what the other groups add to a group's own loss, in units of it;
            negative where they cancel some of it.
    """

    groups: tuple[str, ...]
    schemes: tuple[str, ...]
    correlation: Floats
    amplification: Floats


def dependency(table: SensitivityTable, schemes: str | Sequence[str] | None = None) -> Dependency:
    """Correlations between groups, and how much each one's loss is amplified by the others.

    Args:
        table: With interactions.
        schemes: Name of one scheme for all groups, or of each group's; None takes the one of the largest total loss.

    Raises:
        MpqError: If the table has no interactions or no such scheme.
    """
    pick = _pick(table, schemes)
    own, others = _at(table, pick)
    scale = np.sqrt(np.outer(own, own))
    correlation = np.divide(others, 2 * scale, out=np.zeros_like(others), where=scale > 0)
    np.fill_diagonal(correlation, 1)
    amplification = np.divide(others.sum(1), own, out=np.zeros_like(own), where=own > 0)
    return Dependency(table.groups, tuple(table.schemes[s] for s in pick), correlation, amplification)


def augmented_order(table: SensitivityTable, scheme: str | None = None) -> Ints:
    """Groups from the least to the most sensitive, each with what it does to the others: a ranking to read.

    Schaefer et al. (2023, arXiv:2306.04879) sort layers by their Hessian score augmented with what they do to each
    other, and bisect over how many from the front can have the lower scheme. The score here is ours: a group's loss
    plus its interactions with all others, ``L_g + sum_h I_gh``: just what the predicted loss of the uniform model falls
    by when this group stays float. For their trace score, put measured or influence's interactions into a
    ``hessian_trace`` table of the same groups and schemes:
    ``dataclasses.replace(trace, interactions=other.interactions)``.

    No search here uses the list: `mpq.search.bisection` goes along the picks of the least predicted loss.

    Args:
        table: With interactions.
        scheme: The lower scheme; None takes the one of the largest total loss.

    Returns:
        Numbers of the groups ``[G]``; equal scores in the order of the groups.

    Raises:
        MpqError: If the table has no interactions or no such scheme.
    """
    own, others = _at(table, _pick(table, scheme))
    return np.argsort(own + others.sum(1), kind="stable").astype(np.int64)


def _pick(table: SensitivityTable, schemes: str | Sequence[str] | None) -> Ints:
    if schemes is None:
        return np.full(len(table.groups), table.loss.sum(0).argmax(), np.int64)
    names = [schemes] * len(table.groups) if isinstance(schemes, str) else list(schemes)
    unknown = [n for n in names if n not in table.schemes]
    if unknown or len(names) != len(table.groups):
        known = ", ".join(table.schemes)
        raise MpqError(f"schemes must be one name or one for each of {len(table.groups)} groups, out of {known}")
    return np.array([table.schemes.index(n) for n in names], np.int64)


def _at(table: SensitivityTable, pick: Ints) -> tuple[Floats, Floats]:
    """Losses ``[G]`` and interactions ``[G, G]`` of a pick."""
    if table.interactions is None:
        raise MpqError(f"the {table.provenance.get('estimator')} table has no interactions; measured_pairs has")
    groups = np.arange(len(pick))
    return table.loss[groups, pick], table.interactions[groups[:, None], pick[:, None], groups, pick]
