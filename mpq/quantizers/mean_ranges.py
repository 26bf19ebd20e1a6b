"""Ranges of ternary and binary formats: the mean or median magnitude is the scale."""

from __future__ import annotations

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.blocks import work_dtype
from mpq.quantizers.formats import NumberFormat


def mean_is_best(fmt: NumberFormat) -> bool:
    """Whether the mean magnitude has the least squared error: for the two levels ``-scale, scale`` (XNOR-Net, 2016)."""
    return _binary(fmt) and fmt.scale != "e8m0"


def magnitude_range(
    blocks: Tensor, fmt: NumberFormat, method: str, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Range whose end is the mean magnitude of a block, or its median by ``absmedian``.

    The mean is the scale of BitNet b1.58 (Ma et al., 2024), ``round(clip(w / mean, -1, 1))``, and for two levels that
    of XNOR-Net (Rastegari et al., 2016); the median that of BitNet b1.58 Reloaded (Nielsen and Schneider-Kamp, 2024).

    Args:
        blocks: ``[blocks, elements]``.
        fmt: A ternary or binary format.
        method: ``absmedian``, else the mean.
        importance: Weights of the elements, same shape; None: all alike. A block without any weight counts all alike.

    Returns:
        Lower and upper ends, both ``[blocks, 1]``.

    Raises:
        FormatError: If the format has more levels.
    """
    if fmt.family != "ternary" and not _binary(fmt):
        raise FormatError(f"{method} ranges are for ternary and binary formats, not for {fmt.name}")
    size = blocks.to(work_dtype(blocks)).abs()
    weights = torch.ones_like(size) if importance is None else importance
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
    if method == "absmedian":
        size, order = size.sort(dim=1)
        share = weights.gather(1, order).cumsum(1)
        at = torch.searchsorted(share, share[:, -1:] / 2).clamp(max=blocks.shape[1] - 1)
        end = size.gather(1, at)
    else:
        end = (size * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    return -end, end


def _binary(fmt: NumberFormat) -> bool:
    return fmt.family == "binary" or (fmt.family == "int" and fmt.bits == 1 and fmt.symmetric)
