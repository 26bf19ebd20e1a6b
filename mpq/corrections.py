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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from mpq.apply import InputQuantizer
from mpq.calibration import Batch, Calibration, read_batches
from mpq.errors import ConfigError, DataError, GraphError
from mpq.input_statistics import gather, tokens_of
from mpq.quantizers.equalization import cross_layer_scales, noise_bias, smooth_scales
from mpq.trees import tensors_in
from mpq.view import Forward, ModelView, channels_first, plain, preserved_state

Layer = nn.Linear | _ConvNd

# What commutes with positive factors of each channel.
_HOMOGENEOUS_MODULES = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)
_HOMOGENEOUS_CALLS = {torch.relu, F.relu, F.leaky_relu, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, "relu"}
_NORMS = (nn.LayerNorm, nn.RMSNorm)
_SAME = 1e-3  # of the largest output
_NOISE_ROWS = 4096
_NO_DATA = "the data is empty: no batch with at least one sample (is a generator already used up?)"


def equalize(model: nn.Module, pairs: Iterable[tuple[str, str]] | None = None, sweeps: int = 3) -> nn.Module:
    """Give neighbouring layers equal ranges in each channel between them (Nagel et al., 2019, section 4.1).

    Only layers count between which there is nothing but ReLU, pooling and the like; batch norms must be folded first
    (`torch.fx.experimental.optimization.fuse`). The outputs stay as they are. No forward pass.

    Args:
        model: A float model.
        pairs: Names of layers of which the second reads the first; None finds them with torch.fx.
        sweeps: Over all pairs: a layer may be in two of them.

    Raises:
        GraphError: If torch.fx can't trace the model and no pairs are given, or a pair does not fit together.
    """
    equalized = copy.deepcopy(plain(model))
    modules = dict(equalized.named_modules())
    found = layer_pairs(equalized) if pairs is None else tuple(pairs)
    with torch.no_grad():
        for _ in range(sweeps):
            for names in found:
                first, second = (modules.get(n) for n in names)
                if not isinstance(first, Layer) or not isinstance(second, Layer):
                    raise GraphError(f"{names} are not two linear layers or convolutions of the model")
                _equalize_pair(first, second, names)
    return equalized


def _equalize_pair(first: Layer, second: Layer, names: tuple[str, str]) -> None:
    outputs, inputs = channels_first(first, first.weight), _inputs_first(second, second.weight)
    if len(outputs) != len(inputs):
        raise GraphError(f"{names[0]!r} has {len(outputs)} output channels, {names[1]!r} {len(inputs)} input channels")
    scales = cross_layer_scales(outputs, inputs)
    first.weight.copy_(channels_first(first, outputs / scales.view(-1, *[1] * (outputs.dim() - 1))))
    if first.bias is not None:
        first.bias.div_(scales)
    second.weight.copy_(_inputs_first(second, inputs * scales.view(-1, *[1] * (inputs.dim() - 1))))


def _inputs_first(layer: Layer, weight: Tensor) -> Tensor:
    """A weight with its input channels as first axis; applied twice it gives the weight back."""
    if isinstance(layer, nn.Linear):
        return weight.T
    if isinstance(layer, _ConvTransposeNd):
        return weight
    return weight.reshape(layer.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)


def layer_pairs(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Pairs of layers that `equalize` can treat, in the order of the forward pass.

    Raises:
        GraphError: If torch.fx can't trace the model.
    """
    try:
        nodes = list(fx.symbolic_trace(model).graph.nodes)
    except Exception as error:
        raise GraphError(
            f"torch.fx can't trace {type(model).__name__} ({type(error).__name__}: {error}); "
            "pass pairs=[('first layer', 'second layer'), ...]"
        ) from error
    modules = dict(model.named_modules())
    targets = [n.target for n in nodes if n.op == "call_module"]
    weights = [id(m.weight) for m in modules.values() if isinstance(m, Layer)]

    def alone(name: str) -> bool:
        """Called once, with a weight of its own."""
        layer = modules[name]
        return isinstance(layer, Layer) and targets.count(name) == 1 and weights.count(id(layer.weight)) == 1

    found = []
    for node in nodes:
        if node.op == "call_module" and alone(node.target):
            reader = _reader(node, modules)
            if reader is not None and alone(reader):
                found.append((node.target, reader))
    return tuple(found)


def _reader(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """The layer that alone reads a node's output, through nothing but what commutes with factors."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Layer):
            return str(node.target)
        through = isinstance(module, _HOMOGENEOUS_MODULES) or (module is None and node.target in _HOMOGENEOUS_CALLS)
        if not through:
            return None
    return None


def smooth(model: nn.Module, calib: Iterable[Any], *, alpha: float = 0.5, forward: Forward | None = None) -> nn.Module:
    """Move outliers of inputs into the weights of the linear layers behind a norm (Xiao et al., SmoothQuant, 2023).

    The norm's weight and bias are divided by a factor of each channel, the layers' columns multiplied. Norms whose
    output is read by anything else stay as they are; one batch for each finds them: outputs must not change. Besides
    that one forward pass over the data.

    Args:
        model: A float model.
        calib: Calibration batches.
        alpha: How much of the difficulty moves from inputs to weights.
        forward: As for `mpq.allocate`.
    """
    smoothed = copy.deepcopy(plain(model))
    readers: dict[nn.Module, dict[str, nn.Linear]] = {}
    made: dict[int, tuple[Tensor, nn.Module]] = {}

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        made[id(output)] = output, module  # held, so that no other tensor gets its number

    def find(name: str) -> Any:
        def hook(module: nn.Linear, args: Any, kwargs: Any) -> None:
            for x in tensors_in((args, kwargs)):
                if id(x) in made:
                    readers.setdefault(made[id(x)][1], {})[name] = module

        return hook

    with preserved_state(seed=0), torch.no_grad(), _evaluating(smoothed):
        view = ModelView(smoothed, forward)
        data = Calibration.load(calib, view.read)
        hooks = [m.register_forward_hook(keep) for m in smoothed.modules() if isinstance(m, _NORMS)]
        linear = {n: m for n, m in smoothed.named_modules() if isinstance(m, nn.Linear)}
        hooks += [m.register_forward_pre_hook(find(n), with_kwargs=True) for n, m in linear.items()]
        with view.hooked(hooks):
            _run(smoothed, data.batches[0], forward)
        made.clear()
        names = [n for found in readers.values() for n in found]
        stats = gather(view, data, names, progress=False) if names else {}
        for norm, layers in readers.items():
            largest = torch.stack([stats[name].largest.amax(0) for name in layers]).amax(0)
            scales = smooth_scales(largest, torch.cat([x.weight for x in layers.values()]), alpha)
            _fold(smoothed, norm, list(layers.values()), scales, data.batches[0], forward)
    return smoothed


def _fold(
    model: nn.Module, norm: nn.Module, layers: list[nn.Linear], scales: Tensor, batch: Batch, forward: Forward | None
) -> None:
    """Move factors from a norm into the layers behind it; undone if the model's outputs change."""
    own = [p for p in norm.parameters(recurse=False) if p.shape == scales.shape]
    changed: list[Tensor] = [*own, *(layer.weight for layer in layers)]
    before = [p.clone() for p in changed]
    expected = tensors_in(_run(model, batch, forward))
    for p in own:
        p.div_(scales)
    for layer in layers:
        layer.weight.mul_(scales)
    pairs = zip(expected, tensors_in(_run(model, batch, forward)), strict=True)
    if not all(torch.allclose(a, b, rtol=0, atol=_SAME * float(a.abs().max())) for a, b in pairs if a.numel()):
        for tensor, kept in zip(changed, before, strict=True):
            tensor.copy_(kept)


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
                if isinstance(mask, Tensor) and not mask.any():
                    continue  # nothing but padding
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
    with preserved_state(seed=0), torch.no_grad(), _evaluating(estimated):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the average of all batches
            norm.train()
        for batch in read_batches(calib, ModelView(estimated, forward).read):
            _run(estimated, batch, forward)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return estimated


def add_noise_bias(
    quantized: nn.Module, calib: Iterable[Any], *, forward: Forward | None = None, seed: int = 0
) -> nn.Module:
    """Give linear layers a fixed noise before their inputs are rounded (Liu et al., NoisyQuant, 2023).

    Only where the layer's outputs gain by it, and inputs are rounded as they are, not smoothed or rotated. A runtime
    adds the noise to the inputs and takes its product with the weight off the bias. One forward pass.

    Args:
        quantized: What `mpq.quantize` gave.
        calib: Calibration batches.
        forward: As for `mpq.allocate`.
        seed: Of the noise.

    Raises:
        DataError: If there is no data.
    """
    noisy = copy.deepcopy(plain(quantized))
    rows: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = tensors_in((args, kwargs))[0]
            rows.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))

        return hook

    with preserved_state(seed=0), torch.no_grad(), _evaluating(noisy):
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
                size += batch.size
                _run(noisy, batch, forward)
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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards each module is in its own again."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _run(model: nn.Module, batch: Batch, forward: Forward | None) -> Any:
    batch = batch.to(next(model.parameters()).device)
    return model(*batch.args, **batch.kwargs) if forward is None else forward(model, batch.raw)
