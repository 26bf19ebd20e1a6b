"""A problem around a pick: what pairs of groups add becomes what each group adds beside the others' choices."""

from __future__ import annotations

from dataclasses import replace

from mpq.problem import Constraint, Ints, Problem
from mpq.search.lagrangian import relax
from mpq.search.local_search import with_others
from mpq.search.rows import binding_rows, named_prices


def linearized(problem: Problem, pick: Ints) -> Problem:
    """The problem without interactions and pair costs, in which each choice has them with the others' choices.

    What changes if one group changes is exact. A pick counts its pairs twice, which limits allow for.
    """
    constraints = tuple(_linear(c, pick) for c in problem.constraints)
    return Problem(problem.loss + with_others(problem, pick), constraints)


def dual_prices(problem: Problem, pick: Ints, deadline: float) -> dict[str, float]:
    """Constraint name -> loss saved per unit of a looser limit, by the linear relaxation around a pick."""
    linear = linearized(problem, pick)
    cost, limit = binding_rows(linear)
    return named_prices(linear, relax(linear.loss, cost, limit, deadline).prices)


def _linear(constraint: Constraint, pick: Ints) -> Constraint:
    if constraint.pairs is None:
        return constraint
    cost = constraint.cost + constraint.pairs.with_others(pick)[..., None]
    return replace(constraint, cost=cost, limit=constraint.limit + constraint.pairs.total(pick), pairs=None)
