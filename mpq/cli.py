"""The ``mpq`` command. Heavy imports happen inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mpq.errors import DataError, ExportError, MpqError, UnreachableError
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
        typer.Argument(help="package.module:name or file.py:name of a model or what makes it; or an .onnx file."),
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
    schemes: Annotated[
        str | None, typer.Option(help="What each layer may have. [default: W2A8,W3A8,W4A8,W8A8, or the runtime's]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where to write the bits.")] = Path("bits.json"),
    eval_data: Annotated[str | None, typer.Option("--eval", help="Labelled batches to measure the result on.")] = None,
    pin: Annotated[
        list[str] | None, typer.Option(help="layer=scheme, such as 'fc=W8A8' or 'layer1.*=W4A8'. Repeatable.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Layer name or glob to leave float. Repeatable.")] = None,
    device: Annotated[str, typer.Option(help="Device profile; see 'mpq devices'.")] = "generic",
    runtime: Annotated[str | None, typer.Option(help="Search only what this tool loads; see 'mpq export'.")] = None,
    estimator: Annotated[
        str, typer.Option(help="anchored, influence, hessian_trace or another of mpq.sensitivity.ESTIMATORS.")
    ] = "anchored",
    loss: Annotated[str, typer.Option(help="What is protected: auto, kl or mse.")] = "auto",
    weight_range: Annotated[
        str, typer.Option(help="Range rule of weights: mse, minmax, percentile:P, mse:N, pnorm:P, kl, ...")
    ] = "mse",
    activation_range: Annotated[str, typer.Option(help="Range rule of activations; or loss, or loss:N.")] = "mse",
    max_samples: Annotated[int, typer.Option(help="Use at most about this many calibration samples.")] = 512,
    store: Annotated[
        Path | None, typer.Option(help="Folder that keeps what was measured: a killed run resumes from it.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML report.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Find the per-layer bits that cost the least accuracy under a budget.

    Example: mpq allocate mpq.bundled:resnet20 --calib mpq.bundled:calibration --budget 'avg_bits<=4'
    """
    from mpq.allocation import allocate_and_analyze
    from mpq.locate import locate_data, locate_model
    from mpq.tables import print_config

    pins = dict(_split_pin(p) for p in pin or [])
    _check_folders(out, report)
    config, analysis = allocate_and_analyze(
        locate_model(model),
        locate_data(calib),
        budget,
        schemes,
        eval_data=None if eval_data is None else locate_data(eval_data),
        pin=pins,
        skip=skip or [],
        device=device,
        runtime=runtime,
        estimator=estimator,
        loss=loss,
        weight_range=weight_range,
        activation_range=activation_range,
        max_samples=max_samples,
        store=store,
        seed=seed,
    )
    print_config(config, console)
    console.print(f"wrote {config.save(out)}", highlight=False)
    if report is not None:
        console.print(f"wrote {config.report(report, analysis=analysis)}", highlight=False)


@app.command()
def show(path: Annotated[Path, typer.Argument(help="A bits.json.")]) -> None:
    """Print a saved config: per-layer table, size, predicted and measured loss."""
    from mpq.config import load
    from mpq.tables import print_config

    print_config(load(path), console)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="A bits.json.")],
    out: Annotated[Path, typer.Option(help="Where to write the page.")] = Path("report.html"),
) -> None:
    """Write an HTML report of a saved config: one file that loads nothing from the network.

    With frontier, sensitivities and prices it comes from 'mpq allocate --report'.
    """
    from mpq.config import load

    config = load(path)
    _check_folders(out)
    console.print(f"wrote {config.report(out)}", highlight=False)


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
    if left and right and not left.keys() & right.keys():
        console.print("the configs have no layer in common: they are of different models", highlight=False)
    if different and exit_code:
        raise typer.Exit(1)


@app.command()
def devices(
    name: Annotated[str | None, typer.Argument(help="Name or .json file of one profile: explain it.")] = None,
) -> None:
    """List the device profiles, or explain one: kernels, figures, and where each figure comes from."""
    from mpq.devices_cli import show_devices

    show_devices(console, name)


@app.command()
def export(
    bits: Annotated[Path, typer.Argument(help="A bits.json.")],
    to: Annotated[str, typer.Option(help="Name of the tool; an unknown name lists them.")],
    out: Annotated[Path, typer.Option(help="File or folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="The network as for 'mpq allocate', where the tool's file holds weights.")
    ] = None,
    calib: Annotated[
        str | None, typer.Option(help="Batches as for 'mpq allocate', where the tool's file is traced with one.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of the exporter as name=value, such as fold=false; repeatable.")
    ] = None,
) -> None:
    """Write a saved config for a downstream tool, and say layer by layer what that tool will hold.

    Example: mpq export bits.json --to gptqmodel --out quantize_config.json
    """
    from mpq.config import load
    from mpq.export import export as write
    from mpq.locate import locate_data, locate_model

    options = dict(map(_option, option or []))
    if calib is not None:
        batches = iter(locate_data(calib))
        options["sample"] = next(batches, None)
        if options["sample"] is None:
            raise DataError(f"{calib} has no batches; --calib needs at least one")
    found = write(load(bits), to, out, model=None if model is None else locate_model(model), **options)
    console.print(repr(found), highlight=False, markup=False)


def _option(text: str) -> tuple[str, Any]:
    """Name and value of ``name=value``; what is no JSON is a string."""
    name, sign, value = text.partition("=")
    if not sign:
        raise ExportError(f"--option takes name=value, such as fold=false, not {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="The tool's JSON file, a folder with its config.json, or a GGUF file.")],
    source: Annotated[str, typer.Option("--from", help="Name of the tool; an unknown name lists them.")],
    model: Annotated[str, typer.Option(help="The float network, as for 'mpq allocate'.")],
    calib: Annotated[
        str | None,
        typer.Option(help="Calibration batches, as for 'mpq allocate'; models of transformers can do without."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where to write the bits.")] = Path("bits.json"),
) -> None:
    """Read a config that another tool made, so that 'mpq show', 'compare' and 'export' take it.

    Example: mpq import quantize_config.json --from gptqmodel --model net.py:model --calib net.py:batches
    """
    from mpq.export.importing import import_config
    from mpq.locate import locate_data, locate_model
    from mpq.tables import print_config

    config = import_config(source, file, locate_model(model), None if calib is None else locate_data(calib))
    print_config(config, console)
    console.print(f"wrote {config.save(out)}", highlight=False)


app.command()(profile)


def _check_folders(*paths: Path | None) -> None:
    for path in paths:
        if path is None:
            continue
        folder = path.absolute().parent
        if not folder.is_dir():
            raise MpqError(f"there is no folder {folder} to write {path.name} into")
        if path.is_dir() or not os.access(folder, os.W_OK):
            raise MpqError(f"{path} can't be written: it is a folder, or its folder is read-only")


def _split_pin(text: str) -> tuple[str, str]:
    layer, _, scheme = text.rpartition("=")
    if not layer:
        raise MpqError(f"--pin takes layer=scheme, such as 'fc=W8A8', not {text!r}")
    return layer, scheme


def main() -> None:
    """Entry point: errors that a user can act on are one line, not a traceback."""
    try:
        app()
    except (MpqError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(3 if isinstance(error, UnreachableError) else 2)
