"""Largest Hessian eigenvalue of each layer times squared quantization error (HAWQ, Dong et al., 2019)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mpq.bank import QuantizerBank
from mpq.calibration import Calibration
from mpq.errors import DataError, MpqError
from mpq.losses import OutputLoss
from mpq.progress import progress_bar
from mpq.sensitivity.aggregate import by_group, distinct_layers, squared_error
from mpq.sensitivity.capture import table_of
from mpq.sensitivity.hessian import BLOCK_PASSES, GRADIENT_PASSES, hessian_of
from mpq.sensitivity.options import check_values
from mpq.sensitivity.table import SensitivityTable
from mpq.sensitivity.trace_methods import random_vectors
from mpq.space import SearchSpace
from mpq.view import ModelView


def top_eigenvalue(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    tolerance: float = 1e-3,
    iterations: int = 50,
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """Predicted loss ``0.5 * lambda_i * ||Q(w_i) - w_i||^2`` of every scheme of every group.

    ``lambda_i`` is the largest eigenvalue of one layer's block ``H_ii`` of the Hessian of the mean loss over the data,
    so that the score is an upper bound of the quadratic form ``0.5 d^T H_ii d`` of the weight's rounding error ``d``
    (HAWQ, Dong et al., 2019, arXiv:1905.03696; `hawq_order` is its order of layers). Tied weights count once;
    activations are not scored.

    Each block has its own Lanczos iteration (the three-term recurrence; Golub and Van Loan, Matrix Computations,
    section 10.1), which needs fewer products than power iteration and the memory of three vectors. All of them advance
    together, so that the gradient of each batch is built once per iteration for all layers.

    The largest eigenvalue is meant, not the one of largest magnitude: with the ``kl`` and ``mse`` losses there are no
    negative ones, and the full Hessian of a callable loss can't lose more than the largest allows. If even that is
    negative, the layer scores zero and is named in ``provenance["negative_eigenvalues"]``.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        bank: Quantized weights.
        loss: What is protected.
        tolerance: Stop when the residual norm ``||H_ii v - lambda v||`` of the unit vector ``v`` found is below this
            share of the eigenvalue; the error of the eigenvalue is usually about the square of that.
        iterations: At most; layers that need more are named in ``provenance["unconverged"]``.
        seed: Of the first vectors.
        progress: Show a bar.

    Returns:
        A table in the unit of ``loss``, without standard errors. ``provenance["eigenvalues"]`` holds value, residual
        norm and size of every layer.

    Raises:
        DataError: If an eigenvalue is NaN or infinite, naming the layer.
        GraphError: If no gradient reaches a layer that matters.
        MpqError: If an option is out of range.
    """
    check_values(tolerance=tolerance, iterations=iterations)
    layers = distinct_layers(space)
    draw = random_vectors("rademacher", torch.Generator().manual_seed(seed))
    runs = {x.name: Lanczos(draw(view.weight(x.name)), tolerance) for x in layers}
    passes = 0
    for _ in progress_bar(range(iterations), "top eigenvalue", progress):
        active = [name for name, run in runs.items() if not run.converged]
        if not active:
            break
        for name, product in _block_products(view, data, loss, {n: runs[n].vector for n in active}).items():
            if not torch.isfinite(product).all():
                raise DataError(f"the Hessian of layer {name!r} is NaN or infinite; check the data and the loss")
            runs[name].advance(product)
        passes += GRADIENT_PASSES + BLOCK_PASSES * len(active)
    largest = {x.storage: max(runs[x.name].value, 0.0) for x in layers}
    found = by_group(space, lambda x, s: 0.5 * largest[x.storage] * squared_error(view, bank, x, s))
    return table_of(
        space,
        found,
        np.zeros_like(found),
        "top_eigenvalue",
        passes,
        loss=loss.name,
        tolerance=tolerance,
        iterations=iterations,
        eigenvalues={
            x.name: {"value": runs[x.name].value, "residual": runs[x.name].residual, "parameters": x.parameters}
            for x in layers
        },
        unconverged=[name for name, run in runs.items() if not run.converged],
        negative_eigenvalues=[name for name, run in runs.items() if run.value < 0],
    )


def hawq_order(table: SensitivityTable) -> list[str]:
    """Layers from most to least sensitive by HAWQ's ``S_i = lambda_i / n_i``, the largest eigenvalue over the size.

    Args:
        table: Made by `top_eigenvalue`.

    Raises:
        MpqError: If it is not.
    """
    found = table.provenance.get("eigenvalues")
    if found is None:
        raise MpqError(f"the {table.provenance.get('estimator')} table has no eigenvalues; use top_eigenvalue")
    return sorted(found, key=lambda name: -found[name]["value"] / found[name]["parameters"])


def _block_products(
    view: ModelView, data: Calibration, loss: OutputLoss, vectors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """``H_ii v_i`` over all data for each named layer, in float64."""
    found = {name: torch.zeros_like(v) for name, v in vectors.items()}
    for batch in data.batches:
        with hessian_of(view, list(vectors), batch, loss) as hessian:
            for i, (name, weight) in enumerate(zip(vectors, hessian.weights, strict=True)):
                product = hessian.block_product(i, vectors[name].to(weight.dtype))
                found[name] += product.double() * (batch.size / data.num_samples)
    return found


class Lanczos:
    """Largest eigenvalue of a symmetric matrix from products with it, one at a time.

    Without reorthogonalization the basis forgets what it has found, which repeats eigenvalues but does not move them
    (Paige, 1980).

    Args:
        start: First vector, any shape and length.
        tolerance: Relative residual norm to converge at.

    Attributes:
        vector: What to multiply next, float64 of unit length.
        value: Largest eigenvalue so far (from below).
        residual: Residual norm of its vector.
        converged: Whether the residual is small enough, or nothing is left to search.
    """

    def __init__(self, start: Tensor, tolerance: float) -> None:
        self.vector = start.double() / start.double().norm()
        self.value, self.residual, self.converged = 0.0, float("inf"), False
        self._before = torch.zeros_like(self.vector)
        self._tolerance = tolerance
        self._diagonal: list[float] = []
        self._beside: list[float] = []

    def advance(self, product: Tensor) -> None:
        """Take the product of the matrix and `vector`."""
        rest = product - self._beside[-1] * self._before if self._beside else product
        self._diagonal.append(float((rest * self.vector).sum()))
        rest = rest - self._diagonal[-1] * self.vector
        length = float(rest.norm())
        tridiagonal = np.diag(self._diagonal) + np.diag(self._beside, -1)
        values, vectors = np.linalg.eigh(tridiagonal, UPLO="L")
        self.value, self.residual = float(values[-1]), length * abs(float(vectors[-1, -1]))
        exhausted = len(self._diagonal) >= self.vector.numel()
        self.converged = exhausted or self.residual <= self._tolerance * abs(self.value)
        self._before, self.vector = self.vector, rest / (length or 1.0)
        self._beside.append(length)
