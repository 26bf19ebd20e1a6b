"""A CPU profile fitted to half of the layer shapes of four networks, scored on the other half's measured kernels.

`python benchmarks/profile_cpu.py [--quick] [--measurements FILE]`; the file keeps what was measured, to fit it again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from scipy.stats import spearmanr

from mpq.cost_models.devices import Device
from mpq.cost_models.kernels import shape_key
from mpq.cost_models.profiling import (
    Measurement,
    fit_profile,
    load_measurements,
    measure_layers,
    predict,
    save_measurements,
    write_profile,
)
from mpq.layers import LayerSpec
from mpq.trace import trace
from mpq.view import ModelView

SCHEMES = ("W32", "W8A8", "W4:g32")


def layers(quick: bool) -> list[LayerSpec]:
    """Distinct layers of ResNet-50, MobileNetV3-Large, ViT-B/16 and a BERT-base block on 128 tokens."""
    found: list[LayerSpec] = []
    for name in ("mobilenet_v3_large",) if quick else ("resnet50", "mobilenet_v3_large", "vit_b_16"):
        view = ModelView(getattr(torchvision.models, name)(weights=None).eval())
        found += trace(view, view.read(torch.zeros(1, 3, 224, 224)))
    for i, (out, depth) in enumerate([(768, 768), (3072, 768), (768, 3072)]):
        macs, parameters = 128 * out * depth, out * depth
        shape = out, depth
        found.append(
            LayerSpec(f"bert.{i}", "linear", shape, shape, (128, depth), (128, out), macs, parameters, 1, i, i)
        )
    return list({shape_key(x): x for x in found}.values())


def halves(measurements: list[Measurement], seed: int) -> tuple[list[Measurement], list[Measurement]]:
    """A random half of the distinct shapes, in all formats, and the other one."""
    keys = list(dict.fromkeys(shape_key(m.layer) for m in measurements))
    order = np.random.default_rng(seed).permutation(len(keys))
    chosen = {keys[i] for i in order[: len(keys) // 2]}
    fitted = [m for m in measurements if shape_key(m.layer) in chosen]
    return fitted, [m for m in measurements if shape_key(m.layer) not in chosen]


def score(device: Device, measurements: list[Measurement], scheme: str) -> dict[str, float]:
    """Rank correlation and errors of one format."""
    rows = [m for m in measurements if m.scheme == scheme]
    predicted, measured = np.array(predict(device, rows)), np.array([m.seconds for m in rows])
    error = np.abs(predicted / measured - 1)
    rank = float(spearmanr(predicted, measured).statistic)
    return {
        "kernels": len(rows),
        "spearman": rank,
        "median_error": float(np.median(error)),
        "worst_error": float(error.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="MobileNetV3 and BERT only, 0.05 s a kernel, two splits")
    parser.add_argument("--measurements", type=Path, help="read them if the file exists, else write them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    if options.measurements and options.measurements.exists():
        measured = load_measurements(options.measurements)
    else:
        measured = measure_layers(layers(options.quick), SCHEMES, 0.05 if options.quick else 0.25)
        if options.measurements:
            save_measurements(measured, options.measurements)
    spent = time.process_time() - started
    found: dict[str, list[dict[str, float]]] = {s: [] for s in SCHEMES}
    for seed in range(2 if options.quick else 10):
        fitted, left = halves(measured, seed)
        with tempfile.TemporaryDirectory() as folder:  # the profile as a user reads it back
            device = write_profile(fit_profile(fitted), Path(folder) / "profile.json")
        for scheme, rows in found.items():
            rows.append(score(device, left, scheme))
            shown = "  ".join(f"{k} {v:.3g}" for k, v in rows[-1].items())
            print(f"split {seed}  {scheme:<8}{shown}", flush=True)
    goals = {f"{s} {name}": goal for s in ("W32", "W8A8") for name, goal in worst(found[s]).items()}
    print(json.dumps({"benchmark": "profile_cpu", "seconds_measuring": spent, "splits": found, "goals": goals}))


def worst(rows: list[dict[str, float]]) -> dict[str, Any]:
    """The goals of one format, over all splits."""
    rank, error = min(r["spearman"] for r in rows), max(r["median_error"] for r in rows)
    return {
        "lowest spearman": {"value": round(rank, 4), "goal": 0.95, "met": rank >= 0.95},
        "highest median error": {"value": round(error, 4), "goal": 0.2, "met": error < 0.2},
    }


if __name__ == "__main__":
    main()
