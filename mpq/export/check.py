"""Refusing what a runtime can't load, by name, with the rule and the fix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mpq.errors import ExportError
from mpq.export.runtimes import Runtime

if TYPE_CHECKING:
    from torch import nn

    from mpq.config import BitConfig


def check(config: BitConfig, runtime: Runtime, model: nn.Module | None = None) -> None:
    """Refuse a config that a runtime would load wrongly or not at all.

    Args:
        config: The bits.
        runtime: Its rules.
        model: The network, to see its names, and which layers share one weight now; without it the config says which
            did when it was made.

    Raises:
        ExportError: Naming the layers, the rule and the fix.
    """
    for name, choice in config.layers.items():
        why = runtime.refusal(choice.op, choice.weight_shape, choice.scheme)
        if why is not None:
            raise ExportError(f"layer {name!r} has {choice.scheme}, but {why}")
    for name, what in runtime.stay_float(config.layers).items():
        raise ExportError(
            f"{runtime.name} leaves layer {name!r} float, being {what}; skip it, or allocate with "
            f"runtime={runtime.name!r}"
        )
    modules = {} if model is None else dict(model.named_modules())
    known = dict.fromkeys(
        [*config.layers, *left_out(config), *(n for n, m in modules.items() if _weight(m) is not None)]
    )
    for members in runtime.fused_sets(known):
        schemes = {n: str(config[n].scheme) for n in members if n in config}
        _whole(schemes, members, f"{runtime.name} loads them as one tensor", "skip all of them or none")
    if model is not None:
        missing = [n for n, c in config.layers.items() if c.op != "attention_in_proj" and n not in modules]
        if missing:  # several tools ignore names that they don't find
            raise ExportError(f"there is no layer {missing[0]!r} in the model; the config was made for another one")
    recorded = [names for names in config.provenance.get("tied", ()) if any(n in config for n in names)]
    for members in recorded if model is None else _tied(model, config):
        formats = {n: config[n].weight.name for n in members if n in config}  # an embedding rounds no input
        _whole(formats, members, "they share one weight", "a tied head can't be split: skip both, or untie them")


def left_out(config: BitConfig) -> list[str]:
    """Layers that a tool might quantize and must leave as they are."""
    others = (o for o in config.outside if o.name not in config.layers and not o.name.startswith("("))
    return list(dict.fromkeys(o.name for o in others if o.kind != "other"))


def _whole(held: Mapping[str, str], members: list[str], why: str, fix: str) -> None:
    """Refuse a set of layers of which some stay float, or which hold different things."""
    apart = [n for n in members if n not in held]
    if held and apart:
        raise ExportError(f"layers {', '.join(held)} are quantized and {', '.join(apart)} not, but {why}; {fix}")
    if len(set(held.values())) > 1:
        raise ExportError(
            f"layers {', '.join(held)} must have one scheme because {why}, not {', '.join(held.values())}; "
            f"allocate with runtime=..., or with groups=[{list(held)!r}]"
        )


def _weight(module: nn.Module) -> nn.Parameter | None:
    return module._parameters.get("weight")


def _tied(model: nn.Module, config: BitConfig) -> list[list[str]]:
    """Modules with the same weight, where at least one is in the config."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = _weight(module)
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    return [names for names in owners.values() if len(names) > 1 and any(n in config.layers for n in names)]
