"""Saliency scores: rounding errors weighed by gradients, by the inputs they meet, or by how unusual a layer is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.bank import Inputs, QuantizerBank
from mpq.calibration import Calibration
from mpq.layers import LayerSpec
from mpq.losses import OutputLoss
from mpq.problem import Floats
from mpq.progress import progress_bar
from mpq.sensitivity.aggregate import by_group
from mpq.sensitivity.capture import (
    by_activation,
    gradient_sums,
    grouped,
    has_activations,
    input_sums,
    over_draws,
    table_of,
)
from mpq.sensitivity.labels import first_order_objective, probe_objective
from mpq.sensitivity.table import SensitivityTable
from mpq.sensitivity.weight_only import beyond, relative_error
from mpq.space import SearchSpace
from mpq.trees import map_tensors, tensors_in
from mpq.view import ModelView, channels_first


def _weight_errors(view: ModelView, space: SearchSpace, bank: QuantizerBank, layer: LayerSpec) -> list[Tensor]:
    """``Q(w) - w`` for each scheme."""
    weight = view.weight(layer.name).detach()
    return [bank.weight(layer, s.weight) - weight for s in space.schemes]


def gradient_saliency(
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
    """First-order saliency ``sum_i |g_i * (Q(w) - w)_i| + mean_n sum_i |g_ni * (Q(a_n) - a_n)_i|`` of every scheme.

    The DeltaLoss of SignRoundV2 (Cheng et al., 2025, arXiv 2512.04746, equation 3; ``delta_loss.py`` of AutoRound):
    the first-order change of the loss with all signs against us, for weights ``w`` and layer inputs ``a``. AutoRound
    takes the gradients at the quantized point of each scheme; here one set at the float model serves all schemes.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        bank: Quantized weights and activation ranges.
        loss: What is protected.
        draws: Backward passes per batch; one is exact for ``labels="true"``.
        labels: ``true``: gradients of the mean cross-entropy of the data's labels, batch by batch, as in AutoRound.
            ``probe``: gradients of the loss's probes, since that of ``kl`` or ``mse`` vanishes at the float model. A
            batch's weight gradient then is the root of its samples' mean square, so that its size has no say.
        seed: Of the draws.
        progress: Show a bar.

    Returns:
        A table in nats for ``labels="true"``; else its square has the unit of ``loss``. The standard errors are those
        of the draws, with the data taken as given. An input that several layers read counts once, for the first.

    Raises:
        DataError: If ``labels="true"`` and there are none, or a score is NaN or infinite, naming the layer.
        GraphError: If no gradient reaches a layer that matters.
        MpqError: If the loss returns one mean for a batch of several samples.
    """
    objective, draws, factors = first_order_objective(labels, loss, data, draws, seed)

    def weight(layer: LayerSpec, gradient: Tensor) -> Tensor:
        scores = torch.stack([_first_order(gradient, e) for e in _weight_errors(view, space, bank, layer)])
        return torch.cat([scores, torch.zeros_like(scores)])

    def activation(layer: LayerSpec, value: Tensor, gradient: Tensor) -> Tensor:
        inputs: Inputs = ((value,), {})
        scores = by_activation(space, bank, layer, inputs, lambda t, r: float(_first_order(gradient, r - t)))
        return torch.tensor([0.0] * len(scores) + scores, dtype=torch.float64)

    sums = gradient_sums(
        view,
        space,
        data,
        objective,
        draws,
        "gradient saliency",
        progress,
        weight=weight,
        activation=activation if has_activations(space) else None,
    )
    of_weights, of_inputs = np.split(sums, 2, -1)
    scores = grouped(space, of_weights * factors[:, None, None] + of_inputs)
    mean, stderr = over_draws(scores, data, exact=labels == "true")
    passes = 1 + 2 * draws
    return table_of(space, mean, stderr, "gradient_saliency", passes, loss=loss.name, draws=draws, labels=labels)


def _first_order(gradient: Tensor, error: Tensor) -> Tensor:
    return (gradient.double() * error).abs().sum()


def output_channel_salience(
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
    """Predicted loss ``0.5 * sum_c mean_n (g_nc . (Q(w_c) - w_c))**2`` over the output channels of every layer.

    The salience of output features in MixLLM (Zheng et al., 2024, arXiv 2412.14590; ``__loss_score_est`` in
    ``mixllm/quantization/searcher.py``), summed over a layer's channels ``c``: the Fisher form of the error with all
    interactions inside a channel and none between channels. MixLLM adds the first-order term ``g . (Q(w_c) - w_c)``;
    it is left out here, because it vanishes for losses against the float model.

    Only weights are scored: activation formats change the costs here, not the loss. Use `influence` to score both.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        bank: Quantized weights.
        loss: What is protected.
        draws: Backward passes per batch, each with a random sign per sample.
        labels: ``probe``: gradients of the loss's probes; ``true``: of the cross-entropy of the data's labels, as in
            MixLLM.
        seed: Of the draws.
        progress: Show a bar.

    Returns:
        A table in the unit of ``loss`` (nats for ``labels="true"``); the standard errors are those of the draws, with
        the data taken as given.

    Raises:
        DataError: If ``labels="true"`` and there are none, or a score is NaN or infinite, naming the layer.
        GraphError: If no gradient reaches a layer that matters.
        MpqError: If the loss returns one mean for a batch of several samples.
    """
    objective = probe_objective(labels, loss, data, torch.Generator().manual_seed(seed))

    def weight(layer: LayerSpec, gradient: Tensor) -> Tensor:
        module = view.layers[layer.name]
        products = [channels_first(module, gradient.double() * e) for e in _weight_errors(view, space, bank, layer)]
        return torch.stack([0.5 * p.flatten(1).sum(1).square().sum() for p in products])

    sums = gradient_sums(view, space, data, objective, draws, "output channel salience", progress, weight=weight)
    mean, stderr = over_draws(grouped(space, sums), data)
    passes = 1 + 2 * draws
    return table_of(space, mean, stderr, "output_channel_salience", passes, loss=loss.name, draws=draws, labels=labels)


def activation_saliency(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """Squared weight error weighed by input norms, ``sum_ij (Q(w) - w)_ij**2 * ||X_j||**2 / samples``.

    Wanda's weight importance ``|w_ij| * ||X_j||`` (Sun et al., 2023, equation 1) with the rounding error for the
    weight; OWQ (Lee et al., 2023) ranks input columns by the same products. It is the squared error of a layer's
    outputs as if its inputs were uncorrelated. ``X_j`` holds all values that input feature ``j`` takes: of a
    convolution, one feature for each channel and place in the window.

    Only weights are scored: activation formats change the costs here, not the loss. Neither ``loss`` nor ``seed`` have
    a say.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        bank: Quantized weights.
        loss: Not used.
        seed: Not used.
        progress: Show a bar.

    Returns:
        A table in squared units of each layer's outputs, summed over the layers of a group; standard errors are zero.
    """

    def read(layer: LayerSpec, inputs: Inputs) -> list[float]:
        power = _input_power(view, layer, inputs)
        errors = _weight_errors(view, space, bank, layer)
        return [float((e.double().square() * power).sum()) for e in errors]

    scores = grouped(space, input_sums(view, space, data, read, "activation saliency", progress)) / data.num_samples
    # The layers run a second time, forward and backward.
    return table_of(space, scores, np.zeros_like(scores), "activation_saliency", 3, loss=loss.name, unit="output power")


def _input_power(view: ModelView, layer: LayerSpec, inputs: Inputs) -> Tensor:
    """Sum of the squares of all inputs that each weight is multiplied with, in the shape of the weight.

    A layer is linear in its weight, so this is the gradient of the sum of its outputs for squared inputs.
    """
    args, kwargs = map_tensors(lambda t: t.square() if t.is_floating_point() else t, inputs)
    weight = view.weight(layer.name).detach().requires_grad_()
    with torch.enable_grad(), view.swapped({layer.name: weight}):
        outputs = tensors_in(view.layers[layer.name].forward(*args, **kwargs))
    (power,) = torch.autograd.grad(outputs, weight, [torch.ones_like(t) for t in outputs])
    return power.to_dense()


def outlier_share(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    sigmas: float = 3.0,
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """Noise-to-signal ratio of weights and inputs, each weighed by the layer's share of outliers.

    ``(1 + o_w / mean o_w) * ||Q(w) - w||^2 / ||w||^2 + (1 + o_a / mean o_a) * ||Q(a) - a||^2 / ||a||^2``, where ``o``
    is the share of elements more than ``sigmas`` standard deviations from the mean of their tensor, and its mean is
    over layers. A heuristic after OWL (Yin et al., 2023), which spares layers with many outliers when pruning; OWL
    counts products of weight and input norm above a multiple of their mean. Without outliers anywhere, ``1 + o`` is 1.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data, for the inputs.
        bank: Quantized weights and activation ranges.
        loss: Not used.
        sigmas: Where outliers begin.
        seed: Not used.
        progress: Show a bar.

    Returns:
        A table without unit, summed over the layers of a group; standard errors are zero.
    """
    tensors = {x.name: view.weight(x.name) for x in space.layers}
    shares = _above_mean(np.array([beyond(t, sigmas) / t.numel() for t in tensors.values()]))
    factor = dict(zip(tensors, 1 + shares, strict=True))
    scores = by_group(space, lambda x, s: factor[x.name] * relative_error(view, bank, x, s))
    rounds_inputs = has_activations(space)
    if rounds_inputs:
        scores = scores + grouped(space, _input_outliers(view, space, data, bank, sigmas, progress))
    provenance = {"loss": loss.name, "sigmas": sigmas, "unit": "score"}
    return table_of(space, scores, np.zeros_like(scores), "outlier_share", int(rounds_inputs), **provenance)


def _above_mean(shares: Floats) -> Floats:
    mean = shares.mean()
    return shares / mean if mean > 0 else shares


def _input_outliers(
    view: ModelView, space: SearchSpace, data: Calibration, bank: QuantizerBank, sigmas: float, progress: bool
) -> Floats:
    """Weighed noise-to-signal ratio of each layer's inputs ``[layers, S]``."""

    def read(layer: LayerSpec, inputs: Inputs) -> list[float]:
        values = [t for t in tensors_in(inputs) if t.is_floating_point()]
        noise = by_activation(space, bank, layer, inputs, lambda t, r: float((r - t).double().square().sum()))
        signal = sum(float(t.double().square().sum()) for t in values)
        return [*noise, signal, sum(beyond(t, sigmas) for t in values), sum(t.numel() for t in values)]

    sums = input_sums(view, space, data, read, "outliers", progress)
    noise, signal, far, size = sums[:, :-3], sums[:, -3], sums[:, -2], np.maximum(sums[:, -1], 1)
    ratio = np.divide(noise, signal[:, None], out=np.zeros_like(noise), where=signal[:, None] > 0)
    weighed: Floats = (1 + _above_mean(far / size))[:, None] * ratio
    return weighed


def lim(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """How much a layer changes its input, times noise-to-signal ratio: ``(1 + LIM) / 2 * ||Q(w) - w||^2 / ||w||^2``.

    ``LIM`` is the layer input modification score of Dumitru et al., "Layer-Wise Quantization", 2024 (arXiv 2406.17415,
    section 3.1): minus the cosine of the angle between a layer's input and output, mean over samples. The paper ranks
    transformer blocks by it, a larger change meaning more important, without regard to bits. Here a layer whose output
    has another shape than its input takes the score of the smallest module around it that keeps the shape (a residual
    block, say); one without such a module is taken to turn its input by a right angle (LIM 0). ``(1 + LIM) / 2``,
    between 0 and 1, weighs the noise of each scheme.

    Only weights are scored: activation formats change the costs here, not the loss. Neither ``loss`` nor ``seed`` have
    a say.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        bank: Quantized weights.
        loss: Not used.
        seed: Not used.
        progress: Show a bar.

    Returns:
        A table without unit, summed over the layers of a group; standard errors are zero.
    """
    around = {x.name: _enclosing(x.name) for x in space.layers}
    cosines = _cosines(view, data, {name for names in around.values() for name in names}, progress)
    turn = {
        x: next((0.5 - 0.5 * float(np.mean(cosines[n])) for n in names if n in cosines), 0.5)
        for x, names in around.items()
    }
    scores = by_group(space, lambda x, s: turn[x.name] * relative_error(view, bank, x, s))
    return table_of(space, scores, np.zeros_like(scores), "lim", 1, loss=loss.name, unit="score")


def _enclosing(name: str) -> list[str]:
    """A module's name and those of the modules around it, the model itself excepted."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _cosines(view: ModelView, data: Calibration, names: set[str], progress: bool) -> dict[str, list[float]]:
    """Cosine between input and output of each module for each sample, where they have one shape."""
    found: dict[str, list[float]] = {}

    def hook(name: str) -> Any:
        def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = (next((t for t in tensors_in(x)), None) for x in ((args, kwargs), output))
            if before is None or after is None or before.shape != after.shape or before.dim() < 2:
                return
            if before.is_floating_point() and after.is_floating_point():
                cosine = F.cosine_similarity(before.flatten(1).double(), after.flatten(1).double(), 1)
                found.setdefault(name, []).extend(cosine.tolist())

        return compare

    hooks = [view.module.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True) for n in sorted(names)]
    with view.hooked(hooks), torch.no_grad():
        for batch in progress_bar(data.batches, "layer input modification", progress):
            view(batch)
    return found
