"""`quantize`: a quantized copy of a model from a `BitConfig`. The original is never touched."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mpq.bank import Inputs, quantize_inputs, round_weight
from mpq.calibration import model_hash
from mpq.config import BitConfig
from mpq.errors import ConfigError
from mpq.quantizers.formats import NumberFormat
from mpq.view import copy_model, op_of, own_weight, plain


class InputQuantizer(nn.Module):
    """Rounds a layer's inputs to an activation format with a calibrated range.

    A child of the layer, so that it shows in the model's ``repr`` and is copied with it.
    """

    def __init__(self, fmt: NumberFormat, limits: tuple[float, float] | None) -> None:
        super().__init__()
        self.fmt, self.limits = fmt, limits

    def forward(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """As a forward pre-hook with keywords: the layer's rounded arguments."""
        return quantize_inputs(self.fmt, self.limits, (args, kwargs))

    def extra_repr(self) -> str:
        """Format and range."""
        return (
            f"{self.fmt}" if self.limits is None else f"{self.fmt}, range=[{self.limits[0]:.4g}, {self.limits[1]:.4g}]"
        )


def quantize(model: nn.Module, config: BitConfig, *, strict: bool = True) -> nn.Module:
    """A fake-quantized copy: weights and layer inputs hold only values that the chosen formats can express.

    Attentions (``nn.MultiheadAttention``) become modules with explicit projections; everything else keeps its class and
    its parameter names. Training or evaluation mode stays as in the original.

    Args:
        model: The float model that the config was made for.
        config: The bits.
        strict: Refuse a model whose weights differ from those the config was made for. With False, only names and
            shapes must fit (a model trained further, say).

    Raises:
        ConfigError: If the config was made for another model.
    """
    if not isinstance(config, BitConfig):
        raise ConfigError(f"quantize takes a BitConfig (mpq.load reads one from a file), not {type(config).__name__}")
    model = plain(model)
    copied = copy_model(model)
    check_fits(copied, config)
    if strict:
        check_hash(model_hash(model), config)
    done: set[int] = set()
    for name, choice in config.layers.items():
        layer = copied.get_submodule(name)
        weight = own_weight(layer)
        assert weight is not None
        if id(weight) not in done:  # tied weights are rounded once
            with torch.no_grad():
                weight.copy_(round_weight(layer, weight, choice.weight, config.provenance["weight_range"]))
            done.add(id(weight))
        if choice.activation is not None:
            quantizer = InputQuantizer(choice.activation, choice.activation_range)
            layer.add_module("input_quantizer", quantizer)
            layer.register_forward_pre_hook(quantizer, with_kwargs=True)
    return copied


def check_hash(found: str, config: BitConfig) -> None:
    """Refuse other weights than those the config was made for.

    Raises:
        ConfigError: If the hashes differ.
    """
    if config.provenance["model_hash"] != found:
        raise ConfigError(
            "the config was made for a model with other weights (its hash differs); "
            "pass strict=False to use it on the same network with other weights"
        )


def check_fits(model: nn.Module, config: BitConfig) -> None:
    """Refuse a model whose layers are not those of the config.

    Args:
        model: With attentions expanded.
        config: The bits.

    Raises:
        ConfigError: Naming the first layer that is missing or differs.
    """
    modules = dict(model.named_modules())
    missing = [name for name in config.layers if name not in modules]
    if missing:
        raise ConfigError(
            f"the config was made for another model: {len(missing)} of its {len(config)} layers are not in "
            f"{type(model).__name__}, the first is {missing[0]!r}"
        )
    for name, choice in config.layers.items():
        weight = own_weight(modules[name])
        shape = None if weight is None else tuple(weight.shape)
        if shape != choice.weight_shape or op_of(modules[name]) is None:
            raise ConfigError(
                f"the config was made for another model: layer {name!r} has weight {shape}, "
                f"the config expects {choice.weight_shape}"
            )
