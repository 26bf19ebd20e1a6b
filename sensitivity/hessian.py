"""Hessian-vector products of a batch's mean loss in the weights of chosen layers; shared by trace and eigenvalues."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpq.calibration import Batch
from mpq.errors import GraphError
from mpq.losses import OutputLoss
from mpq.sensitivity.rows import check_reached
from mpq.trees import tensors_in
from mpq.view import ModelView

# What the steps cost, in forward passes (benchmarks/hessian_cost.py): the loss and its differentiable gradient; a
# product with the whole Hessian; a product with the block of one layer, which spares the layers before it.
GRADIENT_PASSES, PRODUCT_PASSES, BLOCK_PASSES = 4, 6, 2


@dataclass(frozen=True)
class BatchHessian:
    """The Hessian of one batch, as products.

    Attributes:
        weights: The weights it is taken in.
        gradients: The gradient of the mean loss in each of them, differentiable.
    """

    weights: list[Tensor]
    gradients: list[Tensor]

    def product(self, vectors: list[Tensor]) -> list[Tensor]:
        """``H v`` for one vector over all weights together."""
        return list(
            torch.autograd.grad(self.gradients, self.weights, vectors, retain_graph=True, materialize_grads=True)
        )

    def block_product(self, i: int, vector: Tensor) -> Tensor:
        """``H_ii v`` for a vector of one weight alone."""
        (found,) = torch.autograd.grad(
            self.gradients[i], self.weights[i], vector, retain_graph=True, materialize_grads=True
        )
        return found


@contextmanager
def hessian_of(view: ModelView, names: list[str], batch: Batch, loss: OutputLoss) -> Iterator[BatchHessian]:
    """The Hessian of the mean loss over a batch in the named weights.

    Args:
        view: The model.
        names: Layers; of tied ones name one.
        batch: The samples.
        loss: Measured against the float model's own outputs.

    Raises:
        GraphError: If no gradient reaches a layer that matters.
    """
    with torch.no_grad():
        reference = view(batch)
    weights = [view.weight(name).detach().requires_grad_() for name in names]
    # Fused attention kernels have no second derivative.
    with view.swapped(dict(zip(names, weights, strict=True))), sdpa_kernel(SDPBackend.MATH):
        output = view(batch)
        check_differentiable(output)
        mean = loss.value(output, reference, batch).mean()
        gradients = torch.autograd.grad(mean, weights, create_graph=True, allow_unused=True)
        # A constant gradient means second derivatives of zero; so does an unused layer.
        constant = [g is None or not g.requires_grad for g in gradients]
        known = [w * 0 if fixed else g for w, g, fixed in zip(weights, gradients, constant, strict=True)]
        yield BatchHessian(weights, known)
    check_reached(view, [name for name, g in zip(names, gradients, strict=True) if g is None], [batch])


def check_differentiable(output: Any) -> None:
    """Refuse a model that runs without gradients.

    Raises:
        GraphError: If no tensor of its output requires one.
    """
    if not any(t.requires_grad for t in tensors_in(output)):
        raise GraphError("no gradient reaches the model's output: its forward runs under torch.no_grad()")
