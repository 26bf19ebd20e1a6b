"""Average Hessian trace times squared quantization error (HAWQ-V2, Dong et al., 2020)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpq.bank import QuantizerBank
from mpq.calibration import Batch, Calibration
from mpq.errors import DataError, GraphError
from mpq.losses import OutputLoss
from mpq.problem import Floats
from mpq.progress import progress_bar
from mpq.sensitivity.aggregate import by_group, distinct_layers, squared_error
from mpq.sensitivity.rows import check_reached
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace
from mpq.view import ModelView

# A Hessian-vector product takes about as long as this many forward passes (benchmarks/end_to_end.py).
_PRODUCT_PASSES = 6

# Draws the random signs of one probe, one tensor per weight.
Probe = Callable[[list[Tensor]], list[Tensor]]


def hessian_trace(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    probes: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """Predicted loss ``0.5 * trace(H_ii) / n_i * ||Q(w_i) - w_i||^2`` of every scheme of every group.

    ``H_ii`` is the block of one layer's weight in the Hessian of the mean loss over the data, ``n_i`` its size. All
    traces come from the same Hessian-vector products (Hutchinson): ``E[v_i^T (H v)_i] = trace(H_ii)`` for random signs
    ``v`` over all weights. With the ``kl`` and ``mse`` losses the Hessian at the float weights is the Gauss-Newton
    matrix, so that traces can't be negative but by chance.

    Only weights are scored: activation formats change the costs here, not the loss. Use `influence` to score both.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        bank: Quantized weights.
        loss: What is protected.
        probes: Random sign vectors.
        seed: Of the probes.
        progress: Show a bar.

    Returns:
        A table in the unit of ``loss``; the standard errors come from the spread of the probes.

    Raises:
        DataError: If a trace is NaN or infinite, naming the layer.
        GraphError: If no gradient reaches a layer that matters.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = distinct_layers(space)
    names = [x.name for x in layers]
    traces = np.zeros((probes, len(names)))
    steps = progress_bar(
        _products(view, names, data, loss, probes, generator),
        "hessian trace",
        progress,
        total=probes * len(data.batches),
    )
    for probe, share, forms in steps:
        traces[probe] += share * forms.numpy()
    for name, column in zip(names, traces.T, strict=True):
        if not np.isfinite(column).all():
            raise DataError(f"the Hessian trace of layer {name!r} is NaN or infinite; check the data and the loss")
    mean = traces.mean(0)
    spread = traces.std(0, ddof=1) / probes**0.5 if probes > 1 else np.full(len(names), np.nan)
    position = {x.storage: i for i, x in enumerate(layers)}

    def score(values: Floats) -> Floats:
        return by_group(
            space, lambda x, s: 0.5 * values[position[x.storage]] / x.parameters * squared_error(view, bank, x, s)
        )

    provenance = {
        "estimator": "hessian_trace",
        "probes": probes,
        "loss": loss.name,
        # One forward pass for the reference; forward and backward; then the products.
        "forward_passes": 1 + 3 + _PRODUCT_PASSES * probes,
    }
    groups = tuple(g.name for g in space.groups)
    return SensitivityTable(groups, tuple(map(str, space.schemes)), score(mean), score(spread), None, provenance)


def _products(
    view: ModelView,
    names: list[str],
    data: Calibration,
    loss: OutputLoss,
    probes: int,
    generator: torch.Generator,
) -> Iterator[tuple[int, float, Tensor]]:
    """Probe number, share of the batch in the data, and quadratic forms ``v_i^T (H v)_i`` of every weight."""

    def signs(weights: list[Tensor]) -> list[Tensor]:
        return [(torch.randint(0, 2, w.shape, generator=generator) * 2 - 1).to(w.device, w.dtype) for w in weights]

    for batch in data.batches:
        forms = block_forms(view, names, batch, loss, [signs] * probes)
        for probe, form in enumerate(forms):
            yield probe, batch.size / data.num_samples, form


def block_forms(
    view: ModelView, names: list[str], batch: Batch, loss: OutputLoss, probes: list[Probe]
) -> Iterator[Tensor]:
    """``v_i^T (H v)_i`` of every named weight, float64 ``[len(names)]``, for each probe ``v``.

    ``H`` is the Hessian of the mean loss over the batch in the named weights together.
    """
    with torch.no_grad():
        reference = view(batch)
    weights = [view.weight(name).detach().requires_grad_() for name in names]
    # Fused attention kernels have no second derivative.
    with view.swapped(dict(zip(names, weights, strict=True))), sdpa_kernel(SDPBackend.MATH):
        mean = loss.value(view(batch), reference, batch).mean()
        if not mean.requires_grad:
            raise GraphError("no gradient reaches the model's output: its forward runs under torch.no_grad()")
        gradients = torch.autograd.grad(mean, weights, create_graph=True, allow_unused=True)
        unreached = [name for name, g in zip(names, gradients, strict=True) if g is None]
        known = [torch.zeros_like(w) * w if g is None else g for w, g in zip(weights, gradients, strict=True)]
        for probe in probes:
            vectors = probe(weights)
            products = torch.autograd.grad(known, weights, vectors, retain_graph=True, materialize_grads=True)
            yield torch.stack([(v * p).double().sum().cpu() for v, p in zip(vectors, products, strict=True)])
    check_reached(view, unreached, [batch])
