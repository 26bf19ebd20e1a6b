"""The tables of the HTML report: a config, and what its analysis adds, as rows of text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mpq.analysis import Analysis
from mpq.budget import UNITS, Budget
from mpq.config import BitConfig, LayerChoice
from mpq.explanation import Explanation, Price
from mpq.units import show, si
from mpq.viz.plots import LOSSES

NAMES = {
    "size": "size",
    "avg_bits": "average bits",
    "stored_bits": "stored bits",
    "bitops": "BitOps",
    "peak_memory": "peak memory",
}


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What is shown.
        value: Sorts the column by numbers.
        bar: Length of a bar before the text, 0 to 1.
    """

    text: str
    value: float | None = None
    bar: float | None = None


@dataclass(frozen=True)
class Column:
    """Heading of a column; numbers are aligned to the right."""

    name: str
    number: bool = True


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        name: Its id.
        caption: What it shows, in a line.
        columns: Headings; the first column names the rows.
        rows: Cells by row.
        marked: Index of the row to point out.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    marked: int | None = None


def amount(value: float, unit: str) -> str:
    """A value of a metric with its unit, as short as the name of the metric allows.

    Example:
        >>> amount(144_398, "bytes"), amount(1.144e9, "bit operations")
        ('144.4 kB', '1.144 G')
    """
    return show(value, unit).removesuffix("BitOps").strip()


def number(value: float, digits: int = 3) -> str:
    """A number in few digits, without zeros in the exponent.

    Example:
        >>> number(0.0085425), number(1.2e-06), number(0.0)
        ('0.00854', '1.2e-6', '0')
    """
    return re.sub(r"e([+-])0*", lambda m: f"e{m[1].strip('+')}", f"{value:.{digits}g}")


def predicted(config: BitConfig) -> float:
    """Predicted rise of the loss, with interactions where they are known."""
    joint = config.predicted["with_interactions"]
    return config.predicted_loss if joint is None else joint


def loss_name(config: BitConfig) -> str:
    """What the loss is, in words."""
    name = str(config.provenance.get("loss", "loss"))
    return LOSSES.get(name, name)


def weight_bytes(choice: LayerChoice) -> float:
    """Bytes of a layer's weight with its scales."""
    transposed = choice.op.startswith("conv_transpose")  # output channels second
    return math.ceil(choice.weight.storage_bits(choice.weight_shape, int(transposed)) / 8)


def uniform_configs(analysis: Analysis | None) -> dict[str, BitConfig]:
    """Scheme -> the config that has it everywhere."""
    return {} if analysis is None else {str(s): analysis.uniform(s) for s in analysis.space.uniform_schemes}


def comparison(config: BitConfig, analysis: Analysis | None, measured: Mapping[str, BitConfig]) -> Table:
    """The config against the float model, uniform schemes and other measured configs."""
    rivals = _rivals(config, analysis, measured)
    metrics = [m for m in config.metrics if m != "stored_bits"]
    seen = [c.measured for c in rivals.values() if c.measured is not None]
    quantities = [q for q in ("accuracy", "loss", "kl", "mse") if any(getattr(m, q) is not None for m in seen)]
    rows = [_float_row(config, metrics, quantities)]
    for label, rival in rivals.items():
        cells = [Cell(label)]
        for m in metrics:
            cells.append(_metric(rival.metrics.get(m)))
        cells.append(Cell(number(predicted(rival)), predicted(rival)))
        cells += [_quantity(q, getattr(rival.measured, q, None)) for q in quantities]
        rows.append(tuple(cells))
    names = {"accuracy": "accuracy", "loss": "measured loss", "kl": "KL to float", "mse": "squared error"}
    heads = [*(NAMES.get(m, m) for m in metrics), "predicted rise", *(names[q] for q in quantities)]
    columns = (Column("config", number=False), *map(Column, heads))
    marked = 1 + next(i for i, c in enumerate(rivals.values()) if c is config)
    return Table("comparison", "This config against others", columns, tuple(rows), marked)


def _rivals(config: BitConfig, analysis: Analysis | None, measured: Mapping[str, BitConfig]) -> dict[str, BitConfig]:
    """Label -> config, each map of bits once, by falling size."""
    found = {label: c for label, c in measured.items() if c.schemes() != config.schemes()}
    rivals = {"this config": config, **found}
    known = [c.schemes() for c in rivals.values()]
    for scheme, uniform in uniform_configs(analysis).items():
        if uniform.schemes() not in known:
            rivals[f"{scheme} everywhere"] = uniform
    return dict(sorted(rivals.items(), key=lambda item: -item[1].size_bytes))


def _float_row(config: BitConfig, metrics: list[str], quantities: list[str]) -> tuple[Cell, ...]:
    accuracy = None if config.measured is None else config.measured.float_accuracy
    known = {"accuracy": accuracy}
    cells = [_metric({**config.metrics[m], "value": config.metrics[m]["float"]}) for m in metrics]
    return (Cell("float"), *cells, Cell("0", 0.0), *(_quantity(q, known.get(q)) for q in quantities))


def _metric(metric: Mapping[str, Any] | None) -> Cell:
    if metric is None or (not metric["value"] and not metric["float"]):
        return Cell("-")
    return Cell(amount(metric["value"], metric["unit"]), metric["value"])


def _quantity(name: str, value: float | None) -> Cell:
    if value is None:
        return Cell("-")
    return Cell(f"{value:.2%}" if name == "accuracy" else number(value), value)


def budget_table(config: BitConfig, why: Explanation | None) -> Table:
    """What is used of each budget; with an explanation also whether it binds, its price and what it can reach."""
    columns = [Column("budget", number=False), *map(Column, ("used", "limit", "slack", "share used"))]
    columns += (
        [] if why is None else [Column("binds", number=False), Column("price", number=False), Column("can reach")]
    )
    rows = []
    for text in config.budgets:
        used, limit, unit = _usage(config, text)
        share = None if used is None or not limit else used / limit
        cells = [Cell(text), _amount(used, unit), _amount(limit, unit)]
        cells.append(_amount(None if used is None else limit - used, unit))
        cells.append(Cell("-") if share is None else Cell(f"{share:.1%}", share, min(max(share, 0.0), 1.0)))
        metric = text.partition("<=")[0]
        if why is not None and metric in why.prices:
            reach = why.feasibility.metrics[metric]
            cells += _priced(why.prices[metric])
            cells.append(Cell(f"{amount(reach.least, unit)} to {amount(reach.most, unit)}", reach.least))
        elif why is not None:
            cells += [Cell("-")] * 3
        rows.append(tuple(cells))
    return Table("budget-table", "What is used of each limit", tuple(columns), tuple(rows))


def _priced(price: Price) -> list[Cell]:
    """Whether a limit binds, and what more of it would buy."""
    if price.price > 0:
        saved = number(price.price * price.step, 2)
        return [Cell("yes"), Cell(f"{amount(price.step, price.unit)} more would lower the rise by about {saved}")]
    if price.binding:
        return [Cell("yes"), Cell("more pays once several layers can change together")]
    return [Cell("no"), Cell("0: more would buy nothing")]


def cost_budgets(config: BitConfig) -> tuple[Budget, ...]:
    """The budgets that limit a metric of costs: not accuracy, and not the loss."""
    return tuple(Budget.parse(b) for b in config.budgets if b.partition("<=")[0] in UNITS.keys() - {"accuracy_drop"})


def _usage(config: BitConfig, text: str) -> tuple[float | None, float, str]:
    """What is used of a budget (None if not measured), its limit, and the unit."""
    metric, _, limit = text.partition("<=")
    if metric == "accuracy_drop":
        m = config.measured
        known = m is not None and m.accuracy is not None and m.float_accuracy is not None
        used = m.float_accuracy - m.accuracy if known else None  # type: ignore[union-attr, operator]
        return used, Budget.parse(text).value, "points"
    if metric not in UNITS:
        return predicted(config), float(limit), "loss"
    found = config.metrics[metric]
    return found["value"], Budget.parse(text).limit(found["float"]), found["unit"]


def _amount(value: float | None, unit: str) -> Cell:
    if value is None:
        return Cell("not measured")
    if unit == "points":
        return Cell(f"{100 * value:.2f} points", value)
    return Cell(number(value) if unit == "loss" else amount(value, unit), value)


def layer_table(config: BitConfig, why: Explanation | None) -> Table:
    """All layers; with an explanation also each one's runner-up."""
    words = ("layer", "op", "weight", "activation", "group", "runner-up")
    heads = ["layer", "depth", "op", "weight", "activation", "parameters", "weight bytes", "MACs", "predicted rise"]
    shared = len({c.group for c in config.layers.values()}) < len(config)
    heads += ["group"] if shared else []
    heads += [] if why is None else ["runner-up", "its rise", "margin"]
    by_group = {} if why is None else {row["group"]: row for row in why.table()}
    widest = max(c.weight.bits for c in config.layers.values())
    rows = []
    for i, (name, c) in enumerate(config.layers.items()):
        cells = [Cell(name), Cell(str(i + 1), i + 1), Cell(c.op)]
        cells.append(Cell(c.weight.name, c.weight.bits, c.weight.bits / widest))
        cells.append(Cell("float") if c.activation is None else Cell(c.activation.name, c.activation.bits))
        cells += [_count(c.parameters), _count(weight_bytes(c)), Cell(si(c.macs, ""), c.macs)]
        error = "" if c.stderr is None else f" ± {number(c.stderr, 1)}"
        cells.append(Cell(number(c.predicted_loss) + error, c.predicted_loss))
        cells += [Cell(c.group)] if shared else []
        cells += [] if why is None else _runner_up(by_group[c.group])
        rows.append(tuple(cells))
    columns = tuple(Column(h, number=h not in words) for h in heads)
    return Table("layers-table", "Layers in execution order", columns, tuple(rows))


def _runner_up(row: Mapping[str, Any]) -> list[Cell]:
    if row["runner_up"] is None:
        return [Cell("no other"), Cell("-"), Cell("-")]
    change, margin = row["runner_up_loss"], row["margin"]
    signed = ("+" if change >= 0 else "") + number(change, 2)
    return [Cell(row["runner_up"]), Cell(signed, change), Cell(number(margin, 2), margin)]


def _count(value: float) -> Cell:
    return Cell(f"{value:,.0f}", value)


def outside_table(config: BitConfig) -> Table:
    """Reason, modules, parameters and MACs of what was not searched."""
    found: dict[str, list[int]] = {}
    for o in config.outside:
        row = found.setdefault(o.reason, [0, 0, 0, 0])
        for i, value in enumerate((1, o.parameters, o.size_bytes, o.macs)):
            row[i] += value
    rows = tuple((Cell(reason), *map(_count, row)) for reason, row in found.items())
    columns = (Column("reason", number=False), *map(Column, ("modules", "parameters", "bytes", "MACs")))
    return Table("outside-table", "What was not searched, and stays as it is", columns, rows)


def findings_table(config: BitConfig) -> Table:
    """What the sanity gate saw in the sensitivities."""
    rows = tuple(
        tuple(Cell(str(f[key])) for key in ("group", "kind", "message", "action"))
        for f in config.provenance.get("findings", ())
    )
    heads = ("group", "finding", "what was seen", "what was done")
    columns = tuple(Column(h, number=False) for h in heads)
    return Table("findings-table", "What the sanity gate found in the sensitivities", columns, rows)


def provenance(config: BitConfig) -> list[tuple[str, str]]:
    """All that the config says of its origin, but for what is told elsewhere in the report."""
    told = {"findings", "cost_notes"}
    return [(k.replace("_", " "), _flat(v)) for k, v in sorted(config.provenance.items()) if k not in told]


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{k.replace('_', ' ')}: {_flat(v)}" for k, v in value.items()) or "none"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(_flat, value)) or "none"
    return number(value, 4) if isinstance(value, float) else str(value)
