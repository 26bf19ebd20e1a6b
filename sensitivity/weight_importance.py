"""Importance of weights in gradient-based post-training quantization, ``|w * g|``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mpq.bank import QuantizerBank
from mpq.calibration import Calibration
from mpq.layers import LayerSpec
from mpq.losses import OutputLoss
from mpq.sensitivity.capture import gradient_sums, grouped, over_draws, schemes_of, table_of
from mpq.sensitivity.labels import first_order_objective
from mpq.sensitivity.table import SensitivityTable
from mpq.sensitivity.weight_only import relative_error
from mpq.space import SearchSpace
from mpq.view import ModelView


def weight_importance(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    draws: int = 4,
    labels: str = "probe",
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """Importance times noise-to-signal ratio, ``sum_i |w_i * g_i| * ||Q(w) - w||^2 / ||w||^2``, of every scheme.

    ``|w * g|``, to first order what the loss changes by without the weight, is a criterion of pruning that Yvinec et
    al., "Gradient-Based Post-Training Quantization: Challenging the Status Quo", 2023 (arXiv 2308.07662) give bits to
    layers by. It tells layers apart, not formats: here, as in `lim` and `zd`, it weighs the noise of each scheme.
    `gradient_saliency` has the real rounding error in the place of ``w``.

    Only weights are scored: activation formats change the costs here, not the loss.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        bank: Quantized weights.
        loss: What is protected.
        draws: Backward passes per batch; one is exact for ``labels="true"``.
        labels: As for `gradient_saliency`.
        seed: Of the draws.
        progress: Show a bar.

    Returns:
        A table without unit, summed over the layers of a group. The standard errors are those of the draws, with the
        data taken as given. A weight that several layers share counts once, with the gradient of all its uses.

    Raises:
        DataError: If ``labels="true"`` and there are none, or a score is NaN or infinite, naming the layer.
        GraphError: If no gradient reaches a layer that matters.
        MpqError: If the loss returns one mean for a batch of several samples.
    """
    objective, draws, factors = first_order_objective(labels, loss, data, draws, seed)

    def importance(layer: LayerSpec, gradient: Tensor) -> Tensor:
        return (gradient.double() * view.weight(layer.name)).abs().sum()[None]

    sums = gradient_sums(view, space, data, objective, draws, "weight importance", progress, weight=importance)
    with torch.no_grad():
        noise = np.array([[relative_error(view, bank, x, s) for s in schemes_of(space, x)] for x in space.layers])
    mean, stderr = over_draws(grouped(space, sums * factors[:, None, None] * noise), data, exact=labels == "true")
    options = {"loss": loss.name, "draws": draws, "labels": labels, "unit": "score"}
    return table_of(space, mean, stderr, "weight_importance", 1 + 2 * draws, **options)
