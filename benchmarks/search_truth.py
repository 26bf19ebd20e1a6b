"""Searches for measured truth, on a network of which every config was measured (../shared/reference/tabular).

How many evaluations a search needs to come within 1 % of the true optimum (of the range from the least to the largest
loss, on a log scale) at five budgets, and what share of the true hypervolume it reaches after 16, 64 and 256
evaluations. Sensitivities come from calibration images that no measurement has seen. Bisection is told the loss to come
near and looks for the least size. A search that has not come near at its limit needs more than that: a median of which
half the seeds have not is shown as ">limit", and what such a median only bounds from above meets no goal. The last line
is JSON, with null for what has not come near.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from real_models import SHARED, shared_loader

import mpq
from mpq.problem import Constraint, Floats, Ints, Problem
from mpq.search import (
    Bisection,
    Cqap,
    Evaluations,
    Genetic,
    Linas,
    MeasuredSearch,
    Nsga2,
    OptunaSearch,
    Quantune,
    RandomSearch,
    Refine,
    Sweep,
)

BUDGETS = (2.5, 3.0, 3.5, 4.0, 5.0)  # average bits
MOST = 8.0  # average bits of the largest config
SENSITIVITY_SEEDS = 4
NEAR = 0.01
LIMIT, SLOW_LIMIT = 1024, 256  # of evaluations
SLOW = (OptunaSearch, Linas, Quantune)  # they take longer with each evaluation
# Those of others, named: without what sensitivity knows, as their users run them.
COLD: dict[str, Callable[[int], MeasuredSearch]] = {
    "genetic": lambda seed: Genetic(seed, seeded=False),
    "nsga2": lambda seed: Nsga2(seed, seeded=False),
    "tpe": lambda seed: OptunaSearch("tpe", seed, seeded=False),
    "cmaes": lambda seed: OptunaSearch("cmaes", seed, seeded=False),
    "nsga3": lambda seed: OptunaSearch("nsga3", seed, seeded=False),
    "quantune": lambda seed: Quantune(seed, seeded=False),
    "cqap": lambda seed: Cqap(seed, seeded=False),
    "linas": lambda seed: Linas(seed, seeded=False),
    "random, repaired": lambda seed: RandomSearch(seed),
}
WARM: dict[str, Callable[[int], MeasuredSearch]] = {
    "refine": lambda seed: Refine(seed),
    "genetic, seeded": lambda seed: Genetic(seed),
    "nsga2, seeded": lambda seed: Nsga2(seed),
    "tpe, seeded": lambda seed: OptunaSearch("tpe", seed),
    "quantune, seeded": lambda seed: Quantune(seed),
    "cqap, seeded": lambda seed: Cqap(seed),
    "linas, seeded": lambda seed: Linas(seed),
}
FRONTIERS: dict[str, Callable[[int], MeasuredSearch]] = {
    "sweep of refine": lambda seed: Sweep(seed),
    "sweep of genetic": lambda seed: Sweep(inner=Genetic(seed, seeded=False), points=4),
    "sweep of tpe": lambda seed: Sweep(inner=OptunaSearch("tpe", seed, seeded=False), points=4),
    "sweep of quantune": lambda seed: Sweep(inner=Quantune(seed, initial=8, seeded=False), points=4),
    "sweep of cqap": lambda seed: Sweep(inner=Cqap(seed, seeded=False), points=4),
    "nsga2": lambda seed: Nsga2(seed, seeded=False),
    "nsga2, seeded": lambda seed: Nsga2(seed),
    "linas": lambda seed: Linas(seed, seeded=False),
    "linas, seeded": lambda seed: Linas(seed),
    "nsga3": lambda seed: OptunaSearch("nsga3", seed, seeded=False),
    "random, repaired": lambda seed: RandomSearch(seed),
}


@dataclass(frozen=True)
class Needed:
    """Evaluations that runs needed.

    Attributes:
        counts: Infinite where one had not come near at the limit.
        limit: Of evaluations.
    """

    counts: list[float]
    limit: float

    @property
    def median(self) -> float:
        """The median, or the limit, which it then is above."""
        return self.limit if self.censored else float(np.median(self.counts))

    @property
    def censored(self) -> bool:
        """The median is above the limit."""
        return bool(np.isinf(np.median(self.counts)))

    def __str__(self) -> str:
        shown = (np.median(self.counts), max(self.counts))
        return "{} ({})".format(*(f"{x:g}" if np.isfinite(x) else f">{self.limit}" for x in shown))

    def to_json(self) -> list[float | None]:
        """The counts, None where one had not come near."""
        return [x if np.isfinite(x) else None for x in self.counts]


@dataclass(frozen=True)
class Truth:
    """The exhaustive table."""

    loss: Floats
    cost: Floats

    @classmethod
    def load(cls) -> Truth:
        """Read it."""
        table = np.load(SHARED / "reference" / "tabular" / "plain8.npz")
        return cls(table["kl"].astype(float), (table["params"][:, None] * table["bits"]).astype(float))

    @cached_property
    def size(self) -> Floats:
        """Bits of every config, in the order of `flat`."""
        G, S = self.cost.shape
        picks = np.array(list(itertools.product(range(S), repeat=G)))
        found: Floats = self.cost[np.arange(G), picks].sum(1)
        return found

    @cached_property
    def flat(self) -> Floats:
        """Losses of all configs."""
        return self.loss.ravel()

    @cached_property
    def span(self) -> float:
        """Range of the logarithm of the losses."""
        return float(np.log(self.loss.max() / self.loss.min()))

    def measure(self, pick: Ints) -> float:
        """Look up a loss."""
        return float(self.loss[tuple(pick)])

    def limit(self, average: float) -> float:
        """Size in bits."""
        return average * float(self.cost[:, 0].sum()) / 2

    def near(self, average: float) -> float:
        """Loss that is within 1 % of the optimum's."""
        least = self.flat[self.size <= self.limit(average)].min()
        return float(least * np.exp(NEAR * self.span))

    def hypervolume(self, size: Floats, loss: Floats) -> float:
        """Area above a set of configs in normalised size and logarithm of the loss."""
        order = np.argsort(size, kind="stable")
        x = (size[order] - self.size.min()) / np.ptp(self.size)
        y = np.minimum.accumulate(np.log(loss[order] / self.flat.min()) / self.span)
        return float(((1 - y) * np.diff(np.append(x, 1.0))).sum())


def sensitivities(seeds: int) -> list[Any]:
    """Tables from 2,048 calibration images."""
    load, folder = shared_loader(), SHARED / "reference" / "tabular"
    sys.path.insert(0, str(folder))
    from plain8_net import net as make

    net = make()
    net.load_state_dict(torch.load(folder / "plain8.pt", weights_only=True))
    images, labels = (t[:2048] for t in load.fashion_mnist("calib"))
    calib = list(zip(images.split(128), labels.split(128), strict=True))
    options = {"estimator_options": {"anchor_samples": 512}, "max_samples": None, "progress": False}
    return [mpq.analyze(net.eval(), calib, "W2,W3,W4,W8", seed=s, **options).table for s in range(seeds)]


def problem(truth: Truth, table: Any, average: float) -> Problem:
    size = Constraint("size", "bits", truth.cost, np.array([truth.limit(average)]))
    return Problem(table.loss, (size,), table.interactions)


def needed(
    truth: Truth, task: Problem, average: float, search: MeasuredSearch | Bisection, limit: int, searched: Problem
) -> float:
    """Evaluations of a search (of the task, or of another problem) until one is near the task's optimum."""
    near = truth.near(average)

    def measure(pick: Ints) -> float:
        loss = truth.measure(pick)
        if loss <= near and task.feasible(pick):
            evaluations.limit = 0  # nothing more after this batch
        return loss

    evaluations = Evaluations(measure, limit=limit)
    best = search.search(searched, evaluations).trace.best(task)
    return int((best <= near).argmax()) + 1 if evaluations.limit == 0 else np.inf


def needed_by_random(truth: Truth, average: float, seed: int) -> int:
    """Evaluations that uniform draws of feasible configs need, none drawn twice."""
    feasible = np.flatnonzero(truth.size <= truth.limit(average))
    order = np.random.default_rng(seed).permutation(feasible)
    return int((truth.flat[order] <= truth.near(average)).argmax()) + 1


def evaluations_needed(
    truth: Truth, tables: list[Any], seeds: int, budgets: tuple[float, ...], most: int
) -> dict[str, dict[str, Needed]]:
    """Search -> budget -> evaluations by seed."""
    searches = WARM | COLD
    found: dict[str, Any] = {}
    print(f"\nevaluations to 1 % of the optimum, median (largest) of {seeds} seeds")
    print(f"{'':<20}" + "".join(f"{f'{a:g} bits':>16}" for a in budgets) + f"{'CPU s each':>14}")
    for name in [*searches, "bisection", "random"]:
        started, rows = time.process_time(), {}
        limit = min(most, SLOW_LIMIT) if name in searches and isinstance(searches[name](0), SLOW) else most
        for average in budgets:
            row: list[float] = []
            for seed in range(seeds):
                if name == "random":
                    row.append(needed_by_random(truth, average, seed))
                    continue
                task = searched = problem(truth, tables[seed % len(tables)], average)
                if name == "bisection":
                    searched = problem(truth, tables[seed % len(tables)], MOST)
                search = searches[name](seed) if name in searches else Bisection(truth.near(average))
                row.append(needed(truth, task, average, search, limit, searched))
            rows[str(average)] = Needed(row, limit)
        seconds = (time.process_time() - started) / (seeds * len(budgets))
        print(f"{name:<20}" + "".join(f"{row!s:>16}" for row in rows.values()) + f"{seconds:>14.2f}", flush=True)
        found[name] = rows
    return found


def hypervolumes(truth: Truth, tables: list[Any], seeds: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Search -> evaluations -> median share of the true hypervolume."""
    total = truth.hypervolume(truth.size, truth.flat)
    groups = np.arange(len(truth.cost))
    print(f"\nshare of the true hypervolume, median of {seeds} seeds")
    print(f"{'':<20}" + "".join(f"{n:>10}" for n in sizes))
    found: dict[str, Any] = {}
    for name, make in FRONTIERS.items():
        found[name] = {}
        for n in sizes:
            shares = []
            for seed in range(seeds):
                task = problem(truth, tables[seed % len(tables)], MOST)
                trace = make(seed).search(task, Evaluations(truth.measure, limit=n)).trace
                shares.append(truth.hypervolume(truth.cost[groups, trace.picks].sum(1), trace.losses) / total)
            found[name][str(n)] = float(np.median(shares))
        print(f"{name:<20}" + "".join(f"{x:>10.3f}" for x in found[name].values()), flush=True)
    return found


def goals(needs: dict[str, dict[str, Needed]]) -> dict[str, Any]:
    """The issue's goals."""
    pooled = {
        name: Needed([x for row in rows.values() for x in row.counts], max(row.limit for row in rows.values()))
        for name, rows in needs.items()
    }
    refine = needs["refine"]
    worst = max(refine.values(), key=lambda row: (row.censored, row.median))
    found = {"refine_median": at_most(pooled["refine"], 8), "refine_worst_budget": at_most(worst, 16)}
    for name in ("genetic", "nsga2", "tpe", "quantune"):
        if name in pooled:
            found[f"fewer_than_{name}"] = times_fewer(pooled["refine"], pooled[name], 10)
    fine = [times_fewer(refine[a], needs["random"][a], 100) for a in refine if float(a) >= 3]
    found["fewer_than_random"] = min(fine, key=lambda ratio: (ratio["met"], ratio["value"]))
    for name in ("quantune", "cqap"):
        if name in pooled:
            found[f"{name}_fewer_than_random"] = times_fewer(pooled[name], pooled["random"], 5)
    return found


def times_fewer(ours: Needed, others: Needed, goal: float) -> dict[str, Any]:
    """How many times the evaluations of ours the others needed; not met where that is only known to be at most so."""
    value = others.median / ours.median
    found = {"value": round(value, 3), "goal": goal, "met": value >= goal and not ours.censored}
    if ours.censored or others.censored:
        found["bound"] = "none" if ours.censored and others.censored else "at most" if ours.censored else "at least"
    return found


def at_most(needed: Needed, goal: float) -> dict[str, Any]:
    found = {"value": needed.median, "goal": goal, "met": needed.median <= goal and not needed.censored}
    return found | ({"bound": "at least"} if needed.censored else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two budgets, few evaluations")
    parser.add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    truth = Truth.load()
    tables = sensitivities(1 if args.quick else SENSITIVITY_SEEDS)
    if args.quick:
        args.seeds = 1
    budgets, most, sizes = (BUDGETS[1:4:2], 128, (16,)) if args.quick else (BUDGETS, LIMIT, (16, 64, 256))
    needs = evaluations_needed(truth, tables, args.seeds, budgets, most)
    shares = hypervolumes(truth, tables, args.seeds, sizes)
    counts = {name: {a: row.to_json() for a, row in rows.items()} for name, rows in needs.items()}
    results = {"evaluations": counts, "hypervolume": shares, "quick": args.quick}
    print(json.dumps({"benchmark": "search_truth", "results": results, "goals": goals(needs)}, allow_nan=False))


if __name__ == "__main__":
    main()
