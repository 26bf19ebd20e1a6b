"""A self-contained HTML report of a config: one file, no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from mpq.config import BitConfig
from mpq.errors import MpqError
from mpq.explanation import Explanation, explain_config
from mpq.files import write_text
from mpq.viz import report_charts as charts
from mpq.viz import report_tables as tables
from mpq.viz.report_tables import amount, number, predicted

if TYPE_CHECKING:
    from mpq.analysis import Analysis
    from mpq.frontier import Frontier

_EXPECTED_COVERAGE = 0.8


def write_report(
    config: BitConfig,
    path: str | Path,
    *,
    analysis: Analysis | None = None,
    frontier: Frontier | None = None,
    measured: Mapping[str, BitConfig] | None = None,
    title: str | None = None,
) -> Path:
    """Write the report.

    A config alone gives the summary, its budgets, charts and tables of its layers, and provenance. Uniform schemes, the
    frontier, sensitivities, prices and runners-up need the analysis.

    Args:
        config: What it is about.
        path: Where to.
        analysis: What the config was made from; by default the frontier's.
        frontier: To draw; by default the analysis' over the first budgeted metric that binds, which takes some seconds.
        measured: Label -> measured config, to compare with; the same bits with figures stand for a config without.
        title: Heading; names the model's class by default.

    Raises:
        ConfigError: If the config is of another model than the analysis or the frontier, or has other schemes.
        MpqError: If the frontier or the measured configs are of another type.
    """
    from mpq.frontier import Frontier

    if frontier is not None and not isinstance(frontier, Frontier):
        raise MpqError(f"frontier must be what analysis.pareto() gives, not {type(frontier).__name__}")
    if measured is not None and not isinstance(measured, Mapping):
        raise MpqError("measured maps labels to measured configs, such as {'uniform 4 bits': config}")
    if config.measured is None:
        same = (c.measured for c in (measured or {}).values() if c.schemes() == config.schemes())
        config = replace(config, measured=next(filter(None, same), None))
    analysis = frontier.analysis if analysis is None and frontier is not None else analysis
    why = _explained(config, analysis)
    if analysis is not None and frontier is None:
        frontier = analysis.pareto(_axis(config, analysis, why))
    script = _resource("report.js")
    template = _environment().get_template("report.html.j2")
    page = template.render(
        title=title or f"Bit allocation of {config.provenance.get('model_class', 'a model')}",
        style=_resource("report.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        config=config,
        verdict=_verdict(config),
        cards=_cards(config, analysis),
        notes=_notes(config),
        compared=tables.comparison(config, analysis, measured or {}),
        frontier=None if frontier is None else charts.frontier_chart(frontier, config),
        budgets=tables.budget_table(config, why),
        depth=charts.depth_chart(config),
        layers=tables.layer_table(config, why),
        explained=why is not None,
        heat=None if analysis is None else charts.heat_map(analysis, config),
        findings=tables.findings_table(config),
        outside=tables.outside_table(config),
        provenance=tables.provenance(config),
        file=base64.b64encode(config.to_json().encode()).decode(),
        loss=tables.loss_name(config),
    )
    return write_text(path, page)


def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("mpq.viz", ".")
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _resource(name: str) -> str:
    return resources.files("mpq.viz").joinpath(name).read_text("utf8")


def _axis(config: BitConfig, analysis: Analysis, why: Explanation | None) -> str:
    """The first budgeted metric that a frontier can have, one that binds if there is one; else size."""
    metrics = [b.metric for b in tables.cost_budgets(config)]
    sums = [m for m in metrics if analysis.cost(m).rows.shape[2] == 1]
    return min(sums, key=lambda m: not (why and why.prices[m].binding), default="size")


def _explained(config: BitConfig, analysis: Analysis | None) -> Explanation | None:
    budgets = tables.cost_budgets(config)
    if analysis is None or not budgets:
        return None
    return explain_config(analysis, config, budgets)


def _verdict(config: BitConfig) -> str:
    """The answer in a sentence."""
    size = config.metrics["size"]
    share, bits = size["value"] / size["float"], f"{config.avg_bits:.2f} bits per weight on average"
    text = f"{len(config)} layers with {bits}: {amount(size['value'], size['unit'])}, {share:.1%} of the float model"
    measured = config.measured
    if measured is None:
        return f"{text}. Its loss is predicted, not measured."
    if measured.accuracy is None or measured.float_accuracy is None:
        return f"{text}. Measured: {measured}."
    change = 100 * (measured.accuracy - measured.float_accuracy)
    told = (
        "as accurate as float" if not change else f"{abs(change):.2f} points {'above' if change > 0 else 'below'} float"
    )
    return f"{text}. Measured accuracy is {measured.accuracy:.2%}, {told}, on {measured.samples:,} samples."


def _cards(config: BitConfig, analysis: Analysis | None) -> list[tuple[str, str, str]]:
    """Label, figure and what it compares with."""
    cards = []
    for metric, found in config.metrics.items():
        share = f"{found['value'] / found['float']:.1%} of float" if found["float"] else ""
        if metric == "avg_bits":
            share = f"{config.stored_bits:.2f} stored, with scales"
        if metric != "stored_bits" and found["value"]:
            cards.append((tables.NAMES.get(metric, metric), amount(found["value"], found["unit"]), share))
    error = config.predicted["stderr"]
    spread = "" if error is None else f"± {number(error, 2)}"
    cards.append((f"predicted rise of {tables.loss_name(config)}", number(predicted(config)), spread))
    m = config.measured
    if m is not None and m.accuracy is not None:
        cards.append(("accuracy", f"{m.accuracy:.2%}", f"float {m.float_accuracy:.2%}" if m.float_accuracy else ""))
    return cards + _against_uniform(config, analysis)


def _against_uniform(config: BitConfig, analysis: Analysis | None) -> list[tuple[str, str, str]]:
    """What the smallest uniform scheme with as little predicted loss takes, if there is one."""
    uniform = tables.uniform_configs(analysis)
    as_good = {n: c for n, c in uniform.items() if predicted(c) <= predicted(config)}
    if not as_good:
        return []
    name = min(as_good, key=lambda n: as_good[n].size_bytes)
    more = as_good[name].size_bytes / config.size_bytes - 1
    told = f"{name} everywhere, {abs(more):.1%} {'larger' if more >= 0 else 'smaller'}"
    return [("as good with one scheme", amount(as_good[name].size_bytes, "bytes"), told)]


def _notes(config: BitConfig) -> list[str]:
    """What to know before trusting the figures."""
    gap, status = config.solver.get("gap"), config.solver["status"]
    found = []
    if config.measured is None:
        found.append(
            "Not measured: losses here are predictions. config.with_measured(mpq.Evaluator(model, "
            "labelled_batches).measure(config)) adds accuracy on data."
        )
    if status == "feasible":
        found.append(f"Not proven optimal: the best that was found{'' if gap is None else f', gap {gap:.2%}'}.")
    covered = config.provenance.get("coverage", {}).get("parameters", 1.0)
    if covered < _EXPECTED_COVERAGE:
        found.append(f"Only {covered:.0%} of the parameters are in searched layers; see Outside the search.")
    found += [config.findings] if config.findings else []
    found += [f"Costs: {config.cost_notes}"] if config.cost_notes else []
    return found
