"""Flat JSON: layer name -> weight and activation format, for scripts that need nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq.errors import ConfigError
from mpq.export.fields import of_kind, read_format, take
from mpq.export.report import Exported
from mpq.layers import LayerSpec
from mpq.quantizers import Scheme

if TYPE_CHECKING:
    from torch import nn

    from mpq.config import BitConfig


def flat_json(config: BitConfig, path: Path, model: nn.Module | None) -> Exported:
    """Write ``{layer: {"weight": "int4", "activation": "int8:tensor:asym"}}``; every format fits."""
    layers = {
        name: {"weight": c.weight.name, "activation": None if c.activation is None else c.activation.name}
        for name, c in config.layers.items()
    }
    path.write_text(json.dumps(layers, indent=1) + "\n", "utf8")
    return Exported("json", path, {n: ("exact", str(c.scheme)) for n, c in config.layers.items()})


def read_flat(settings: Mapping[str, Any], layers: Mapping[str, LayerSpec]) -> dict[str, Scheme]:
    """What the file says of each layer.

    Raises:
        ConfigError: If the model has no such layer, or mpq no such format.
    """
    found = {}
    for name, entry in settings.items():
        where = f"layer {name!r}"
        if name not in layers:
            raise ConfigError(f"the model has no {where}")
        names = of_kind(entry, dict, where)
        activation = take(names, "activation", str, where, "")
        weight = read_format(take(names, "weight", str, where), where)
        found[name] = Scheme(weight, read_format(activation, where) if activation else None)
    return found
