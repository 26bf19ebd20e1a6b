"""What is protected: a loss of the outputs against those of the float model, or a callable of the user's.

Every loss can do two things. `OutputLoss.value` measures it per sample. `OutputLoss.probe` returns a scalar whose
gradient at the outputs is, for each sample, a random vector ``u`` with ``E[u u^T] = H``, where ``H`` is the Hessian
of that sample's loss in its outputs, at the float outputs. So for a perturbation ``d`` of the network,
``E[(u^T J d)^2] = d^T J^T H J d``: the Gauss-Newton form, from one backward pass and without labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq.calibration import Batch
from mpq.errors import DataError, MpqError
from mpq.labels import IGNORED_LABEL, scores_and_labels
from mpq.trees import tensors_in

UserLoss = Callable[[Any, Any], Tensor]


class OutputLoss(Protocol):
    """What an estimator needs of a loss."""

    @property
    def name(self) -> str:
        """Short name, such as ``kl``."""

    def value(self, output: Any, reference: Any, batch: Batch) -> Tensor:
        """Loss of each sample ``[B]``, given the outputs of the changed and of the float model."""

    def probe(self, output: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        """A scalar whose gradient at the outputs is one random factor of the Hessian per sample."""

    def all_probes(self, output: Any, batch: Batch) -> Iterator[Tensor]:
        """Scalars whose gradients' outer products sum to the Hessian exactly (no randomness)."""

    def count_probes(self, output: Any, batch: Batch) -> int:
        """How many `all_probes` gives."""

    def by_sample(self, output: Any, batch: Batch) -> bool:
        """Whether probes have independent signs for each sample."""


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs of the shape of a tensor; drawn on the CPU, so that every device draws the same."""
    signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8) * 2 - 1
    return signs.to(like.device, like.dtype)


def logits_of(output: Any) -> Tensor | None:
    """The logits of an output: the tensor itself or its ``logits`` (Hugging Face); None where there are none."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    return found if isinstance(found, Tensor) and found.is_floating_point() else None


@dataclass(frozen=True)
class KLLoss:
    """Kullback-Leibler divergence from the float model's class probabilities, in nats, mean or sum over positions.

    Logits are ``[B, C]``, tokens ``[B, T, C]`` or maps ``[B, C, H, W]``. Positions that a batch's ``attention_mask``
    hides don't count. The Hessian of one position is ``diag(p) - p p^T``; its random factor here is
    ``sqrt(p) * e - p (sqrt(p) . e)`` with random signs ``e``: the same expectation as labels drawn from ``p``, but its
    variance stays below ``2 (d^T H d)^2`` where drawn labels of a confident model have no such limit.

    Attributes:
        probabilities: The outputs are probabilities already.
        reduction: Over the positions of a sample: ``mean``, so that every sequence counts the same, or ``sum``, so that
            every token does.
        draw: What probes are made of: random ``signs``; labels ``sampled`` from the model's predictions; or the batch's
            ``true`` labels (empirical Fisher), which measure the loss on labels where the model errs. Labels of -100
            don't count; those that are the input tokens are each predicted by the position before.
        positions: Probes look at this many random positions of each sample; None for all. Same expectation, less
            memory where the vocabulary is large.
    """

    probabilities: bool = False
    name: str = "kl"
    reduction: str = "mean"
    draw: str = "signs"
    positions: int | None = None

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum") or self.draw not in ("signs", "sampled", "true"):
            raise MpqError(
                f"reduction is 'mean' or 'sum' and draw 'signs', 'sampled' or 'true', not {self.reduction!r} and "
                f"{self.draw!r}"
            )
        if self.positions is not None and self.positions < 1:
            raise MpqError(f"positions must be at least 1, not {self.positions}; None takes all")

    def _log_probabilities(self, z: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Of logits ``[B, P, C]``: samples, positions (all or those chosen ``[B, P]``), classes."""
        z = z if chosen is None else z.gather(1, chosen[..., None].expand(-1, -1, z.shape[2]))
        z = z if z.dtype == torch.float64 else z.float()
        return z.clamp_min(torch.finfo(z.dtype).tiny).log() if self.probabilities else F.log_softmax(z, -1)

    @staticmethod
    def _logits(output: Any) -> Tensor:
        z = logits_of(output)
        if z is None or z.dim() < 2:
            raise MpqError("the kl loss needs logits with a class axis; use loss='mse' or a callable")
        z = z.movedim(1, -1).flatten(1, -2) if z.dim() > 3 else z
        return z[:, None] if z.dim() == 2 else z

    def _position_weights(self, z: Tensor, batch: Batch) -> Tensor:
        """``[B, P]``: what each position of logits or log-probabilities ``[B, P, C]`` counts; hidden ones nothing."""
        mask = batch.kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != z.shape[:2]:
            mask = torch.ones(z.shape[:2])
        return self._shares(mask, z)

    def _shares(self, counted: Tensor, z: Tensor) -> Tensor:
        weights = counted.to(z.device, torch.float64 if z.dtype == torch.float64 else torch.float32)
        return weights / weights.sum(1, keepdim=True).clamp_min(1) if self.reduction == "mean" else weights

    def value(self, output: Any, reference: Any, batch: Batch) -> Tensor:
        """Divergence of each sample ``[B]``."""
        log_p, log_q = (self._log_probabilities(self._logits(x)) for x in (reference, output))
        each = (log_p.exp() * (log_p - log_q)).sum(-1)
        return (each * self._position_weights(log_p, batch)).sum(1)

    def probe(self, output: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        """See `OutputLoss.probe`.

        Raises:
            DataError: If true labels are wanted, and there are none or they don't fit.
        """
        labels, chosen = None, None
        if self.draw == "true":
            z, labels = scores_and_labels(logits_of(output), batch)
            weights = self._shares(labels != IGNORED_LABEL, z)
        else:
            z = self._logits(output)
            weights = self._position_weights(z, batch)
        if self.positions is not None and self.positions < z.shape[1]:
            # With replacement, in proportion to what each counts: the mean over draws is the whole in expectation.
            total = weights.sum(1, keepdim=True)
            likely = weights.where(total > 0, 1.0)  # any will do where none counts
            chosen = torch.multinomial(likely.cpu(), self.positions, True, generator=generator).to(z.device)
            weights = (total / self.positions).expand(-1, self.positions)
        log_p = self._log_probabilities(z, chosen)
        if self.draw == "signs":
            return self._project(log_p, weights, _signs(log_p, generator))
        if labels is None:
            flat = log_p.detach().exp().flatten(0, 1).cpu()
            labels = torch.multinomial(flat, 1, generator=generator).view(log_p.shape[:2]).to(z.device)
        elif chosen is not None:
            labels = labels.gather(1, chosen)
        picked = log_p.gather(2, labels.clamp_min(0)[..., None])[..., 0]
        # Positions and samples are told apart by their signs.
        return (picked * weights.sqrt() * _signs(picked, generator)).sum()

    def all_probes(self, output: Any, batch: Batch) -> Iterator[Tensor]:
        """One probe per position and class: signs replaced by unit vectors."""
        log_p = self._log_probabilities(self._logits(output))
        weights = self._position_weights(log_p, batch)
        for position in range(log_p.shape[1]):
            for c in range(log_p.shape[2]):
                unit = torch.zeros_like(log_p)
                unit[:, position, c] = 1
                yield self._project(log_p, weights, unit)

    def count_probes(self, output: Any, batch: Batch) -> int:
        """See `OutputLoss.count_probes`."""
        return self._logits(output)[0].numel()

    def by_sample(self, output: Any, batch: Batch) -> bool:
        """See `OutputLoss.by_sample`."""
        return True

    @staticmethod
    def _project(log_p: Tensor, weights: Tensor, direction: Tensor) -> Tensor:
        # d(log_p)/d(z) = I - 1 p^T, so the gradient of sum(sqrt(p) e log_p) is sqrt(p) e - p (sqrt(p) . e).
        return (log_p.detach().mul(0.5).exp() * direction * weights.sqrt()[..., None] * log_p).sum()


@dataclass(frozen=True)
class MSELoss:
    """Squared error to the float model's outputs, mean over all output elements of a sample.

    Every floating-point tensor of the output counts; each needs the batch as its first axis. Its Hessian in the
    outputs is ``2/D I``, its random factor ``sqrt(2/D) e`` with random signs ``e``.
    """

    name: str = "mse"

    @staticmethod
    def _flat(output: Any, batch: Batch) -> Tensor:
        leaves = [t for t in tensors_in(output) if t.is_floating_point()]
        if not leaves or any(t.dim() == 0 or len(t) != batch.size for t in leaves):
            shapes = ", ".join(str(tuple(t.shape)) for t in leaves) or "no tensor"
            raise MpqError(
                f"outputs must have the batch of {batch.size} as first axis, not {shapes}; pass a callable loss"
            )
        return torch.cat([t.flatten(1) if t.dim() > 1 else t[:, None] for t in leaves], 1)

    def value(self, output: Any, reference: Any, batch: Batch) -> Tensor:
        """Mean squared error of each sample ``[B]``."""
        error: Tensor = self._flat(output, batch) - self._flat(reference, batch)
        return error.square().mean(1)

    def probe(self, output: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        """See `OutputLoss.probe`."""
        y = self._flat(output, batch)
        return (y * _signs(y, generator)).sum() * math.sqrt(2 / y.shape[1])

    def all_probes(self, output: Any, batch: Batch) -> Iterator[Tensor]:
        """One probe per output element."""
        y = self._flat(output, batch)
        for column in y.unbind(1):
            yield column.sum() * math.sqrt(2 / y.shape[1])

    def count_probes(self, output: Any, batch: Batch) -> int:
        """See `OutputLoss.count_probes`."""
        return self._flat(output, batch).shape[1]

    def by_sample(self, output: Any, batch: Batch) -> bool:
        """See `OutputLoss.by_sample`."""
        return True


@dataclass(frozen=True)
class CallableLoss:
    """A loss of the user's own, taken as a negative log-likelihood.

    ``fn(output, batch)`` returns one loss per sample ``[B]`` (better) or their mean. The factor of its Hessian is the
    per-sample gradient (empirical Fisher), with a random sign per sample so that batches can be summed.
    """

    fn: UserLoss
    name: str = "callable"

    def _per_sample(self, output: Any, batch: Batch) -> Tensor:
        loss = self.fn(output, batch.raw)
        if not isinstance(loss, Tensor) or loss.shape not in ((), (batch.size,)):
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise MpqError(f"the loss must return a scalar or one value per sample ({batch.size}), not {got}")
        if not loss.requires_grad and any(t.requires_grad for t in tensors_in(output)):
            raise MpqError(
                "no gradient leads from the loss to the model's output: it was detached, or made by argmax, NumPy or "
                "the like; return a differentiable loss, or use estimator='perturbation'"
            )
        return loss

    def value(self, output: Any, reference: Any, batch: Batch) -> Tensor:
        """The user's loss ``[B]``; a mean is repeated."""
        return self._per_sample(output, batch).expand(batch.size)

    def probe(self, output: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        """See `OutputLoss.probe`."""
        loss = self._per_sample(output, batch)
        return loss * batch.size if loss.dim() == 0 else (loss * _signs(loss, generator)).sum()

    def all_probes(self, output: Any, batch: Batch) -> Iterator[Tensor]:
        """The summed loss: its per-sample gradients are exact already."""
        yield self._per_sample(output, batch).expand(batch.size).sum()

    def count_probes(self, output: Any, batch: Batch) -> int:
        """See `OutputLoss.count_probes`."""
        return 1

    def by_sample(self, output: Any, batch: Batch) -> bool:
        """See `OutputLoss.by_sample`."""
        return self._per_sample(output, batch).dim() == 1


def resolve_loss(loss: str | UserLoss | OutputLoss, output: Any) -> OutputLoss:
    """The loss named by ``auto``, ``kl`` or ``mse``, or made from a callable.

    ``auto`` takes ``kl`` where the output is logits or probabilities: a tensor, or an object with ``.logits``. It takes
    ``mse`` for everything else: other structures, a single output per sample, and rows of unit length (embeddings).

    Args:
        loss: Name, callable ``(output, batch) -> loss``, or an `OutputLoss`.
        output: An output of the float model.

    Raises:
        MpqError: If the name is unknown.
    """
    if hasattr(loss, "probe"):
        return loss  # type: ignore[return-value]
    if callable(loss):
        return CallableLoss(loss)
    if loss not in ("auto", "kl", "mse"):
        raise MpqError(f"unknown loss {loss!r}; use 'auto', 'kl', 'mse' or a callable (output, batch) -> loss")
    z = logits_of(output)
    classes = (
        None if z is None or z.dim() < 2 else z.flatten(0, -2) if z.dim() <= 3 else z.movedim(1, -1).flatten(0, -2)
    )
    if classes is None or classes.shape[1] < 2:
        if loss == "kl":
            raise MpqError("loss='kl' needs logits with at least two classes; use 'mse' or a callable")
        return MSELoss()
    one = torch.ones(len(classes), dtype=classes.dtype, device=classes.device)
    probabilities = bool((classes >= 0).all()) and torch.allclose(classes.sum(1), one, atol=1e-3)
    embeddings = torch.allclose(classes.norm(dim=1), one, atol=1e-3) and not probabilities
    return MSELoss() if loss == "mse" or (loss == "auto" and embeddings) else KLLoss(probabilities)


def check_finite_output(output: Any, where: str) -> None:
    """Refuse NaN and infinity in any output tensor.

    Raises:
        DataError: Naming where it was seen.
    """
    for t in tensors_in(output):
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise DataError(f"the float model's output holds NaN or infinity {where}")
