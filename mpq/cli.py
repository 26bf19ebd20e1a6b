"""The ``mpq`` command. Heavy imports happen inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mpq.errors import MpqError, UnreachableError
from mpq.profile_cli import profile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Mixed-precision bit allocation: which number format each layer of a trained PyTorch network should have.\n\n"
    "Start with [bold]mpq demo[/bold]. Exit codes: 0 done, 1 configs differ (compare --exit-code), "
    "2 bad input or usage, 3 the budget can't be met.",
)
# Not a terminal: wide enough that names are not folded.
console = Console(width=None if sys.stdout.isatty() else 140)


@app.callback(invoke_without_command=True)
def version(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Options of the command itself."""
    if show_version:
        from mpq import __version__

        console.print(__version__, highlight=False)
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for bits.json, pareto.png and report.html.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of the random probes.")] = 0,
) -> None:
    """Allocate bits of the bundled ResNet-20 and measure the result on 2,000 real test images (under a minute)."""
    from mpq.demo import run_demo

    run_demo(out, seed, console)


@app.command()
def allocate(
    model: Annotated[
        str,
        typer.Argument(help="package.module:name or file.py:name of a model, or of a function that makes it."),
    ],
    calib: Annotated[
        str,
        typer.Option(help="Calibration batches: package.module:name, file.py:name, or an .npz file with array x."),
    ],
    budget: Annotated[
        list[str],
        typer.Option(
            help="Such as 'size<=25%', 'avg_bits<=4', 'latency<=3ms', 'accuracy_drop<=0.5%'. Repeat for several."
        ),
    ],
    schemes: Annotated[str, typer.Option(help="What each layer may have.")] = "W2A8,W3A8,W4A8,W8A8",
    out: Annotated[Path, typer.Option(help="Where to write the bits.")] = Path("bits.json"),
    eval_data: Annotated[str | None, typer.Option("--eval", help="Labelled batches to measure the result on.")] = None,
    pin: Annotated[
        list[str] | None, typer.Option(help="layer=scheme, such as 'fc=W8A8' or 'layer1.*=W4A8'. Repeatable.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Layer name or glob to leave float. Repeatable.")] = None,
    device: Annotated[str, typer.Option(help="Device profile; see 'mpq devices'.")] = "generic",
    estimator: Annotated[
        str, typer.Option(help="anchored, influence, hessian_trace or another of mpq.sensitivity.ESTIMATORS.")
    ] = "anchored",
    loss: Annotated[str, typer.Option(help="What is protected: auto, kl or mse.")] = "auto",
    max_samples: Annotated[int, typer.Option(help="Use at most about this many calibration samples.")] = 512,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML report.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Find the per-layer bits that cost the least accuracy under a budget.

    Example: mpq allocate mpq.bundled:resnet20 --calib mpq.bundled:calibration --budget 'avg_bits<=4'
    """
    import mpq
    from mpq.locate import locate_data, locate_model
    from mpq.tables import print_config

    pins = dict(_split_pin(p) for p in pin or [])
    for path in (out, report):
        if path is not None and not path.absolute().parent.is_dir():
            raise MpqError(f"there is no folder {path.absolute().parent} to write {path.name} into")
    config = mpq.allocate(
        locate_model(model),
        locate_data(calib),
        budget,
        schemes,
        eval_data=None if eval_data is None else locate_data(eval_data),
        pin=pins,
        skip=skip or [],
        device=device,
        estimator=estimator,
        loss=loss,
        max_samples=max_samples,
        seed=seed,
    )
    print_config(config, console)
    console.print(f"wrote {config.save(out)}", highlight=False)
    if report is not None:
        console.print(f"wrote {config.report(report)}", highlight=False)


@app.command()
def show(path: Annotated[Path, typer.Argument(help="A bits.json.")]) -> None:
    """Print a saved config: per-layer table, size, predicted and measured loss."""
    from mpq.config import load
    from mpq.tables import print_config

    print_config(load(path), console)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A bits.json.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 if any layer differs.")] = False,
) -> None:
    """Compare two saved configs: metrics, and the layers whose scheme differs."""
    from mpq.config import load

    a, b = load(first), load(second)
    table = Table("metric", str(first), str(second))
    for name in sorted(set(a.metrics) & set(b.metrics)):
        table.add_row(name, f"{a.metrics[name]['value']:,.6g}", f"{b.metrics[name]['value']:,.6g}")
    table.add_row("predicted loss", f"{a.predicted['loss']:.5g}", f"{b.predicted['loss']:.5g}")
    table.add_row("measured", str(a.measured or "-"), str(b.measured or "-"))
    console.print(table)
    left, right = a.schemes(), b.schemes()
    names = [*left, *(n for n in right if n not in left)]
    different = [n for n in names if left.get(n) != right.get(n)]
    if different:
        table = Table("layer", str(first), str(second))
        for name in different:
            table.add_row(escape(name), left.get(name, "-"), right.get(name, "-"))
        console.print(table)
    console.print(f"{len(different)} of {len(names)} layers differ", highlight=False)
    if different and exit_code:
        raise typer.Exit(1)


@app.command()
def devices(
    name: Annotated[str | None, typer.Argument(help="Name or .json file of one profile: explain it.")] = None,
) -> None:
    """List the device profiles, or explain one: kernels, figures, and where each figure comes from."""
    from mpq.devices_cli import show_devices

    show_devices(console, name)


app.command()(profile)


def _split_pin(text: str) -> tuple[str, str]:
    layer, _, scheme = text.rpartition("=")
    if not layer:
        raise MpqError(f"--pin takes layer=scheme, such as 'fc=W8A8', not {text!r}")
    return layer, scheme


def main() -> None:
    """Entry point: errors that a user can act on are one line, not a traceback."""
    try:
        app()
    except MpqError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(3 if isinstance(error, UnreachableError) else 2)
