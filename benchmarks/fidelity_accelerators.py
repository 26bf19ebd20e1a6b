"""Cost models of FPGAs, accelerators and energy, held against figures that others published.

Nothing is fitted: formulas and figures are those of the sources that the profiles name. Reference data are read
from ``../shared/reference`` (or ``$MPQ_SHARED/reference``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fidelity import Row
from scipy.stats import spearmanr

from mpq.cost_models import find_device
from mpq.cost_models.array import fusion_factor
from mpq.cost_models.devices import Setting
from mpq.cost_models.energy import DRAM_PJ_PER_BIT, sram_pj_per_bit
from mpq.cost_models.finn import packed_dsps, unit_bram18, unit_cycles, unit_dsps, unit_luts, unit_urams
from mpq.cost_models.latency import layer_times
from mpq.cost_models.operations import float_add, float_multiply, int_add, int_multiply
from mpq.cost_models.workload import Workload, make_workload
from mpq.layers import LayerSpec
from mpq.problem import Floats
from mpq.quantizers import Scheme

SHARED = Path(os.environ.get("MPQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))
BITS = range(1, 9)
# Profiles that are held against HAQ's table, and whether it was at hand when they were made.
HAQ_DEVICES = {
    "haq-cloud": "chosen with the table in view",
    "bismo-pynq-z1": "as published, table unseen",
    "bismo-ultra96": "as published, table unseen",
}
IN_VIEW = f"haq-cloud ({HAQ_DEVICES['haq-cloud']})"


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
    """All 3,392 entries of the table, by the accelerator of the paper and by BISMO as it was published.

    What HAQ leaves open of its accelerator was chosen with this table in view; BISMO's profiles were not.
    """
    work, cycles = haq()
    schemes = [Scheme.parse(f"W{w}A{a}") for w in BITS for a in BITS]
    rows = []
    for name, how in HAQ_DEVICES.items():
        device = find_device(name)
        found = layer_times(work, schemes, device).total * device.figures["clock_hz"]
        score = float(spearmanr(found.ravel(), cycles.ravel()).statistic)
        ratio = float(np.median(found / cycles))
        text = f"{found.size:,} entries, median {ratio:.2f} x the cycles"
        title = f"HAQ MobileNetV2 table, {name} ({how}), Spearman"
        rows.append(Row(title, text, "simulator; BitOps: 0.165", score, ">= 0.9", score >= 0.9))
    return rows


def haq_depthwise() -> list[Row]:
    """Depthwise layers: time is linear in the activation bits, whatever the weight bits."""
    work, cycles = haq()
    schemes = [Scheme.parse(f"W{w}A{a}") for w in BITS for a in BITS]
    found = layer_times(work, schemes, find_device("haq-cloud")).total
    shares = [(x / x[:, -1:])[work.depthwise] for x in (found, cycles)]
    means = [np.array([x[:, 59].mean(), x[:, 31].mean()]) for x in shares]
    score = float(np.abs(means[0] - means[1]).max())
    text = [f"W8A4 {m[0]:.3f}, W4A8 {m[1]:.3f} of W8A8" for m in means]
    text[0] += f"; single entries off by up to {np.abs(shares[0] - shares[1]).max():.2f}"
    by_bits = [x[work.depthwise].reshape(-1, len(BITS), len(BITS)) for x in (found, cycles)]  # layers, W, A
    ours, theirs = ((x / x[..., -1:]).transpose(1, 0, 2).reshape(len(BITS), -1) for x in by_bits)
    fits = np.array([np.corrcoef(a, b)[0, 1] ** 2 for a, b in zip(ours, theirs, strict=True)])
    least, off = float(fits.min()), np.abs(ours - theirs)
    linear = "A/8 at every W" if np.allclose(by_bits[0] / by_bits[0][..., -1:], np.array(BITS) / 8) else "not linear"
    seen = (
        f"R2 {fits.max():.3f} (W{fits.argmax() + 1}) to {least:.3f} (W{fits.argmin() + 1}), mean error {off.mean():.3f}"
    )
    return [
        Row(f"HAQ depthwise layers, {IN_VIEW}, mean share of W8A8", *text, score, "<= 0.05", score <= 0.05),
        Row(
            f"HAQ depthwise layers, {IN_VIEW}, share of A8 over A1 to A8, least R2 of any W",
            *(linear, seen, least, ">= 0.95", least >= 0.95),
        ),
    ]


def haq_strategy() -> list[Row]:
    """The cost of HAQ's published bit widths relative to 8 bits everywhere; its budget was 0.6."""
    work, cycles = haq()
    strategy = reference("haq_mobilenetv2_latency_lut")["published"]["strategy_wa"]
    # The stem's input has no entry of its own: the 8 bits of the image.
    schemes = [Scheme.parse(f"W{w}A{a if a > 0 else 8}") for w, a in strategy]
    both = [*schemes, Scheme.parse("W8A8")]
    layers = np.arange(len(strategy))
    times = layer_times(work, both, find_device("haq-cloud")).total
    columns = [8 * (s.weight.bits - 1) + s.activation.bits - 1 for s in schemes if s.activation]
    found = float(times[layers, layers].sum() / times[:, -1].sum())
    published = float(cycles[layers, columns].sum() / cycles[:, -1].sum())
    score = abs(found / published - 1)
    text = f"{found:.3f} of W8A8", f"{published:.3f} of W8A8"
    return [Row(f"HAQ's published bit widths, {IN_VIEW}, relative error", *text, score, "<= 0.02", score <= 0.02)]


def bit_fusion() -> list[Row]:
    """Products in a cycle of a fusion unit, published as a table; the order of the operands does not matter."""
    published = {(2, 2): 16, (2, 4): 8, (4, 4): 4, (2, 8): 4, (4, 8): 2, (8, 8): 1}
    found = {pair: int(fusion_factor(*pair)) for pair in published}
    wrong = sum(found[p] != n or int(fusion_factor(*p[::-1])) != n for p, n in published.items())
    text = [" ".join(map(str, x.values())) for x in (found, published)]
    return [Row("Bit Fusion factors 2x2 2x4 4x4 2x8 4x8 8x8", *text, wrong, "0 wrong", wrong == 0)]


def energies() -> list[Row]:
    """Operations that Horowitz measured and QKeras' constants, in picojoules."""
    e = reference("hardware_cost_models")["energy_pj"], reference("hardware_cost_models")["energy_formulas"]["qkeras"]
    pairs = {
        **{f"int{b} product": (int_multiply(b), e[0]["int_mult"][str(b)]) for b in (8, 32)},
        "int32 sum": (int_add(32), e[0]["int_add"]["32"]),
        "int8 sum (Horowitz: 0.03)": (int_add(8), e[1]["check"]["add8"]),
        "fp16 product": (float_multiply(5, 10), e[0]["fp_mult"]["16"]),
        "fp32 product": (float_multiply(8, 23), e[0]["fp_mult"]["32"]),
        "fp16 sum": (float_add(16), e[0]["fp_add"]["16"]),
        "fp32 sum": (float_add(32), e[0]["fp_add"]["32"]),
        "DRAM bit": (DRAM_PJ_PER_BIT, e[1]["dram_pj_per_bit"]),
        **{
            f"SRAM {size}, 64 bits": (64 * float(sram_pj_per_bit(kb * 1024)), e[0]["sram_64b"][size])
            for size, kb in (("8KB", 8), ("32KB", 32), ("1MB", 1024))
        },
    }
    rows = []
    for name, (found, published) in pairs.items():
        off = abs(found - published)
        rows.append(Row(f"energy, {name}", f"{found:.4f} pJ", f"{published:g} pJ", off, "<= 0.001 pJ", off <= 0.001))
    return rows


@dataclass(frozen=True)
class Unit:
    """A matrix-vector unit and what FINN-R's formulas give for it, worked out by hand."""

    name: str
    shape: dict[str, int]
    bits: tuple[int, int]
    positions: int
    options: dict[str, Any]
    luts: int
    dsps: int
    packed: int
    bram18: int
    urams: int
    cycles: int


UNITS = (
    # 300 + 1.1 x 16 x (64 multipliers + 124 adders + 11 accumulator) = 3802.4
    Unit("W2A2", {"pe": 16, "simd": 16, "depth": 64, "columns": 64}, (2, 2), 100, {}, 3802, 256, 64, 15, 8, 1600),
    # 300 + 1.1 x 8 x (136 adders + 18 accumulator) = 1655.2
    Unit(
        "W4A4 in DSPs",
        {"pe": 8, "simd": 9, "depth": 576, "columns": 64},
        (4, 4),
        196,
        {"dsp": True},
        *(1655, 72, 18, 8, 4, 100352),
    ),
    # 300 + 1.1 x 4 x (240 multipliers + 80 adders + 20 accumulator) + 4 x 3 x 8 x 2 for weights = 1988
    Unit(
        "W8A8 with weights in LUTs",
        {"pe": 4, "simd": 3, "depth": 27, "columns": 32},
        (8, 8),
        12544,
        {"lutram": True, "signed": True},
        *(1988, 12, 3, 3, 2, 903168),
    ),
    # the first one with three thresholds of 11 bits: 300 + 1.1 x 16 x (199 + 33 + 33) = 4964
    Unit(
        "W2A2 with thresholds",
        {"pe": 16, "simd": 16, "depth": 64, "columns": 64},
        (2, 2),
        100,
        {"out_bits": 2},
        *(4964, 256, 64, 15, 8, 1600),
    ),
)


def finn_units() -> list[Row]:
    """The units above."""
    rows = []
    for u in UNITS:
        fold = {k: u.shape[k] for k in ("pe", "simd")}
        w, a = u.bits
        found = (
            unit_luts(**u.shape, weight_bits=w, activation_bits=a, **u.options),
            unit_dsps(**fold, weight_bits=w, activation_bits=a),
            packed_dsps(**fold),
            unit_bram18(**u.shape, weight_bits=w),
            unit_urams(**u.shape, weight_bits=w),
            unit_cycles(**u.shape, positions=u.positions),
        )
        expected = (u.luts, u.dsps, u.packed, u.bram18, u.urams, u.cycles)
        wrong = sum(float(x) != y for x, y in zip(found, expected, strict=True))
        text = [" ".join(f"{float(x):,.0f}" for x in values) for values in (found, expected)]
        rows.append(Row(f"FINN {u.name}: LUTs, DSPs, packed, BRAM18, URAM, cycles", *text, wrong, "0 wrong", not wrong))
    return rows


COMPARISONS: dict[str, Callable[[], list[Row]]] = {
    "HAQ table": haq_rank,
    "HAQ depthwise layers": haq_depthwise,
    "HAQ strategy": haq_strategy,
    "Bit Fusion": bit_fusion,
    "Horowitz and QKeras energies": energies,
    "FINN units": finn_units,
}
