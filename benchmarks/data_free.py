"""What data made from the network itself is worth: the loss of a 4-bit allocation beside that from real images.

    python benchmarks/data_free.py [--quick]

EfficientNet-Lite0, weights only, per channel. Bits are chosen three times, from real images, from `distilled_data` and
from noise that nothing was learned about; each choice is measured as KL to the float model on other images. One
thread, CPU seconds. Needs the real models (../shared, or $MPQ_SHARED). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import mpq
from mpq.distill import distilled_data

SCHEMES = "W2,W3,W4,W5,W6,W8"
BUDGET = "avg_bits<=4"


def load(samples: int, evaluated: int) -> tuple[torch.nn.Module, list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Model, calibration images, and labelled images that are not among them."""
    folder = Path(os.environ.get("MPQ_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
    if not (folder / "load.py").is_file():
        raise FileNotFoundError(f"no real models at {folder}; set MPQ_SHARED")
    sys.path.insert(0, str(folder))
    from load import LOADERS, imagenet_sample

    model, calib, _ = LOADERS["efficientnet_lite0"](samples)
    images, labels = (t[128 : 128 + evaluated] for t in imagenet_sample())
    inputs = ((images.float() - 127) / 128).permute(0, 3, 1, 2).contiguous()
    test = list(zip(inputs.split(25), labels.split(25), strict=True))
    return model, [x for x, _ in calib], test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images and iterations")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    samples, batch_size, iterations, evaluated = (16, 16, 20, 50) if quick else (32, 16, 40, 100)
    try:
        model, real, test = load(samples, evaluated)
    except ImportError as error:
        sys.exit(f"skipped: {error}; see the loader's docstring for what to install")
    except FileNotFoundError as error:
        sys.exit(f"skipped: {error}")

    started = time.process_time()
    distilled = distilled_data(model, (224, 224), samples=samples, batch_size=batch_size, iterations=iterations)
    seconds = time.process_time() - started
    noise = torch.randn(samples, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    evaluator = mpq.Evaluator(model, test)
    results: dict[str, dict[str, float | None]] = {}
    print(f"{'bits chosen from':<18}{'KL (nats)':>10}{'of real':>9}{'top-1':>8}{'predicted KL':>14}{'CPU s':>8}")
    for name, calib in {"real": real, "distilled": distilled, "noise": list(noise.split(batch_size))}.items():
        started = time.process_time()
        cfg = mpq.analyze(model, calib, SCHEMES).allocate(BUDGET)
        spent = time.process_time() - started
        measured = evaluator.measure(cfg)
        assert measured.kl is not None
        assert measured.accuracy is not None
        predicted = float(cfg.solver["objective"])
        results[name] = {"kl": measured.kl, "accuracy": measured.accuracy, "predicted": predicted, "seconds": spent}
        share = measured.kl / (results["real"]["kl"] or 1.0)
        print(f"{name:<18}{measured.kl:>10.4f}{share:>9.3f}{measured.accuracy:>8.1%}{predicted:>14.4f}{spent:>8.1f}")
    print(f"distilled {samples} images in {iterations} iterations: {seconds:.1f} CPU s")

    ratio = (results["distilled"]["kl"] or 0.0) / (results["real"]["kl"] or 1.0)
    goals = {"kl_of_distilled_over_real": {"value": round(ratio, 3), "goal": 1.25, "met": ratio <= 1.25}}
    report = {
        "bits_from": {k: {m: None if v is None else round(v, 5) for m, v in r.items()} for k, r in results.items()},
        "samples": samples,
        "iterations": iterations,
        "distill_seconds": round(seconds, 1),
        "evaluated": evaluated,
        "quick": quick,
    }
    print(json.dumps({"benchmark": "data_free", "results": report, "goals": goals}))


if __name__ == "__main__":
    main()
