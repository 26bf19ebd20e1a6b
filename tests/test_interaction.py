"""Measured interactions against full passes, Shapley values against the sum over all subsets."""

import copy
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from estimators import NETWORKS, SCHEMES, run

import mpq
from mpq.errors import MpqError
from mpq.losses import CallableLoss, KLLoss, MSELoss
from mpq.sensitivity import interaction
from mpq.sensitivity.interaction import augmented_order, dependency, measured_pairs, shapley
from mpq.sensitivity.perturbation import perturbation, quantized
from mpq.sensitivity.table import SensitivityTable
from mpq.space import make_space
from mpq.testing import EstimatorContract, prepared


class TestSemidefinitePairs(EstimatorContract):
    @pytest.fixture
    def estimator(self):
        return partial(measured_pairs, psd=True)


class TestShapley(EstimatorContract):
    @pytest.fixture(params=[None, 0.5], ids=["values", "covariances"])
    def estimator(self, request):
        return partial(shapley, permutations=3, shrinkage=request.param)


def full_loss(setup, loss, config):
    """Mean loss of a config, nothing reused; -1 stands for float."""
    view, space, calib, bank = setup
    total = 0.0
    with torch.no_grad():
        for batch in calib.batches:
            exact = view(batch)
            choices = [(space.groups[g], space.schemes[s]) for g, s in enumerate(config) if s >= 0]
            with quantized(view, bank, choices):
                total += loss.value(view(batch), exact, batch).sum().item()
    return total / calib.num_samples


@pytest.mark.parametrize("loss", [KLLoss(), MSELoss()], ids=["kl", "mse"])
@pytest.mark.parametrize("name", NETWORKS)
def test_pairs_are_what_full_passes_measure(name, loss):
    setup = prepared(*NETWORKS[name], SCHEMES)
    table = run(measured_pairs, setup, loss)
    G, S = table.loss.shape
    for g, s in np.ndindex(G, S):
        alone = [s if i == g else -1 for i in range(G)]
        assert table.loss[g, s] == pytest.approx(full_loss(setup, loss, alone), rel=1e-10)
        for h, t in np.ndindex(G, S):
            both = [t if i == h else k for i, k in enumerate(alone)]
            expected = full_loss(setup, loss, both) - table.loss[g, s] - table.loss[h, t] if h != g else 0.0
            assert table.interactions[g, s, h, t] == pytest.approx(expected, rel=1e-8, abs=1e-14)
    singles = run(perturbation, setup, loss)
    np.testing.assert_array_equal(table.loss, singles.loss)
    np.testing.assert_array_equal(table.stderr, singles.stderr)
    assert table.provenance["forward_passes"] == 1 + G * S + G * (G - 1) // 2 * S**2
    assert abs(table.interactions).max() > 1e-3 * table.loss.max()


def test_a_table_of_pairs_predicts_every_pair():
    net, data = NETWORKS["depthwise"]
    net, data = copy.deepcopy(net).float(), [x.float() for x in data]  # which is what W32 holds
    analysis = mpq.analyze(net, data, f"{SCHEMES},W32", estimator=measured_pairs, progress=False)
    evaluator = mpq.Evaluator(net, data, progress=False)
    for pick in itertools.product(range(3), repeat=3):
        if 2 in pick:
            measured = evaluator.measure(analysis.config(pick)).kl
            assert analysis.table.predict(pick) == pytest.approx(measured, rel=1e-9, abs=1e-12)


def test_choices_that_are_not_allowed_are_not_paired():
    view, space, calib, bank = prepared(*NETWORKS["conv"], SCHEMES)
    pinned = make_space(space.graph, SCHEMES, pin={"2": "W8A8"}, device=space.device)
    free = run(measured_pairs, (view, space, calib, bank))
    table = run(measured_pairs, (view, pinned, calib, bank))
    allowed = pinned.allowed[:, :, None, None] & pinned.allowed
    assert (table.interactions[~allowed] == 0).all()
    assert table.interactions[0, 0, 1, 2] != 0
    np.testing.assert_array_equal(table.interactions[0, :2, 2, :2], free.interactions[0, :, 2])
    assert table.provenance["forward_passes"] == 1 + 9 + (2 + 4 + 2)


def test_psd_is_the_nearest_semidefinite_form():
    setup = prepared(*NETWORKS["shared"], "W2A2,W3")
    raw, psd = run(measured_pairs, setup, MSELoss()), run(measured_pairs, setup, MSELoss(), psd=True)
    n = raw.loss.size
    form = raw.interactions.reshape(n, n) + np.diag(2 * raw.loss.ravel())
    values, vectors = np.linalg.eigh(form)
    assert values[0] < -1e-6
    nearest = sum(v * np.outer(u, u) for v, u in zip(values, vectors.T, strict=True) if v > 0)
    np.testing.assert_allclose(psd.loss.ravel(), np.diag(nearest) / 2, rtol=1e-9)
    for pick in itertools.product(range(2), repeat=3):
        chosen = np.zeros(raw.loss.shape)
        chosen[range(3), pick] = 1
        assert psd.predict(pick) == pytest.approx(chosen.ravel() @ nearest @ chosen.ravel() / 2, rel=1e-9)
        assert raw.predict(pick) == pytest.approx(chosen.ravel() @ form @ chosen.ravel() / 2, rel=1e-9)


def shapley_value(value, groups, g):
    """By definition: a weighted sum over the subsets of the others."""
    others = [h for h in range(groups) if h != g]
    total = 0.0
    for size in range(groups):
        weight = math.factorial(size) * math.factorial(groups - size - 1) / math.factorial(groups)
        for subset in itertools.combinations(others, size):
            total += weight * (value({*subset, g}) - value(set(subset)))
    return total


@pytest.mark.parametrize("name", NETWORKS)
def test_all_orders_give_the_shapley_values(name):
    setup = prepared(*NETWORKS[name], f"{SCHEMES},W3A8")
    table = run(shapley, setup, permutations=12)  # as many pairs as four groups have
    G = len(table.groups)
    wide = 1  # W4A8

    def value(lower, upper, lowered):
        return full_loss(setup, KLLoss(), [lower if g in lowered else upper for g in range(G)])

    for g in range(G):
        to_wide = shapley_value(partial(value, wide, -1), G, g)
        for s in range(3):
            further = shapley_value(partial(value, s, wide), G, g)
            assert table.loss[g, s] == pytest.approx(max(to_wide + further, 0), rel=1e-9, abs=1e-12)
    for s in range(3):
        if table.loss[:, s].all():  # none was cut off at zero
            assert table.total([s] * G)[0] == pytest.approx(full_loss(setup, KLLoss(), [s] * G), rel=1e-9)
    assert table.loss[:, 0].all()
    assert (table.stderr == 0).all()
    assert table.interactions is None
    configs = {tuple(x) for low, up in ((1, -1), (0, 1), (2, 1)) for x in itertools.product((low, up), repeat=G)}
    assert table.provenance["forward_passes"] == len(configs)
    assert table.provenance["permutations"] == math.factorial(G)


def six_layers():
    """Six groups of a network whose own losses don't matter."""
    net = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(6)))
    return prepared(net, [torch.ones(2, 2)], "W2,W8")


def game(monkeypatch, loss):
    """Take losses of configs from a function."""

    def losses(view, space, data, bank, kl, configs, progress):
        return [loss(c) for c in configs]

    monkeypatch.setattr(interaction, "_config_losses", losses)


def test_sampled_orders_are_right_within_their_standard_error(monkeypatch):
    """Losses that depend on all groups at once: over 200 seeds, the interval of 95% (Student's) holds the exact value
    about as often."""
    setup, rng = six_layers(), np.random.default_rng(0)
    losses = {c: 30 + sum(c) + rng.normal() for c in itertools.product((-1, 0, 1), repeat=6)}
    losses[(-1,) * 6] = -100.0  # so that no effect is cut off at zero
    monkeypatch.setattr(
        interaction,
        "_config_losses",
        lambda view, space, data, bank, kl, configs, progress: [losses[c] for c in configs],
    )
    exact = run(shapley, setup, permutations=360)
    assert exact.loss.min() > 1
    assert (exact.stderr == 0).all()
    tables = [run(shapley, setup, permutations=12, seed=seed) for seed in range(200)]
    inside = np.mean([np.abs(t.loss - exact.loss) <= 2.201 * t.stderr for t in tables])  # 11 degrees of freedom
    assert 0.93 < inside < 0.97
    spread = np.std([t.loss for t in tables], 0, ddof=1)
    assert (np.abs(np.mean([t.loss for t in tables], 0) - exact.loss) < 4 * spread / 200**0.5).all()
    assert tables[0].provenance["permutations"] == 24
    assert not np.array_equal(tables[0].loss, tables[1].loss)


def test_orders_in_reverse_cancel_pairs(monkeypatch):
    """Where only pairs interact, one order and its reverse are exact."""
    setup, rng = six_layers(), np.random.default_rng(0)
    own, pair = rng.random((6, 3)), rng.normal(size=(6, 3, 6, 3))
    own[:, 1:] += 20

    def loss(config):
        levels = [s + 1 for s in config]
        pairs = itertools.combinations(range(6), 2)
        return sum(own[g, levels[g]] for g in range(6)) + sum(pair[g, levels[g], h, levels[h]] for g, h in pairs)

    game(monkeypatch, loss)
    complete, two = run(shapley, setup, permutations=360), run(shapley, setup, permutations=2)
    np.testing.assert_allclose(two.loss, complete.loss, rtol=1e-12)
    np.testing.assert_allclose(two.stderr, 0, atol=1e-12)


@pytest.mark.parametrize("shrinkage", [0.0, 0.5, 1.0])
def test_covariances_are_those_of_impq(shrinkage):
    """Its objective ``a^T q + q^T K q`` for two schemes, from the marginal effects of all orders, by hand."""
    setup = prepared(*NETWORKS["shared"], "W2,W4")
    table, plain = run(shapley, setup, shrinkage=shrinkage), run(shapley, setup)
    effects = []
    for order in itertools.permutations(range(3)):
        config, marginal, last = [1, 1, 1], np.zeros(3), full_loss(setup, KLLoss(), [1, 1, 1])
        for g in order:
            config[g] = 0
            now = full_loss(setup, KLLoss(), config)
            marginal[g], last = now - last, now
        effects.append(marginal)
    phi, covariance = np.mean(effects, 0), np.cov(np.transpose(effects), bias=True)
    K = (1 - shrinkage) * covariance + shrinkage * np.diag(np.diag(covariance))
    a = phi - K.sum(1) + np.diag(K)
    for q in itertools.product((0, 1), repeat=3):
        pick = [1 - x for x in q]
        assert table.predict(pick) - plain.loss[:, 1].sum() == pytest.approx(a @ q + q @ K @ q, rel=1e-7, abs=1e-12)
    assert (abs(table.interactions).max() > 0) == (shrinkage < 1)


def test_pinned_groups_stay_where_they_are():
    view, space, calib, bank = prepared(*NETWORKS["conv"], SCHEMES)
    setup = view, make_space(space.graph, SCHEMES, pin={"2": "W8A8"}, device=space.device), calib, bank
    table = run(shapley, setup)

    def value(lowered):
        return full_loss(setup, KLLoss(), [0 if g in lowered else 1 for g in (0,)] + [2] + [0 if 2 in lowered else 1])

    def to_wide(raised):
        return full_loss(setup, KLLoss(), [[-1, 1][0 in raised], [-1, 2][1 in raised], [-1, 1][2 in raised]])

    for g in (0, 2):
        expected = shapley_value(to_wide, 3, g) + shapley_value(value, 3, g)
        assert table.loss[g, 0] == pytest.approx(max(expected, 0), rel=1e-9)
    np.testing.assert_allclose(table.loss[1], max(shapley_value(to_wide, 3, 1), 0), rtol=1e-9)


def test_baseline_is_the_widest_or_the_one_given():
    setup = prepared(*NETWORKS["linear"], f"{SCHEMES},W4")
    assert run(shapley, setup).provenance["baseline"] == "W4"
    table = run(shapley, setup, baseline="W4A8")
    G = len(table.groups)
    expected = shapley_value(lambda q: full_loss(setup, KLLoss(), [1 if g in q else -1 for g in range(G)]), G, 0)
    assert table.loss[0, 1] == pytest.approx(expected, rel=1e-9)
    assert table.provenance["baseline"] == "W4A8"


def errors_table():
    """Losses and interactions of known errors ``d``: half their squared norm, and their inner products."""
    rng = np.random.default_rng(3)
    errors = rng.normal(size=(5, 2, 7)) * np.array([1, 3])[:, None]
    errors[:, 0] = 0  # the first scheme is exact
    errors[4] = 0
    loss = 0.5 * np.square(errors).sum(-1)
    interactions = np.einsum("gsd,htd->gsht", errors, errors)
    interactions[np.arange(5), :, np.arange(5)] = 0
    names = tuple("abcde"), ("W8", "W2")
    return errors, SensitivityTable(*names, loss, np.zeros_like(loss), interactions)


def test_dependency_is_the_cosine_of_errors():
    errors, table = errors_table()
    found = dependency(table)
    assert found.schemes == ("W2",) * 5
    d = errors[:4, 1]
    norms = np.linalg.norm(d, axis=1)
    np.testing.assert_allclose(found.correlation[:4, :4], d @ d.T / np.outer(norms, norms))
    np.testing.assert_allclose(found.amplification[:4], 2 * (d @ d.sum(0) - norms**2) / norms**2)
    assert found.amplification[4] == 0
    np.testing.assert_array_equal(found.correlation[4], [0, 0, 0, 0, 1])
    mixed = dependency(table, ["W2", "W8", "W2", "W8", "W8"])
    assert mixed.amplification[0] == pytest.approx(2 * d[0] @ d[2] / norms[0] ** 2)
    np.testing.assert_array_equal(mixed.correlation[1], [0, 1, 0, 0, 0])


def test_augmented_order_is_that_of_what_each_group_saves():
    _, table = errors_table()
    uniform = table.predict([1] * 5)
    saved = [uniform - table.predict([0 if h == g else 1 for h in range(5)]) for g in range(5)]
    order = augmented_order(table)
    assert list(order) == sorted(range(5), key=lambda g: saved[g])
    assert list(order) != list(np.argsort(table.loss[:, 1], kind="stable"))
    assert list(augmented_order(table, "W8")) == [0, 1, 2, 3, 4]


def test_errors_say_what_is_wrong():
    setup = prepared(*NETWORKS["linear"], SCHEMES)
    with pytest.raises(MpqError, match="permutations must be a whole number of at least 1, not 0"):
        run(shapley, setup, permutations=0)
    with pytest.raises(MpqError, match=r"shrinkage must be between 0 and 1, not 1\.5"):
        run(shapley, setup, shrinkage=1.5)
    with pytest.raises(MpqError, match="baseline 'W9' is no scheme of the space; it has W2A4, W4A8"):
        run(shapley, setup, baseline="W9")
    with pytest.raises(MpqError, match="the perturbation table has no interactions"):
        dependency(run(perturbation, setup))
    table = run(measured_pairs, setup)
    for wrong in ("W9", ["W2A4"]):
        with pytest.raises(MpqError, match="one name or one for each of 2 groups, out of W2A4, W4A8"):
            dependency(table, wrong)


def test_pairs_measured_with_one_mean_per_batch_have_errors_over_batches():
    setup = prepared(*NETWORKS["linear"], SCHEMES)
    mean = CallableLoss(lambda out, batch: out[:, 0].square().mean())
    expected = run(perturbation, setup, mean)
    found = run(measured_pairs, setup, mean)
    np.testing.assert_array_equal(found.stderr, expected.stderr)
    by_sample = run(measured_pairs, setup, CallableLoss(lambda out, batch: out[:, 0].square()))
    np.testing.assert_allclose(by_sample.loss, found.loss)
    assert (by_sample.stderr != found.stderr).all()
