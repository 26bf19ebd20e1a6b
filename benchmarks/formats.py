"""What number formats besides integers are worth: a mixed search against integers only, at equal stored bits.

    python benchmarks/formats.py [--quick] [--models mobilenetv2 ...] [--evaluations 48]

Weights only. Both searches have the same sensitivity estimator, data and budget (``stored_bits``, so that scales and
codebooks count), and measure as many configs on that data (`analysis.search`); the second may also give a layer
minifloats, MX blocks, nf4 or powers of two. Each answer is measured on other data: KL to the float model, squared error
of embeddings for MiniLM. One thread, CPU seconds; the real models but for ``--quick`` (the bundled ResNet-20) are in
../shared, or $MPQ_SHARED. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from typing import Any

import torch
from real_models import MODELS

import mpq
from mpq.search import Refine

INTEGERS = "W2,W3,W4,W5,W6,W8,W2:g32,W3:g32,W4:g32,W2:asym,W3:asym,W4:asym"
OTHERS = (
    "Wfp3_e2m0,Wfp3_e2m0:g32,Wfp4_e2m1,Wfp4_e2m1:g32,Wfp5_e2m2,Wfp6_e3m2,Wnf4,Wnf4:g32,Wmxfp4,Wmxfp6_e2m3,"
    "Wpow2_3,Wpow2_4,Wpost_3,Wpost_4"
)
BUDGETS = (3, 4)
SPACES = {"integers": INTEGERS, "all formats": f"{INTEGERS},{OTHERS}"}


def measure(name: str, calib: int, evaluation: int, evaluations: int) -> dict[str, Any]:
    """Measured divergence of both searches at every budget, and which formats the second chose."""
    model, data, test = MODELS[name](calib, evaluation)
    evaluator, own = (mpq.Evaluator(model, batches, progress=False) for batches in (test, data))
    found: dict[str, Any] = {}
    for space, schemes in SPACES.items():
        started = time.process_time()
        analysis = mpq.analyze(model, data, schemes, progress=False)
        seconds = time.process_time() - started
        for bits in BUDGETS:
            budget = f"stored_bits<={bits}"
            predicted = evaluator.measure(analysis.allocate(budget))
            search = Refine(handful=evaluations)  # it spends them all
            cfg = analysis.search(own, budget, search, evaluations=evaluations, progress=False).config
            assert cfg is not None
            assert cfg.measured is not None
            measured = evaluator.measure(cfg)
            lost = measured.kl if measured.kl is not None else measured.mse
            families = Counter(choice.weight.base for choice in cfg.layers.values())
            found[f"{bits}, {space}"] = {
                "lost": lost,
                "lost_on_calibration_data": cfg.measured.kl if cfg.measured.kl is not None else cfg.measured.mse,
                "accuracy": measured.accuracy,
                "lost_as_predicted": predicted.kl if predicted.kl is not None else predicted.mse,
                "predicted": cfg.predicted["with_interactions"] or cfg.predicted_loss,
                "stored_bits": cfg.stored_bits,
                "layers": dict(families.most_common()),
                "seconds": seconds,
            }
            accuracy = "" if measured.accuracy is None else f"  top-1 {measured.accuracy:.1%}"
            chosen = ", ".join(f"{n} {base}" for base, n in families.most_common())
            print(f"{name:<20}{bits} bits  {space:<12}{lost:10.4g}{accuracy}  {seconds:7.0f} s  {chosen}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the bundled ResNet-20 and few samples")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS))
    parser.add_argument("--evaluations", type=int, default=48, help="configs that each search measures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.models or (["resnet20"] if options.quick else ["mobilenetv2", "efficientnet_lite0", "minilm"])
    sizes = {"resnet20": (128, 500), "mobilenetv2": (512, 1000), "efficientnet_lite0": (128, 372), "minilm": (128, 400)}
    results = {name: measure(name, *sizes[name], options.evaluations) for name in names}
    goals = {}
    for name, found in results.items():
        for bits in BUDGETS:
            ratio = found[f"{bits}, all formats"]["lost"] / found[f"{bits}, integers"]["lost"]
            goals[f"{name}_{bits}_bits"] = {"value": round(ratio, 3), "goal": 1, "met": ratio < 1}
    print(json.dumps({"benchmark": "formats", "results": results, "goals": goals}))


if __name__ == "__main__":
    sys.exit(main())
