"""Scores of weights alone: no data, no forward pass."""

from __future__ import annotations

import numpy as np
import torch

from mpq.bank import QuantizerBank
from mpq.calibration import Calibration
from mpq.layers import LayerSpec
from mpq.losses import OutputLoss
from mpq.quantizers import Scheme
from mpq.sensitivity.aggregate import by_group, squared_error
from mpq.sensitivity.capture import table_of
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace
from mpq.view import ModelView


def relative_error(view: ModelView, bank: QuantizerBank, layer: LayerSpec, scheme: Scheme) -> float:
    """Noise-to-signal ratio of a weight, ``||Q(w) - w||^2 / ||w||^2``; zero for a weight that is all zeros."""
    signal = float(view.weight(layer.name).double().square().sum())
    return squared_error(view, bank, layer, scheme) / signal if signal else 0.0


def weight_sqnr(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """Noise-to-signal ratio ``||Q(w) - w||^2 / ||w||^2`` of every scheme: the inverse of the weights' SQNR.

    The layer-wise measure of Lin et al., "Fixed Point Quantization of Deep Convolutional Networks", 2016; also the
    ``t^2`` of the linearity theorem in HIGGS (Malinovskii et al., 2024), with the same slope for every layer.

    Only weights are scored: activation formats change the costs here, not the loss. Neither data, ``loss`` nor
    ``seed`` have a say, and no forward pass is run.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Not used.
        bank: Quantized weights.
        loss: Not used.
        seed: Not used.
        progress: Not used.

    Returns:
        A table of ratios (no unit), summed over the layers of a group; standard errors are zero.
    """
    ratios = by_group(space, lambda x, s: relative_error(view, bank, x, s))
    return table_of(space, ratios, np.zeros_like(ratios), "weight_sqnr", 0, loss=loss.name, unit="noise over signal")


def zd(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """Share of weights near their mean times noise-to-signal ratio: ``(1 - ZD) * ||Q(w) - w||^2 / ||w||^2``.

    ``ZD`` is the z-score distribution of Dumitru et al., "Layer-Wise Quantization", 2024 (arXiv 2406.17415, section
    3.1): the share of a layer's weights more than one standard deviation from their mean. The paper ranks layers by it,
    fewer meaning more important, without regard to bits. Here the share of the other weights, between 0 and 1, weighs
    the noise of each scheme.

    Only weights are scored: activation formats change the costs here, not the loss. Neither data, ``loss`` nor
    ``seed`` have a say, and no forward pass is run.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Not used.
        bank: Quantized weights.
        loss: Not used.
        seed: Not used.
        progress: Not used.

    Returns:
        A table without unit, summed over the layers of a group; standard errors are zero.
    """
    near = {x.name: 1 - _far_share(view.weight(x.name)) for x in space.layers}
    scores = by_group(space, lambda x, s: near[x.name] * relative_error(view, bank, x, s))
    return table_of(space, scores, np.zeros_like(scores), "zd", 0, loss=loss.name, unit="score")


def _far_share(weight: torch.Tensor) -> float:
    return beyond(weight, 1.0) / weight.numel()


def beyond(t: torch.Tensor, sigmas: float) -> float:
    """Elements of a tensor more than so many standard deviations from its mean."""
    t = t.double()
    return float(((t - t.mean()).abs() > sigmas * t.std(correction=0)).sum())
