"""What an exporter did, layer by layer."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpq.config import BitConfig

STATUSES = ("exact", "approximated", "left float")


@dataclass(frozen=True)
class Exported(os.PathLike[str]):
    """An exported config; where a path is expected it is that of its file.

    Attributes:
        tool: Name of the exporter.
        path: The file or folder written.
        layers: Layer name -> status and what the tool holds. ``exact``: our bits, format and groups, with our own
            values, or where the text says so with codes and scales that the tool makes itself; ``approximated``:
            something else, which the text names; ``left float``: not in the config.
        next_step: How the tool loads it, in one line.
    """

    tool: str
    path: Path
    layers: Mapping[str, tuple[str, str]]
    next_step: str = ""

    def __fspath__(self) -> str:
        return str(self.path)

    def summary(self) -> str:
        """One line: how many layers are exact."""
        counts = Counter(status for status, _ in self.layers.values())
        left = counts.pop("left float", 0)
        parts = ", ".join(f"{counts[s]} {s}" for s in STATUSES if counts[s])
        apart = f", {left} left float" if left else ""
        return f"{self.path} for {self.tool}: {parts} of {len(self.layers) - left} layers{apart}"

    def __repr__(self) -> str:
        width = max((len(n) for n in self.layers), default=0)
        rows = [f"  {n:<{width}}  {status:<12} {held}" for n, (status, held) in self.layers.items()]
        if len(rows) > 60:
            rows = [*rows[:30], f"  ... {len(rows) - 60} more layers ...", *rows[-30:]]
        return "\n".join([f"Exported {self.summary()}", *rows, *([f"  {self.next_step}"] if self.next_step else [])])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def rounded_by(tool: str, config: BitConfig) -> dict[str, tuple[str, str]]:
    """What a report says of layers whose codes and scales a tool makes itself."""
    return {n: ("exact", f"{c.scheme}; codes and scales by {tool}") for n, c in config.layers.items()}
