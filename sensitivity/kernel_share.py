"""Quantization kernel: the share of values that a format rounds to zero (CrossQuant, Liu et al., 2024)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mpq.bank import Inputs, QuantizerBank
from mpq.calibration import Calibration
from mpq.errors import FormatError
from mpq.layers import LayerSpec
from mpq.losses import OutputLoss
from mpq.problem import Floats
from mpq.quantizers import NumberFormat, Scheme, fake_quantize
from mpq.sensitivity.aggregate import by_group
from mpq.sensitivity.capture import by_activation, grouped, has_activations, input_sums, table_of
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace
from mpq.trees import tensors_in
from mpq.view import ModelView


def kernel_share(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """Share of the weights plus share of the layer inputs that every scheme rounds to zero.

    The quantization kernel of CrossQuant (Liu et al., 2024, arXiv 2410.07505): ``{x : Q(x) = 0}``. The paper
    looks at activations and finds that a model keeps its accuracy while their share is small (below 19 % for OPT, 1 %
    for LLaMA); here weights count as well. Values that are zero already lose nothing and are left out, or every input
    that comes from a ReLU would look lost at any number of bits.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data, for the inputs.
        bank: Quantized weights and activation ranges.
        loss: Not used.
        seed: Not used.
        progress: Show a bar.

    Returns:
        A table of shares (no unit), 0 to 2 for each layer, summed over the layers of a group; standard errors are zero.

    Raises:
        FormatError: If a format has no zero (1-bit symmetric weights): its kernel is empty however much is lost.
    """
    _check_zero(space)

    def of_weight(layer: LayerSpec, scheme: Scheme) -> float:
        weight = view.weight(layer.name)
        return _lost(weight, bank.weight(layer, scheme.weight)) / weight.numel()

    shares = by_group(space, of_weight)
    rounds_inputs = has_activations(space)
    if rounds_inputs:
        shares = shares + grouped(space, _input_shares(view, space, data, bank, progress))
    return table_of(
        space, shares, np.zeros_like(shares), "kernel_share", int(rounds_inputs), loss=loss.name, unit="share"
    )


def _lost(exact: Tensor, rounded: Tensor) -> float:
    """How many values become zero that were not."""
    return float(((rounded == 0) & (exact != 0)).sum())


def _check_zero(space: SearchSpace) -> None:
    formats = {f for s in space.schemes for f in (s.weight, s.activation) if f is not None}
    for fmt in sorted(formats, key=lambda f: f.name):
        if not _has_zero(fmt):
            raise FormatError(
                f"{fmt} has no code for zero, so kernel_share can't tell what it loses; leave it out or use another "
                "estimator"
            )


def _has_zero(fmt: NumberFormat) -> bool:
    plain = replace(fmt, recipe=())
    return float(fake_quantize(torch.tensor([[-1.0, 0.0, 1.0]]), plain)[0, 1]) == 0


def _input_shares(
    view: ModelView, space: SearchSpace, data: Calibration, bank: QuantizerBank, progress: bool
) -> Floats:
    """Share of each layer's inputs, over all calls, that is lost under each scheme ``[layers, S]``."""

    def read(layer: LayerSpec, inputs: Inputs) -> list[float]:
        size = sum(t.numel() for t in tensors_in(inputs) if t.is_floating_point())
        return [*by_activation(space, bank, layer, inputs, _lost), size]

    sums = input_sums(view, space, data, read, "quantization kernel", progress)
    shares: Floats = sums[:, :-1] / np.maximum(sums[:, -1:], 1)
    return shares
