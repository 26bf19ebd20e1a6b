"""What influence costs: CPU seconds against forward passes of the calibration set, memory against a training step.

    python benchmarks/influence_cost.py [--quick]

EfficientNet-Lite0 and MiniLM, weights in six formats, one draw. Influence is to take at most 1.5 x (S + 4) forward
passes for S schemes, and at its peak 1.5 x the memory of an ordinary training step (forward, backward, SGD with
momentum) at the same batch size. Memory is the peak resident size of a process of its own that does nothing else, above
the same process with the model and the data loaded; quantized weights count. CPU seconds of one thread, medians of
three; the last line is JSON. Needs the real models (../shared, or $MPQ_SHARED).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from real_models import MODELS
from torch import Tensor

from mpq.bank import QuantizerBank
from mpq.calibration import Calibration
from mpq.cost_models import find_device
from mpq.losses import KLLoss, MSELoss
from mpq.sensitivity.influence import influence
from mpq.space import make_space
from mpq.trace import trace
from mpq.view import ModelView, preserved_state

SCHEMES = "W2,W3,W4,W5,W6,W8"
FACTOR = 1.5
NAMES = ("efficientnet_lite0", "minilm")
SAMPLES = {"efficientnet_lite0": 64, "minilm": 128}


class Setup:
    """A model with its calibration data."""

    def __init__(self, name: str, samples: int) -> None:
        self.model, calib, _ = MODELS[name](samples)
        self.view = ModelView(self.model)
        self.data = Calibration.load(calib, self.view.read, samples)
        self.loss = MSELoss() if name == "minilm" else KLLoss()

    def forward(self) -> None:
        """One pass over the data."""
        with torch.no_grad():
            for batch in self.data.batches:
                self.view(batch)

    def influence(self) -> tuple[float, int]:
        """CPU seconds of the estimator alone, and the number of schemes."""
        with preserved_state(0):
            space = make_space(trace(self.view, self.data.batches[0]), SCHEMES, device=find_device("generic"))
            bank = QuantizerBank(self.view, space.graph)
            bank.prepare(space.schemes, progress=False)
            start = time.process_time()
            influence(self.view, space, self.data, bank, self.loss, draws=1, progress=False)
            return time.process_time() - start, len(space.schemes)

    def training(self) -> None:
        """One step on the largest batch."""
        raw = max(self.data.batches, key=lambda b: b.size).raw
        self.model.train().requires_grad_()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-9, momentum=0.9)
        output: Tensor = self.model(**raw) if isinstance(raw, dict) else self.model(raw[0])
        output.square().mean().backward()
        optimizer.step()


def peak_of(work: Callable[[], Any]) -> float:
    """MB that a call adds to the resident size at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1])


def memory(name: str, samples: int, what: str) -> float:
    """`peak_of` one of the two in its own process."""
    command = [sys.executable, __file__, "--memory", name, what, "--samples", str(samples)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        name, what = args.memory
        setup = Setup(name, args.samples)
        print(peak_of({"influence": setup.influence, "training": setup.training}[what]))
        return
    results, goals = {}, {}
    for name in NAMES:
        samples = 16 if args.quick else SAMPLES[name]
        setup = Setup(name, samples)
        setup.forward()
        one_pass, spent = [], []
        for _ in range(1 if args.quick else 3):
            start = time.process_time()
            setup.forward()
            one_pass.append(time.process_time() - start)
            seconds, schemes = setup.influence()
            spent.append(seconds)
        passes = statistics.median(spent) / statistics.median(one_pass)
        allowed = FACTOR * (schemes + 4)
        peaks = {what: memory(name, samples, what) for what in ("training", "influence")}
        ratio = peaks["influence"] / peaks["training"]
        print(
            f"{name}: one forward pass of {samples} samples {statistics.median(one_pass):.2f} CPU s, influence of "
            f"{schemes} schemes {statistics.median(spent):.2f} CPU s = {passes:.1f} passes (allowed {allowed:g}); peak "
            f"memory {peaks['influence']:.0f} MB, training step {peaks['training']:.0f} MB: {ratio:.2f} x",
            flush=True,
        )
        results[name] = {"forward_pass": one_pass, "influence": spent, "peak_mb": peaks, "samples": samples}
        goals[f"passes_{name}"] = {"value": round(passes, 2), "goal": allowed, "met": passes <= allowed}
        goals[f"memory_{name}"] = {"value": round(ratio, 2), "goal": FACTOR, "met": ratio <= FACTOR}
    print(json.dumps({"benchmark": "influence_cost", "results": results, "goals": goals}))


if __name__ == "__main__":
    main()
