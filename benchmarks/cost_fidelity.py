"""All cost models against numbers that others published or measured, in one table.

    python benchmarks/cost_fidelity.py [--quick] [--only NAME ...]

Each comparison is a function that returns rows; the modules below list theirs in ``COMPARISONS``. What a model was
fitted on is never what it is scored on. Needs ``../shared/reference``. The last line is JSON;
the exit code tells whether all goals are met.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module

from fidelity import Row
from hawq_layers import SHARED

MODULES = ("fidelity_gpu", "fidelity_cpu", "fidelity_accelerators")


def comparisons(quick: bool = False) -> dict[str, Callable[[], list[Row]]]:
    """Name -> comparison, of all modules; without those that a module calls ``SLOW`` if it must be quick."""
    found: dict[str, Callable[[], list[Row]]] = {}
    for name in MODULES:
        module = import_module(name)
        slow = getattr(module, "SLOW", set()) if quick else set()
        found |= {k: v for k, v in module.COMPARISONS.items() if k not in slow}
    return found


def show(rows: list[Row]) -> str:
    """The table as text."""
    texts = [(r.name, r.predicted, r.published) for r in rows]
    widths = [max(len(text[i]) for text in texts) for i in range(3)]
    lines = []
    for text, r in zip(texts, rows, strict=True):
        cells = "  ".join(f"{t:<{w}}" for t, w in zip(text, widths, strict=True))
        lines.append(f"{cells}  {r.score:>8.4f}  {r.goal:<9}{'met' if r.met else 'MISSED'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these comparisons")
    options = parser.parse_args()
    if not (SHARED / "reference").exists():
        raise SystemExit("needs the reference figures in ../shared")
    chosen = comparisons(options.quick)
    if unknown := set(options.only or ()) - set(chosen):
        raise SystemExit(f"no comparison is called {', '.join(sorted(unknown))}; there are {', '.join(chosen)}")
    rows, seconds = [], {}
    for name, compare in chosen.items():
        if options.only and name not in options.only:
            continue
        started = time.perf_counter()
        rows += compare()
        seconds[name] = round(time.perf_counter() - started, 2)
    print("comparison, predicted, published, score, goal")
    print(show(rows))
    print(f"{sum(r.met for r in rows)} of {len(rows)} goals met in {sum(seconds.values()):.1f} s")
    goals = {r.name: {"value": round(r.score, 4), "goal": r.goal, "met": r.met} for r in rows}
    results = {"rows": [asdict(r) for r in rows], "seconds": seconds}
    print(json.dumps({"benchmark": "cost_fidelity", "results": results, "goals": goals}))
    if missed := [r.name for r in rows if not r.met]:
        raise SystemExit(f"missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
