"""Corrections of whole networks, before and after their weights are rounded.

    model = equalize(model)                                # before; no forward pass
    model = smooth(model, calib)                           # before; one forward pass over the calibration data
    quantized = mpq.quantize(model, config)
    quantized = correct_bias(quantized, model, calib)      # two
    quantized = reestimate_batch_norm(quantized, calib)    # one
    quantized = add_noise_bias(quantized, calib)           # one

Each is of use alone, and returns a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from mpq.apply import InputQuantizer
from mpq.calibration import read_batches
from mpq.errors import ConfigError, DataError, GraphError
from mpq.input_statistics import tokens_of
from mpq.quantizers.equalization import noise_bias
from mpq.rescaling import Layer, equalize, evaluating, layer_pairs, run_on, smooth
from mpq.trees import tensors_in
from mpq.view import Forward, ModelView, plain, preserved_state

__all__ = ["add_noise_bias", "correct_bias", "equalize", "layer_pairs", "reestimate_batch_norm", "smooth"]

_NOISE_ROWS = 4096
_NO_DATA = "the data is empty: no batch with at least one sample (is a generator already used up?)"


def correct_bias(
    quantized: nn.Module, model: nn.Module, calib: Iterable[Any], *, forward: Forward | None = None
) -> nn.Module:
    """Shift each layer's outputs so that their means are the float model's (Nagel et al., 2019, section 4.2).

    Layers are corrected from first to last: in each batch, a layer sees inputs whose means are right already. The
    shifts of the batches are averaged, so that all means are equal with one batch, and nearly so with several. Layers
    without bias get one; packed projections of attentions stay as they are. Two forward passes: one of each model.

    Args:
        quantized: What `mpq.quantize` gave.
        model: The float model.
        calib: Calibration batches.
        forward: As for `mpq.allocate`.

    Raises:
        ConfigError: If the float model has other layers than the quantized one.
        DataError: If there is no data.
    """
    corrected = copy.deepcopy(plain(quantized))
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    wanted: dict[str, list[Tensor]] = {}
    size = 0
    mask: Tensor | None = None

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            wanted.setdefault(name, []).append(_channel_means(module, output, mask))

        return hook

    def shift(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            missing = wanted[name].pop(0) - _channel_means(module, output, mask)
            sums[name] = sums.get(name, torch.zeros_like(missing)) + missing * size
            counts[name] = counts.get(name, 0.0) + size
            return output + missing.view(-1, *[1] * _places(module))

        return hook

    with preserved_state(seed=0), torch.no_grad():
        exact, rounded = ModelView(model, forward), ModelView(corrected, forward)
        _check_alike(rounded, exact)
        names = [n for n, m in rounded.layers.items() if isinstance(m, Layer)]
        hooks = [exact.layers[n].register_forward_hook(keep(n)) for n in names]
        hooks += [rounded.layers[n].register_forward_hook(shift(n)) for n in names]
        with rounded.hooked(hooks):
            for batch in read_batches(calib, exact.read):
                mask = batch.kwargs.get("attention_mask")
                if _all_padding(mask):
                    continue
                size = batch.size
                wanted.clear()
                exact(batch)
                rounded(batch)
        if not size:
            raise DataError(_NO_DATA)
        for name, total in sums.items():
            layer = corrected.get_submodule(name)
            assert isinstance(layer, Layer)
            bias = torch.zeros_like(total) if layer.bias is None else layer.bias
            layer.bias = nn.Parameter((bias + total / counts[name]).to(layer.weight.dtype))
    return corrected


def _places(layer: nn.Module) -> int:
    """Axes of an output after its channels."""
    return len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0


def _check_alike(rounded: ModelView, exact: ModelView) -> None:
    for name in rounded.layers:
        shape = tuple(rounded.weight(name).shape)
        if name not in exact.layers or tuple(exact.weight(name).shape) != shape:
            raise ConfigError(f"this is not the float model: it has no layer {name!r} with a weight {list(shape)}")


def _all_padding(mask: Any) -> bool:
    return isinstance(mask, Tensor) and not mask.any()


def _channel_means(layer: nn.Module, output: Tensor, mask: Tensor | None) -> Tensor:
    """Of what is no padding."""
    if not _places(layer):
        output = tokens_of(output, mask)
    return output.movedim(-1 - _places(layer), 0).flatten(1).double().mean(1).to(output.dtype)


def reestimate_batch_norm(quantized: nn.Module, calib: Iterable[Any], *, forward: Forward | None = None) -> nn.Module:
    """Means and variances of batch norms as they are in the quantized network (Hubara et al., AdaQuant, 2020, sec. 5).

    Each batch norm works with a batch's own statistics while the data runs through, and keeps the average over batches.
    One forward pass.

    Args:
        quantized: What `mpq.quantize` gave.
        calib: Calibration batches, best of equal sizes and many samples each.
        forward: As for `mpq.allocate`.

    Raises:
        GraphError: If the network has no batch norm with running statistics.
    """
    estimated = copy.deepcopy(plain(quantized))
    norms = [m for m in estimated.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise GraphError("the model has no batch norm with running statistics; they may be folded into other layers")
    momenta = [m.momentum for m in norms]
    with preserved_state(seed=0), torch.no_grad(), evaluating(estimated):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the average of all batches
            norm.train()
        for batch in read_batches(calib, ModelView(estimated, forward).read):
            run_on(estimated, batch, forward)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return estimated


def add_noise_bias(
    quantized: nn.Module, calib: Iterable[Any], *, forward: Forward | None = None, seed: int = 0
) -> nn.Module:
    """Give linear layers a fixed noise before their inputs are rounded (Liu et al., NoisyQuant, 2023).

    Only where the layer's outputs gain by it, and inputs are rounded as they are, not smoothed or rotated; tokens that
    a batch's ``attention_mask`` hides have no say. A runtime adds the noise to the inputs and takes its product with
    the weight off the bias. One forward pass.

    Args:
        quantized: What `mpq.quantize` gave.
        calib: Calibration batches.
        forward: As for `mpq.allocate`.
        seed: Of the noise.

    Raises:
        GraphError: If the model has no layer with weights, or one of them holds NaN or infinity.
        DataError: If there is no data, it does not fit the model, or it holds NaN or infinity.
    """
    noisy = copy.deepcopy(plain(quantized))
    rows: dict[str, list[Tensor]] = {}
    mask: Tensor | None = None

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows.setdefault(name, []).append(tokens_of(tensors_in((args, kwargs))[0], mask))

        return hook

    with preserved_state(seed=0), torch.no_grad(), evaluating(noisy):
        layers = {
            name: m
            for name, m in noisy.named_modules()
            if isinstance(m, nn.Linear) and (q := _quantizer(m)) is not None and q.limits is not None and not q.basis
        }
        # Before the layer's own quantizer, which is such a hook, too.
        hooks = [m.register_forward_pre_hook(keep(n), prepend=True, with_kwargs=True) for n, m in layers.items()]
        size = 0
        try:
            for batch in read_batches(calib, ModelView(noisy, forward).read):
                mask = batch.kwargs.get("attention_mask")
                if _all_padding(mask):
                    continue
                size += batch.size
                run_on(noisy, batch, forward)
        finally:
            for handle in hooks:
                handle.remove()
        if not size:
            raise DataError(_NO_DATA)
        for name, parts in rows.items():
            quantizer, x = _quantizer(layers[name]), torch.cat(parts)
            assert quantizer is not None
            assert quantizer.limits is not None
            taken = x[:: -(-len(x) // _NOISE_ROWS)]
            quantizer.noise = noise_bias(taken, quantizer.fmt, *quantizer.limits, layers[name].weight, seed)
    return noisy


def _quantizer(layer: nn.Module) -> InputQuantizer | None:
    found = layer._modules.get("input_quantizer")
    return found if isinstance(found, InputQuantizer) else None
