"""Fills in what pages repeat from the code, so that it can't go stale.

A line ``<!-- mpq runtime vllm -->`` stands for the rules of that runtime, as `mpq.export.runtimes` has them; `SECTIONS`
has all kinds. MkDocs calls `on_page_markdown` and `on_files`; the test of the pages calls `expand`.
"""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from collections.abc import Callable, Iterable
from inspect import getdoc
from pathlib import Path
from typing import Any

import typer

from mpq.cli import app
from mpq.cost_models import COST_MODELS, all_devices
from mpq.export import EXPORTERS
from mpq.export.importing import IMPORTERS
from mpq.export.runtimes import RUNTIMES
from mpq.search import BASELINES, SEARCHES, SOLVERS
from mpq.sensitivity import ESTIMATORS
from mpq.units import si

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"^<!-- mpq (?P<what>[a-z]+)(?: (?P<about>.+?))? -->$", re.MULTILINE)
_SHOWN_KERNELS = 24


def expand(markdown: str) -> str:
    """The text of a page with its marks filled in."""
    return MARK.sub(lambda mark: SECTIONS[mark["what"]](*filter(None, [mark["about"]])), markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs: the text of a page."""
    return expand(markdown)


def on_files(files: Any, config: Any) -> Any:
    """MkDocs: the notebooks are files of the site, to be downloaded."""
    from mkdocs.structure.files import File

    for path in _notebooks():
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
    return files


def _notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table without the columns that are empty throughout."""
    names, body = list(head), list(map(list, rows))
    shown = [i for i in range(len(names)) if any(row[i] for row in body)]
    lines = [names, ["---"] * len(names), *body]
    return "\n".join("| " + " | ".join(_cell(line[i]) for i in shown) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    """Bars would end the cell, but for those in code."""
    return "`".join(part if i % 2 else part.replace("|", "\\|") for i, part in enumerate(text.split("`")))


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{n}`" for n in names)


def _first_sentence(thing: Any) -> str:
    """Of its docstring, on one line; double backticks are single ones here."""
    text = " ".join((getdoc(thing) or "").split("\n\n")[0].split()).replace("``", "`")
    return re.split(r"(?<=[a-z)`\]])\. ", text)[0].rstrip(".")


def _named(things: dict[str, Any]) -> str:
    return _table(("name", "what it does"), ((f"`{n}`", _first_sentence(t)) for n, t in things.items()))


def exporters() -> str:
    """All exporters: page, extra, and whether their files can be read back."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]["optional-dependencies"]
    rows = []
    for name, where in EXPORTERS.items():
        module = str(where).partition(":")[0].rpartition(".")[2].replace("_", "-")
        extra = next((f"`mpq[{e}]`" for e in extras if e.startswith("export-") and module.startswith(e[7:])), "none")
        page = f"[{name}]({name.replace('.', '-')}.md)"
        rows.append((page, extra, "yes" if name in IMPORTERS else "", "yes" if name in RUNTIMES else ""))
    return _table(("name", "extra", "`mpq.import_config`", "`runtime=`"), rows)


def runtime(name: str) -> str:
    """The rules of a runtime."""
    r = RUNTIMES[name]
    kernels = [
        (_code(k.weights), _code(k.activations), f"multiples of {k.features}" if k.features > 1 else "any")
        for k in r.kernels
    ]
    rules = [f"Layers that it quantizes: {_code(sorted(r.ops))}. Others stay float."]
    if r.grouped_ops is not None:
        rules.append(f"Groups only in {_code(sorted(r.grouped_ops))}.")
    if r.whole_groups:
        rules.append("A group size must divide the input features.")
    if r.multiple_of > 1:
        rules.append(f"Input and output features must be multiples of {r.multiple_of}.")
    if r.fused:
        rules.append(f"One scheme for each of: {'; '.join(map(_code, r.fused))}.")
    if r.routers:
        rules.append("Routers of mixtures of experts stay float.")
    if r.blocks:
        rules.append("Only layers of numbered blocks, and `lm_head`.")
    if r.experts:
        each = "all experts of a layer" if r.experts == "all" else "each projection of all experts of a layer"
        rules.append(f"One scheme for {each}.")
    head = ("weights", "inputs of the layer", "input features")
    how = "`[48]` stands for one of these digits, `*` for any number, `(...)?` for what may be left out."
    listed = "\n".join(f"- {rule}" for rule in [*rules, f"Source: {r.source}."])
    return f"{_table(head, kernels)}\n{how}\n\n{listed}\n"


def devices() -> str:
    """All device profiles."""
    rows = ((f"`{d.name}`", d.kind, d.description, d.kernel_names()) for d in all_devices().values())
    return _table(("device", "kind", "description", "kernels (weight x input)"), rows)


def device(name: str) -> str:
    """One profile: kernels, memory, and where each figure comes from."""
    d = all_devices()[name]
    parts = [f"### `{d.name}`\n\n{d.description} Tensors that stay float are `{d.float_format}`.\n"]
    if 0 < len(d.kernels) <= _SHOWN_KERNELS:
        rows = (
            (
                f"`{k.weight}`",
                f"`{k.activation}`",
                "" if k.peak is None else si(k.peak, "MAC/s"),
                "" if k.runs_as is None else " x ".join(f"`{n}`" for n in k.runs_as),
            )
            for k in d.kernels
        )
        parts.append(_table(("weight", "input", "peak", "computed as"), rows))
    elif d.kernels:
        parts.append(f"Kernels (weight x input): {d.kernel_names()}.\n")
    for m in d.memory:
        size = "" if m.size_bytes == float("inf") else f" of {si(m.size_bytes, 'B')}"
        parts.append(f"- memory `{m.name}`{size} at {si(m.bandwidth, 'B/s')}")
    sources = _table(("figure", "source"), ((f"`{n}`", s) for n, s in d.sources.items()))
    indented = "\n".join(f"    {line}" for line in sources.splitlines())
    parts.append(f'\n??? note "Where the figures come from"\n\n{indented}\n')
    return "\n".join(parts)


def benchmark(name: str) -> str:
    """A paragraph of ``benchmarks/README.md`` with its tables; it names the script that prints it."""
    text = (ROOT / "benchmarks" / "README.md").read_text("utf8")
    found = re.search(rf"^\*\*{re.escape(name)}\*\*.*?(?=^\*\*\w|\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise KeyError(f"benchmarks/README.md has no paragraph {name!r}")
    script = re.compile(r"`(\w+\.py)")
    return script.sub(r"`benchmarks/\1", found[0], count=1)


def public(module: str) -> str:
    """Every public name of a module, from its docstrings."""
    found = importlib.import_module(module)
    names = getattr(found, "__all__", None)
    if names is None:
        return f"::: {module}\n    options:\n      show_root_heading: false\n"
    classes = [n for n in names if not (n == "export" and module == "mpq")]
    return "\n".join(f"::: {module}.{n}\n" for n in classes)


def commands() -> str:
    """The command line, from its own help."""
    found: Any = typer.main.get_command(app)
    parts = []
    for name, command in found.commands.items():
        rows = (
            (", ".join(f"`{o}`" for o in p.opts) if p.opts[0].startswith("-") else f"`{p.name.upper()}`", p.help or "")
            for p in command.params
        )
        text = (command.help or "").strip()
        parts.append(f"## `mpq {name}`\n\n{text}\n\n{_table(('argument', 'meaning'), rows)}")
    return "\n".join(parts)


def notebooks(prefix: str) -> str:
    """Links to all notebooks with their titles.

    Args:
        prefix: Where the folder is, as seen from the page.
    """
    links = []
    for path in _notebooks():
        cells = json.loads(path.read_text("utf8"))["cells"]
        title = next("".join(c["source"]).splitlines()[0] for c in cells if c["cell_type"] == "markdown")
        links.append(f"- [{title.lstrip('# ')}]({prefix}{path.name}) (`notebooks/{path.name}`)")
    return "\n".join(links)


def formats() -> str:
    """The list of number formats in the docstring of `mpq.quantizers.formats`."""
    text = getdoc(importlib.import_module("mpq.quantizers.formats")) or ""
    listed = text.split("::\n", 1)[1].split("\n\nOptions", 1)[0]
    return "```text\n" + "\n".join(line.removeprefix("    ") for line in listed.strip("\n").splitlines()) + "\n```\n"


def recipes() -> str:
    """The table of roundings in the docstring of `mpq.quantizers.recipes`."""
    text = getdoc(importlib.import_module("mpq.quantizers.recipes")) or ""
    return "\n".join(line for line in text.splitlines() if line.startswith("|")).replace("``", "`") + "\n"


def snippet(name: str) -> str:
    """A file of ``docs/snippets``: what several pages start with."""
    return (ROOT / "docs" / "snippets" / f"{name}.md").read_text("utf8").rstrip("\n")


SECTIONS: dict[str, Callable[..., str]] = {
    "baselines": lambda: _named(BASELINES),
    "benchmark": benchmark,
    "commands": commands,
    "device": device,
    "devices": devices,
    "estimators": lambda: _named(ESTIMATORS),
    "exporters": exporters,
    "formats": formats,
    "importers": lambda: _code(IMPORTERS),
    "metrics": lambda: _named(COST_MODELS),
    "notebooks": notebooks,
    "public": public,
    "recipes": recipes,
    "runtime": runtime,
    "searches": lambda: _named(SEARCHES),
    "snippet": snippet,
    "solvers": lambda: _named(SOLVERS),
}
