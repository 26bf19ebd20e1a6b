"""What all pairwise interactions cost on the bundled ResNet-20: influence's against measured ones.

    python benchmarks/interactions.py [--quick]

Forward passes are those that the tables state. CPU seconds are of one thread: of all of influence, and of a random
sample of measured pairs, with reuse of what runs before a change, extrapolated to all of them. The rank correlation
compares the two over that sample. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mpq.bank import QuantizerBank
from mpq.bundled import load_example
from mpq.calibration import Calibration
from mpq.comparison import rank_correlation
from mpq.cost_models import find_device
from mpq.losses import KLLoss
from mpq.sensitivity import influence
from mpq.sensitivity.perturbation import float_recording, names_of, perturbation, quantized, rise_meter
from mpq.sensitivity.prefix import Recording
from mpq.space import SearchSpace, make_space
from mpq.trace import trace
from mpq.view import ModelView, preserved_state

SCHEMES = "W2,W3,W4,W8"


def cpu_seconds(step: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a step, and its result."""
    started = time.process_time()
    result = step()
    return time.process_time() - started, result


def sample_pairs(space: SearchSpace, count: int) -> list[tuple[int, int, int, int]]:
    """Random pairs of choices of two groups, the earlier one first."""
    rng = np.random.default_rng(0)
    pairs = set()
    while len(pairs) < count:
        g, h = sorted(rng.choice(len(space.groups), 2, replace=False).tolist())
        s, t = rng.integers(len(space.schemes), size=2).tolist()
        pairs.add((g, s, h, t))
    return sorted(pairs)


def measure_pairs(
    view: ModelView, space: SearchSpace, data: Calibration, bank: QuantizerBank, pairs: list[tuple[int, int, int, int]]
) -> tuple[np.ndarray, float, float]:
    """Loss of each pair, and mean seconds of its first choice alone and of adding the second."""
    losses, alone, added = np.zeros(len(pairs)), 0.0, 0.0
    for batch in data.batches:
        float_pass = float_recording(view, batch)
        meter = rise_meter(KLLoss(), float_pass.output, batch)
        for i, (g, s, h, t) in enumerate(pairs):
            first, second = (space.groups[g], space.schemes[s]), (space.groups[h], space.schemes[t])
            with quantized(view, bank, [first]):
                spent, one = cpu_seconds(lambda: Recording(view, batch, float_pass, names_of(first[0])))  # noqa: B023
            alone += spent
            with quantized(view, bank, [first, second]):
                spent, output = cpu_seconds(lambda: one.run(names_of(second[0])))  # noqa: B023
            added += spent
            losses[i] += float(meter(output).sum()) / data.num_samples
    return losses, alone / len(pairs), added / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images and pairs")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    samples, count = (128, 40) if quick else (256, 120)
    model, calib, _ = load_example()
    with preserved_state(0):
        view = ModelView(model)
        data = Calibration.load(calib, view.read, samples)
        space = make_space(trace(view, data.batches[0]), SCHEMES, device=find_device("generic"))
        bank = QuantizerBank(view, space.graph)
        bank.observe(data, progress=False)
        bank.prepare(space.schemes, progress=False)

        def forward() -> None:
            with torch.no_grad():
                for batch in data.batches:
                    view(batch)

        forward()
        one_pass = float(np.median([cpu_seconds(forward)[0] for _ in range(3)]))
        setup = view, space, data, bank, KLLoss()
        fast, table = cpu_seconds(lambda: influence(*setup, progress=False))
        each, singles = cpu_seconds(lambda: perturbation(*setup, progress=False))
        pairs = sample_pairs(space, count)
        losses, alone, added = measure_pairs(view, space, data, bank, pairs)

    G, S = singles.loss.shape
    choices, total = G * S, G * (G - 1) // 2 * S**2
    measured = losses - np.array([singles.loss[g, s] + singles.loss[h, t] for g, s, h, t in pairs])
    slow = choices * alone + total * added
    stated, needed = float(table.provenance["forward_passes"]), 1 + choices + total
    assert table.interactions is not None
    correlation = float(rank_correlation(np.array([table.interactions[pair] for pair in pairs]), measured))
    print(f"{G} groups, {S} schemes, {data.num_samples} images; one forward pass: {one_pass:.3f} CPU s")
    print(f"{'':<34}{'forward passes':>16}{'CPU s':>10}")
    print(f"{'influence, all pairs':<34}{stated:>16.1f}{fast:>10.2f}")
    print(f"{'single choices measured':<34}{1 + choices:>16}{each:>10.2f}")
    print(f"{'all pairs measured (extrapolated)':<34}{needed:>16}{slow:>10.1f}")
    print(f"{'  without reuse':<34}{needed:>16}{needed * one_pass:>10.1f}")
    print(f"rank correlation with {count} measured pairs: {correlation:.3f}")

    fewer = needed / stated
    results = {
        "groups": G,
        "schemes": S,
        "samples": data.num_samples,
        "passes": {"influence": stated, "measured_pairs": needed},
        "seconds": {
            "forward_pass": round(one_pass, 4),
            "influence": round(fast, 3),
            "singles": round(each, 3),
            "pairs": round(slow, 1),
            "pairs_without_reuse": round(needed * one_pass, 1),
        },
        "times_faster": round(slow / fast, 1),
        "reuse_saves": round(1 - slow / (needed * one_pass), 3),
        "rank_correlation": round(correlation, 3),
        "sampled_pairs": count,
        "quick": quick,
    }
    goals = {"times_fewer_passes": {"value": round(fewer, 1), "goal": 100, "met": fewer >= 100}}
    print(json.dumps({"benchmark": "interactions", "results": results, "goals": goals}))


if __name__ == "__main__":
    main()
