"""Class labels beside the outputs that they belong to."""

from __future__ import annotations

import torch
from torch import Tensor

from mpq.calibration import Batch
from mpq.errors import DataError

IGNORED_LABEL = -100  # PyTorch's and Hugging Face's convention


def has_labels(batch: Batch) -> bool:
    """Whether a batch has class labels."""
    return isinstance(batch.labels, Tensor) and not batch.labels.is_floating_point()


def labels_are_tokens(labels: Tensor, batch: Batch) -> bool:
    """Whether labels are the input tokens, as causal language models take them: each is due one position earlier."""
    ids = batch.kwargs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape != labels.shape:  # one label for a whole text, say
        return False
    ids = ids.to(labels)
    return torch.equal(labels.where(labels != IGNORED_LABEL, ids), ids)


def scores_and_labels(logits: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
    """Class scores ``[B, P, C]`` and the labels they should predict ``[B, P]``.

    Where the labels are the input tokens, as causal language models take them, each is that of the position before it.
    Labels at positions that the batch's ``attention_mask`` hides become `IGNORED_LABEL`.

    Args:
        logits: ``[B, C]``, tokens ``[B, T, C]`` or maps ``[B, C, H, W]``; None if the output has none.
        batch: With its labels.

    Raises:
        DataError: If the batch has no class labels, or they don't fit the output.
    """
    labels = batch.labels
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise DataError("true labels need integer labels with each batch, such as (inputs, labels)")
    if logits is None or logits.dim() < 2:
        raise DataError("true labels need class scores as output; use probes of the model's own predictions")
    scores = logits.movedim(1, -1) if logits.dim() > 3 else logits
    labels = labels.to(scores.device, torch.long)
    if labels.dim() == scores.dim() and labels.shape[-1] == 1:
        labels = labels[..., 0]
    if labels.shape != scores.shape[:-1]:
        raise DataError(f"labels of shape {tuple(labels.shape)} don't fit class scores {tuple(logits.shape)}")
    mask, causal = batch.kwargs.get("attention_mask"), labels_are_tokens(labels, batch)
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        labels = labels.where(mask.to(labels.device) != 0, IGNORED_LABEL)
    if causal:
        scores, labels = scores[:, :-1], labels[:, 1:]
    classes, counted = scores.shape[-1], labels != IGNORED_LABEL
    if ((labels < 0) | (labels >= classes))[counted].any():
        raise DataError(f"a label is not one of the model's {classes} classes (0 to {classes - 1})")
    return scores.reshape(len(scores), -1, classes), labels.reshape(len(labels), -1)
