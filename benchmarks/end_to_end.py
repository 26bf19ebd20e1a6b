"""Seconds and forward-pass equivalents of each step on the bundled ResNet-20.

    python benchmarks/end_to_end.py [--quick]

CPU seconds of one thread, median of several runs, beside one forward pass of the same calibration set in the same run
(the baseline). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import mpq
from mpq.bank import QuantizerBank
from mpq.bundled import load_example
from mpq.calibration import Calibration
from mpq.cost_models import COST_MODELS, find_device
from mpq.losses import KLLoss
from mpq.sensitivity import hessian_trace, influence
from mpq.space import make_space
from mpq.trace import trace
from mpq.view import ModelView, preserved_state

SCHEMES = "W2A8,W3A8,W4A8,W8A8"


def cpu_seconds(step: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median CPU seconds of a step, and its last result."""
    times = []
    result = None
    for _ in range(repeats):
        started = time.process_time()
        result = step()
        times.append(time.process_time() - started)
    return statistics.median(times), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images and repeats")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    repeats, samples = (3, 128) if quick else (5, 512)
    model, calib, test = load_example()
    test = test[:2] if quick else test
    seconds: dict[str, float] = {}

    with preserved_state(0):
        view = ModelView(model)
        data = Calibration.load(calib, view.read, samples)

        def forward() -> None:
            with torch.no_grad():
                for batch in data.batches:
                    view(batch)

        forward()
        seconds["forward pass (baseline)"], _ = cpu_seconds(forward, repeats)
        seconds["layer graph"], graph = cpu_seconds(lambda: trace(view, data.batches[0]), repeats)
        space = make_space(graph, SCHEMES, device=find_device("generic"))

        def weights() -> QuantizerBank:
            bank = QuantizerBank(view, graph)
            bank.prepare(space.schemes, progress=False)
            return bank

        seconds["quantize weights, all schemes"], bank = cpu_seconds(weights, repeats)
        seconds["activation ranges"], _ = cpu_seconds(lambda: bank.observe(data, progress=False), repeats)
        for layer in space.layers:
            for scheme in space.schemes:
                bank.range(layer, scheme.activation)
        seconds["influence"], table = cpu_seconds(
            lambda: influence(view, space, data, bank, KLLoss(), progress=False), repeats
        )
        seconds["hessian trace, to 5 %"], traces = cpu_seconds(
            lambda: hessian_trace(view, space, data, bank, KLLoss(), progress=False), 1
        )
        seconds["costs"], _ = cpu_seconds(lambda: [cost(space) for cost in COST_MODELS.values()], repeats)

    analysis = mpq.analyze(model, calib, SCHEMES, max_samples=samples, progress=False)
    seconds["solve one budget"], cfg = cpu_seconds(lambda: analysis.allocate("avg_bits<=4"), repeats)
    seconds["solve two budgets"], _ = cpu_seconds(lambda: analysis.allocate("size<=13%,bitops<=3%"), repeats)
    seconds["exact frontier"], front = cpu_seconds(lambda: analysis.pareto(), repeats)
    seconds["quantized copy"], quantized = cpu_seconds(lambda: mpq.quantize(model, cfg), repeats)
    seconds["evaluate on test images"], measured = cpu_seconds(
        lambda: mpq.evaluate(quantized, test, reference=model, progress=False), repeats
    )

    baseline = seconds["forward pass (baseline)"]
    print(f"{'step':<32}{'CPU s':>10}{'forward passes':>16}")
    for step, value in seconds.items():
        print(f"{step:<32}{value:>10.4f}{value / baseline:>16.3f}")
    print(
        f"stated cost: influence {table.provenance['forward_passes']}, "
        f"hessian trace {traces.provenance['forward_passes']} forward passes of {data.num_samples} images"
    )
    print(f"{front!r}\n{measured}")

    passes = seconds["influence"] / baseline
    stated = float(table.provenance["forward_passes"])
    goals = {
        "influence_passes": {"value": round(passes, 2), "goal": 20, "met": passes <= 20},
        "influence_measured_over_stated": {
            "value": round(passes / stated, 2),
            "goal": 1.5,
            "met": passes / stated <= 1.5,
        },
    }
    results = {
        "seconds": {k: round(v, 5) for k, v in seconds.items()},
        "samples": data.num_samples,
        "accuracy": measured.accuracy,
        "quick": quick,
    }
    print(json.dumps({"benchmark": "end_to_end", "results": results, "goals": goals}))


if __name__ == "__main__":
    main()
