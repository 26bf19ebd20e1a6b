"""How far can any allocation get? A search that may measure configs on the very data that allocations are judged on.

    python benchmarks/allocation_bound.py [--quick] [--models resnet20 minilm] [--evaluations 200]

No user has that data: what `analysis.search` finds on it, starting from the default's own allocation, is better than
what any sensitivity can be expected to give. Weights only, the models and schemes of `sensitivity_quality.py`; each
loss is beside that of trace x error at the same average bits. One thread; the real models but for ``--quick`` (the
bundled ResNet-20) are in ../shared, or $MPQ_SHARED. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from real_models import MODELS
from sensitivity_quality import WEIGHTS, unit

import mpq
from mpq.evaluation import Measured
from mpq.search import Refine

AVERAGES = (2.5, 3, 3.5)


def bound(name: str, evaluations: int) -> dict[str, dict[str, float]]:
    """Average bits -> measured loss of trace x error, of the default and of the best config found."""
    model, calib, evaluation = MODELS[name]()
    evaluator = mpq.Evaluator(model, evaluation, progress=False)

    def loss(measured: Measured | None) -> float:
        assert measured is not None
        return measured.kl if measured.kl is not None else (measured.mse or 0.0) / unit(name)

    trace, default = (
        mpq.analyze(model, calib, WEIGHTS, estimator=estimator, max_samples=None, progress=False)
        for estimator in ("hessian_trace", "anchored")
    )
    found = {}
    for average in AVERAGES:
        budget, started = f"avg_bits<={average}", time.process_time()
        search = Refine(handful=evaluations)  # it spends them all
        best = default.search(evaluator, budget, search, evaluations=evaluations, progress=False).config
        assert best is not None
        found[str(average)] = {
            "trace x error": loss(evaluator.measure(trace.allocate(budget))),
            "default": loss(evaluator.measure(default.allocate(budget))),
            "found": loss(best.measured),
        }
        row = "  ".join(f"{label} {value:.4g}" for label, value in found[str(average)].items())
        print(f"{name:<20}{average:>4} bits  {row}  {time.process_time() - started:.0f} s", flush=True)
    return found


def ratio(results: dict[str, dict[str, dict[str, float]]], label: str) -> float:
    """Median over models and average bits of a loss as a share of that of trace x error."""
    return statistics.median(row[label] / row["trace x error"] for rows in results.values() for row in rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the bundled ResNet-20 and few evaluations")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS))
    parser.add_argument("--evaluations", type=int, default=200, help="configs that each search measures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.models or (["resnet20"] if options.quick else sorted(MODELS))
    results = {name: bound(name, 8 if options.quick else options.evaluations) for name in names}
    medians: dict[str, Any] = {label: ratio(results, label) for label in ("default", "found")}
    print("median of the shares of trace x error:", {label: round(value, 3) for label, value in medians.items()})
    goal = {"value": round(medians["found"], 4), "goal": 0.6, "met": medians["found"] <= 0.6}
    print(json.dumps({"benchmark": "allocation_bound", "results": results, "goals": {"found": goal}}))


if __name__ == "__main__":
    main()
