"""GPTQ: round one input column after the other and let those still to come make up for each error."""

from __future__ import annotations

import torch
from torch import Tensor

from mpq.errors import DataError
from mpq.quantizers.elements import element_scales
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.statistics import LayerStats
from mpq.quantizers.tensors import QuantizedTensor, round_elements

_COLUMNS = 128  # between updates of all that is to come


def gptq(
    weight: Tensor,
    fmt: NumberFormat,
    stats: LayerStats,
    method: str = "mse",
    *,
    by_activation: bool = True,
    damping: float | None = None,
    nearest: QuantizedTensor | None = None,
) -> Tensor:
    """Round a weight so that its outputs change least (Frantar et al., GPTQ, 2023, algorithm 1).

    Costs one forward pass over the calibration data, which all layers and formats share. Scales are those of nearest
    rounding, so that the order of columns leaves no trace in what is stored. Groups of output channels with inputs of
    their own are rounded at once.

    Args:
        weight: ``[out, in]``.
        fmt: Any scalar format.
        stats: Of the layer's inputs; with token weights (RSQ) if they were gathered so.
        method: Range rule of the scales.
        by_activation: Columns with the largest inputs go first; False takes them as they are.
        damping: See `LayerStats.damped`.
        nearest: The weight rounded to nearest, if it is at hand.

    Raises:
        FormatError: If the format is not scalar.
        DataError: If the damped second moments are not positive definite.
    """
    scale, zero = element_scales(weight, fmt, method, nearest)
    hessian = stats.damped(damping)
    order = torch.arange(weight.shape[1], device=weight.device).expand(stats.groups, -1)
    if by_activation:
        order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        hessian = hessian.gather(1, order[:, :, None].expand_as(hessian))
        hessian = hessian.gather(2, order[:, None].expand_as(hessian))

    def ordered(x: Tensor) -> Tensor:
        parts = stats.by_group(x)
        return parts.gather(2, order[:, None].expand_as(parts))

    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        factor = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # documented, but not in torch's types
        raise DataError("the second moments of the inputs are not positive definite; use a larger damping") from None
    columns = ordered(weight), ordered(scale), None if zero is None else ordered(zero)
    rounded = _round_columns(*columns, factor, fmt)
    back = order.argsort(1)
    return rounded.gather(2, back[:, None].expand_as(rounded)).reshape(weight.shape)


def _round_columns(w: Tensor, scale: Tensor, zero: Tensor | None, factor: Tensor, fmt: NumberFormat) -> Tensor:
    """The columns ``[groups, out, in]`` from left to right.

    ``factor`` ``[groups, in, in]`` is the upper Cholesky factor of the inverse second moments: row i says how the
    columns from i on make up for an error in column i.
    """
    w, rounded = w.clone(), torch.empty_like(w)
    for start in range(0, w.shape[2], _COLUMNS):
        end = min(start + _COLUMNS, w.shape[2])
        errors = torch.empty_like(w[:, :, start:end])
        for i in range(start, end):
            column = w[:, :, i]
            q = round_elements(column, scale[:, :, i], None if zero is None else zero[:, :, i], fmt)
            error = (column - q) / factor[:, i, i, None]
            w[:, :, i:end].baddbmm_(error[:, :, None], factor[:, i, None, i:end], alpha=-1)
            rounded[:, :, i], errors[:, :, i - start] = q, error
        w[:, :, end:].baddbmm_(errors, factor[:, start:end, end:], alpha=-1)
    return rounded
