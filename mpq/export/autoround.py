"""AutoRound: a ``layer_config`` with the full name of each layer. Codes and scales are AutoRound's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq.errors import ConfigError
from mpq.export.check import check, left_out
from mpq.export.fields import matches, of_kind, read_integer, take
from mpq.export.integers import in_block, integer_settings
from mpq.export.report import Exported, rounded_by
from mpq.export.runtimes import RUNTIMES
from mpq.layers import LayerSpec
from mpq.quantizers import Scheme

if TYPE_CHECKING:
    from torch import nn

    from mpq.config import BitConfig


def autoround(config: BitConfig, path: Path, model: nn.Module | None) -> Exported:
    """Write a JSON for ``AutoRound(model, tokenizer, layer_config=json)``.

    AutoRound takes a name that is part of others for all of them; full names that all are there leave nothing to that.
    Layers that stay float have 16 bits.

    Raises:
        ExportError: If AutoRound can't hold the config.
    """
    check(config, RUNTIMES["autoround"], model)
    written = {n: {**integer_settings(c.weight), "data_type": "int", "act_bits": 16} for n, c in config.layers.items()}
    apart = {name: {"bits": 16, "act_bits": 16} for name in left_out(config)}
    path.write_text(json.dumps({**written, **apart}, indent=1) + "\n", "utf8")
    # The symmetry for all chooses how the file packs zero points, and that for symmetric layers holds no others.
    sym = "" if all(c.weight.symmetric for c in config.layers.values()) else "sym=False, "
    use = f"AutoRound(model, tokenizer, {sym}layer_config=json).quantize_and_save(folder)"
    return Exported("autoround", path, rounded_by("AutoRound", config), use)


def read_autoround(settings: Mapping[str, Any], layers: Mapping[str, LayerSpec]) -> dict[str, Scheme]:
    """What AutoRound gives each linear layer of a block: its own entry, or the first that is found in its name.

    Layers whose features are no multiples of 32 it leaves float.

    Args:
        settings: A ``layer_config``, whose default is AutoRound's own (4 bits, groups of 128), or the
            ``quantization_config`` of a checkpoint, whose ``extra_config`` has what differs from the default.
        layers: Quantizable layers of the model.

    Raises:
        ConfigError: If inputs are quantized too, or a field is missing or wrong.
    """
    entries = take(settings, "extra_config", dict, "the config", {}) if "bits" in settings else dict(settings)
    defaults = {"bits": 4, "group_size": 128, "sym": True}
    defaults |= {k: v for k, v in settings.items() if k in defaults and "bits" in settings}
    found = {}
    for name, layer in layers.items():
        own = _entry(entries, name)
        entry, where = {**defaults, **own}, f"the entry of layer {name!r}"
        if layer.op != "linear" or take(entry, "bits", int, where) >= 16 or not (own or in_block(name)):
            continue
        if any(n % RUNTIMES["autoround"].multiple_of for n in layer.weight_shape):
            continue
        if take(entry, "act_bits", int, where, 16) < 16 or entry.get("data_type", "int") != "int":
            raise ConfigError(f"layer {name!r}: only integer weights with float inputs are read from AutoRound")
        found[name] = read_integer(entry, where)
    return found


def _entry(entries: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the entries say of a layer: its own one counts, else the first whose key is found in its name."""
    key = name if name in entries else next((k for k in entries if matches(f".*(?:{k})", name, "the config")), None)
    return {} if key is None else of_kind(entries[key], dict, f"the entry {key!r}")
