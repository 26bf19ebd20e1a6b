"""Whose gradients a Fisher matrix is made of: probes of the loss (no labels needed) or the labels of the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpq.calibration import Batch, Calibration
from mpq.errors import DataError, MpqError
from mpq.labels import IGNORED_LABEL, has_labels, scores_and_labels
from mpq.losses import KLLoss, OutputLoss, logits_of
from mpq.problem import Floats
from mpq.sensitivity.capture import Objective


def probe_objective(
    labels: str, loss: OutputLoss, data: Calibration, generator: torch.Generator, *, by_sample: bool = True
) -> Objective:
    """A scalar whose gradients' outer products are, in expectation, those of a Fisher matrix summed over samples.

    Args:
        labels: ``probe``: `mpq.losses.OutputLoss.probe`, so that the matrix is the Gauss-Newton matrix of the loss, for
            ``kl`` the model's own Fisher matrix. ``true``: the cross-entropy of the data's labels with a random sign
            for each (empirical Fisher); the loss has no say then.
        loss: What is protected.
        data: Must hold class labels for ``true``.
        generator: Of the draws.
        by_sample: Refuse losses that return one mean for a whole batch: the gradient of a weight is no sum over samples
            with independent signs then.

    Raises:
        DataError: If ``true`` labels are missing.
        MpqError: If ``labels`` is neither, or, when called, the loss can't tell samples apart.
    """
    if labels == "true":
        require_labels(data)

        def signed(output: Any, batch: Batch) -> Tensor:
            losses, weights = label_losses(output, batch, loss)
            signs = torch.randint(0, 2, losses.shape, generator=generator, dtype=torch.int8) * 2 - 1
            return (losses * weights.sqrt() * signs.to(losses.device)).sum()

        return signed
    if labels != "probe":
        raise MpqError(f"unknown labels {labels!r}; use 'probe' (drawn from the model, none needed) or 'true'")

    def probe(output: Any, batch: Batch) -> Tensor:
        if by_sample and batch.size > 1 and not loss.by_sample(output, batch):
            raise MpqError(
                "a loss that returns one mean for the batch hides the gradient of each sample; return one loss per "
                "sample, or use batches of one sample"
            )
        return loss.probe(output, batch, generator)

    return probe


def first_order_objective(
    labels: str, loss: OutputLoss, data: Calibration, draws: int, seed: int
) -> tuple[Objective, int, Floats]:
    """What to differentiate for scores that are linear in the gradient.

    Args:
        labels: ``true``: the cross-entropy of the data's labels, batch by batch, one pass each. ``probe``: probes of
            the loss, since the gradient of ``kl`` or ``mse`` vanishes at the float model.
        loss: What is protected.
        data: The batches.
        draws: Of the probes.
        seed: Of the probes.

    Returns:
        The objective, the backward passes per batch, and what to multiply each batch's weight gradient with
        ``[batches]``: that of probes grows with the root of the samples only.

    Raises:
        DataError: If ``true`` labels are missing.
        MpqError: If ``labels`` is neither.
    """
    if labels == "true":
        return _label_objective(loss, data), 1, np.ones(len(data.batches))
    objective = probe_objective(labels, loss, data, torch.Generator().manual_seed(seed))
    return objective, draws, np.sqrt([b.size for b in data.batches])


def _label_objective(loss: OutputLoss, data: Calibration) -> Objective:
    """The summed cross-entropy of a batch's labels."""
    require_labels(data)

    def total(output: Any, batch: Batch) -> Tensor:
        losses, weights = label_losses(output, batch, loss)
        return (losses * weights).sum()

    return total


def require_labels(data: Calibration) -> None:
    """Refuse data without class labels.

    Raises:
        DataError: Naming the first batch without.
    """
    for i, batch in enumerate(data.batches):
        if not has_labels(batch):
            raise DataError(
                f"batch {i} of the data has no class labels for labels='true': give (inputs, integer labels) batches, "
                "or use labels='probe', which needs none"
            )


def label_losses(output: Any, batch: Batch, loss: OutputLoss) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every position and the position's share in its sample's mean, both ``[B, P]``.

    Args:
        output: Class scores; class probabilities where ``loss`` takes them for such.
        batch: With labels; those of -100 don't count, nor those that its attention mask hides.
        loss: What is protected.

    Raises:
        DataError: If the labels don't fit the output.
    """
    scores, labels = scores_and_labels(logits_of(output), batch)
    counted = labels != IGNORED_LABEL
    scores = scores if scores.dtype == torch.float64 else scores.float()
    probabilities = isinstance(loss, KLLoss) and loss.probabilities
    log_p = scores.clamp_min(torch.finfo(scores.dtype).tiny).log() if probabilities else F.log_softmax(scores, -1)
    losses = -log_p.gather(2, labels.clamp_min(0)[..., None])[..., 0]
    return losses, counted / counted.sum(1, keepdim=True).clamp_min(1)
