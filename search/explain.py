"""Why a pick is what it is: dual prices, runners-up, and how often choices survive when losses are drawn anew."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from mpq.errors import MpqError
from mpq.problem import Floats, Ints, Problem
from mpq.search.interaction import separable_solver, solver_for, symmetric
from mpq.search.lagrangian import relax
from mpq.search.linearized import linearized
from mpq.search.local_search import LocalSearch
from mpq.search.rows import binding_rows, named_prices

_RELAX_SECONDS = 10.0
_KICKS = 20
_MOVES = 2.5e7  # pair moves of the local search in a second
_TIE = 1e-12  # relative: a pick that is worse by less is as good


@dataclass(frozen=True, eq=False)
class Alternatives:
    """Every choice against that of a pick.

    Attributes:
        change: What the total loss changes by if this group alone takes this scheme, interactions included ``[G, S]``;
            infinite where not allowed, zero where picked.
        margin: ``change`` plus the price of what the rows change by ``[G, S]``. Below zero only where the answer owes
            its choice to whole steps: the linear relaxation would take the other.
        runner_up: Allowed scheme of each group with the least margin that is not picked, -1 without one ``[G]``.
        prices: Constraint name -> loss saved per unit that all its rows are loosened.
        binding: Names of the constraints without which the loss would be less. One with pair costs may bind at no
            price: where only changes of several groups together save loss.
    """

    change: Floats
    margin: Floats
    runner_up: Ints
    prices: dict[str, float]
    binding: frozenset[str]


def explain_pick(problem: Problem, pick: Ints) -> Alternatives:
    """Prices and runners-up of a pick.

    Dual prices are those of the linear relaxation; with interactions or pair costs, of the problem in which each
    group's are as they are with the others' choices.

    Args:
        problem: What was solved.
        pick: A feasible pick ``[G]``.
    """
    groups = np.arange(len(pick))
    linear = linearized(problem, pick)
    (cost, limit), loss = binding_rows(linear), linear.loss
    relaxed = relax(loss, cost, limit, time.perf_counter() + _RELAX_SECONDS)
    change = loss - loss[groups, pick][:, None]
    margin = change + (cost - cost[groups, pick][:, None]) @ relaxed.prices
    rivals = margin.copy()
    rivals[groups, pick] = np.inf
    found = np.where(np.isfinite(rivals).any(1), rivals.argmin(1), -1)
    span = np.where(linear.allowed[..., None], np.abs(cost - cost[groups, pick][:, None]), 0.0).max(1).sum(0)
    worth = relaxed.prices * span > _TIE * np.abs(loss[linear.allowed]).sum()  # less is rounding
    prices = named_prices(linear, np.where(worth, relaxed.prices, 0.0))
    binding = frozenset(name for name, price in prices.items() if price > 0 or _binds(problem, pick, name))
    return Alternatives(change, margin, found, prices, binding)


def _binds(problem: Problem, pick: Ints, name: str) -> bool:
    """Whether a better pick is found without a constraint that has pair costs; the others have their price."""
    others = tuple(c for c in problem.constraints if c.name != name or c.pairs is None)
    if len(others) == len(problem.constraints):
        return False
    without = replace(problem, constraints=others)
    found = solver_for(without, _RELAX_SECONDS).solve(without).pick
    return found is not None and not _as_good(problem, pick, found)


def _as_good(problem: Problem, pick: Ints, other: Ints) -> bool:
    """Whether a pick is as good as another, but for rounding."""
    objective = problem.objective(pick)
    terms = float(np.abs(problem.loss[np.arange(len(pick)), pick]).sum()) + abs(objective)
    return objective <= problem.objective(other) + _TIE * terms


def resampled(problem: Problem, stderr: Floats, rows: Floats | None, count: int, seed: int = 0) -> Iterator[Problem]:
    """The problem with losses as other calibration samples might have given them; none is below zero.

    With rows: bootstrap over samples (Efron, 1979), which keeps what the entries have in common; interactions move as
    far as those of the rows do, in the ratio between the two (least squares), as estimators shrink them. Without rows:
    independent normal errors of the losses; interactions stay.

    Args:
        problem: Loss, constraints and interactions.
        stderr: Standard errors of the losses ``[G, S]``.
        rows: Effects ``[N, D, G, S]`` of each sample and draw, or None: half their squared sum over a pick, summed
            over draws, is the sample's share of the loss.
        count: How many.
        seed: Of the draws.

    Raises:
        MpqError: If there are neither rows nor standard errors.
    """
    rng = np.random.default_rng(seed)
    if rows is not None and len(rows) > 1:
        yield from _bootstrapped(problem, rows, count, rng)
        return
    if not np.isfinite(stderr[problem.allowed]).all():
        raise MpqError("the table has no standard errors to draw from; measure with more calibration samples")
    spread = np.where(problem.allowed, stderr, 0.0)
    for _ in range(count):
        yield replace(problem, loss=np.maximum(problem.loss + spread * rng.standard_normal(spread.shape), 0.0))


def _bootstrapped(problem: Problem, rows: Floats, count: int, rng: np.random.Generator) -> Iterator[Problem]:
    N, D, G, S = rows.shape
    flat = np.asarray(rows, np.float64).reshape(N * D, G * S)
    shares = 0.5 * np.square(flat).reshape(N, D, G * S).sum(1)
    groups = np.arange(G)
    pairs, ratio = problem.interactions, 0.0

    def products(weight: Floats) -> Floats:
        found: Floats = ((flat * np.repeat(weight, D)[:, None]).T @ flat).reshape(G, S, G, S)
        found[groups, :, groups] = 0.0
        return found

    if pairs is not None:
        mean = products(np.full(N, 1 / N))
        ratio = float((mean * pairs).sum()) / max(float(np.square(mean).sum()), 1e-300)
    for _ in range(count):
        weight = rng.multinomial(N, np.full(N, 1 / N)) / N
        moved = ((weight - 1 / N) @ shares).reshape(G, S)
        found = pairs if pairs is None else pairs + ratio * (products(weight) - mean)
        yield Problem(np.maximum(problem.loss + moved, 0.0), problem.constraints, found)


def survivors(pick: Ints, drawn: Iterator[Problem], time_limit: float) -> Iterator[Ints]:
    """The best pick found of each problem, and the given pick where none is better.

    Without interactions exact, unless time is up. With them by local search from the given pick, from the optimum
    without interactions and from random kicks.

    Args:
        pick: Feasible in all problems ``[G]``.
        drawn: Problems of one shape.
        time_limit: Seconds for each; the local search counts its work instead, which reproduces.
    """
    for problem in drawn:
        separable = Problem(problem.loss, problem.constraints)
        found = separable_solver(separable, time_limit).solve(separable).pick
        best = pick if found is None else found
        if problem.interactions is not None and len(pick) > 1:
            search = LocalSearch(symmetric(problem), np.inf)
            best = search.search([pick, best], _KICKS, _MOVES * time_limit, np.inf, np.random.default_rng(0))
        yield pick if _as_good(problem, pick, best) else best
