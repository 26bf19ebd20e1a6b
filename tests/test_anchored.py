"""The default estimator: which configs are measured, and the fit to them."""

import numpy as np
import pytest

import mpq
from mpq.problem import Problem
from mpq.search import Exhaustive
from mpq.sensitivity.anchors import candidates, solved, unlike
from mpq.sensitivity.recalibration import Recalibrator
from mpq.sensitivity.table import SensitivityTable
from mpq.testing import prepared, tiny_networks

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
    import torch

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
