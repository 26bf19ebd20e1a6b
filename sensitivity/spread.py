"""Standard errors over independent units: samples, or whole batches where samples are not told apart. No torch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mpq.problem import Floats, Ints


def batch_numbers(sizes: Iterable[int]) -> Ints:
    """Number of the batch of each row, for batches of these sizes one after the other."""
    counts = list(sizes)
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)


def leave_one_out(values: Floats, batches: Ints | None = None) -> Floats:
    """Means ``[units, ...]`` over the first axis without one unit each; none where there is only one.

    Args:
        values: Rows ``[N, ...]``.
        batches: Number of each row's batch ``[N]``, where batches are the units; by default rows are.
    """
    total, counts = values.sum(0), np.ones(len(values))
    if batches is not None:
        counts = np.bincount(batches).astype(np.float64)
        values = np.add.reduceat(values, np.searchsorted(batches, np.arange(len(counts))), axis=0)
    if len(values) < 2:
        return values[:0]
    left: Floats = (total - values) / (counts.sum() - counts).reshape(-1, *[1] * (values.ndim - 1))
    return left


def jackknife(left: Floats) -> Floats:
    """Standard error of an estimate, given what it is without one unit each ``[units, ...]`` (Tukey, 1958).

    NaN where there are none: a single unit tells nothing. For a mean over rows it is the usual standard error.
    """
    units = len(left)
    if not units:
        return np.full(left.shape[1:], np.nan)
    found: Floats = np.sqrt(np.square(left - left.mean(0)).sum(0) * (units - 1) / units)
    return found


def standard_error(values: Floats, batches: Ints | None = None) -> Floats:
    """Standard error of the mean over the first axis; NaN for a single unit. See `leave_one_out`."""
    return jackknife(leave_one_out(values, batches))
