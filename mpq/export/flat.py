"""Flat JSON: layer name -> weight and activation format, for scripts that need nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpq.config import BitConfig


def flat_json(config: BitConfig, path: str | Path, **options: Any) -> Path:
    """Write ``{layer: {"weight": "int4", "activation": "int8:tensor:asym"}}``; every format fits.

    Args:
        config: The bits.
        path: Where to.
        **options: None are known.

    Raises:
        TypeError: If options are given.
    """
    if options:
        raise TypeError(f"the json exporter takes no options, not {', '.join(options)}")
    layers = {
        name: {"weight": c.weight.name, "activation": None if c.activation is None else c.activation.name}
        for name, c in config.layers.items()
    }
    Path(path).write_text(json.dumps(layers, indent=1) + "\n", "utf8")
    return Path(path)
