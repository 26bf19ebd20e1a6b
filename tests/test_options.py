"""Options of estimators: known and in range before any work, whoever asks."""

from functools import partial

import pytest

import mpq
from mpq.errors import MpqError
from mpq.sensitivity import ESTIMATORS, noise
from mpq.sensitivity.options import find_estimator
from mpq.testing import tiny_networks


def own(view, space, data, bank, loss, draws=0, *, seed=0, progress=True):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("estimator", "options", "message"),
    [
        ("influence", {"drawz": 1}, "estimator 'influence' has no option 'drawz'; it has draws, exact, executor"),
        ("zd", {"view": 1}, "estimator 'zd' has no option 'view'"),
        (own, {"sigmas": 1}, "estimator 'own' has no option 'sigmas'; it has draws"),
        (partial(noise, draws=2), {"drawz": 1}, "estimator 'noise' has no option 'drawz'"),
        ("influence", {"draws": 0}, "draws must be a whole number of at least 1, not 0"),
        ("noise", {"draws": -1}, "draws .* not -1"),
        ("fisher_trace", {"draws": 1.5}, r"draws .* not 1\.5"),
        ("anchored", {"draws": True}, "draws .* not True"),
        ("squared_gradient", {"draws": None}, "draws of squared_gradient can't be None"),
        (partial(noise, draws=0), {}, "draws .* not 0"),
        ("anchored", {"anchor_samples": 0}, "anchor_samples must be a whole number of at least 1, not 0"),
        ("anchored", {"anchors": -3}, "anchors must be a whole number of at least 0, not -3"),
        ("outlier_share", {"sigmas": -1}, "sigmas must be above 0, not -1"),
        ("outlier_share", {"sigmas": float("nan")}, "sigmas must be above 0, not nan"),
        ("hessian_trace", {"probes": 0}, "probes"),
        ("hessian_trace", {"rank": 0}, "rank"),
        ("hessian_trace", {"tolerance": 0}, "tolerance must be above 0, not 0"),
        ("top_eigenvalue", {"tolerance": None}, "tolerance of top_eigenvalue can't be None"),
        ("top_eigenvalue", {"iterations": 0}, "iterations"),
        ("shapley", {"permutations": 0}, "permutations"),
        ("shapley", {"shrinkage": 2}, "shrinkage must be between 0 and 1, not 2"),
    ],
)
def test_wrong_options_are_refused_before_any_work(monkeypatch, estimator, options, message):
    monkeypatch.setattr("mpq.allocation.ModelView", None)
    net, data = tiny_networks()["conv"]
    with pytest.raises(MpqError, match=message):
        mpq.analyze(net, data, "W2,W8", estimator=estimator, estimator_options=options, progress=False)


def test_right_options_pass():
    for name, options in {
        "anchored": {"anchors": 0, "anchor_samples": 1, "draws": 1},
        "hessian_trace": {"tolerance": None, "probes": 1},
        "shapley": {"shrinkage": None},
        "outlier_share": {"sigmas": 0.5},
    }.items():
        assert find_estimator(name, options) is ESTIMATORS[name]
    assert find_estimator(own, {"draws": -1}) is own
    assert find_estimator(lambda view, space, data, bank, loss, **options: None, {"anything": 1})
    for name in ESTIMATORS:
        find_estimator(name, {})
