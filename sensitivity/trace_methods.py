"""Ways to draw estimates of the trace of each layer's Hessian block; `mpq.sensitivity.probing` averages them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpq.calibration import Batch, Calibration
from mpq.errors import MpqError
from mpq.losses import OutputLoss
from mpq.progress import progress_bar
from mpq.sensitivity.aggregate import distinct_layers
from mpq.sensitivity.gradient_norms import GradientNorms
from mpq.sensitivity.hessian import BLOCK_PASSES, GRADIENT_PASSES, PRODUCT_PASSES, BatchHessian, hessian_of
from mpq.sensitivity.probing import Estimate
from mpq.sensitivity.rows import check_reached, layouts_of
from mpq.space import SearchSpace
from mpq.view import ModelView

# Draws a random vector of the shape of a weight, with independent entries of mean zero and variance one.
Draw = Callable[[Tensor], Tensor]


def random_vectors(distribution: str, generator: torch.Generator) -> Draw:
    """Random signs or normal numbers; drawn on the CPU, so that every device draws the same.

    Raises:
        MpqError: If the distribution is unknown.
    """
    if distribution not in ("rademacher", "gaussian"):
        raise MpqError(f"unknown distribution {distribution!r}; use 'rademacher' or 'gaussian'")

    def draw(like: Tensor) -> Tensor:
        if distribution == "gaussian":
            return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
        return (torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8) * 2 - 1).to(like)

    return draw


class GaussNewton:
    """Traces of the Gauss-Newton blocks of weights and of layer inputs: squared gradient norms of loss probes.

    One term for each sample, as their probes are independent.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        loss: What is protected.
        generator: Of the probes.
        weights: Estimate traces of the distinct weights; they come first.
        activations: Estimate traces of the inputs of each layer.

    Attributes:
        setup_passes: Cost of finding where the samples are, in forward passes.
        mixed: Layers whose samples could not be told apart, in the batches so far.
    """

    def __init__(
        self,
        view: ModelView,
        space: SearchSpace,
        data: Calibration,
        loss: OutputLoss,
        generator: torch.Generator,
        *,
        weights: bool = True,
        activations: bool = False,
    ) -> None:
        self._view, self._space, self._data, self._loss, self._generator = view, space, data, loss, generator
        self._parts = {"weights": weights, "activations": activations}
        self._layouts, self.setup_passes = layouts_of(view, [x.name for x in space.layers], data)
        self._unreached = {x.name for x in space.layers}
        self.mixed: set[str] = set()

    def draws(self, batch: Batch, probes: int) -> Iterator[list[Tensor]]:
        """See `mpq.sensitivity.probing.Probing`."""

        def random(output: Any) -> Iterable[Tensor]:
            return (self._loss.probe(output, batch, self._generator) for _ in range(probes))

        return self._norms(batch, random, exact=False)

    def passes(self, probes: int) -> float:
        """See `mpq.sensitivity.probing.Probing`: a forward pass, then backward passes with gradients by sample."""
        return 1 + 3 * probes

    def exact(self, progress: bool) -> Estimate:
        """The traces themselves: sums over all classes (or output elements), one backward pass for each."""
        total, passes = np.zeros(1), self.setup_passes
        for batch in progress_bar(self._data.batches, "exact trace", progress):
            norms = self._norms(batch, partial(self._loss.all_probes, batch=batch), exact=True)
            each = [[float(t.sum()) for t in terms] for terms in norms]
            total = total + np.sum(each, 0)
            passes += batch.size / self._data.num_samples * self.passes(len(each))
        return Estimate(total, np.zeros_like(total), np.zeros_like(total), 0, passes)

    def _norms(self, batch: Batch, probes: Callable[[Any], Iterable[Tensor]], *, exact: bool) -> Iterator[list[Tensor]]:
        norms = GradientNorms(self._view, self._space, batch, self._layouts, **self._parts)
        self.mixed |= norms.mixed
        if norms.mixed and batch.size > 1 and (exact or not self._loss.by_sample(norms.output, batch)):
            what = "exact=True" if exact else "a loss that returns one mean for the batch"
            raise MpqError(
                f"layer {min(norms.mixed)!r} mixes the samples of a batch, which {what} can't tell apart; "
                + ("use random probes" if exact else "return one loss per sample, or use batches of one sample")
            )
        for probe in probes(norms.output):
            yield [each / self._data.num_samples for each in norms.of(probe)]
        self._unreached -= norms.reached

    def check_reached(self) -> None:
        """Refuse layers that matter although no gradient of any batch has reached them.

        Raises:
            GraphError: Naming the first such layer.
        """
        check_reached(self._view, sorted(self._unreached), self._data.batches)


class _Products(ABC):
    """What the methods with Hessian-vector products share.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        loss: What is protected.
        draw: Of random vectors.

    Attributes:
        setup_passes: Cost of the preparation, in forward passes.
    """

    setup_passes = 0.0

    def __init__(self, view: ModelView, space: SearchSpace, data: Calibration, loss: OutputLoss, draw: Draw) -> None:
        self._view, self._data, self._loss, self._draw = view, data, loss, draw
        self._names = [x.name for x in distinct_layers(space)]

    def draws(self, batch: Batch, probes: int) -> Iterator[list[Tensor]]:
        """See `mpq.sensitivity.probing.Probing`."""
        with hessian_of(self._view, self._names, batch, self._loss) as hessian:
            for _ in range(probes):
                yield [self._share(batch) * form[None] for form in self._forms(hessian)]

    def _share(self, batch: Batch) -> float:
        return batch.size / self._data.num_samples

    @abstractmethod
    def passes(self, probes: int) -> float:
        """See `mpq.sensitivity.probing.Probing`."""

    @abstractmethod
    def _forms(self, hessian: BatchHessian) -> list[Tensor]:
        """One unbiased estimate of the trace of each block."""


class Hutchinson(_Products):
    """``v_i^T (H v)_i`` of the full Hessian: one product serves all layers (Hutchinson, 1990).

    Its noise includes that of all blocks off the diagonal.
    """

    def passes(self, probes: int) -> float:
        """See `mpq.sensitivity.probing.Probing`."""
        return GRADIENT_PASSES + PRODUCT_PASSES * probes

    def _forms(self, hessian: BatchHessian) -> list[Tensor]:
        vectors = [self._draw(w) for w in hessian.weights]
        return [_inner(v, p) for v, p in zip(vectors, hessian.product(vectors), strict=True)]


class Blocks(_Products):
    """``v^T H_ii v`` of one layer after the other, as HAWQ and PyHessian do: one product for each layer."""

    def passes(self, probes: int) -> float:
        """See `mpq.sensitivity.probing.Probing`."""
        return GRADIENT_PASSES + BLOCK_PASSES * probes * len(self._names)

    def _forms(self, hessian: BatchHessian) -> list[Tensor]:
        vectors = [self._draw(w) for w in hessian.weights]
        return [_inner(v, hessian.block_product(i, v)) for i, v in enumerate(vectors)]


class HutchPlusPlus(Blocks):
    """The large eigenvalues of each block exactly, the rest by probes that avoid them (Hutch++, Meyer et al., 2021).

    With an orthonormal basis ``Q`` of the products of ``rank`` random vectors and ``P = I - Q Q^T``,
    ``trace(H_ii) = trace(Q^T H_ii Q) + E[(P v)^T H_ii (P v)]``. Given ``Q`` the probes are independent, so that
    standard errors and the stop hold as for the other methods. (XTrace, Epperly et al., 2024, needs fewer products, but
    its leave-one-out estimates depend on each other.) The bases take ``rank`` vectors over all weights in float64.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        loss: What is protected.
        draw: Of random vectors.
        rank: Columns of each basis; a block of no more rows is exact.
        progress: Show a bar.
    """

    def __init__(
        self,
        view: ModelView,
        space: SearchSpace,
        data: Calibration,
        loss: OutputLoss,
        draw: Draw,
        rank: int,
        progress: bool,
    ) -> None:
        super().__init__(view, space, data, loss, draw)
        weights = [view.weight(name) for name in self._names]
        starts = [torch.stack([draw(w).flatten().double() for _ in range(min(rank, w.numel()))], 1) for w in weights]
        images = self._times(starts, "basis of the trace", progress)
        self._bases = [torch.linalg.qr(y)[0] for y in images]
        images = self._times(self._bases, "trace in the basis", progress)
        self._known = [(q * y).sum().cpu() for q, y in zip(self._bases, images, strict=True)]
        self.setup_passes = 2 * self.passes(rank)

    def _times(self, columns: list[Tensor], title: str, progress: bool) -> list[Tensor]:
        """Products of each layer's block, over all data, with float64 columns ``[n, rank]``."""
        found = [torch.zeros_like(c) for c in columns]
        for batch in progress_bar(self._data.batches, title, progress):
            with hessian_of(self._view, self._names, batch, self._loss) as hessian:
                for i, weight in enumerate(hessian.weights):
                    for j, column in enumerate(columns[i].T):
                        product = hessian.block_product(i, column.reshape(weight.shape).to(weight.dtype))
                        found[i][:, j] += self._share(batch) * product.flatten().double()
        return found

    def _forms(self, hessian: BatchHessian) -> list[Tensor]:
        forms = []
        for i, (weight, basis, known) in enumerate(zip(hessian.weights, self._bases, self._known, strict=True)):
            v = self._draw(weight).flatten().double()
            v = (v - basis @ (basis.T @ v)).reshape(weight.shape).to(weight.dtype)
            forms.append(known + _inner(v, hessian.block_product(i, v)))
        return forms


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum().cpu()
