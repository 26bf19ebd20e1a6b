"""``mpq profile``: measure this machine's kernels for a model's layers and write a device profile."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mpq.errors import MpqError

console = Console(width=None if sys.stdout.isatty() else 140)


def profile(
    model: Annotated[
        str,
        typer.Argument(help="package.module:name or file.py:name of a model, or of a function that makes it."),
    ],
    calib: Annotated[
        str,
        typer.Option(help="Batches, for the shapes: package.module:name, file.py:name, or an .npz file with array x."),
    ],
    device: Annotated[str, typer.Option(help="What to measure; this machine's cpu is the only one.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Where to write the device profile.")] = Path("this_cpu.json"),
    name: Annotated[str, typer.Option(help="Name of the device in the profile.")] = "this_cpu",
    seconds: Annotated[float, typer.Option(help="Seconds spent on each kernel.", min=0.001)] = 0.25,
) -> None:
    """Measure onnxruntime's kernels for every distinct layer of a model, and write a device profile fitted to them.

    The profile then is a device as any other: mpq allocate ... --device this_cpu.json --budget 'latency<=3ms'.
    """
    from mpq.cost_models.profiling import profile_model
    from mpq.locate import locate_data, locate_model

    if device != "cpu":
        raise MpqError(f"mpq profile measures this machine's cpu, not {device!r}; import other tables in Python")
    if not out.absolute().parent.is_dir():
        raise MpqError(f"there is no folder {out.absolute().parent} to write {out.name} into")
    found = profile_model(
        locate_model(model),
        locate_data(calib),
        out,
        name=name,
        seconds=seconds,
        progress=lambda layer: console.print(f"measuring {layer}", highlight=False),
    )
    console.print(f"wrote {out}: {found.sources['kernels']}", highlight=False)
