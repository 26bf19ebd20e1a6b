"""`quantize`: a quantized copy of a model from a `BitConfig`. The original is never touched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mpq.bank import Inputs, WeightRounder, quantize_inputs
from mpq.calibration import Calibration, model_hash
from mpq.config import BitConfig
from mpq.errors import ConfigError
from mpq.kept_codes import check_hash, codes_of, keep, layer_weights, refuse_quantized
from mpq.quantizers.basis import InputBasis
from mpq.quantizers.formats import NumberFormat
from mpq.trees import map_tensors
from mpq.view import Forward, ModelView, Network, channels_first, copy_model, op_of, own_weight, plain, preserved_state


class InputQuantizer(nn.Module):
    """Rounds a layer's inputs to an activation format with a calibrated range.

    A child of the layer, so that it shows in the model's ``repr`` and is copied with it.

    Attributes:
        basis: What the inputs are rounded in (``W8:smoothA8``); None: their own.
        noise: Added to the inputs before they are rounded and taken off afterwards (`mpq.corrections.add_noise_bias`).
    """

    noise: Tensor | None

    def __init__(self, fmt: NumberFormat, limits: tuple[float, float] | None, basis: InputBasis | None = None) -> None:
        super().__init__()
        self.fmt, self.limits, self.basis = fmt, limits, basis
        self.register_buffer("noise", None, persistent=False)

    def forward(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """As a forward pre-hook with keywords: the layer's rounded arguments."""
        noise = self.noise
        if noise is None:
            return quantize_inputs(layer, self.fmt, self.limits, (args, kwargs), self.basis)
        rounded = quantize_inputs(layer, self.fmt, self.limits, map_tensors(lambda t: t + noise, (args, kwargs)))
        args, kwargs = map_tensors(lambda t: t - noise, rounded)
        return args, kwargs

    def extra_repr(self) -> str:
        """Format and range."""
        return (
            f"{self.fmt}" if self.limits is None else f"{self.fmt}, range=[{self.limits[0]:.4g}, {self.limits[1]:.4g}]"
        )


def quantize(
    model: Network,
    config: BitConfig,
    *,
    calib: Iterable[Any] | None = None,
    forward: Forward | None = None,
    strict: bool = True,
) -> nn.Module:
    """A fake-quantized copy: weights and layer inputs hold only values that the chosen formats can express.

    Attentions (``nn.MultiheadAttention``) become modules with explicit projections; everything else keeps its class and
    its parameter names. Training or evaluation mode stays as in the original. Layers keep the codes and scales of their
    weights, for `mpq.save_quantized` and `mpq.export`.

    Args:
        model: The float model that the config was made for, or its ONNX file.
        config: The bits.
        calib: The calibration batches that the config was made with: needed where weights are rounded with an eye to
            their inputs (``W4:gptq``), by one forward pass. The same batches give the same bytes.
        forward: As for `mpq.allocate`; only ``calib`` is run.
        strict: Refuse a model whose weights differ from those the config was made for, and other calibration data. With
            False, only names and shapes must fit (a model trained further, say).

    Raises:
        ConfigError: If the config was made for another model, or with other calibration data.
        FormatError: If a layer's weight can't be rounded, or needs calibration data and there is none.
    """
    model = plain(model)
    copied = fitting_copy(model, config, strict=strict)
    with preserved_state(seed=0):
        view = ModelView(model, forward)
        data = calibration_of(config, view, calib, strict) if needs_data(config) else None
        rounder = WeightRounder(view, config.provenance["weight_range"], data)
        for name, layer, weight, choice in layer_weights(copied, config):
            stored = rounder.stored(name, choice.weight)
            keep(layer, stored)
            with torch.no_grad():
                plain_cast = stored.fmt.plain_float
                weight.copy_(rounder(name, stored.fmt) if plain_cast else channels_first(layer, stored.values()))
    add_input_quantizers(copied, config)
    set_input_bases(copied, config)
    return copied


def fitting_copy(model: Network, config: BitConfig, *, strict: bool) -> nn.Module:
    """A copy with explicit attentions of a model that a config fits.

    Raises:
        ConfigError: If it does not fit.
    """
    if not isinstance(config, BitConfig):
        raise ConfigError(f"quantize takes a BitConfig (mpq.load reads one from a file), not {type(config).__name__}")
    model = plain(model)
    refuse_quantized(model)
    copied = copy_model(model)
    check_fits(copied, config)
    if strict:
        check_hash(model_hash(model), config)
    return copied


def add_input_quantizers(copied: nn.Module, config: BitConfig) -> None:
    """Let layers round their inputs as a config has it, in place."""
    for name, choice in config.layers.items():
        if choice.activation is not None:
            layer = copied.get_submodule(name)
            quantizer = InputQuantizer(choice.activation, choice.activation_range)
            layer.add_module("input_quantizer", quantizer)
            layer.register_forward_pre_hook(quantizer, with_kwargs=True)


def set_input_bases(model: nn.Module, config: BitConfig) -> None:
    """Tell the input quantizers of a model whose layers keep their codes what to round in, in place."""
    for name, choice in config.layers.items():
        steps = () if choice.activation is None else choice.activation.recipe
        quantizer = model.get_submodule(name)._modules.get("input_quantizer")
        if steps and isinstance(quantizer, InputQuantizer):
            quantizer.basis = codes_of(model, config, name).input_basis(steps)


def refuse_noise(model: nn.Module) -> None:
    """Refuse a model whose layers add noise to their inputs (`mpq.corrections.add_noise_bias`), which would be lost.

    Raises:
        ConfigError: If one does.
    """
    for name, layer in model.named_modules():
        quantizer = layer._modules.get("input_quantizer")
        if isinstance(quantizer, InputQuantizer) and quantizer.noise is not None:
            raise ConfigError(f"layer {name!r} adds noise to its inputs, which no tool holds")


def remove_input_quantizers(model: nn.Module) -> None:
    """Let layers take their inputs as they come again, in place.

    Raises:
        ConfigError: If one adds noise to its inputs.
    """
    refuse_noise(model)
    for layer in model.modules():
        quantizer = layer._modules.get("input_quantizer")
        if isinstance(quantizer, InputQuantizer):
            hooks = layer._forward_pre_hooks
            for key in [k for k, hook in hooks.items() if hook is quantizer]:
                del hooks[key], layer._forward_pre_hooks_with_kwargs[key]
            del layer.input_quantizer


def needs_data(config: BitConfig) -> bool:
    """Whether weights of a config are rounded with an eye to the layers' inputs."""
    return any(choice.weight.needs_data for choice in config.layers.values())


def calibration_of(
    config: BitConfig, view: ModelView, calib: Iterable[Any] | None, strict: bool = True
) -> Calibration | None:
    """The batches that a config was made with, out of what is given; None if nothing is.

    Args:
        config: It tells how many samples were taken, and their hash.
        view: The model.
        calib: The batches, or more.
        strict: Refuse other data.

    Raises:
        ConfigError: If the data is another.
    """
    if calib is None:
        return None
    data = Calibration.load(calib, view.read, config.provenance["samples"])
    if strict and data.hash != config.provenance["data_hash"]:
        raise ConfigError(
            "calib is not the calibration data that the config was made with (its hash differs), so that weights would "
            "be rounded differently; pass strict=False to use it all the same"
        )
    return data


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
