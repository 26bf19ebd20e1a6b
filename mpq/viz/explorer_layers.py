"""What an explorer shows of the layers of one config: the rows, and their table. No widgets in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mpq.config import BitConfig
from mpq.explanation import Explanation
from mpq.quantizers import Scheme

_CELL = "padding:1px 8px;white-space:nowrap;"
_HEAD = f"{_CELL}position:sticky;top:0;background:var(--jp-layout-color0,Canvas);"


@dataclass(frozen=True)
class LayerRow:
    """One layer of a config, and what it might have had.

    Attributes:
        name: Of the layer.
        op: Its op type.
        shape: Of its weight.
        parameters: Weight elements.
        scheme: What it has.
        bits: Of its weight.
        runner_up: What its group would have instead; None where nothing is known of it.
        runner_up_bits: Of the weight then.
        change: Loss and metric -> by how much they would change, in words.
        price: What the runner-up would cost in loss, with the change of the metric priced in.
        shared: How many layers have the same scheme by rule, this one included.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    parameters: int
    scheme: str
    bits: float
    runner_up: str | None = None
    runner_up_bits: float | None = None
    change: Mapping[str, str] | None = None
    price: float | None = None
    shared: int = 1

    @property
    def hover(self) -> str:
        """All of it in a few lines of HTML."""
        shape = " x ".join(map(str, self.shape))
        lines = [f"<b>{escape(self.name)}</b>: {self.scheme}", f"{self.op} {shape}, {self.parameters:,} parameters"]
        if self.change is not None:
            changes = ", ".join(f"{what} {by}" for what, by in self.change.items())
            lines += [f"runner-up {self.runner_up}: {changes}", f"price {self.price:.2g}"]
        if self.shared > 1:
            lines.append(f"one scheme for {self.shared} layers")
        return "<br>".join(lines)


def layer_rows(config: BitConfig, why: Explanation | None) -> list[LayerRow]:
    """A row for each layer by depth, with its runner-up where the choice can be explained."""
    groups = {} if why is None else {name: row for row in why.table() for name in row["layers"]}
    rows = []
    for name, choice in config.layers.items():
        facts = name, choice.op, choice.weight_shape, choice.parameters, str(choice.scheme), choice.weight.bits
        rows.append(LayerRow(*facts, **_runner_up(groups.get(name), why)))
    return rows


def _runner_up(row: Mapping[str, Any] | None, why: Explanation | None) -> dict[str, Any]:
    if row is None or why is None:
        return {}
    if row["runner_up"] is None:
        return {"shared": len(row["layers"])}
    changes = {"loss": f"{row['runner_up_loss']:+.2g}"}
    for metric in why.prices:
        text = why.analysis.costs[metric].scaled(row["runner_up_costs"][metric])
        changes[metric] = text if text.startswith("-") else f"+{text}"
    return {
        "runner_up": row["runner_up"],
        "runner_up_bits": Scheme.parse(row["runner_up"]).weight.bits,
        "change": changes,
        "price": row["margin"],
        "shared": len(row["layers"]),
    }


def layer_table(rows: Sequence[LayerRow]) -> str:
    """The rows as an HTML table that scrolls."""
    explained = next((row.change for row in rows if row.change is not None), None)
    changes = [] if explained is None else list(explained)
    heads = ["layer", "op", "parameters", "scheme"]
    heads += [] if explained is None else ["runner-up", *changes, "price"]
    cells = []
    for row in rows:
        line = [row.name, row.op, f"{row.parameters:,}", row.scheme]
        if row.change is not None:
            line += [str(row.runner_up), *row.change.values(), f"{row.price:.2g}"]
        elif explained is not None:
            line += ["(only choice)", *[""] * (len(changes) + 1)]
        cells.append(line)
    sides = ["right" if head in ("parameters", "price", *changes) else "left" for head in heads]
    body = "".join(_line("td", line, sides) for line in cells)
    return (
        "<div style='max-height:20em;overflow:auto;line-height:1.5'><table style='border-collapse:collapse'>"
        f"<thead>{_line('th', heads, sides)}</thead><tbody>{body}</tbody></table></div>"
    )


def _line(tag: str, cells: Sequence[str], sides: Sequence[str]) -> str:
    style = _CELL if tag == "td" else _HEAD
    parts = (f"<{tag} style='{style}text-align:{s}'>{escape(c)}</{tag}>" for c, s in zip(cells, sides, strict=True))
    return f"<tr>{''.join(parts)}</tr>"
