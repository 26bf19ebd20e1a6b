"""A config as a table in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mpq.config import BitConfig


def print_config(config: BitConfig, to: Console) -> None:
    """The per-layer table and the summary."""
    table = Table("layer", "scheme", "bits", "parameters", "M MACs", "predicted loss")
    table.columns[0].overflow = "fold"
    for column in table.columns[3:]:
        column.justify = "right"
    for name, c in config.layers.items():
        bits = f"{'#' * min(16, c.weight.bits):<8} {c.weight.bits}"
        loss = f"{c.predicted_loss:.2g}" if c.stderr is None else f"{c.predicted_loss:.2g} +- {c.stderr:.1g}"
        table.add_row(escape(name), str(c.scheme), bits, f"{c.parameters:,}", f"{c.macs / 1e6:,.2f}", loss)
    to.print(table)
    to.print(escape(config.summary()), highlight=False, soft_wrap=True)
