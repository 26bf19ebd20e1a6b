"""Outliers kept apart, so that the scales of all others can be small. No forward pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROUNDS = 25


def largest_elements(weight: Tensor, per_mille: int) -> Tensor:
    """Places of the elements with the largest magnitude (SqueezeLLM's sparse part, Kim et al., 2024), in rising order.

    Args:
        weight: Any shape.
        per_mille: How many of a thousand, rounded up; the first of equals.
    """
    count = math.ceil(per_mille * weight.numel() / 1000)
    return weight.abs().flatten().argsort(descending=True, stable=True)[:count].sort().values


def channels_to_split(weight: Tensor, percent: int, positions: int = 1) -> Tensor:
    """Input channels with the largest weights (Zhao et al., outlier channel splitting, 2019), by falling magnitude.

    Args:
        weight: ``[out, channels * positions]``.
        percent: How many of a hundred, rounded up.
        positions: Columns of one channel.
    """
    peaks = weight.abs().amax(0).reshape(-1, positions).amax(1)
    return peaks.argsort(descending=True, stable=True)[: math.ceil(percent * len(peaks) / 100)]


def clusters(weight: Tensor, count: int) -> Tensor:
    """The cluster of each element, by k-means over the values (SplitQuant, Song & Lin, 2025: lower, middle, upper).

    Args:
        weight: Any shape.
        count: How many clusters; they start at even quantiles and are numbered by rising values.
    """
    ordered = weight.flatten().sort().values.double()
    places = (torch.arange(count, device=weight.device) + 0.5) * len(ordered) / count
    centres, sums = ordered[places.long()], torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    for _ in range(_ROUNDS):
        middles = (centres[1:] + centres[:-1]) / 2
        ends = torch.cat([middles.new_full((1,), -math.inf), middles, middles.new_full((1,), math.inf)])
        at = torch.searchsorted(ordered, ends)
        size = at[1:] - at[:-1]
        centres = torch.where(size > 0, (sums[at[1:]] - sums[at[:-1]]) / size.clamp(min=1), centres)
    return torch.bucketize(weight.double(), (centres[1:] + centres[:-1]) / 2)
