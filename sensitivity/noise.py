"""Quantization noise: the loss measured with random noise in place of rounding (QuantNAS, Shvetsov et al., 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpq.bank import QuantizerBank
from mpq.calibration import Calibration
from mpq.layers import LayerGroup, LayerSpec
from mpq.losses import OutputLoss
from mpq.progress import progress_bar
from mpq.quantizers import Scheme
from mpq.sensitivity.capture import cut_below_zero, table_of
from mpq.sensitivity.perturbation import rise_meter
from mpq.sensitivity.spread import standard_error
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace, layer_scheme
from mpq.trees import map_tensors
from mpq.view import ModelView, channels_first


def noise(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    draws: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """Measured rise of the loss when one group at a time gets uniform noise with the power of its rounding error.

    QuantNAS (Shvetsov et al., 2022, arXiv 2208.14839; ``quant_noise`` in its repository) adds ``step * u`` with random
    ``u`` to weights and activations in place of rounding them. Here ``u`` is uniform and the power is that of the real
    rounding error: for weights in each output channel, for inputs over each tensor. Where nothing is clipped and
    the steps are small, that is ``step**2 / 12``, noise of one step's width. Noise tells what rounding costs on average
    over where values happen to lie between the levels; it has no part that rounding shares with the weights. All
    schemes get the same ``u``, so that they differ by their power only.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        bank: Quantized weights and activation ranges.
        loss: What is protected.
        draws: Noise patterns for each group.
        seed: Of the noise.
        progress: Show a bar.

    Returns:
        A table in the unit of ``loss``, zero where the loss fell (``provenance["negative_losses"]``); the standard
        errors are those of the draws, with the data taken as given.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        meters = [rise_meter(loss, view(b), b) for b in data.batches]
        rise = np.zeros((draws, *space.allowed.shape))
        todo = [(d, g) for d in range(draws) for g in range(len(space.groups))]
        for d, g in progress_bar(todo, "quantization noise", progress):
            layers = space.groups[g].layers
            patterns = {x.storage: _uniform(view.weight(x.name), generator) for x in layers}
            stream = int(torch.randint(2**62, (), generator=generator))
            for s, scheme in enumerate(space.schemes):
                with _noisy(view, bank, space.groups[g], scheme, patterns, stream):
                    total = sum(float(meter(view(b)).sum()) for meter, b in zip(meters, data.batches, strict=True))
                rise[d, g, s] = total / data.num_samples
    losses, negative = cut_below_zero(space, rise.mean(0))
    options = {"loss": loss.name, "draws": draws, "negative_losses": negative}
    return table_of(space, losses, standard_error(rise), "noise", 1 + draws * space.allowed.size, **options)


@contextmanager
def _noisy(
    view: ModelView,
    bank: QuantizerBank,
    group: LayerGroup,
    scheme: Scheme,
    patterns: dict[int, Tensor],
    stream: int,
) -> Iterator[None]:
    """Run with noise in the weights and inputs of a group's layers."""
    weights, hooks = {}, []
    for layer in group.layers:
        own = layer_scheme(layer, scheme)
        weight = view.weight(layer.name)
        weights[layer.name] = weight + patterns[layer.storage] * _half_width(view, bank, layer, own)
        if own.activation is not None and layer.source is not None:
            # A tensor that several layers read is rounded once, so they must see the same noise.
            hook = _input_noise(bank, layer, own, torch.Generator().manual_seed(stream + layer.source))
            hooks.append(view.layers[layer.name].register_forward_pre_hook(hook, with_kwargs=True))
    with view.swapped(weights), view.hooked(hooks):
        yield


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform between -1 and 1; drawn on the CPU, so that every device draws the same."""
    drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return drawn.to(like.device, like.dtype)


def _half_width(view: ModelView, bank: QuantizerBank, layer: LayerSpec, scheme: Scheme) -> Tensor:
    """Half the width of uniform noise with the power of the weight's rounding error in each output channel."""
    module = view.layers[layer.name]
    error = channels_first(module, bank.weight(layer, scheme.weight) - view.weight(layer.name))
    widths = (3 * error.flatten(1).square().mean(1)).sqrt()
    return channels_first(module, widths.reshape(-1, *[1] * (error.dim() - 1)).expand_as(error))


def _input_noise(bank: QuantizerBank, layer: LayerSpec, scheme: Scheme, generator: torch.Generator) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        def add(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            (rounded,), _ = bank.inputs(layer, scheme.activation, ((t,), {}))
            error: Tensor = rounded - t
            return t + _uniform(t, generator) * (3 * error.square().mean()).sqrt()

        return map_tensors(add, (args, kwargs))

    return hook
