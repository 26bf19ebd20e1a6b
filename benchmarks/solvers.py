"""Exact solvers against general ones, on the same seeded instances.

    python benchmarks/solvers.py [--quick]

One constraint: `Knapsack` against PuLP with CBC, scipy's ``milp`` (HiGHS, gap 0: its default of 1e-4 is no optimality),
OR-tools CP-SAT and NSGA-II (pymoo), 20 s each. Two and three constraints (size, latency, BitOps): `Ilp` against HiGHS.
Interactions: `Interaction` in 5 s against HiGHS on the exact linearization in 60 s, and against all picks at 4^10, two
seeds each.
Losses are lognormal and fall fourfold per bit; latencies are slow at odd bits. CPU seconds of one thread, children
included, median of up to five runs; OR-tools and pymoo are left out where they are not installed. The last line is
JSON, with null for an objective or a time that there is none of.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from solver_baselines import baselines, by_highs, linearized_by_highs

from mpq.problem import Constraint, Problem, Solution, Status
from mpq.search import Exhaustive, Ilp, Interaction, Knapsack

BITS = {3: np.array([2.0, 4, 8]), 6: np.array([2.0, 3, 4, 5, 6, 8])}
STEPS = {3: np.array([1.0, 1.2, 2.0]), 6: np.array([1.0, 1.8, 1.2, 2.4, 2.6, 2.0])}


def instance(G: int, S: int, rows: int = 1, seed: int = 0, share: float = 0.4) -> Problem:
    """Groups like layers or channels of a network, under some of a size, a latency and a BitOps limit."""
    rng = np.random.default_rng(seed)
    bits = BITS[S]
    loss = rng.lognormal(0, 2, (G, 1)) * 4.0**-bits * rng.uniform(0.7, 1.3, (G, S))
    count = np.round(rng.lognormal(8, 1, (G, 1)))
    costs = {
        "size": count * bits,
        "latency": count**0.7 * rng.lognormal(0, 0.5, (G, 1)) * STEPS[S],
        "bitops": count * np.round(rng.lognormal(3, 1, (G, 1))) * bits**2,
    }
    made = []
    for name, cost in list(costs.items())[:rows]:
        low, high = cost.min(1).sum(), cost.max(1).sum()
        made.append(Constraint(name, "", cost, np.floor(low + share * (high - low))))
    return Problem(loss, tuple(made))


def interacting(G: int, S: int, seed: int) -> Problem:
    """Errors that fall with the bits and correlate between groups, as an influence matrix gives them."""
    rng = np.random.default_rng(seed)
    bits = np.array([2.0, 3, 4, 6, 8])[:S]
    factor = rng.standard_normal((4 * G, G, S)) * 2.0**-bits * rng.lognormal(0, 0.7, (G, 1))
    pairs = np.tensordot(factor, factor, (0, 0))
    loss = np.einsum("gsgs->gs", pairs).copy() / 2
    pairs[np.arange(G), :, np.arange(G)] = 0.0
    cost = np.round(rng.lognormal(5, 1, (G, 1))) * bits
    limit = cost[:, 0].sum() + 0.4 * (cost[:, -1] - cost[:, 0]).sum()
    return Problem(loss, (Constraint("size", "bits", cost, limit),), pairs)


def cpu() -> float:
    """CPU seconds so far, ended children included."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def timed(solve: Callable[[], Any], repeats: int = 5) -> tuple[float, Any]:
    """Median CPU seconds, of one run if it is slow, and the last result."""
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < 2:
        started = cpu()
        result = solve()
        seconds.append(cpu() - started)
        if isinstance(result, tuple) and len(result) == 3:  # it ran in a process of its own and says what it took
            seconds[-1] = result[2]
    return float(np.median(seconds)), result


def show(label: str, seconds: float, objective: float, proven: bool, best: float, note: str = "") -> None:
    """One line of the table: the objective is shown over the best known one."""
    above = objective / best - 1
    print(f"{label:<34}{seconds:>10.4f}{above:>12.1e}{'proven' if proven else '':>8} {note}", flush=True)


def run_knapsack(sizes: list[int], limit: float) -> dict[str, Any]:
    """One constraint."""
    print(f"one constraint{'':<20}{'CPU s':>10}{'above best':>12}")
    results = {}
    for G in sizes:
        for S in (3, 6):
            problem = instance(G, S)
            seconds, ours = timed(partial(Knapsack().solve, problem))
            rows = {"knapsack": (seconds, ours.objective, ours.status is Status.OPTIMAL)}
            for name, solve in baselines(G).items():
                spent, (objective, proven, *_) = timed(partial(solve, problem, limit), 3)
                rows[name] = spent, objective, proven
            best = min(r[1] for r in rows.values())
            for name, row in rows.items():
                show(f"{G:>9,} x {S} {name}", *row, best)
            exact = [r for n, r in rows.items() if n not in ("knapsack", "nsga2")]
            fastest = min((r[0] for r in exact if r[2]), default=None)
            others = min(r[1] for n, r in rows.items() if n != "knapsack")
            results[f"{G}x{S}"] = {
                "rows": rows,
                "above_others": ours.objective / others - 1,
                "proven": rows["knapsack"][2],
                # Where none proves optimality in its time limit: what the first to give up has spent.
                "times_faster": (fastest or min(r[0] for r in exact)) / seconds,
                "others_prove": fastest is not None,
            }
    return results


def run_large(G: int) -> dict[str, Any]:
    """A problem that no baseline can do, in a process of its own for its memory."""
    done = subprocess.run(
        [sys.executable, __file__, "--large", str(G)], capture_output=True, text=True, check=True, env=os.environ
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{G:>9,} x 6 knapsack: {found['seconds']:.2f} CPU s, gap {found['gap']:.1e}, {found['status']}, "
        f"{found['peak_gb']:.2f} GB at most",
        flush=True,
    )
    return found


def large(G: int) -> None:
    """Solve and print what `run_large` reads."""
    problem = instance(G, 6)
    started = cpu()
    solution = Knapsack().solve(problem)
    print(
        json.dumps(
            {
                "groups": G,
                "seconds": cpu() - started,
                "gap": solution.gap,
                "status": solution.status.value,
                "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            }
        )
    )


def gap_below(problem: Problem, goal: float, limits: list[float]) -> tuple[float, Solution]:
    """CPU seconds of the first run, by rising time limits, that ends with such a gap; and that of the last."""
    for limit in limits:
        started = cpu()
        solution = Ilp(time_limit=limit).solve(problem)
        seconds = cpu() - started
        if solution.gap < goal:
            break
    return seconds, solution


def run_several(sizes: list[int], limit: float, seeds: int) -> dict[str, Any]:
    """Two and three constraints."""
    print(f"\nseveral constraints{'':<15}{'CPU s':>10}{'above best':>12}")
    results = {}
    for G in sizes:
        for rows in (2, 3):
            for seed in range(seeds):
                problem = instance(G, 6, rows, seed, 0.4 if seed % 2 == 0 else 0.15)
                quick = gap_below(problem, 1e-4, [1.0, 15.0])
                seconds, ours = timed(partial(Ilp(time_limit=limit).solve, problem), 3)
                spent, (objective, proven) = timed(partial(by_highs, problem, limit), 3)
                best = min(ours.objective, objective)
                label = f"{G:>9,} x 6, {rows} rows, seed {seed}"
                note = f"gap {ours.gap:.1e}; below 1e-4 in {quick[0]:.2f} s"
                show(f"{label} ilp", seconds, ours.objective, ours.status is Status.OPTIMAL, best, note)
                show(f"{label} highs", spent, objective, proven, best)
                results[f"{G}x6 {rows} rows seed {seed}"] = {
                    "seconds": seconds,
                    "highs_seconds": spent,
                    "proven": ours.status is Status.OPTIMAL,
                    "highs_proven": proven,
                    "gap": ours.gap,
                    "above_highs": ours.objective / objective - 1,
                    "seconds_to_1e-4": quick[0] if quick[1].gap < 1e-4 else None,
                }
    return results


def run_interactions(G: int, seeds: int, limit: float) -> dict[str, Any]:
    """Anytime against the exact linearization, and against all picks."""
    print(f"\ninteractions{'':<22}{'CPU s':>10}{'above best':>12}")
    results: dict[str, Any] = {"worst_above_highs": -np.inf, "longest": 0.0, "gaps": [], "bounds_hold": True}
    for seed in range(seeds):
        problem = interacting(G, 5, seed)
        wall = time.perf_counter()
        seconds, ours = timed(partial(Interaction(time_limit=5).solve, problem), 1)
        results["longest"] = max(results["longest"], time.perf_counter() - wall)
        spent, (objective, proven) = timed(partial(linearized_by_highs, problem, limit), 1)
        best = min(ours.objective, objective)
        note = f"gap {ours.gap:.3f}"
        show(f"{G} x 5, seed {seed} interaction", seconds, ours.objective, ours.gap == 0, best, note)
        show(f"{G} x 5, seed {seed} highs", spent, objective, proven, best)
        results["worst_above_highs"] = max(results["worst_above_highs"], ours.objective / objective - 1)
        results["bounds_hold"] &= bool(ours.bound <= best)
        results["gaps"].append(ours.gap)
    equal = True
    for seed in range(2):
        problem = interacting(10, 4, seed)
        _, all_picks = timed(partial(Exhaustive().solve, problem), 1)
        seconds, ours = timed(partial(Interaction(time_limit=5).solve, problem), 1)
        equal &= bool(ours.status is Status.OPTIMAL and (ours.pick == all_picks.pick).all())
        show(f"4^10, seed {seed} interaction", seconds, ours.objective, ours.gap == 0, all_picks.objective)
    return {**results, "equal_to_all_picks": equal}


def goal(value: Any, target: Any, met: bool) -> dict[str, Any]:
    """One line of the goals; numbers to three digits."""
    rounded = float(f"{value:.3g}") if isinstance(value, float) else value
    return {"value": rounded, "goal": target, "met": bool(met)}


def finite(value: Any) -> Any:
    """A result as JSON holds it: None in place of infinity and NaN, which it has no word for."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 1,000 groups, and 3 s for each baseline")
    parser.add_argument("--large", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.large:
        large(options.large)
        return
    quick = options.quick
    for solve in baselines(2).values():  # imports are not part of the times
        solve(instance(2, 3), 3)
    one = run_knapsack([20, 200, 1000] if quick else [20, 54, 200, 1000, 10_000], 3 if quick else 20)
    big = [run_large(G) for G in ([100_000] if quick else [100_000, 1_000_000])]
    several = run_several([54] if quick else [54, 1000, 100_000], 3 if quick else 20, 1 if quick else 2)
    pairs = run_interactions(20 if quick else 60, 1 if quick else 2, 3 if quick else 60)

    def fastest(G: int) -> float:
        return min((r["times_faster"] for n, r in one.items() if n.startswith(f"{G}x")), default=np.nan)

    def slowest(G: int) -> float:
        found = [r["seconds_to_1e-4"] for n, r in several.items() if n.startswith(f"{G}x")]
        return max((np.inf if s is None else s for s in found), default=np.nan)

    worst = max(r["above_others"] for r in one.values())
    above_highs = max(r["above_highs"] for r in several.values())
    goals = {
        "worst_above_others": goal(worst, 0, worst < 1e-9),
        "all_proven": goal(all(r["proven"] for r in one.values()), True, all(r["proven"] for r in one.values())),
        "times_faster_1000": goal(fastest(1000), 3, fastest(1000) >= 3),
        "several_worst_above_highs": goal(above_highs, 0, above_highs < 1e-9),
        "interactions_worst_above_highs": goal(pairs["worst_above_highs"], 0, pairs["worst_above_highs"] < 1e-9),
        "interactions_seconds": goal(pairs["longest"], 5, pairs["longest"] <= 5),
        "interactions_bounds_hold": goal(pairs["bounds_hold"], True, pairs["bounds_hold"]),
        "equal_to_all_picks": goal(pairs["equal_to_all_picks"], True, pairs["equal_to_all_picks"]),
    }
    if not quick:
        million = big[-1]
        goals |= {
            "times_faster_10000": goal(fastest(10_000), 20, fastest(10_000) >= 20),
            "million_seconds": goal(million["seconds"], 5, million["seconds"] < 5),
            "million_gap": goal(million["gap"], 1e-6, million["gap"] < 1e-6),
            "million_gb": goal(million["peak_gb"], 2, million["peak_gb"] < 2),
            "several_1000_seconds_to_1e-4": goal(slowest(1000), 1, slowest(1000) <= 1),
            "several_100000_seconds_to_1e-4": goal(slowest(100_000), 15, slowest(100_000) <= 15),
        }
    results = {"one": one, "large": big, "several": several, "interactions": pairs, "quick": quick}
    found = finite({"benchmark": "solvers", "results": results, "goals": goals})
    print(json.dumps(found, allow_nan=False))


if __name__ == "__main__":
    main()
