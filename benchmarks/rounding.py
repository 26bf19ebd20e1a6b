"""What ways to round are worth at equal bits: the loss of whole networks, beside nearest rounding.

    python benchmarks/rounding.py [--quick] [--models minilm,efficientnet_lite0] [--formats int3,int4]

All linear layers and convolutions are rounded to one format, embeddings stay float. Measured: KL to the float model,
for MiniLM the mean squared error of embeddings, on data that calibration did not see. Forward passes over the
calibration data are the float model's, shared by all layers and methods; CPU seconds are of rounding all layers, the
statistics of inputs apart. One thread. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from real_models import MODELS

from mpq.bank import QuantizerBank
from mpq.calibration import Calibration
from mpq.layers import LayerSpec
from mpq.losses import resolve_loss
from mpq.quantizers import NumberFormat
from mpq.trace import trace
from mpq.view import ModelView, preserved_state

RECIPES = (
    "",
    "adaround",
    "adaquant",
    "gptq",
    "rsq:gptq",
    "awq",
    "awq:gptq",
    "hadamard",
    "hadamard:gptq",
    "ocs2",
    "sparse5",
    "lorc8",
    "qera8",
    "lorc8:gptq",
    "svd8",
    "svd8:gptq",
    "weighted",
    "weighted:gptq",
    "awq:weighted",
)
QUICK = ("", "adaround", "gptq", "awq", "hadamard:gptq", "lorc8")


class Bench:
    """One model with its calibration data, and what it gives on other data."""

    def __init__(self, name: str, quick: bool) -> None:
        samples = {"minilm": 512}.get(name, 128)  # sentences are short
        model, calib, evaluation = MODELS[name](samples, 250) if quick else MODELS[name](samples)
        self.view = ModelView(model)
        data = Calibration.load(calib, self.view.read)
        self.graph = trace(self.view, data.batches[0])
        self.batches = [self.view.read(b) for b in evaluation]
        with preserved_state(0), torch.no_grad():
            self.references = [self.view(b) for b in self.batches]
        self.loss = resolve_loss("auto", self.references[0])
        self.bank = QuantizerBank(self.view, self.graph, data=data, progress=False)
        self.layers = list({x.storage: x for x in self.graph if x.op != "embedding"}.values())

    def measured(self, fmt: NumberFormat) -> tuple[float, float, float]:
        """Loss, stored bits per weight, and CPU seconds of rounding."""
        started = time.process_time()
        with preserved_state(0):
            weights = {x.name: self.bank.weight(x, fmt) for x in self.layers}
        seconds = time.process_time() - started
        with preserved_state(0), torch.no_grad(), self.view.swapped(weights):
            pairs = zip(self.batches, self.references, strict=True)
            total = sum(float(self.loss.value(self.view(b), r, b).double().sum()) for b, r in pairs)
        bits = sum(fmt.storage_bits(x.rows_shape) for x in self.layers) / sum(x.parameters for x in self.layers)
        return total / sum(b.size for b in self.batches), bits, seconds

    def passes(self, fmt: NumberFormat) -> float:
        """CPU seconds of the pass over the calibration data, if a format takes one that was not made yet."""
        before, first = self.bank.passes, self.smallest
        started = time.process_time()
        self.bank.weight(first, fmt)
        return time.process_time() - started if self.bank.passes > before else 0.0

    @property
    def smallest(self) -> LayerSpec:
        """The layer that is rounded soonest."""
        return min(self.layers, key=lambda x: x.parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the bundled ResNet-20, fewer methods")
    parser.add_argument("--models", default="minilm,efficientnet_lite0")
    parser.add_argument("--formats", default="int3,int4")
    parser.add_argument("--recipes", default=None, help="joined by commas; most by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = ["resnet20"] if args.quick else args.models.split(",")
    formats = ["int3"] if args.quick else args.formats.split(",")
    recipes = QUICK if args.quick else RECIPES if args.recipes is None else ("", *args.recipes.split(","))
    results: dict[str, dict[str, dict[str, float]]] = {}
    print(
        f"{'model':<20}{'format':<10}{'recipe':<15}{'loss':>11}{'of nearest':>12}{'bits':>7}{'passes':>8}{'CPU s':>8}"
    )
    for name in models:
        bench = Bench(name, args.quick)
        statistics = 0.0
        for base in formats:
            nearest = 0.0
            for recipe in recipes:
                fmt = NumberFormat.parse(":".join(filter(None, (base, recipe))))
                statistics += bench.passes(fmt)
                loss, bits, seconds = bench.measured(fmt)
                nearest = nearest or loss
                key = f"{name}/{base}"
                row = {"loss": loss, "of_nearest": loss / nearest, "bits": bits, "seconds": seconds}
                results.setdefault(key, {})[recipe or "nearest"] = row
                print(
                    f"{name:<20}{base:<10}{recipe or 'nearest':<15}{loss:>11.5g}{loss / nearest:>12.3f}{bits:>7.3f}"
                    f"{int(fmt.needs_data):>8}{seconds:>8.1f}",
                    flush=True,
                )
        print(
            f"{name}: statistics of inputs took {statistics:.1f} CPU s, {bench.bank.passes} passes of the float model"
        )
    shares = [rows["gptq"]["of_nearest"] for rows in results.values() if "gptq" in rows]
    worst = max(shares, default=None)
    goals = {"gptq_of_nearest_at_worst": {"value": round(worst, 4), "goal": 1.0, "met": worst < 1.0}} if worst else {}
    rounded = {
        k: {r: {m: float(f"{v:.4g}") for m, v in row.items()} for r, row in t.items()} for k, t in results.items()
    }
    print(json.dumps({"benchmark": "rounding", "results": rounded, "goals": goals, "quick": args.quick}))


if __name__ == "__main__":
    main()
