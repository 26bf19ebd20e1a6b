"""Average Hessian trace times squared quantization error (HAWQ-V2, Dong et al., 2020)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import numpy as np
import torch

from mpq.bank import QuantizerBank
from mpq.calibration import Calibration
from mpq.errors import DataError, MpqError
from mpq.layers import LayerSpec
from mpq.losses import OutputLoss
from mpq.problem import Floats
from mpq.quantizers import Scheme
from mpq.sensitivity.aggregate import by_group, distinct_layers, squared_error
from mpq.sensitivity.capture import grouped, input_power, table_of
from mpq.sensitivity.options import check_values
from mpq.sensitivity.probing import Estimate, Probing, estimate
from mpq.sensitivity.table import SensitivityTable
from mpq.sensitivity.trace_methods import Blocks, GaussNewton, Hutchinson, HutchPlusPlus, random_vectors
from mpq.space import SearchSpace
from mpq.view import ModelView

_METHODS = ("gauss_newton", "hutchinson", "blocks", "hutch++")


def hessian_trace(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    method: str = "gauss_newton",
    probes: int = 64,
    tolerance: float | None = 0.05,
    exact: bool = False,
    distribution: str = "rademacher",
    rank: int = 8,
    activations: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """Predicted loss ``0.5 * trace(H_ii) / n_i * ||Q(w_i) - w_i||^2`` of every scheme of every group.

    HAWQ-V2 (Dong et al., 2020, arXiv:1911.03852): ``H_ii`` is the block of one layer's weight in the Hessian of the
    mean loss over the data, ``n_i`` its size. Tied weights count once. Methods, all unbiased:

    - ``gauss_newton``: mean squared norm of each sample's gradient of a loss probe, ``E ||J_n^T u||^2``. With the
      ``kl`` and ``mse`` losses the Hessian at the float weights is the Gauss-Newton matrix, so this is the same trace
      from first derivatives, it can't be negative, and its noise averages over samples. With a callable loss it is the
      trace of the empirical Fisher matrix.
    - ``hutchinson``: ``v_i^T (H v)_i`` of the full Hessian, one product for all layers; noisy, as each layer's estimate
      holds the noise of all others.
    - ``blocks``: ``v^T H_ii v``, one product for each layer, as HAWQ and PyHessian do.
    - ``hutch++``: as ``blocks``, with the part of the trace in a random subspace of ``rank`` dimensions taken exactly
      (Meyer et al., 2021, arXiv:2010.09649).

    With ``activations``, the trace of the Gauss-Newton matrix in each layer's input ``a_i``, mean over samples, times
    half the mean squared rounding error of an input element is added (HAWQ-V2, mixed-precision activations). A tensor
    that several layers read counts once, for the first of them.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        bank: Quantized weights and activation ranges.
        loss: What is protected.
        method: See above.
        probes: Random probes of each batch, at most.
        tolerance: Stop when the standard error of every trace is below this share of it. It is first looked at after
            four probes, and counts only once it has 16 degrees of freedom, so that the stop does not bias the traces
            noticeably. None makes all probes.
        exact: No probes but the sum over all classes (or output elements), one backward pass for each position and
            class; with ``gauss_newton`` only.
        distribution: Of the entries of vectors over weights, ``rademacher`` (signs) or ``gaussian``; ``gauss_newton``
            has none.
        rank: Of ``hutch++``: two more products and one float64 vector per layer for each.
        activations: Score the rounding of activations; None: if the schemes differ in it.
        seed: Of the probes.
        progress: Show a bar.

    Returns:
        A table in the unit of ``loss``. Its standard errors are those of the probes, with the data taken as given, and
        add up over the layers of a group (an upper bound). Negative traces, which the full Hessian of a callable loss
        or the noise of few probes can give, score zero; ``provenance["negative_traces"]`` names their layers, and
        ``provenance["traces"]`` (``"activation_traces"``) holds the raw value and standard error of every layer.

    Raises:
        DataError: If a trace is NaN or infinite, naming the layer.
        GraphError: If no gradient reaches a layer that matters.
        MpqError: If an option is unknown, or exact traces are asked for of samples that can't be told apart.
    """
    _check_options(method, probes, tolerance, exact, rank)
    generator = torch.Generator().manual_seed(seed)
    draw = random_vectors(distribution, generator)
    if activations is None:
        activations = len({s.activation for s in space.schemes}) > 1
    by_products: dict[str, Callable[[], Probing]] = {
        "hutchinson": lambda: Hutchinson(view, space, data, loss, draw),
        "blocks": lambda: Blocks(view, space, data, loss, draw),
        "hutch++": lambda: HutchPlusPlus(view, space, data, loss, draw, rank, progress),
    }
    stop = (data, probes, tolerance, "hessian trace", progress)
    found: list[Estimate] = []  # of the weights, then of the activations
    mixed: set[str] = set()
    if method in by_products:
        found.append(estimate(by_products[method](), *stop))
    if method not in by_products or activations:
        wanted = {"weights": method not in by_products, "activations": activations}
        squares = GaussNewton(view, space, data, loss, generator, **wanted)
        found.append(squares.exact(progress) if exact else estimate(squares, *stop))
        squares.check_reached()
        mixed = squares.mixed
    mean, stderr = (np.concatenate(each) for each in zip(*((e.mean, e.stderr) for e in found), strict=True))
    weights = distinct_layers(space)
    traces = _named(weights, mean, stderr)
    input_traces = _named(space.layers if activations else (), mean[len(weights) :], stderr[len(weights) :])
    losses = _losses(view, space, bank, input_power(view, space, data, bank, progress) if activations else None)
    return table_of(
        space,
        losses(np.maximum(mean, 0)),
        losses(stderr),
        "hessian_trace",
        sum(e.passes for e in found) + activations,
        loss=loss.name,
        method=method,
        probes="exact" if exact else max(e.probes for e in found),
        tolerance=None if exact else tolerance,
        distribution=None if method == "gauss_newton" else distribution,
        rank=rank if method == "hutch++" else None,
        traces=traces,
        activation_traces=input_traces,
        negative_traces=[x.name for x, value in zip(weights, mean, strict=False) if value < 0],
        mixed_layers=sorted(mixed),
    )


def _check_options(method: str, probes: int, tolerance: float | None, exact: bool, rank: int) -> None:
    if method not in _METHODS:
        raise MpqError(f"unknown method {method!r}; known: {', '.join(_METHODS)}")
    if exact and method != "gauss_newton":
        raise MpqError(f"exact=True sums over output classes, which method={method!r} does not have; use gauss_newton")
    check_values(probes=probes, rank=rank, tolerance=tolerance)


def _named(layers: Iterable[LayerSpec], mean: Floats, stderr: Floats) -> dict[str, dict[str, float | None]]:
    """Traces by layer name, as JSON takes them; a single probe has no standard error."""
    found: dict[str, dict[str, float | None]] = {}
    for layer, value, error in zip(layers, mean, stderr, strict=False):
        if not np.isfinite(value):
            raise DataError(
                f"the Hessian trace of layer {layer.name!r} is NaN or infinite; check the data and the loss"
            )
        found[layer.name] = {"value": float(value), "stderr": float(error) if np.isfinite(error) else None}
    return found


def _losses(
    view: ModelView, space: SearchSpace, bank: QuantizerBank, power: Floats | None
) -> Callable[[Floats], Floats]:
    """What turns traces, of the distinct weights and of the layers' inputs (if scored), into losses ``[G, S]``.

    Args:
        view: The model.
        space: Groups and schemes.
        bank: Quantized weights.
        power: Mean squared rounding error of an input element ``[layers, S]``, or None.
    """
    position = {x.storage: i for i, x in enumerate(distinct_layers(space))}

    @cache
    def weight_power(layer: LayerSpec, scheme: Scheme) -> float:
        return squared_error(view, bank, layer, scheme) / layer.parameters

    def losses(traces: Floats) -> Floats:
        found = by_group(space, lambda x, s: 0.5 * traces[position[x.storage]] * weight_power(x, s))
        return found if power is None else found + grouped(space, 0.5 * traces[len(position) :, None] * power)

    return losses
