"""Exporters: one file per downstream tool. ``mpq.export(cfg, "json", path)`` calls the one named.

An exporter is a function ``(BitConfig, path, **options) -> Path`` that refuses what its tool can't load, naming the
rule; a new one is one file here plus one line in `EXPORTERS`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from mpq.errors import MpqError
from mpq.export.flat import flat_json

if TYPE_CHECKING:
    from mpq.config import BitConfig


class Exporter(Protocol):
    """What every exporter is."""

    def __call__(self, config: BitConfig, path: str | Path, **options: Any) -> Path:
        """Write the file and return its path."""


EXPORTERS: dict[str, Exporter] = {"json": flat_json}


def export(config: BitConfig, name: str, path: str | Path, **options: Any) -> Path:
    """Write a config for a downstream tool.

    Args:
        config: The bits.
        name: A name in `EXPORTERS`.
        path: Where to.
        **options: The exporter's own.

    Raises:
        MpqError: If there is no such exporter, or the tool can't load the config.
    """
    if name not in EXPORTERS:
        raise MpqError(f"unknown exporter {name!r}; known: {', '.join(EXPORTERS)}")
    return EXPORTERS[name](config, path, **options)


class _CallableModule(ModuleType):
    """Lets the package be called, so that ``mpq.export(...)`` and ``mpq.export.EXPORTERS`` both work."""

    def __call__(self, config: BitConfig, name: str, path: str | Path, **options: Any) -> Path:
        """See `export`."""
        return export(config, name, path, **options)


sys.modules[__name__].__class__ = _CallableModule
