"""Ranges of ternary and binary formats: the mean or median magnitude is the scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpq.errors import FormatError
from mpq.quantizers.blocks import BUFFERED, all_finite, work_dtype
from mpq.quantizers.formats import NumberFormat
from mpq.quantizers.selection import LARGE, weighted_rank


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
        importance: Weights of the elements, same shape, some of each block positive (`checked_weights`); None: all
            alike.

    Returns:
        Lower and upper ends, both ``[blocks, 1]``.

    Raises:
        FormatError: If the format has more levels.
    """
    if fmt.family != "ternary" and not _binary(fmt):
        raise FormatError(f"{method} ranges are for ternary and binary formats, not for {fmt.name}")
    end = (_medians if method == "absmedian" else _means)(blocks, importance)
    return -end, end


def _means(blocks: Tensor, weights: Tensor | None) -> Tensor:
    size = blocks.to(work_dtype(blocks)).abs()
    if weights is None:
        return size.sum(1, keepdim=True) / blocks.shape[1]
    return size.mul_(weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


def _medians(blocks: Tensor, weights: Tensor | None) -> Tensor:
    if blocks.shape[1] > LARGE and all_finite(blocks):
        totals: Any = [blocks.shape[1]] * len(blocks)
        if weights is not None:  # in parts, each of which is copied in double precision
            totals = sum(part.sum(1, dtype=torch.float64) for part in torch.split(weights, BUFFERED, 1))
        of_rows = [None] * len(blocks) if weights is None else list(weights)
        rows = zip(blocks, totals, of_rows, strict=True)
        return torch.stack([weighted_rank(row, total / 2, w, magnitudes=True) for row, total, w in rows])[:, None]
    size, order = blocks.to(work_dtype(blocks)).abs().sort(dim=1)
    share = (torch.ones_like(size) if weights is None else weights.gather(1, order)).cumsum(1)
    at = torch.searchsorted(share, share[:, -1:] / 2).clamp(max=blocks.shape[1] - 1)
    return size.gather(1, at)


def _binary(fmt: NumberFormat) -> bool:
    return fmt.family == "binary" or (fmt.family == "int" and fmt.bits == 1 and fmt.symmetric)
