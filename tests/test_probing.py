"""Means of random probes: rounds, standard errors and the stop."""

import numpy as np
import pytest
import torch

from mpq.sensitivity.probing import Estimate, estimate


class Drawn:
    """Probes from a distribution of known mean: ``terms`` independent ones in each."""

    setup_passes = 0.0

    def __init__(self, seed, terms, draw):
        self.generator, self.terms, self.draw = torch.Generator().manual_seed(seed), terms, draw

    def draws(self, batch, probes):
        for _ in range(probes):
            yield [self.draw(torch.randn(self.terms, generator=self.generator, dtype=torch.float64))]

    def passes(self, probes):
        return probes


class OneBatch:
    batches = (None,)


def stopped(seeds, terms, draw, tolerance, probes=4096):
    found = [estimate(Drawn(i, terms, draw), OneBatch, probes, tolerance, "", False) for i in range(seeds)]
    return [np.array([getattr(e, k) for e in found]).ravel() for k in ("mean", "stderr", "probes")]


@pytest.mark.parametrize("terms", [1, 40])
@pytest.mark.slow
def test_the_stop_hardly_biases_skewed_estimates(terms):
    """Squares of normal numbers, as one dominant direction of a Hessian gives: the worst case for a stop."""
    mean, stderr, probes = stopped(400, terms, lambda x: x.square() / terms, 0.1)
    assert (stderr <= 0.1 * mean).all()
    assert probes.min() * terms >= 17
    assert len(set(probes)) > 3
    assert abs(mean.mean() - 1) < 0.5 * 0.1
    assert (np.abs(mean - 1) < 2 * stderr).mean() > 0.88


def test_a_standard_error_of_few_degrees_of_freedom_stops_nothing():
    """However loose the tolerance: one term of each probe has one degree less than there are probes."""
    _, _, probes = stopped(50, 1, lambda x: 1 + 0.1 * x, 1.0)
    assert 16 < probes.min() <= probes.max() < 40
    _, _, probes = stopped(50, 100, lambda x: (1 + 0.1 * x) / 100, 1.0)
    assert (probes == 4).all()


def test_negative_and_vanishing_means_do_not_stop_early():
    """A known defect of peers: a relative change over a negative trace is always below the tolerance."""
    mean, stderr, probes = stopped(20, 1, lambda x: x - 0.5, 0.1)
    assert (stderr <= 0.1 * np.abs(mean)).all()
    assert probes.min() > 100
    _, _, probes = stopped(5, 1, lambda x: x, 0.1, probes=100)
    assert (probes == 100).all()


@pytest.mark.parametrize("probes", [1, 2, 3, 5, 6, 7, 9])
def test_as_many_probes_as_asked_for_and_no_round_of_one(probes):
    for tolerance in (None, 1e-9):
        found = estimate(Drawn(0, 3, lambda x: x), OneBatch, probes, tolerance, "", False)
        assert found.probes == found.passes == probes
        assert np.isnan(found.stderr).all() == (probes == 1)


def test_joined_rounds_are_the_weighted_mean():
    a = Estimate(np.array([1.0]), np.array([4.0]), np.array([2.0]), 2, 1.0)
    b = Estimate(np.array([4.0]), np.array([1.0]), np.array([0.5]), 4, 2.0)
    both = a.joined(b)
    assert both.mean == 3
    assert both.variance == pytest.approx((4 * 4 + 16 * 1) / 36)
    assert both.doubt == pytest.approx((16 * 2 + 256 * 0.5) / 36**2)
    assert (both.probes, both.passes) == (6, 3.0)
