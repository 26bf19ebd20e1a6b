"""Effects of one call of a layer: inner products of every scheme's output error with gradients, by sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.bank import Inputs, QuantizerBank
from mpq.layers import LayerSpec
from mpq.quantizers import Scheme
from mpq.sensitivity.rows import MIXED, Layout
from mpq.trees import tensors_in

# Elements of a buffer that still fits in the caches.
_BUFFER_ELEMENTS = 1 << 23

_FEW_DRAWS = 2

# (input [n, ...], gradient [D, n, ...]) of whole samples -> gradients by sample and draw [D, n, weights].
WeightGradients = Callable[[Tensor, Tensor], Tensor]


def effects(
    bank: QuantizerBank,
    layer: LayerSpec,
    schemes: list[Scheme],
    inputs: Inputs,
    gradient: Tensor,
    layout: Layout,
    samples: int,
    which: int = 0,
) -> tuple[Tensor, int]:
    """``<gradient, Q(layer)(Q(x)) - layer(x)>`` of each sample, draw and scheme, float64 ``[samples, D, S]``.

    Where the layer is linear in its weight, each sample's weight gradient is made once and serves every weight format,
    unless draws are many: ``<g, W' * x' - W * x> = <G(x'), W' - W> + <G(x' - x), W>``. Elsewhere the layer runs once
    per scheme.

    Args:
        bank: Quantized weights and activation ranges.
        layer: The layer.
        schemes: What each scheme means for it.
        inputs: Its float inputs.
        gradient: Of the loss probes at its output ``[D, ...]``.
        layout: Where the samples are in the output.
        samples: Of the batch.
        which: Number of the output tensor.

    Returns:
        The effects, and how many runs of the layer they took.
    """
    formats = dict.fromkeys(s.activation for s in schemes)
    weight_gradients = _weight_gradients(bank.view.layers[layer.name], inputs, gradient, layout)
    # Which way is taken must not depend on the other schemes: results in a store are joined bit for bit.
    if weight_gradients is not None and len(gradient) <= _FEW_DRAWS:
        found = _by_weight_gradient(bank, layer, schemes, inputs, gradient, samples, weight_gradients)
        return found, len(gradient) * sum(1 if a is None else 2 for a in formats)
    exact = tensors_in(bank.run(layer, None, inputs))[which]
    rounded_inputs = {a: bank.inputs(layer, a, inputs) for a in formats}
    rows = 1 if layout == MIXED else samples
    flat_gradient = _by_row(gradient, exact, rows, layout)
    columns = []
    for scheme in schemes:
        rounded = tensors_in(bank.run(layer, scheme.weight, rounded_inputs[scheme.activation]))[which]
        error = _by_row(rounded.sub_(exact)[None], exact, rows, layout)[0]
        columns.append(torch.einsum("krd,rd->rk", flat_gradient, error).double().cpu())
    found = torch.stack(columns, -1)
    # An output of the whole batch has one sum, spread evenly: the squares of the rows add up to the square of the sum,
    # which has the right expectation because the probes of different samples have independent signs.
    return (found.expand(samples, -1, -1) / samples**0.5 if rows < samples else found), len(schemes) + 1


def _by_row(values: Tensor, like: Tensor, rows: int, layout: Layout) -> Tensor:
    """Values ``[D, ...]`` at an output as ``[D, rows, elements]``, in the order that the output has in memory."""
    if layout[0] == "second":
        values = values.transpose(1, 2)
    elif like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        values = values.movedim(2, -1)
    return values.reshape(len(values), rows, -1)


def _weight_gradients(module: nn.Module, inputs: Inputs, gradient: Tensor, layout: Layout) -> WeightGradients | None:
    """How to get a module's weight gradients by sample; None where running it once per scheme is the way."""
    args, kwargs = inputs
    if kwargs or len(args) != 1 or layout[0] != "rows" or gradient.shape[1] != len(args[0]):
        return None
    if type(module) is nn.Linear:
        return _linear_gradients
    if type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros" and gradient.dim() == 5:
        conv, padding = module, module.padding
        if isinstance(padding, str):
            return None

        def conv_gradients(x: Tensor, g: Tensor) -> Tensor:
            if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and padding == (0, 0):
                columns = x.flatten(2)
            else:
                columns = F.unfold(x, conv.kernel_size, conv.dilation, padding, conv.stride)
            return torch.matmul(g.flatten(3), columns.transpose(1, 2)).flatten(2)

        return conv_gradients
    return None


def _linear_gradients(x: Tensor, g: Tensor) -> Tensor:
    """``[D, n, out * in]`` from inputs ``[n, ..., in]`` and gradients ``[D, n, ..., out]``."""
    rows, columns = g.reshape(*g.shape[:2], -1, g.shape[-1]), x.reshape(len(x), -1, x.shape[-1])
    return torch.matmul(rows.transpose(2, 3), columns).flatten(2)


def _by_weight_gradient(
    bank: QuantizerBank,
    layer: LayerSpec,
    schemes: list[Scheme],
    inputs: Inputs,
    gradient: Tensor,
    samples: int,
    weight_gradients: WeightGradients,
) -> Tensor:
    weight = bank.view.weight(layer.name)
    x = inputs[0][0]
    # Rows of one sample (tokens, windows) become one axis, so that a sample is an entry of the first one.
    each = len(x) // samples
    gradient = gradient.reshape(len(gradient), samples, *((each,) if each > 1 else ()), *gradient.shape[2:])
    errors = {s.weight: (bank.weight(layer, s.weight) - weight).flatten() for s in schemes}
    buffer = max(weight.numel(), x.numel() // samples * max(1, weight[0].numel() // max(1, weight.shape[1])))
    step = max(1, _BUFFER_ELEMENTS // (buffer * len(gradient)))
    found = torch.zeros(samples, len(gradient), len(schemes), dtype=torch.float64)
    for activation in dict.fromkeys(s.activation for s in schemes):
        columns = [i for i, s in enumerate(schemes) if s.activation == activation]
        rounded = bank.inputs(layer, activation, inputs)[0][0]
        for start in range(0, samples, step):
            part = slice(start, start + step)

            def gradients(t: Tensor, part: slice = part) -> Tensor:
                by_sample = t.reshape(samples, *((each,) if each > 1 else ()), *t.shape[1:])
                return weight_gradients(by_sample[part], gradient[:, part])

            by_sample_and_draw = gradients(rounded)
            change = 0.0 if activation is None else gradients(rounded - x) @ weight.flatten()
            for i in columns:
                products = by_sample_and_draw @ errors[schemes[i].weight] + change
                found[part, :, i] = products.T.double().cpu()
    return found
