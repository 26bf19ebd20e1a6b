"""The default estimator: which configs are measured, and the fit to them."""

import numpy as np
import pytest
import torch

import mpq
from mpq.losses import KLLoss, MSELoss
from mpq.problem import Problem
from mpq.search import Exhaustive
from mpq.sensitivity.anchored import _Truth, anchored, constant_outputs
from mpq.sensitivity.anchors import _bits, candidates, solved, unlike
from mpq.sensitivity.influence import influence
from mpq.sensitivity.recalibration import Recalibrator
from mpq.sensitivity.table import SensitivityTable
from mpq.testing import prepared, tiny_networks
from mpq.view import preserved_state

G, S = 4, 3


def table_of(rng: np.random.Generator, *, interactions: bool = True) -> SensitivityTable:
    rows = rng.normal(size=(50, 1, G, S)) * np.array([0.5, 0.1, 0.02])
    flat = rows.reshape(50, G * S)
    pairs = (flat.T @ flat / 50).reshape(G, S, G, S)
    pairs[np.arange(G), :, np.arange(G)] = 0
    names = tuple(f"g{i}" for i in range(G)), ("W2", "W4", "W8")
    loss = 0.5 * np.square(rows).sum(1).mean(0)
    return SensitivityTable(*names, loss, np.zeros((G, S)), pairs if interactions else None, rows)


def every_pick() -> np.ndarray:
    return np.array(np.unravel_index(np.arange(S**G), (S,) * G)).T


def model_of(table: SensitivityTable, ceiling: float = 2.0) -> Recalibrator:
    assert table.interactions is not None
    return Recalibrator(table.loss, table.interactions, ceiling)


def predict(
    table: SensitivityTable, correction: np.ndarray, coupling: float, ceiling: float, pick: np.ndarray
) -> float:
    """The formula of the docstring, one term after the other."""
    a = np.exp(correction / 2)
    v = sum(a[g, pick[g]] ** 2 * table.loss[g, pick[g]] for g in range(G))
    for g in range(G):
        for h in range(g):
            s, t = pick[g], pick[h]
            v += coupling * a[g, s] * a[h, t] * table.interactions[g, s, h, t]
    return v / (1 + v / ceiling)


def test_fit_recovers_what_made_the_measured_losses():
    table = table_of(np.random.default_rng(0))
    picks = every_pick()
    truth = np.log(1.4) * np.ones((G, S))
    truth[1, 0] += 0.4  # a large entry that second order predicts too low
    measured = np.array([predict(table, truth, 0.8, 1.5, p) for p in picks])
    fit = model_of(table).fit(picks, measured)
    again = np.array([predict(table, fit.correction, fit.coupling, fit.ceiling, p) for p in picks])
    np.testing.assert_allclose(again, measured, rtol=0.03)
    assert fit.correction[1, 0] - fit.correction[0, 0] == pytest.approx(0.4, abs=0.1)
    assert fit.error == pytest.approx(np.sqrt(np.mean(np.log(again / measured) ** 2)))


def test_perfect_predictions_are_hardly_changed():
    table = table_of(np.random.default_rng(1))
    picks = every_pick()[::5]
    fit = model_of(table).fit(picks, np.array([predict(table, np.zeros((G, S)), 0.88, 2.0, p) for p in picks]))
    assert np.abs(fit.correction).max() < 0.02
    assert fit.error < 0.01


def test_what_schemes_share_is_learnt_from_some_of_them():
    """Group 0 loses more with the second feature; no measured config has its scheme 2, which has it, too."""
    rng = np.random.default_rng(5)
    loss, none = np.full((G, S), 0.1), np.zeros((G, S, G, S))
    picks = rng.integers(0, S, (40, G))
    picks[:, 0] %= 2
    measured = np.where(picks[:, 0] == 1, 0.5, 0.4)
    shared, alone = (Recalibrator(loss, none, 100.0, f).fit(picks, measured) for f in ([[0, 1, 1]], []))
    assert shared.correction[0, 2] - shared.correction[0, 0] > 0.25
    assert alone.correction[0, 2] - alone.correction[0, 0] < 0.1


def test_informative_configs_are_those_of_the_greedy_posterior():
    table = table_of(np.random.default_rng(2))
    model, picks = model_of(table), every_pick()
    chosen = model.informative(picks, 3)
    # Twin: the posterior covariance of the parameters, inverted anew for each possible next config.
    start = torch.zeros(G * S + 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda p: model._log_predicted(p, picks), start).numpy()
    expected: list[int] = []
    for _ in range(3):
        left = []
        for i in range(len(picks)):
            seen = jacobian[[*expected, i]]
            posterior = np.linalg.inv(np.eye(G * S + 3) + seen.T @ seen / 0.1**2)
            left.append(np.inf if i in expected else np.einsum("ci,ij,cj->", jacobian, posterior, jacobian))
        expected.append(int(np.argmin(left)))
    assert chosen.tolist() == expected


@pytest.fixture(scope="module")
def space():
    return prepared(*tiny_networks()["conv"], "W2,W4,W8")[1]


def test_candidates_are_allowed_and_spread(space):
    table = mpq.sensitivity.SensitivityTable(
        tuple(g.name for g in space.groups),
        tuple(map(str, space.schemes)),
        np.tile([0.3, 0.01, 1e-5], (len(space.groups), 1)),
        np.zeros(space.allowed.shape),
    )
    picks = candidates(table, space, 1.0, np.random.default_rng(0))
    assert len(np.unique(picks, axis=0)) == len(picks)
    assert space.allowed[np.arange(len(space.groups)), picks].all()
    losses = table.predict_all(picks)
    assert losses.min() < 0.01 < 0.5 < losses.max()
    assert (picks == candidates(table, space, 1.0, np.random.default_rng(0))).all()


def test_solved_configs_are_optimal_for_some_budget(space):
    groups = len(space.groups)
    rng = np.random.default_rng(3)
    loss = np.sort(rng.random((groups, 3)), axis=1)[:, ::-1] * np.array([1.0, 0.1, 0.01])
    table = SensitivityTable(
        tuple(g.name for g in space.groups), tuple(map(str, space.schemes)), loss, np.zeros((groups, 3))
    )
    picks = solved(table, space, 1.0)
    assert len(picks) > groups
    bits = np.array([[s.weight.bits * g.parameters for s in space.schemes] for g in space.groups], float)
    at = np.arange(groups)
    for pick in picks:
        limit = mpq.problem.Constraint("size", "bits", bits, bits[at, pick].sum())
        best = Exhaustive().solve(Problem(loss, (limit,)))
        assert loss[at, pick].sum() == pytest.approx(best.objective)


def test_unlike_leaves_out_what_is_taken():
    table = table_of(np.random.default_rng(4))
    picks = every_pick()
    found = unlike(table, picks, picks[:70], 5, 1.0)
    assert len(found) == 5
    assert not {p.tobytes() for p in found} & {p.tobytes() for p in picks[:70]}
    assert len(unlike(table, picks, picks, 5, 1.0)) == 0


@pytest.mark.parametrize("schemes", ["W2,W4", "W2A8,W4A8"])
def test_weights_alone_are_priced_where_activations_are_all_alike(schemes):
    space = prepared(*tiny_networks()["conv"], schemes)[1]
    bits = np.array([[s.weight.bits * g.parameters for s in space.schemes] for g in space.groups], float)
    np.testing.assert_array_equal(_bits(space), bits / bits.max(1).sum())


def test_activation_bits_have_their_price():
    """Of equal weights, the searched half tries each activation format."""
    space = prepared(*tiny_networks()["attention"], "W4A4,W4A8,W4")[1]
    groups = len(space.groups)
    macs = np.array([sum(x.macs for x in g.layers) for g in space.groups])
    embedding = [g.layers[0].source is None for g in space.groups].index(True)
    activations = np.tile([4.0, 8, 64], (groups, 1))  # float64
    activations[embedding] = 64
    activations *= macs[:, None]
    prices = _bits(space)
    np.testing.assert_allclose(prices - prices[:, [2]], (activations - activations[:, [2]]) / activations[:, 2].sum())
    names = tuple(g.name for g in space.groups), tuple(map(str, space.schemes))
    table = SensitivityTable(*names, np.tile([0.3, 0.01, 0.0], (groups, 1)), np.zeros((groups, 3)))
    searched = solved(table, space, 1.0)
    others = np.arange(groups) != embedding
    assert {0, 1, 2} <= set(searched[:, others].ravel())


def run(estimator, setup, **options):
    view, space, calib, bank = setup
    with preserved_state(0):
        return estimator(view, space, calib, bank, options.pop("loss", KLLoss()), progress=False, **options)


@pytest.mark.parametrize("name", ["conv", "attention"])
def test_anchors_are_what_they_say(name):
    """Measured losses are the evaluator's, the table is influence corrected by the fit, and every pass is counted."""
    net, data = tiny_networks()[name]
    setup = prepared(net, data, "W2A8,W4A8,W8A8")
    table, raw = run(anchored, setup, anchors=9), run(influence, setup)
    anchors = table.provenance["anchors"]
    assert 5 <= len(anchors) <= 9
    assert len({tuple(a["pick"]) for a in anchors}) == len(anchors)
    analysis = mpq.analyze(net, data, "W2A8,W4A8,W8A8", estimator="influence", progress=False)
    evaluator = mpq.Evaluator(net, data, progress=False)
    for a in anchors:
        assert a["measured"] == pytest.approx(evaluator.measure(analysis.config(a["pick"])).kl, rel=1e-9)
        assert a["second_order"] == pytest.approx(raw.predict(a["pick"]))
        assert a["predicted"] == table.predict(a["pick"])
    factors = np.sqrt(table.loss / raw.loss)
    coupling = table.provenance["coupling"]
    assert 0 < coupling < 1
    expected = coupling * raw.interactions * factors[..., None, None] * factors
    np.testing.assert_allclose(table.interactions, expected, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(table.rows, raw.rows * factors, rtol=1e-9)
    np.testing.assert_allclose(table.stderr, raw.stderr * factors**2, rtol=1e-9)
    errors = [np.log(a["predicted"] / a["measured"]) for a in anchors]
    assert table.provenance["anchor_error"] == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    before = [np.log(raw.predict(a["pick"]) / a["measured"]) for a in anchors]
    assert np.square(errors).sum() < np.square(before).sum()
    assert table.provenance["forward_passes"] == pytest.approx(raw.provenance["forward_passes"] + 1 + len(anchors))


def test_anchors_are_measured_on_few_samples_and_may_be_none():
    setup = _, _, calib, _ = prepared(*tiny_networks()["conv"], "W2,W4,W8")
    few, raw = run(anchored, setup, anchors=4, anchor_samples=2), run(influence, setup)
    passes = (1 + len(few.provenance["anchors"])) * calib.batches[0].size / calib.num_samples
    assert few.provenance["forward_passes"] == pytest.approx(raw.provenance["forward_passes"] + passes, abs=0.01)
    none = run(anchored, setup, anchors=0)
    np.testing.assert_array_equal(none.loss, raw.loss)
    assert none.provenance["anchors"] == []


def split(name, size):
    """The tiny network with its data in batches of one size."""
    net, data = tiny_networks()[name]
    return prepared(net, list(torch.cat(data).split(size)), "W2A8,W4A8,W8A8")


@pytest.mark.parametrize("loss", [KLLoss(), MSELoss()], ids=["kl", "mse"])
def test_ceiling_does_not_depend_on_the_batch_size(loss):
    """In batches of one, every output is its own mean; the mean is over all batches."""
    ceilings, counts = [], []
    for size in (8, 3, 1):
        setup = view, space, calib, bank = split("conv", size)
        table = run(influence, setup, loss=loss)
        ceilings.append(_Truth(view, space, calib, bank, loss, 256, None).ceiling(table))
        counts.append(len(run(anchored, setup, loss=loss).provenance["anchors"]))
    view, _, calib, _ = split("conv", 8)
    with torch.no_grad():
        exact = view(calib.batches[0])
    rise = loss.value(exact.mean(0).expand_as(exact), exact, calib.batches[0]).mean().item()
    assert ceilings == pytest.approx([rise] * 3)
    assert min(counts) > 0.8 * max(counts)


def test_ceiling_of_a_single_sample_is_that_of_the_lowest_schemes():
    net, data = tiny_networks()["conv"]
    setup = view, space, calib, bank = prepared(net, [data[0][:1]], "W2,W4,W8")
    table = run(influence, setup)
    truth = _Truth(view, space, calib, bank, KLLoss(), 256, None)
    assert truth.ceiling(table) == truth.rise(np.zeros(len(space.groups), np.int64)) > 0
    found = run(anchored, setup)
    assert len(found.provenance["anchors"]) > 10
    extra = found.provenance["forward_passes"] - table.provenance["forward_passes"]
    assert extra == 2 + len(found.provenance["anchors"])  # the float model and the lowest schemes


def test_ceiling_is_predicted_where_measuring_tells_nothing(monkeypatch):
    setup = view, space, calib, bank = split("conv", 8)
    table = run(influence, setup)
    truth = _Truth(view, space, calib, bank, KLLoss(), 256, None)
    monkeypatch.setattr(truth, "_mean", lambda outputs: 0.0)
    assert truth.ceiling(table) == table.predict(np.zeros(len(space.groups), np.int64))


def test_outputs_of_different_shapes_have_their_own_means():
    """Class scores of two batches, tokens of different lengths, and what belongs to no sample."""
    batches = [
        {"scores": torch.randn(n, 2), "tokens": torch.randn(n, n, 3), "ids": torch.arange(n), "scale": torch.ones(7)}
        for n in (2, 4)
    ]
    for found, given in zip(constant_outputs(batches, [2, 4]), batches, strict=True):
        both = torch.cat([b["scores"] for b in batches])
        torch.testing.assert_close(found["scores"], both.mean(0).expand_as(given["scores"]))
        torch.testing.assert_close(found["tokens"], given["tokens"].mean(0).expand_as(given["tokens"]))
        assert found["ids"] is given["ids"]
        assert found["scale"] is given["scale"]
