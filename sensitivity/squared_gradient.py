"""Squared gradient times squared error of every layer's output (NVIDIA Model Optimizer's ``gradient`` score)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpq.bank import Inputs, QuantizerBank
from mpq.calibration import Calibration
from mpq.labels import has_labels
from mpq.layers import LayerSpec
from mpq.losses import OutputLoss
from mpq.sensitivity.capture import gradient_sums, grouped, over_draws, schemes_of, table_of
from mpq.sensitivity.labels import probe_objective
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace
from mpq.trees import tensors_in
from mpq.view import ModelView


def squared_gradient(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    draws: int = 2,
    labels: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """Predicted loss ``0.5 * mean_n sum_i (dL_n/dy_i)**2 * (Q(layer)(x) - layer(x))_i**2`` of every scheme.

    The score of ``mtq.auto_quantize(method="gradient")`` in NVIDIA Model Optimizer (2024,
    ``modelopt/torch/quantization/algorithms.py``, ``_get_auto_quantize_score``): a second-order expansion in each
    layer's output ``y`` with the diagonal of the Fisher matrix for the Hessian. It sees real errors of weights and
    inputs, as `influence` does, but treats errors of different output elements as independent. Model Optimizer leaves
    out the factor 0.5 and takes the gradient of a batch's mean loss; here each sample has its own.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        bank: Quantized weights and activation ranges.
        loss: What is protected.
        draws: Backward passes per batch.
        labels: ``probe``: gradients of the loss's probes; ``true``: of the cross-entropy of the data's labels, as in
            Model Optimizer; ``auto``: ``true`` for the ``kl`` loss where the data have class labels, else ``probe``.
        seed: Of the draws.
        progress: Show a bar.

    Returns:
        A table in the unit of ``loss`` (nats for ``labels="true"``); the standard errors are those of the draws, with
        the data taken as given.

    Raises:
        DataError: If ``labels="true"`` and there are none, or a score is NaN or infinite, naming the layer.
        GraphError: If no gradient reaches a layer that matters.
    """
    if labels == "auto":
        labels = "true" if loss.name == "kl" and all(map(has_labels, data.batches)) else "probe"
    # A sample's outputs are its own, so that even a loss with one mean for the batch gives its gradient.
    objective = probe_objective(labels, loss, data, torch.Generator().manual_seed(seed), by_sample=False)

    def output(layer: LayerSpec, inputs: Inputs, gradients: Sequence[Tensor | None]) -> Tensor:
        exact = tensors_in(bank.run(layer, None, inputs))
        schemes = schemes_of(space, layer)
        rounded_inputs = {a: bank.inputs(layer, a, inputs) for a in dict.fromkeys(s.activation for s in schemes)}
        scores = []
        for scheme in schemes:
            rounded = tensors_in(bank.run(layer, scheme.weight, rounded_inputs[scheme.activation]))
            parts = [
                (g.double() * (r - e)).square().sum()
                for g, r, e in zip(gradients, rounded, exact, strict=True)
                if g is not None
            ]
            scores.append(0.5 * torch.stack(parts).sum())
        return torch.stack(scores)

    sums = gradient_sums(view, space, data, objective, draws, "squared gradient", progress, output=output)
    mean, stderr = over_draws(grouped(space, sums), data)
    # Each backward pass runs every layer once per scheme and once in float.
    passes = 1 + draws * (2 + len(space.schemes) + 1)
    return table_of(space, mean, stderr, "squared_gradient", passes, loss=loss.name, draws=draws, labels=labels)
