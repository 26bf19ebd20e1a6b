"""Measuring: accuracy, loss and divergence from the float model, on data."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sized
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq.apply import InputQuantizer, calibration_of, check_fits, needs_data
from mpq.bank import QuantizerBank
from mpq.calibration import Batch, Calibration, model_hash, read_batches
from mpq.config import BitConfig, Measured
from mpq.errors import ConfigError, DataError, MpqError
from mpq.kept_codes import check_hash
from mpq.labels import IGNORED_LABEL, labels_are_tokens
from mpq.losses import (
    CallableLoss,
    KLLoss,
    UserLoss,
    check_finite_output,
    logits_of,
    resolve_loss,
)
from mpq.progress import progress_bar
from mpq.trace import trace
from mpq.view import Forward, ModelView, Network, plain, preserved_state
from mpq.warning import warn

_ONE_AT_A_TIME = RLock()  # a measurement swaps weights and hooks in: threads take turns


@dataclass
class _Totals:
    """Sums over batches."""

    samples: int = 0
    labelled: int = 0
    predictions: int = 0
    correct: int = 0
    cross_entropy: float = 0.0
    user_loss: float | None = None
    kl: float | None = None
    mse: float | None = None

    def result(self) -> Measured:
        if 0 < self.labelled < self.samples:
            raise DataError(f"only {self.labelled} of {self.samples} samples have labels; give all or none")
        labelled = self.predictions > 0
        mean = self.cross_entropy / self.predictions if labelled else None
        loss = mean if self.user_loss is None else self.user_loss / self.samples
        kl, mse = (None if total is None else total / self.samples for total in (self.kl, self.mse))
        accuracy = self.correct / self.predictions if labelled else None
        return Measured(self.samples, accuracy, loss, kl, mse=mse)


def _add(totals: _Totals, output: Any, batch: Batch, reference: Any, loss: CallableLoss | None) -> None:
    """Add one batch; ``reference`` is the float model's output for it, or None."""
    totals.samples += batch.size
    _count(totals, output, batch)
    if loss is not None:
        totals.user_loss = (totals.user_loss or 0.0) + float(loss.value(output, None, batch).double().sum())
    if reference is not None:
        divergence = resolve_loss("auto", reference)
        try:
            total = float(divergence.value(output, reference, batch).double().sum())
        except MpqError:  # outputs without the batch as first axis: nothing to compare sample by sample
            return
        if isinstance(divergence, KLLoss):
            totals.kl = (totals.kl or 0.0) + total
        else:
            totals.mse = (totals.mse or 0.0) + total


def _count(totals: _Totals, output: Any, batch: Batch) -> None:
    """Add a labelled batch's predictions, where outputs are class scores."""
    logits, labels = logits_of(output), batch.labels
    if logits is None or not isinstance(labels, Tensor) or labels.is_floating_point() or logits.dim() < 2:
        return
    scores = logits.movedim(1, -1) if logits.dim() > 3 else logits
    if labels.dim() == scores.dim() and labels.shape[-1] == 1:
        labels = labels[..., 0]
    if scores.shape[:-1] != labels.shape:
        unfit = f"labels of shape {tuple(batch.labels.shape)} don't fit class scores {tuple(logits.shape)}"
        warn(f"no accuracy of these batches: {unfit}")
        return
    if labels_are_tokens(labels, batch):
        scores, labels = scores[:, :-1], labels[:, 1:]
    scores, wanted = scores.flatten(0, -2).float(), labels.to(logits.device, torch.long).flatten()
    counted = wanted != IGNORED_LABEL
    classes = scores.shape[1]
    if ((wanted[counted] < 0) | (wanted[counted] >= classes)).any():
        raise DataError(f"a label is not one of the model's {classes} classes (0 to {classes - 1})")
    totals.labelled += batch.size
    totals.predictions += int(counted.sum())
    totals.correct += int((scores.argmax(1) == wanted)[counted].sum())
    totals.cross_entropy += float(F.cross_entropy(scores, wanted, reduction="sum", ignore_index=IGNORED_LABEL))


def evaluate(
    model: Network,
    data: Iterable[Any],
    *,
    reference: Network | None = None,
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
        forward: ``(model, batch) -> output`` where batches are not what ``forward`` takes; it gets the whole batch,
            labels included.
        progress: Show a bar.

    Returns:
        What could be measured; the rest is None.

    Raises:
        DataError: If the data is empty or the model can't take it.
    """
    own = None if loss is None else CallableLoss(loss)
    totals, float_totals = _Totals(), _Totals()
    with preserved_state(seed=0), torch.no_grad():
        view = ModelView(model, forward)
        float_view = None if reference is None else ModelView(reference, forward)
        length = len(data) if isinstance(data, Sized) and not isinstance(data, Tensor) else None
        for batch in progress_bar(read_batches(data, view.read), "evaluate", progress, length):
            expected = None if float_view is None else float_view(batch)
            _add(totals, view(batch), batch, expected, own)
            if expected is not None:
                _add(float_totals, expected, batch, None, None)
    if totals.samples == 0:
        raise DataError("the data is empty: no batch with at least one sample (is a generator already used up?)")
    measured = totals.result()
    if (measured.accuracy, measured.loss, measured.kl, measured.mse) == (None, None, None, None):
        raise DataError("nothing can be measured: pass batches with labels that fit the outputs, or reference=")
    return replace(measured, float_accuracy=float_totals.result().accuracy if reference is not None else None)


class Evaluator:
    """Measures many configs of one model on the same data; quantized weights are kept, so a config is one pass.

    Args:
        model: The float model.
        data: Batches with labels, as for `evaluate`.
        forward: ``(model, batch) -> output`` where batches are not what ``forward`` takes.
        calib: The calibration batches that configs were made with, for those whose weights are rounded with an eye to
            their inputs (``W4:gptq``): they cost one more pass, over these, at the first of them.
        progress: Show a bar for each pass.

    Attributes:
        float_measured: The float model's figures.
        data_hash: Of the data.
        classifies: The outputs are class scores: a config's divergence is its ``kl``, else its ``mse``.

    Raises:
        DataError: If the data is empty, the model can't take it, or outputs NaN.
    """

    def __init__(
        self,
        model: Network,
        data: Iterable[Any],
        *,
        forward: Forward | None = None,
        calib: Iterable[Any] | None = None,
        progress: bool = True,
    ) -> None:
        self._progress = progress
        self._calib = calib
        model = plain(model)
        with preserved_state(seed=0), torch.no_grad():
            self._view = ModelView(model, forward)
            loaded = Calibration.load(data, self._view.read)
            self._batches, self.data_hash = loaded.batches, loaded.hash
            with torch.enable_grad():
                self._graph = trace(self._view, self._batches[0])
            self._references = [self._view(b) for b in progress_bar(self._batches, "float model", progress)]
        totals = _Totals()
        for output, batch in zip(self._references, self._batches, strict=True):
            check_finite_output(output, "on the evaluation data")
            _add(totals, output, batch, None, None)
        self.float_measured = totals.result()
        self.classifies = isinstance(resolve_loss("auto", self._references[0]), KLLoss)
        self._hash = model_hash(model)
        self._banks: dict[tuple[str, str], QuantizerBank] = {}

    def measure(self, config: BitConfig, *, strict: bool = True) -> Measured:
        """Measure a config.

        Args:
            config: The bits.
            strict: Refuse a config that was made for other weights.

        Raises:
            ConfigError: If it was made for another model or with other calibration data, or names a layer that did not
                run here.
            FormatError: If a weight needs calibration data and there is none.
        """
        *_, measured = self.measure_in_parts(config, strict=strict)
        return measured

    def measure_in_parts(self, config: BitConfig, *, strict: bool = True) -> Generator[Measured, None, None]:
        """Measure a config on the first batch, on the first two, and so on; stop early by not asking on.

        Args:
            config: As for `measure`.
            strict: As for `measure`.

        Raises:
            ConfigError: As `measure`.
        """
        check_fits(self._view.module, config)
        if strict:
            check_hash(self._hash, config)
        bank = self._bank(config, strict)
        weights, quantizers = {}, {}
        for name, choice in config.layers.items():
            layer = next((x for x in self._graph if x.name == name), None)
            if layer is None:
                raise ConfigError(f"layer {name!r} of the config did not run on the evaluation data")
            with preserved_state(seed=0):
                weights[name] = bank.weight(layer, choice.weight)
                if choice.activation is not None:
                    basis = bank.basis(layer, choice.activation)
                    quantizers[name] = InputQuantizer(choice.activation, choice.activation_range, basis)
        hooks = [
            self._view.layers[name].register_forward_pre_hook(q, with_kwargs=True) for name, q in quantizers.items()
        ]
        totals = _Totals()
        with (
            _ONE_AT_A_TIME,
            preserved_state(seed=0),
            torch.no_grad(),
            self._view.hooked(hooks),
            self._view.swapped(weights),
        ):
            for i, batch in enumerate(progress_bar(self._batches, "evaluate", self._progress)):
                _add(totals, self._view(batch), batch, self._references[i], None)
                yield replace(totals.result(), float_accuracy=self.float_measured.accuracy)

    def _bank(self, config: BitConfig, strict: bool) -> QuantizerBank:
        """Weights that were rounded by the same range rule, with an eye to the same data."""
        method, wanted = config.provenance["weight_range"], needs_data(config)
        key = method, config.provenance["data_hash"] if wanted else ""
        if key not in self._banks:
            with preserved_state(seed=0):
                data = calibration_of(config, self._view, self._calib, strict) if wanted else None
            self._banks[key] = QuantizerBank(self._view, self._graph, method, data=data, progress=self._progress)
        return self._banks[key]

    def accuracy_drop(self, config: BitConfig) -> tuple[float, Measured]:
        """Float accuracy minus the config's, and all that was measured.

        Raises:
            DataError: If the data has no labels to measure accuracy with.
        """
        self.require_accuracy()
        measured = self.measure(config)
        return (self.float_measured.accuracy or 0.0) - (measured.accuracy or 0.0), measured

    def require_accuracy(self) -> None:
        """Refuse data without usable labels.

        Raises:
            DataError: If the float model's accuracy could not be measured.
        """
        if self.float_measured.accuracy is None:
            raise DataError("accuracy can't be measured: give eval_data as (inputs, integer labels) batches")
