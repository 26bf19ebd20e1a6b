"""FIT: Fisher traces of weights and activations times their quantization noise power (Zandonati et al., 2022)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mpq.bank import QuantizerBank
from mpq.calibration import Calibration
from mpq.layers import LayerSpec
from mpq.losses import OutputLoss
from mpq.sensitivity.aggregate import squared_error
from mpq.sensitivity.capture import (
    gradient_sums,
    grouped,
    has_activations,
    input_power,
    over_draws,
    schemes_of,
    table_of,
)
from mpq.sensitivity.labels import probe_objective
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace
from mpq.view import ModelView


def fisher_trace(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    draws: int = 8,
    labels: str = "probe",
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """Predicted loss ``0.5 * (tr F(w) * mean((Q(w) - w)**2) + tr F(a) * mean((Q(a) - a)**2))`` of every scheme.

    FIT (Zandonati et al., "FIT: A Metric for Model Sensitivity", 2022, arXiv 2210.08502): the Fisher
    information of weights ``w`` and of layer inputs ``a`` taken as isotropic, each trace times the noise power of its
    format. The paper leaves out the factor 0.5 and models the noise as uniform over the range; here it is the rounding
    error of the real weights and inputs, averaged over their elements.

    ``tr F`` is the mean over samples of the squared gradient norm, ``mean_n ||g_n||**2``. One backward pass gives the
    gradient of a whole batch with a random sign per sample, and ``E||sum_n e_n g_n||**2 = sum_n ||g_n||**2``: unbiased,
    where the paper's squared batch gradient relies on gradients that average to nothing.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        bank: Quantized weights and activation ranges.
        loss: What is protected.
        draws: Backward passes per batch.
        labels: ``probe``: gradients of the loss's probes, so that the traces are those of the Gauss-Newton matrix, for
            ``kl`` the model's own Fisher matrix. ``true``: of the cross-entropy of the data's labels, as in the paper
            (empirical Fisher).
        seed: Of the draws.
        progress: Show a bar.

    Returns:
        A table in the unit of ``loss`` (nats for ``labels="true"``); the standard errors are those of the draws, with
        the data taken as given. An input that several layers read counts once, for the first of them.

    Raises:
        DataError: If ``labels="true"`` and there are none, or a trace is NaN or infinite, naming the layer.
        GraphError: If no gradient reaches a layer that matters.
        MpqError: If the loss returns one mean for a batch of several samples.
    """
    objective = probe_objective(labels, loss, data, torch.Generator().manual_seed(seed))
    rounds_inputs = has_activations(space)

    def weight(layer: LayerSpec, gradient: Tensor) -> Tensor:
        trace = _square(gradient)
        return torch.stack([trace, torch.zeros_like(trace)])

    def activation(layer: LayerSpec, value: Tensor, gradient: Tensor) -> Tensor:
        trace = _square(gradient)
        return torch.stack([torch.zeros_like(trace), trace])

    traces = gradient_sums(
        view,
        space,
        data,
        objective,
        draws,
        "Fisher trace",
        progress,
        weight=weight,
        activation=activation if rounds_inputs else None,
    )
    power = np.array(
        [[squared_error(view, bank, x, s) / x.parameters for s in schemes_of(space, x)] for x in space.layers]
    )
    losses = traces[..., :1] * power
    if rounds_inputs:
        losses = losses + traces[..., 1:] * input_power(view, space, data, bank, progress)
    mean, stderr = over_draws(grouped(space, 0.5 * losses), data)
    passes = 1 + 2 * draws + rounds_inputs
    return table_of(space, mean, stderr, "fisher_trace", passes, loss=loss.name, draws=draws, labels=labels)


def _square(t: Tensor) -> Tensor:
    return t.double().square().sum()
