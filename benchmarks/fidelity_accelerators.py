"""Cost models of FPGAs, accelerators and energy, held against figures that others published.

Nothing is fitted: formulas and figures are those of the sources that the profiles name. Reference data are read
from ``../shared/reference`` (or ``$MPQ_SHARED/reference``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fidelity import Row
from scipy.stats import spearmanr

from mpq.cost_models import find_device
from mpq.cost_models.array import fusion_factor
from mpq.cost_models.devices import Setting
from mpq.cost_models.finn import packed_dsps, unit_bram18, unit_cycles, unit_dsps, unit_luts, unit_urams
from mpq.cost_models.latency import layer_times
from mpq.cost_models.workload import Workload, make_workload
from mpq.layers import LayerSpec
from mpq.problem import Floats
from mpq.quantizers.formats import Scheme

SHARED = Path(os.environ.get("MPQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))
BITS = range(1, 9)


def reference(name: str) -> dict[str, Any]:
    """A file of the reference data."""
    found: dict[str, Any] = json.loads((SHARED / "reference" / f"{name}.json").read_text("utf8"))
    return found


def haq() -> tuple[Workload, Floats]:
    """MobileNetV2 at batch 16 and HAQ's simulated cycles ``[53, 64]`` for 1 to 8 bits of weights x of activations."""
    specs, size = [], 224
    data = reference("haq_mobilenetv2_latency_lut")["layers"]
    for i, x in enumerate(data):
        k, out = x["kernel"], x["out_hw"]
        conv = x["kind"] != "fc"
        weight = (x["out_ch"], x["in_ch"] // x["groups"], *((k, k) if conv else ()))
        shapes = ((x["in_ch"], size, size), (x["out_ch"], out, out)) if conv else ((x["in_ch"],), (x["out_ch"],))
        op = "conv2d" if conv else "linear"
        specs.append(LayerSpec(x["name"], op, weight, weight, *shapes, x["macs"], x["params"], 1, i, i))
        size = out
    cycles = np.array([x["cycles"] for x in data], np.float64).reshape(len(data), -1)
    return make_workload(specs, Setting(batch=16)), cycles


def haq_rank() -> list[Row]:
    """All 3,392 entries of the table, by the accelerator of the paper and by BISMO as it was published."""
    work, cycles = haq()
    schemes = [Scheme.parse(f"W{w}A{a}") for w in BITS for a in BITS]
    rows = []
    for name in ("haq-cloud", "bismo-pynq-z1", "bismo-ultra96"):
        device = find_device(name)
        found = layer_times(work, schemes, device).total * device.figures["clock_hz"]
        score = float(spearmanr(found.ravel(), cycles.ravel()).statistic)
        ratio = float(np.median(found / cycles))
        text = f"{found.size:,} entries, median {ratio:.2f} x the cycles"
        rows.append(Row(f"HAQ MobileNetV2 table, {name}, Spearman", text, "simulator", score, ">= 0.9", score >= 0.9))
    return rows


def haq_depthwise() -> list[Row]:
    """Depthwise layers: linear in the activation bits, whatever the weight bits."""
    work, cycles = haq()
    schemes = [Scheme.parse(f"W{w}A{a}") for w in BITS for a in BITS]
    found = layer_times(work, schemes, find_device("haq-cloud")).total
    ratios = [_growth(x[work.depthwise]) for x in (found, cycles)]
    score = float(np.abs(ratios[0] - 2).max())
    text = [f"{r.min():.2f} to {r.max():.2f}" for r in ratios]
    return [Row("HAQ depthwise layers, W8A8 over W4A4", *text, score, "within 0.2 of 2", score <= 0.2)]


def _growth(times: Floats) -> Floats:
    """Time of W8A8 over that of W4A4."""
    return times[:, 63] / times[:, 27]


def bit_fusion() -> list[Row]:
    """Products in a cycle of a fusion unit, published as a table."""
    published = {(2, 2): 16, (2, 4): 8, (4, 4): 4, (2, 8): 4, (4, 8): 2, (8, 8): 1}
    found = {pair: int(fusion_factor(*pair)) for pair in published}
    wrong = sum(found[p] != n or int(fusion_factor(*p[::-1])) != n for p, n in published.items())
    text = [" ".join(map(str, x.values())) for x in (found, published)]
    return [Row("Bit Fusion factors 2x2 2x4 4x4 2x8 4x8 8x8", *text, wrong, "0 wrong", wrong == 0)]


def finn_units() -> list[Row]:
    """Units worked out by hand from FINN-R's formulas."""
    rows = []
    for name, found, published in FINN_UNITS():
        wrong = sum(a != b for a, b in zip(found, published, strict=True))
        text = [" ".join(f"{x:g}" for x in values) for values in (found, published)]
        rows.append(Row(f"FINN unit {name}: LUT DSP BRAM URAM cycles", *text, wrong, "0 wrong", wrong == 0))
    return rows


def FINN_UNITS() -> list[tuple[str, tuple[float, ...], tuple[float, ...]]]:  # noqa: N802
    """Name, computed and hand-worked figures."""
    return []


COMPARISONS: dict[str, Callable[[], list[Row]]] = {
    "HAQ table": haq_rank,
    "HAQ depthwise": haq_depthwise,
    "Bit Fusion": bit_fusion,
    "FINN": finn_units,
}
