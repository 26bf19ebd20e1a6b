"""CPU and DSP models against published times; no time that is scored here was fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import phone_profiles as phones
from fidelity import Row
from scipy.stats import spearmanr

from mpq.cost_models.devices import find_device


def krishnamoorthi_cpu() -> list[Row]:
    """Float and int8 times of eight networks on one core of a Pixel 2 (Krishnamoorthi, 2018, table 7).

    The profile is fitted to TensorFlow's later page of the same phone. That page has three of the eight, so the other
    five are scored apart too. ResNet V2's unfused batch norm is no layer, so its int8 time is too small by a third; see
    the speed-ups.
    """
    rows = phones.read("krishnamoorthi_2018.json")["table7_latency_ms"]["rows"]
    unseen = {n: r for n, r in rows.items() if not phones.fitted_on_pixel2(n)}
    return [*_pixel2_cpu(rows, "8 networks"), *_pixel2_cpu(unseen, f"the {len(unseen)} networks in no fit")]


def _pixel2_cpu(rows: dict[str, dict[str, float]], which: str) -> list[Row]:
    device = find_device("pixel2_cpu")
    times = {n: (phones.milliseconds(device, n, "W32"), phones.milliseconds(device, n, "W8A8")) for n in rows}
    gains = np.array([a / b for a, b in times.values()])
    published = np.array([r["cpu_float"] / r["cpu_int8"] for r in rows.values()])
    rank = _rank([b for _, b in times.values()], [r["cpu_int8"] for r in rows.values()])
    off = np.median(np.abs(gains / published - 1))
    return [
        Row(
            f"Krishnamoorthi 2018, Pixel 2 CPU: int8 speed-ups of {which}",
            f"{gains.min():.2f} to {gains.max():.2f}, median {off:.0%} off",
            f"{published.min():.2f} to {published.max():.2f}",
            float(gains.max() if gains.max() > 2.7 else gains.min()),
            "all within 1.4 to 2.7",
            bool((gains >= 1.4).all() and (gains <= 2.7).all()),
        ),
        Row(
            f"Krishnamoorthi 2018, Pixel 2 CPU: rank of the int8 times of {which}",
            _list(b for _, b in times.values()),
            _list(r["cpu_int8"] for r in rows.values()),
            rank,
            "= 1",
            rank > 1 - 1e-9,
        ),
    ]


def krishnamoorthi_hvx() -> list[Row]:
    """MobileNet V1 and V2 on the Pixel 2's DSP: one rate fitted to one of them, scored on the other, both ways."""
    rows = phones.read("krishnamoorthi_2018.json")["table7_latency_ms"]["rows"]
    names = "Mobilenet_v1_1_224", "Mobilenet_v2_1_224"
    found = []
    for fitted, scored in (names, names[::-1]):
        predicted = phones.milliseconds(phones.pixel2_hvx(fitted), scored, "W8A8")
        published = rows[scored]["hvx_int8"]
        factor = max(predicted / published, published / predicted)
        title = f"Krishnamoorthi 2018, Pixel 2 HVX: {scored}, rate from {fitted}"
        found.append(Row(title, f"{predicted:.1f} ms", f"{published} ms", factor, "<= 1.5", factor <= 1.5))
    return found


def tflite_pixel3() -> list[Row]:
    """Float and int8 pairs on a Pixel 3 (TensorFlow Lite's hosted models) that the profiles were not fitted to."""
    rows = phones.read("tflite_reference.json")["pixel3_android10"]["rows"]
    left = [n for n in rows if n not in phones.FITTED_PIXEL3]
    cpu, dsp = find_device("pixel3_cpu"), find_device("pixel3_hvx")
    int8, fp32 = ([phones.milliseconds(cpu, n, s) for n in left] for s in ("W8A8", "W32"))
    published8, published32 = ([rows[n][f]["cpu4_ms"] for n in left] for f in ("int8", "fp32"))
    rank = _rank([*int8, *fp32], [*published8, *published32])
    off = np.abs(np.divide(int8, fp32) / np.divide(published8, published32) - 1)
    vector = [phones.milliseconds(dsp, n, "W8A8") for n in left]
    published = [rows[n]["int8"]["nnapi_dsp_ms"] for n in left]
    dsp_rank = _rank(vector, published)
    what = f"TFLite, Pixel 3, {len(left)} pairs not fitted"
    return [
        Row(f"{what}: rank of CPU times", _list(int8), _list(published8), rank, ">= 0.95", rank >= 0.95),
        Row(
            f"{what}: int8/float ratio on the CPU, median error",
            f"{np.median(np.divide(int8, fp32)):.2f}, worst error {off.max():.0%}",
            f"{np.median(np.divide(published8, published32)):.2f}",
            float(np.median(off)),
            "<= 0.3",
            float(np.median(off)) <= 0.3,
        ),
        Row(f"{what}: rank of int8 DSP times", _list(vector), _list(published), dsp_rank, ">= 0.95", dsp_rank >= 0.95),
    ]


COMPARISONS: dict[str, Callable[[], list[Row]]] = {
    "krishnamoorthi_cpu": krishnamoorthi_cpu,
    "krishnamoorthi_hvx": krishnamoorthi_hvx,
    "tflite_pixel3": tflite_pixel3,
}


def _rank(predicted: list[float], published: list[float]) -> float:
    return float(spearmanr(predicted, published).statistic)


def _list(times: Iterable[float]) -> str:
    return ", ".join(f"{t:.3g}" for t in times) + " ms"


if __name__ == "__main__":
    for comparison in COMPARISONS.values():
        print(*comparison(), sep="\n")
