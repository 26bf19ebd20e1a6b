"""The cheapest config whose predicted loss stays under a limit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from mpq.budget import Budget
from mpq.config import BitConfig
from mpq.errors import BudgetError, UnreachableError
from mpq.problem import Problem, Status
from mpq.search.smallest import smallest_cost

if TYPE_CHECKING:
    from mpq.analysis import Analysis


def smallest_config(
    analysis: Analysis, metric: str, loss_limit: float, budgets: tuple[Budget, ...], time_limit: float
) -> BitConfig:
    """See `Analysis.smallest`; objective and bound of the config's solver record are of the metric.

    Raises:
        BudgetError: If the metric has no cost model here, is no plain sum or is limited as well, the limit is no
            positive number, no config meets the limits, or none was found in time.
    """
    if not 0 < loss_limit < math.inf:
        raise BudgetError(f"loss_limit must be a positive number, not {loss_limit}")
    if any(b.metric == metric for b in budgets):
        raise BudgetError(f"{metric} is what is to be least; drop its budget")
    cost = analysis.cost(metric)
    cost.require_sum()
    base = analysis.problem(budgets)
    problem = Problem(base.loss, (*base.constraints, cost.constraint(math.inf)), base.interactions)
    ceiling = analysis.table.ceiling
    # The solver's loss is not saturated: what it may be at most for the predicted one to meet the limit.
    unsaturated = loss_limit / (1 - loss_limit / ceiling) if loss_limit < ceiling else math.inf
    solution = smallest_cost(problem, metric, unsaturated, time_limit)
    if solution.pick is None:
        floor = analysis.solve(budgets)
        assert floor.pick is not None
        least = analysis.table.predict(floor.pick)
        if solution.status is Status.INFEASIBLE:
            raise UnreachableError(
                f"loss<={loss_limit:g} can't be met: the least predicted loss under the other budgets is {least:.4g}; "
                "raise the limit or allow higher bits"
            )
        raise BudgetError(f"no config with loss<={loss_limit:g} found in {time_limit:g} s; raise the time limit")
    value = replace(solution, objective=cost.metric(solution.objective), bound=cost.metric(solution.bound))
    config = analysis.config_for(budgets, replace(value, solver=f"least {metric} ({solution.solver})"))
    metrics = analysis.metrics(solution.pick, (*config.metrics, metric))
    return replace(config, budgets=(f"loss<={loss_limit:g}", *config.budgets), metrics=metrics)
