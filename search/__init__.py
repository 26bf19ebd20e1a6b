"""Solvers: arrays in (`mpq.problem.Problem`), `Solution` out. Nothing here imports torch.

A solver keeps its settings in the constructor and has one method, ``solve(problem) -> Solution``. A new one is
one file here plus one line in `SOLVERS`. A search that measures true losses is likewise one file and one line in
`SEARCHES`; its method is ``search(problem, evaluations) -> MeasuredSolution``.
"""

from typing import Protocol

from mpq.problem import Problem, Solution
from mpq.search.baselines import BeamDp, GreedyPath, GreedyRatio, OrderedEnumeration, Uniform
from mpq.search.bisection import Bisection
from mpq.search.choices import Choices
from mpq.search.cqap import Cqap
from mpq.search.epsilon import Surface, epsilon_surface, hypervolume
from mpq.search.evaluations import Evaluations, Measure, PartialMeasure, Stop, Trace
from mpq.search.exhaustive import Exhaustive
from mpq.search.genetic import Genetic, Nsga2
from mpq.search.ilp import Ilp
from mpq.search.interaction import Interaction, separable_solver
from mpq.search.interaction_frontier import interaction_frontier
from mpq.search.knapsack import Knapsack
from mpq.search.ledger import Ledger
from mpq.search.linas import Linas
from mpq.search.measured import MeasuredSearch, MeasuredSolution
from mpq.search.optuna_search import OptunaSearch
from mpq.search.pareto import FrontierPicks, convex_frontier, exact_frontier
from mpq.search.quantune import Quantune
from mpq.search.random_search import RandomSearch
from mpq.search.refine import Refine
from mpq.search.surrogate import EarlierStudy
from mpq.search.sweep import Sweep


class Solver(Protocol):
    """What every solver offers."""

    def solve(self, problem: Problem) -> Solution:
        """Pick one scheme per group: least loss under the constraints."""


SOLVERS: dict[str, type[Solver]] = {
    "knapsack": Knapsack,
    "ilp": Ilp,
    "interaction": Interaction,
    "exhaustive": Exhaustive,
}

# What other tools do: to compare with.
BASELINES: dict[str, type[Solver]] = {
    "uniform": Uniform,
    "greedy_ratio": GreedyRatio,
    "greedy_path": GreedyPath,
    "beam": BeamDp,
    "ordered": OrderedEnumeration,
}

SEARCHES: dict[str, type[MeasuredSearch]] = {
    "refine": Refine,
    "genetic": Genetic,
    "nsga2": Nsga2,
    "optuna": OptunaSearch,
    "random": RandomSearch,
    "sweep": Sweep,
    "quantune": Quantune,
    "cqap": Cqap,
    "linas": Linas,
}


def auto_solver(problem: Problem) -> Solver:
    """The solver for a problem: with interactions its own; else the knapsack for one row, the ilp for several."""
    return separable_solver(problem) if problem.interactions is None else Interaction()


__all__ = [
    "BASELINES",
    "SEARCHES",
    "SOLVERS",
    "Bisection",
    "Choices",
    "Cqap",
    "EarlierStudy",
    "Evaluations",
    "Exhaustive",
    "FrontierPicks",
    "Genetic",
    "Ilp",
    "Interaction",
    "Knapsack",
    "Ledger",
    "Linas",
    "Measure",
    "MeasuredSearch",
    "MeasuredSolution",
    "Nsga2",
    "OptunaSearch",
    "PartialMeasure",
    "Quantune",
    "RandomSearch",
    "Refine",
    "Solver",
    "Stop",
    "Surface",
    "Sweep",
    "Trace",
    "auto_solver",
    "convex_frontier",
    "epsilon_surface",
    "exact_frontier",
    "hypervolume",
    "interaction_frontier",
]
