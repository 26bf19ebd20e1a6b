"""CPU time of rounding a [4096, 4096] weight to number formats, in units of copying it.

    python benchmarks/kernels.py [--quick]

Everything is in CPU milliseconds of the process (all threads together), the median of several runs, each beside a run
of the limit, ``out.copy_(w)`` into a tensor that is there already: on a machine with other work both are slowed. The
torch.compile rows are not in ``--quick``: their first calls take up to a minute each. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpq import NumberFormat
from mpq.quantizers import fake_quantize, fake_quantize_all, find_range, quantize, quantize_all

ALL = "int2 int3 int4 int8 int4:g128 fp8_e4m3 fp4_e2m1 nf4"
Step = Callable[[], Any]


def torchao_groups(w: Tensor) -> Step | None:
    """Groups of 128 as torchao fake-quantizes them, with the scales; None where it is not installed."""
    try:
        from torchao.quantization.quant_primitives import MappingType, _fake_quantize_affine, choose_qparams_affine
    except ImportError:
        return None
    block = (1, 128)

    def step() -> Tensor:
        scale, zero = choose_qparams_affine(w, MappingType.SYMMETRIC, block, torch.int8, -8, 7)
        return _fake_quantize_affine(w, block, scale, zero, torch.int8, -8, 7)

    return step


def steps(w: Tensor, out: Tensor, compiled: bool) -> dict[str, Step]:
    """What is timed, by name."""
    formats = {name: NumberFormat.parse(name) for name in (*ALL.split(), "int4:asym", "mxfp4", "nvfp4")}
    found: dict[str, Step] = {"clone": w.clone}
    for name, fmt in formats.items():
        found[name] = partial(fake_quantize, w, fmt, 0, "minmax", out=out)
    scale, zero = torch.full((len(w),), 0.5), torch.zeros(len(w), dtype=torch.int32)
    found["torch.fake_quantize_per_channel_affine"] = lambda: torch.fake_quantize_per_channel_affine(
        w, scale, zero, 0, -8, 7
    )
    if (groups := torchao_groups(w)) is not None:
        found["torchao, groups of 128"] = groups
    if compiled:
        for name in ("int4", "int4:g128", "fp8_e4m3", "nf4"):
            found[f"{name}, torch.compile"] = partial(
                fake_quantize, w, formats[name], 0, "minmax", out=out, compile=True
            )
    return found


def slow_steps(w: Tensor, outs: list[Tensor]) -> dict[str, Step]:
    """What takes a second or so."""
    int4, grouped = NumberFormat.parse("int4"), NumberFormat.parse("int4:g128")
    formats = [NumberFormat.parse(name) for name in ALL.split()]
    return {
        "int4 range, mse of 24 clips": lambda: find_range(w, int4, "mse"),
        "int4 range, mse:80": lambda: find_range(w, int4, "mse:80"),
        "int4:g128 range, mse:80": lambda: find_range(w.view(-1, 128), grouped, "mse:80"),
        "8 formats one by one": lambda: [
            fake_quantize(w, f, 0, "minmax", out=o) for f, o in zip(formats, outs, strict=True)
        ],
        "8 formats in one call": lambda: fake_quantize_all(w, formats, 0, "minmax", outs=outs),
        "8 formats one by one, codes": lambda: [quantize(w, f, 0, "minmax") for f in formats],
        "8 formats in one call, codes": lambda: quantize_all(w, formats, 0, "minmax"),
    }


def cpu_milliseconds(step: Step, limit: Step, repeats: int) -> tuple[float, float, float]:
    """Median CPU milliseconds of a step, its median ratio to the limit, and the ratio of the fastest runs."""
    step()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for what, seconds in zip((limit, step), times, strict=True):
            started = time.process_time()
            what()
            seconds.append(1000 * (time.process_time() - started))
    limits, own = times
    return statistics.median(own), statistics.median(own) / statistics.median(limits), min(own) / min(limits)


def goals_of(ratio: dict[str, float], milliseconds: dict[str, float]) -> dict[str, Any]:
    """What issue 6 asks for; a row that was not measured has no goal."""
    goals: dict[str, Any] = {}
    for name, most in {
        **{"int4": 3, "int4:g128": 3, "fp8_e4m3": 6, "fp4_e2m1": 6, "nf4": 6, "int4 range, mse:80": 60},
        **{"int4, torch.compile": 2, "int4:g128, torch.compile": 2},
    }.items():
        if name in ratio:
            goals[name] = {"value": round(ratio[name], 2), "goal": most, "met": ratio[name] <= most}
    for slow, fast, least in (
        ("torch.fake_quantize_per_channel_affine", "int4", 3),
        ("torchao, groups of 128", "int4:g128", 5),
        ("8 formats one by one", "8 formats in one call", 2),
    ):
        if slow in milliseconds:
            times = milliseconds[slow] / milliseconds[fast]
            goals[f"{slow} / {fast}"] = {"value": round(times, 2), "goal": least, "met": times >= least}
    return goals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, no torch.compile")
    quick = parser.parse_args().quick
    w = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    outs = [torch.zeros_like(w) for _ in ALL.split()]
    compiled = not quick and shutil.which("g++") is not None
    if not compiled:
        print("torch.compile: skipped,", "--quick" if quick else "there is no g++")
    if torchao_groups(w) is None:
        print("torchao: skipped, not installed (pip install torchao==0.18.0 --no-deps)")
    results: dict[str, Any] = {"quick": quick}
    goals: dict[str, Any] = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        chosen = [(steps(w, outs[0], compiled), 3 if quick else 15), (slow_steps(w, outs), 1 if quick else 3)]
        measured = {
            name: cpu_milliseconds(step, lambda: outs[0].copy_(w), repeats)
            for rows, repeats in chosen
            for name, step in rows.items()
        }
        print(f"\n{threads} thread{'s' * (threads > 1)}{'':<32}{'CPU ms':>10}{'x limit':>10}{'fastest':>10}")
        for name, (own, ratio, fastest) in measured.items():
            print(f"{name:<40}{own:>10.1f}{ratio:>10.2f}{fastest:>10.2f}")
        found = goals_of({n: m[1] for n, m in measured.items()}, {n: m[0] for n, m in measured.items()})
        goals |= {f"{name} ({threads} threads)" if threads > 1 else name: goal for name, goal in found.items()}
        results[f"threads_{threads}"] = {n: [round(v, 2) for v in m] for n, m in measured.items()}
    print(json.dumps({"benchmark": "kernels", "results": results, "goals": goals}))


if __name__ == "__main__":
    main()
