"""GPTQModel: a ``quantize_config.json`` whose ``dynamic`` has one rule for each layer. The codes are GPTQ's own."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def gptqmodel(config: BitConfig, path: Path, model: nn.Module | None) -> Exported:
    """Write ``quantize_config.json``.

    Each layer has a rule ``+:^name$`` of its own, each layer left out ``-:^name$``: the first match counts, and these
    match one name each.

    Raises:
        ExportError: If GPTQModel can't hold the config.
    """
    check(config, RUNTIMES["gptqmodel"], model)
    rules = {name: integer_settings(c.weight) for name, c in config.layers.items()}
    usual = json.loads(Counter(map(json.dumps, rules.values())).most_common(1)[0][0])
    written = {
        **usual,
        "desc_act": False,
        # Its way to order columns by groups refuses whole channels.
        "act_group_aware": all(rule["group_size"] > 0 for rule in rules.values()),
        "lm_head": "lm_head" in config,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "dynamic": {
            **{f"+:^{re.escape(name)}$": rule for name, rule in rules.items()},
            **{f"-:^{re.escape(name)}$": {} for name in left_out(config)},
        },
    }
    path.write_text(json.dumps(written, indent=1) + "\n", "utf8")
    held = rounded_by("GPTQModel", config)
    return Exported("gptqmodel", path, held, "GPTQModel.load(model, QuantizeConfig.from_quant_config(json))")


def read_gptqmodel(settings: Mapping[str, Any], layers: Mapping[str, LayerSpec]) -> dict[str, Scheme]:
    """What GPTQModel gives each linear layer: the first rule of ``dynamic`` that matches, else the common settings."""
    found = {}
    for name, layer in layers.items():
        rule = _rule(take(settings, "dynamic", dict, "the config", {}), name)
        if (
            layer.op == "linear"
            and rule is not None
            and (in_block(name) or (settings.get("lm_head") and name == "lm_head"))
        ):
            found[name] = read_integer({**settings, **rule}, f"the rule of layer {name!r}", group_size=128)
    return found


def _rule(dynamic: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The settings that a name overrides, None if it is left out."""
    for pattern, rule in dynamic.items():
        if matches(re.sub(r"^[+-]:", "", pattern), name, "'dynamic'"):
            return None if pattern.startswith("-:") else of_kind(rule, dict, f"{pattern!r} in 'dynamic'")
    return {}
