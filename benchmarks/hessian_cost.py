"""CPU seconds to know the Hessian trace of every layer of the bundled ResNet-20 equally well: layer by layer, and ours.

    python benchmarks/hessian_cost.py [--quick]

The baseline is what users of HAWQ and PyHessian run, one layer after the other: for each probe of each batch a forward
pass, a differentiable gradient and a Hessian-vector product. It is written to its advantage: gradients stop at the
layer, every batch has its own random vector (PyHessian keeps one for all, which is noisier), and each layer stops on
its own. Ours are the methods of `mpq.sensitivity.hessian_trace`. All estimate the same traces (of the KL divergence
from the float network) on the same data. A few probes give the seconds and the spread of one probe; standard errors
fall with the square root of the probes, which gives the seconds to a relative standard error of 5 %. CPU seconds of one
thread; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass

import numpy as np
import torch

from mpq.bank import QuantizerBank
from mpq.bundled import load_example
from mpq.calibration import Calibration
from mpq.cost_models import find_device
from mpq.losses import KLLoss
from mpq.problem import Floats
from mpq.sensitivity.hessian_trace import hessian_trace
from mpq.sensitivity.trace_methods import random_vectors
from mpq.space import SearchSpace, make_space
from mpq.trace import trace
from mpq.view import ModelView, preserved_state

TARGET = 0.05  # relative standard error
KINDS = {"median_layer": False, "every_layer": True}


@dataclass
class Measured:
    """A few probes of one method.

    Attributes:
        each: CPU seconds of one probe ``[layers]``; ``[1]`` where all layers come together.
        setup: CPU seconds before the first probe.
        traces: ``[layers]``.
        stderr: Of the traces.
        probes: How many.
    """

    each: Floats
    setup: float
    traces: Floats
    stderr: Floats
    probes: int

    def spread(self, traces: Floats) -> Floats:
        """Standard deviation of one probe ``[layers]``, relative to the best known traces."""
        return self.stderr / traces * self.probes**0.5

    def seconds(self, traces: Floats, every_layer: bool) -> float:
        """CPU seconds until every layer, or the median layer, has the target standard error; two probes at least."""
        wanted = np.maximum((self.spread(traces) / TARGET) ** 2, 2)
        if not every_layer:
            wanted = np.full_like(wanted, np.median(wanted))
        return self.setup + float((self.each * wanted).sum() if len(self.each) > 1 else self.each[0] * wanted.max())


def layer_by_layer(view: ModelView, names: list[str], data: Calibration, probes: int) -> Measured:
    """The baseline."""
    draw = random_vectors("rademacher", torch.Generator().manual_seed(0))
    loss, seconds = KLLoss(), np.zeros(len(names))
    forms = np.zeros((len(names), len(data.batches), probes))
    with torch.no_grad():
        references = [view(batch) for batch in data.batches]
    for i, name in enumerate(names):
        started = time.process_time()
        for b, (batch, reference) in enumerate(zip(data.batches, references, strict=True)):
            for k in range(probes):
                weight = view.weight(name).detach().requires_grad_()
                with view.swapped({name: weight}):
                    mean = loss.value(view(batch), reference, batch).mean()
                (gradient,) = torch.autograd.grad(mean, weight, create_graph=True)
                vector = draw(weight)
                (product,) = torch.autograd.grad(gradient, weight, vector)
                forms[i, b, k] = float((vector * product).sum()) * batch.size / data.num_samples
        seconds[i] = time.process_time() - started
    stderr = np.sqrt(forms.var(2, ddof=1).sum(1) / probes)
    return Measured(seconds / probes, 0.0, forms.mean(2).sum(1), stderr, probes)


def ours(view: ModelView, space: SearchSpace, data: Calibration, method: str, probes: int) -> Measured:
    """One method of the library, whole: finding the batch axis, probes, scores of the groups."""
    bank = QuantizerBank(view, space.graph)
    bank.prepare(space.schemes, progress=False)

    def run(count: int) -> tuple[float, Measured]:
        started = time.process_time()
        options = {"method": method, "probes": count, "tolerance": None, "progress": False}
        found = hessian_trace(view, space, data, bank, KLLoss(), **options).provenance["traces"].values()
        seconds = time.process_time() - started
        traces, stderr = (np.array([t[key] for t in found]) for key in ("value", "stderr"))
        return seconds, Measured(np.zeros(1), 0.0, traces, stderr, count)

    few, _ = run(2)
    many, found = run(probes)
    found.each = np.array([(many - few) / (probes - 2)])
    found.setup = max(0.0, few - 2 * float(found.each[0]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images and probes")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    samples, probes = (64, 4) if quick else (256, 8)
    model, calib, _ = load_example()
    with preserved_state(0):
        view = ModelView(model)
        data = Calibration.load([x for batch, _ in calib for x in batch.split(32)], view.read, samples)
        space = make_space(trace(view, data.batches[0]), "W4", device=find_device("generic"))
        baseline = layer_by_layer(view, [x.name for x in space.layers], data, probes)
        default = ours(view, space, data, "gauss_newton", 8 * probes)
        found = {"layer by layer (baseline)": baseline, "gauss_newton (default)": default}
        for method in () if quick else ("blocks", "hutchinson"):
            found[method] = ours(view, space, data, method, probes)
    seconds = {k: {name: m.seconds(default.traces, e) for name, m in found.items()} for k, e in KINDS.items()}
    print(f"{data.num_samples} images, {len(space.layers)} layers; CPU seconds to a standard error of {TARGET:.0%}")
    print(f"{'method':<28}{'s/probe':>10}{'spread':>9}{'worst':>8}{'median layer':>15}{'every layer':>14}")
    for name, m in found.items():
        spread = m.spread(default.traces)
        median, every = (seconds[k][name] for k in KINDS)
        print(
            f"{name:<28}{m.each.sum():>10.3f}{np.median(spread):>9.2f}{spread.max():>8.2f}{median:>15.2f}{every:>14.2f}"
        )
    difference = (baseline.traces - default.traces) / np.hypot(baseline.stderr, default.stderr)
    print(f"difference of the two first in standard errors: root mean square {np.square(difference).mean() ** 0.5:.2f}")
    goals = {}
    for kind, by_method in seconds.items():
        baseline_seconds, our_seconds, *_ = by_method.values()
        ratio = baseline_seconds / our_seconds
        goals[f"times_cheaper_{kind}"] = {"value": round(ratio, 1), "goal": 3, "met": ratio >= 3}
    results = {
        "seconds": {kind: {k: round(v, 3) for k, v in by_method.items()} for kind, by_method in seconds.items()},
        "samples": data.num_samples,
        "quick": quick,
    }
    print(json.dumps({"benchmark": "hessian_cost", "results": results, "goals": goals}))


if __name__ == "__main__":
    main()
