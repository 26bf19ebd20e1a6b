"""Means of random probes: how sure they are, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mpq.calibration import Batch, Calibration
from mpq.problem import Floats
from mpq.progress import progress_bar

_FIRST = 4  # probes of the first round
_FREEDOM = 16  # a standard error with fewer degrees of freedom (known worse than to 18 %) stops nothing


class Probing(Protocol):
    """A way to estimate several quantities, each a sum over batches.

    Attributes:
        setup_passes: Cost of its preparation, in forward passes over the data.
    """

    setup_passes: float

    def draws(self, batch: Batch, probes: int) -> Iterator[list[Tensor]]:
        """Independent, unbiased estimates of the batch's part of every quantity.

        Args:
            batch: A batch.
            probes: How many to yield.

        Yields:
            For each quantity, float64 terms ``[K]`` that add up to the estimate and are independent of each other (such
            as one for each sample).
        """

    def passes(self, probes: int) -> float:
        """Cost of so many probes for every batch, in forward passes over the data."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """Means of independent probes.

    Attributes:
        mean: ``[Q]``.
        variance: Estimated variance of each mean ``[Q]``; NaN for a single probe.
        doubt: Half the variance of each variance ``[Q]``, as for normal terms: ``variance**2 / doubt`` are its
            effective degrees of freedom (Satterthwaite, 1946).
        probes: How many.
        passes: Cost in forward passes.
    """

    mean: Floats
    variance: Floats
    doubt: Floats
    probes: int
    passes: float

    @property
    def stderr(self) -> Floats:
        """Standard error of each mean ``[Q]``, the data taken as given."""
        found: Floats = np.sqrt(self.variance)
        return found

    def joined(self, other: Estimate) -> Estimate:
        """Both together, weighted by their probes."""
        probes = self.probes + other.probes
        a, b = self.probes / probes, other.probes / probes
        return Estimate(
            a * self.mean + b * other.mean,
            a**2 * self.variance + b**2 * other.variance,
            a**4 * self.doubt + b**4 * other.doubt,
            probes,
            self.passes + other.passes,
        )

    def missing(self, tolerance: float) -> int:
        """Further probes that seem to be needed, at most as many as there are.

        All relative standard errors must be below the tolerance, and known from enough degrees of freedom.
        """
        target = (tolerance * self.mean) ** 2
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = np.maximum(self.variance / target, _FREEDOM * self.doubt / self.variance**2)
        factor = float(np.where(self.variance > 0, wanted, 0).max())
        return math.ceil(self.probes * (min(factor, 2) - 1)) if factor > 1 else 0


def estimate(
    probing: Probing, data: Calibration, probes: int, tolerance: float | None, title: str, progress: bool
) -> Estimate:
    """Probe until every relative standard error is below a tolerance.

    Probes come in rounds, each at most as large as all before it. Every term has its own variance, taken over the
    probes of one round, so that few probes of many samples give a standard error with many degrees of freedom. A stop
    that depends on the estimate favours estimates that look certain; with standard errors known from at least 16
    degrees of freedom that bias stays well below the standard error (`tests/test_probing.py` measures it).

    Args:
        probing: What to estimate.
        data: Batches.
        probes: At most so many for each batch.
        tolerance: Relative standard error of each quantity to stop at; None makes all probes.
        title: Of the progress bar.
        progress: Show a bar.
    """
    # No round may have a single probe, which has no variance.
    first = probes if tolerance is None or probes - _FIRST < 2 else _FIRST
    found = _round(probing, data, first, title, progress)
    while tolerance is not None and found.probes < probes and (more := found.missing(tolerance)):
        left = probes - found.probes
        size = left if left - max(2, more) < 2 else max(2, more)
        found = found.joined(_round(probing, data, size, title, progress))
    return replace(found, passes=found.passes + probing.setup_passes)


def _round(probing: Probing, data: Calibration, probes: int, title: str, progress: bool) -> Estimate:
    steps = ((i, terms) for i, batch in enumerate(data.batches) for terms in probing.draws(batch, probes))
    shown = progress_bar(steps, title, progress, total=probes * len(data.batches))
    totals: Floats = np.zeros((3, 1))
    for _, found in groupby(shown, lambda step: step[0]):
        columns = zip(*(terms for _, terms in found), strict=True)
        totals = totals + np.array([_moments(torch.stack(each)) for each in columns]).T
    mean, variance, doubt = totals
    return Estimate(mean, variance, doubt, probes, probing.passes(probes))


def _moments(terms: Tensor) -> tuple[float, float, float]:
    """Mean of the sums of ``[probes, K]`` terms, the variance of that mean, and half the variance of the variance."""
    probes = len(terms)
    if probes == 1:
        return float(terms.sum()), math.nan, math.nan
    each = terms.var(0) / probes
    return float(terms.mean(0).sum()), float(each.sum()), float(each.square().sum()) / (probes - 1)
