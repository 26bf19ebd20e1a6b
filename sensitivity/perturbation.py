"""Measured perturbation: one group at a time is really quantized, and the model's output tells what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpq.apply import InputQuantizer
from mpq.bank import QuantizerBank
from mpq.calibration import Batch, Calibration
from mpq.errors import DataError, MpqError
from mpq.layers import LayerGroup
from mpq.losses import KLLoss, MSELoss, OutputLoss, check_finite_output, logits_of, resolve_loss
from mpq.problem import Floats
from mpq.progress import progress_bar
from mpq.quantizers import NumberFormat, Scheme
from mpq.sensitivity.capture import cut_below_zero, table_of
from mpq.sensitivity.prefix import Recording
from mpq.sensitivity.spread import batch_numbers, standard_error
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace, layer_scheme
from mpq.trees import tensors_in
from mpq.view import ModelView

# Model output -> what it costs each sample, float64 [B].
Meter = Callable[[Any], Tensor]

_TEMPERATURE = 4.0  # of PD-Quant's published script


def perturbation(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    measure: str = "loss",
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """What the model's output loses when one group at a time is quantized: weights, and inputs where a scheme says so.

    Nothing is approximated but the whole by its parts. Passes are shorter than full ones: what runs before the group is
    reused (`mpq.sensitivity.prefix`). Measures, each a mean over samples:

    - ``loss``: rise of the loss, in its unit. With ``kl`` this is the divergence from the float model, with a callable
      the rise of the user's loss.
    - ``sqnr``: noise power over signal power of the output (the logits, where there are any), ``||y' - y||^2 /
      ||y||^2``: the inverse of the signal-to-quantization-noise ratio of Pandey et al. (2023, arXiv:2302.05397).
    - ``prediction_difference``: divergence ``KL(softmax(y / T) || softmax(y' / T))`` in nats with ``T = 4``, as in
      PD-Quant (Liu et al., CVPR 2023, arXiv:2212.07048). A temperature lets unlikely classes count for more.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        bank: Quantized weights and activation ranges.
        loss: What is protected.
        measure: See above.
        seed: Unused: the measure is deterministic.
        progress: Show a bar.

    Returns:
        A table without interactions, zero where a loss fell (``provenance["negative_losses"]``). Standard errors are
        those over samples; over batches for a loss that returns one mean for the batch.

    Raises:
        DataError: If an output of the float model or a measured value is NaN or infinite.
        MpqError: If the measure is unknown or does not fit the output.
    """
    if measure not in _METERS:
        raise MpqError(f"unknown measure {measure!r}; known: {', '.join(_METERS)}")
    by_sample: list[bool] = []

    def make_meter(reference: Any, batch: Batch) -> Meter:
        by_sample.append(measure != "loss" or loss.by_sample(reference, batch))
        return _METERS[measure](loss, reference, batch)

    passes = _measured(view, space, data, bank, make_meter)
    total = len(data.batches) * len(space.groups)
    rows = [np.zeros((batch.size, *space.allowed.shape)) for batch in data.batches]
    for number, g, values in progress_bar(passes, "perturbation", progress, total):
        rows[number][:, g] = values.numpy()
    mean, stderr = mean_rise(rows, all(by_sample))
    losses, negative = cut_below_zero(space, mean)
    options = {"loss": loss.name, "measure": measure, "unit": loss.name if measure == "loss" else measure}
    cost = 1 + space.allowed.size
    return table_of(space, losses, stderr, "perturbation", cost, negative_losses=negative, **options)


def mean_rise(rows: list[Floats], by_sample: bool) -> tuple[Floats, Floats]:
    """Mean over samples, and its standard error.

    Args:
        rows: Of each batch ``[B, ...]``.
        by_sample: Whether the loss gives each sample its own value; else batches are what is independent.
    """
    shares = np.concatenate(rows)
    stderr = standard_error(shares, None if by_sample else batch_numbers(map(len, rows)))
    return shares.mean(0), stderr


def _measured(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    make_meter: Callable[[Any, Batch], Meter],
) -> Iterator[tuple[int, int, Tensor]]:
    """Number of the batch, of the group, and what each scheme costs each sample ``[B, S]``."""
    for number, batch in enumerate(data.batches):
        float_pass = float_recording(view, batch)
        meter = make_meter(float_pass.output, batch)
        for g, group in enumerate(space.groups):
            columns = []
            for scheme in space.schemes:
                with quantized(view, bank, [(group, scheme)]):
                    columns.append(meter(float_pass.run(names_of(group))))
                check_finite(columns[-1], [(group, scheme)])
            yield number, g, torch.stack(columns, 1)


def float_recording(view: ModelView, batch: Batch) -> Recording:
    """The float model's pass over a batch.

    Raises:
        DataError: If its output holds NaN or infinity.
    """
    found = Recording(view, batch)
    check_finite_output(found.output, "on the calibration data")
    return found


@contextmanager
def quantized(view: ModelView, bank: QuantizerBank, choices: Iterable[tuple[LayerGroup, Scheme]]) -> Iterator[None]:
    """Run with the weights and inputs of some groups rounded; the others stay float."""
    layers = [(x, layer_scheme(x, scheme)) for group, scheme in choices for x in group.layers]
    weights = {x.name: bank.weight(x, own.weight) for x, own in layers}
    inputs = {
        x.name: InputQuantizer(own.activation, bank.range(x, own.activation), bank.basis(x, own.activation))
        for x, own in layers
        if own.activation
    }
    hooks = [view.layers[name].register_forward_pre_hook(q, with_kwargs=True) for name, q in inputs.items()]
    with view.hooked(hooks), view.swapped(weights):
        yield


def names_of(group: LayerGroup) -> list[str]:
    """Names of a group's layers."""
    return [x.name for x in group.layers]


def rise_meter(loss: OutputLoss, reference: Any, batch: Batch) -> Meter:
    """Rise of the loss above that of the float model."""
    start = loss.value(reference, reference, batch).double()
    return lambda output: (loss.value(output, reference, batch).double() - start).cpu()


def _noise_meter(loss: OutputLoss, reference: Any, batch: Batch) -> Meter:
    mean_square, clean = MSELoss(), _outputs(reference)
    silence = [torch.zeros_like(t) for t in clean]
    power = mean_square.value(clean, silence, batch).double().clamp_min(torch.finfo(torch.float64).tiny)
    return lambda output: (mean_square.value(_outputs(output), clean, batch).double() / power).cpu()


def _prediction_meter(loss: OutputLoss, reference: Any, batch: Batch) -> Meter:
    kl = resolve_loss("kl", reference)
    if not isinstance(kl, KLLoss):
        raise MpqError("measure='prediction_difference' needs outputs with classes; use measure='loss' or 'sqnr'")

    def softened(output: Any) -> Tensor:
        z = logits_of(output)
        assert z is not None
        return (z.clamp_min(torch.finfo(z.dtype).tiny).log() if kl.probabilities else z) / _TEMPERATURE

    expected = softened(reference)
    return lambda output: KLLoss().value(softened(output), expected, batch).double().cpu()


_METERS: dict[str, Callable[[OutputLoss, Any, Batch], Meter]] = {
    "loss": rise_meter,
    "sqnr": _noise_meter,
    "prediction_difference": _prediction_meter,
}


def _outputs(output: Any) -> list[Tensor]:
    z = logits_of(output)
    return tensors_in(output) if z is None else [z]


def check_finite(values: Tensor, choices: Iterable[tuple[LayerGroup, Scheme]]) -> None:
    """Refuse measured values that are NaN or infinite.

    Raises:
        DataError: Naming what was quantized.
    """
    if not torch.isfinite(values).all():
        what = " and ".join(f"layer {group.name!r} at {scheme}" for group, scheme in choices)
        raise DataError(f"the loss measured with {what} is NaN or infinite; leave that scheme out or check the loss")


def smallest_precision(
    view: ModelView, space: SearchSpace, bank: QuantizerBank, *, eps: float = 0.05, resolution: int = 50
) -> dict[str, NumberFormat | None]:
    """The smallest weight format of each layer that keeps the distribution of its values.

    AdaPT (Kummer et al., 2021, arXiv:2107.13490, "push down") takes the lowest precision whose weights have the same
    distribution at some resolution: with ``p`` and ``q`` the histograms of float and rounded weights over equal bins
    between the smallest and the largest weight, ``sum(p * log(p / q))`` in nats. Half a weight is added to every bin:
    a single weight that rounding moves over a bin's edge is no infinite loss. Needs no data. (AdaPT asks this during
    training, of weights rounded at random.)

    Args:
        view: The model.
        space: The layers; its schemes give the formats.
        bank: Quantized weights.
        eps: Largest divergence in nats.
        resolution: Bins.

    Returns:
        Layer name -> format of the fewest bits with a divergence of at most ``eps``; None where even the widest format
        of the space loses more.

    Raises:
        MpqError: If there are no bins.
    """
    if resolution < 1:
        raise MpqError(f"resolution is a number of bins, at least 1, not {resolution}")
    formats = sorted(dict.fromkeys(s.weight for s in space.schemes), key=lambda f: f.bits)
    found: dict[str, NumberFormat | None] = {}
    for layer in space.layers:
        weight = view.weight(layer.name)
        kept = (f for f in formats if _divergence(weight, bank.weight(layer, f), resolution) <= eps)
        found[layer.name] = next(kept, None)
    return found


def _divergence(weight: Tensor, rounded: Tensor, bins: int) -> float:
    """Divergence of the histogram of rounded values from that of the exact ones, in nats."""
    low, high = float(weight.min()), float(weight.max())
    exact, changed = (t.detach().double().cpu().numpy().clip(low, high) for t in (weight, rounded))
    p, q = (np.histogram(values, bins, (low, high))[0] + 0.5 for values in (exact, changed))
    return max(float((p * np.log(p / q)).sum() / p.sum()), 0.0)
