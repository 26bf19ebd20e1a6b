"""Measuring: accuracy, loss and divergence from the float model, on data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.apply import InputQuantizer
from mpq.bank import QuantizerBank
from mpq.calibration import Batch, Calibration
from mpq.config import BitConfig, Measured
from mpq.errors import ConfigError, DataError
from mpq.losses import (
    CallableLoss,
    KLLoss,
    UserLoss,
    check_finite_output,
    logits_of,
    resolve_loss,
)
from mpq.progress import progress_bar
from mpq.view import Forward, ModelView, preserved_state

_IGNORED_LABEL = -100  # PyTorch's and Hugging Face's convention


@dataclass
class _Totals:
    """Sums over batches."""

    samples: int = 0
    predictions: int = 0
    correct: int = 0
    cross_entropy: float = 0.0
    user_loss: float | None = None
    kl: float | None = None

    def result(self) -> Measured:
        labelled = self.predictions > 0
        mean = self.cross_entropy / self.predictions if labelled else None
        loss = mean if self.user_loss is None else self.user_loss / self.samples
        kl = None if self.kl is None else self.kl / self.samples
        return Measured(self.samples, self.correct / self.predictions if labelled else None, loss, kl)


def _measure(
    run: Callable[[Batch], Any],
    batches: Iterable[Batch],
    references: list[Any] | None = None,
    loss: CallableLoss | None = None,
) -> Measured:
    """Run all batches; ``references`` are the float model's outputs for them."""
    totals = _Totals()
    divergence = None if references is None else resolve_loss("auto", references[0])
    for i, batch in enumerate(batches):
        output = run(batch)
        totals.samples += batch.size
        _count(totals, output, batch)
        if loss is not None:
            totals.user_loss = (totals.user_loss or 0.0) + float(loss.value(output, None, batch).double().sum())
        if references is not None and isinstance(divergence, KLLoss):
            totals.kl = (totals.kl or 0.0) + float(divergence.value(output, references[i], batch).double().sum())
    return totals.result()


def _count(totals: _Totals, output: Any, batch: Batch) -> None:
    """Add a labelled batch's predictions, where outputs are class scores."""
    logits, labels = logits_of(output), batch.labels
    if logits is None or not isinstance(labels, Tensor) or labels.is_floating_point() or logits.dim() < 2:
        return
    scores = logits.movedim(1, -1) if logits.dim() > 3 else logits
    if scores.shape[:-1] != labels.shape:
        return
    scores, wanted = scores.flatten(0, -2).float(), labels.to(logits.device).flatten()
    counted = wanted != _IGNORED_LABEL
    totals.predictions += int(counted.sum())
    totals.correct += int((scores.argmax(1) == wanted)[counted].sum())
    totals.cross_entropy += float(F.cross_entropy(scores, wanted, reduction="sum", ignore_index=_IGNORED_LABEL))


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    reference: nn.Module | None = None,
    loss: UserLoss | None = None,
    forward: Forward | None = None,
    progress: bool = True,
) -> Measured:
    """Accuracy, loss and divergence from a reference model.

    Args:
        model: Float or quantized; its mode, random state and weights stay as they are.
        data: Batches as for `mpq.allocate`; labels come after the inputs in a tuple, or as ``labels`` in a dict.
        reference: The float model, for the divergence and its accuracy.
        loss: ``(output, batch) -> loss`` in place of the cross-entropy.
        forward: ``(model, batch) -> output`` where batches are not what ``forward`` takes.
        progress: Show a bar.

    Returns:
        What could be measured; the rest is None.

    Raises:
        DataError: If the data is empty or the model can't take it.
    """
    batches = Calibration.load(data, model).batches
    own = None if loss is None else CallableLoss(loss)
    with preserved_state(seed=0), torch.no_grad():
        view = ModelView(model, forward)
        if reference is None:
            return _measure(view, progress_bar(batches, "evaluate", progress), None, own)
        float_view = ModelView(reference, forward)
        outputs: list[Any] = [float_view(b) for b in progress_bar(batches, "float model", progress)]
        measured = _measure(view, progress_bar(batches, "evaluate", progress), outputs, own)
        kept = iter(outputs)
        float_measured = _measure(lambda batch: next(kept), batches, loss=own)
        return replace(measured, float_accuracy=float_measured.accuracy)


class Evaluator:
    """Measures many configs of one model on the same data; quantized weights are kept, so a config is one pass.

    Args:
        model: The float model.
        data: Batches with labels, as for `evaluate`.
        forward: ``(model, batch) -> output`` where batches are not what ``forward`` takes.
        progress: Show a bar for each pass.

    Raises:
        DataError: If the data is empty, the model can't take it, or outputs NaN.
    """

    def __init__(
        self, model: nn.Module, data: Iterable[Any], *, forward: Forward | None = None, progress: bool = True
    ) -> None:
        from mpq.trace import trace

        self._progress = progress
        self._batches = Calibration.load(data, model).batches
        with preserved_state(seed=0):
            self._view = ModelView(model, forward)
            self._graph = trace(self._view, self._batches[0])
            with torch.no_grad():
                self._references = [self._view(b) for b in progress_bar(self._batches, "float model", progress)]
        for output in self._references:
            check_finite_output(output, "on the evaluation data")
        kept = iter(self._references)
        self.float_measured = _measure(lambda batch: next(kept), self._batches)
        self._banks: dict[str, QuantizerBank] = {}

    def measure(self, config: BitConfig) -> Measured:
        """Measure a config.

        Raises:
            ConfigError: If it names a layer that did not run here.
        """
        unknown = [name for name in config.layers if name not in self._view.layers]
        if unknown:
            raise ConfigError(f"the config was made for another model: it has no layer {unknown[0]!r}")
        method = config.provenance["weight_range"]
        if method not in self._banks:
            self._banks[method] = QuantizerBank(self._view, self._graph, method)
        bank = self._banks[method]
        weights, hooks = {}, []
        for name, choice in config.layers.items():
            weights[name] = bank.weight(self._graph[name], choice.weight)
            if choice.activation is not None:
                quantizer = InputQuantizer(choice.activation, choice.activation_range)
                hooks.append(self._view.layers[name].register_forward_pre_hook(quantizer))
        with preserved_state(seed=0), torch.no_grad(), self._view.hooked(hooks), self._view.swapped(weights):
            batches = progress_bar(self._batches, "evaluate", self._progress)
            measured = _measure(self._view, batches, self._references)
        return replace(measured, float_accuracy=self.float_measured.accuracy)

    def accuracy_drop(self, config: BitConfig) -> tuple[float, Measured]:
        """Float accuracy minus the config's, and all that was measured.

        Raises:
            DataError: If the data has no labels to measure accuracy with.
        """
        measured = self.measure(config)
        if measured.accuracy is None or self.float_measured.accuracy is None:
            raise DataError("accuracy can't be measured: give eval_data as (inputs, integer labels) batches")
        return self.float_measured.accuracy - measured.accuracy, measured
