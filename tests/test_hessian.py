"""Traces and eigenvalues of layer Hessians against dense twins, and standard errors against the errors they promise."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import mpq
from mpq.losses import CallableLoss, KLLoss, MSELoss
from mpq.quantizers import fake_quantize
from mpq.sensitivity.aggregate import distinct_layers
from mpq.sensitivity.hessian import hessian_of
from mpq.sensitivity.hessian_trace import hessian_trace
from mpq.sensitivity.probing import estimate
from mpq.sensitivity.top_eigenvalue import Lanczos, hawq_order, top_eigenvalue
from mpq.sensitivity.trace_methods import Blocks, GaussNewton, Hutchinson, HutchPlusPlus, random_vectors
from mpq.testing import EstimatorContract, dense_hessian, prepared, tiny_networks

LOSSES = pytest.mark.parametrize("loss", [KLLoss(), MSELoss()], ids=["kl", "mse"])
NETWORKS = pytest.mark.parametrize("name", list(tiny_networks()))
METHODS = "gauss_newton", "hutchinson", "blocks", "hutch++"


class TestHutchinson(EstimatorContract):
    @pytest.fixture(params=METHODS[1:])
    def estimator(self, request):
        return partial(hessian_trace, method=request.param, probes=16, distribution="gaussian")


class TestActivations(EstimatorContract):
    schemes = "W2A4,W4A4,W8A8"

    @pytest.fixture
    def estimator(self):
        return "hessian_trace"


def parts(name, schemes="W2,W4"):
    return prepared(*tiny_networks()[name], schemes)


def blocks(view, space, calib, loss):
    """Dense Hessian block of each distinct layer."""
    names = [x.name for x in distinct_layers(space)]
    sizes = [view.weight(name).numel() for name in names]
    whole = dense_hessian(view, calib, loss, names)
    ends = np.cumsum(sizes)
    return {n: whole[e - s : e, e - s : e] for n, s, e in zip(names, sizes, ends, strict=True)}


def traces(view, space, calib, loss):
    return np.array([h.trace().item() for h in blocks(view, space, calib, loss).values()])


def values(table, kind="traces"):
    return np.array([t["value"] for t in table.provenance[kind].values()])


def stderrs(table, kind="traces"):
    return np.array([t["stderr"] for t in table.provenance[kind].values()])


class Hadamard:
    """Signs whose outer products average to the identity exactly: probes that leave no noise."""

    def __init__(self, view, space):
        layers = distinct_layers(space)
        sizes = [x.parameters for x in layers]
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < sum(sizes):
            matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
        self.count = len(matrix)
        self.vectors = itertools.cycle([v for row in matrix for v in torch.split(row[: sum(sizes)], sizes)])

    def __call__(self, like):
        return next(self.vectors).view_as(like)


@NETWORKS
@LOSSES
def test_exact_gauss_newton_traces_are_the_dense_ones(name, loss):
    args = parts(name)
    table = hessian_trace(*args, loss, exact=True, progress=False)
    np.testing.assert_allclose(values(table), traces(*args[:3], loss), rtol=1e-8)
    assert not table.stderr.any()
    assert table.provenance["mixed_layers"] == []


@NETWORKS
@LOSSES
@pytest.mark.parametrize("method", [Hutchinson, Blocks])
def test_products_with_orthogonal_signs_give_the_dense_traces(name, loss, method):
    view, space, calib, _ = parts(name)
    draw = Hadamard(view, space)
    found = estimate(method(view, space, calib, loss, draw), calib, draw.count, None, "", False)
    np.testing.assert_allclose(found.mean, traces(view, space, calib, loss), rtol=1e-8)


def test_one_probe_of_each_method():
    """A shared product holds the other layers' part of the vector, a block's product does not."""
    view, space, calib, _ = parts("shared")
    names = [x.name for x in distinct_layers(space)]
    vectors = [torch.randn(view.weight(n).shape, dtype=torch.float64) for n in names]
    dense, flat = dense_hessian(view, calib, KLLoss(), names), [v.flatten() for v in vectors]
    sizes = [len(v) for v in flat]
    shared = [(v @ p).item() for v, p in zip(flat, torch.split(dense @ torch.cat(flat), sizes), strict=True)]
    alone = [(v @ h @ v).item() for v, h in zip(flat, blocks(view, space, calib, KLLoss()).values(), strict=True)]
    for method, expected in ((Hutchinson, shared), (Blocks, alone)):
        given = itertools.cycle(vectors)
        found = estimate(
            method(view, space, calib, KLLoss(), lambda like, given=given: next(given)), calib, 1, None, "", False
        )
        np.testing.assert_allclose(found.mean, expected, rtol=1e-8)


@NETWORKS
@pytest.mark.parametrize("rank", [2, 100])
def test_hutchplusplus_with_orthogonal_signs_gives_the_dense_traces(name, rank):
    """With a rank as large as every layer, two probes of anything will do."""
    loss = KLLoss()
    view, space, calib, _ = parts(name)
    draws = [random_vectors("rademacher", torch.Generator().manual_seed(0))]
    probing = HutchPlusPlus(view, space, calib, loss, lambda like: draws[0](like), rank, False)
    if rank == 2:
        draws[0] = Hadamard(view, space)
    found = estimate(probing, calib, draws[0].count if rank == 2 else 2, None, "", False)
    np.testing.assert_allclose(found.mean, traces(view, space, calib, loss), rtol=1e-8)


def test_the_full_hessian_of_a_callable_loss_may_be_negative():
    """Raw traces are kept, losses are clipped, and the layers are named."""
    view, space, calib, bank = parts("linear")
    loss = CallableLoss(lambda output, batch: -output.square().mean(1))
    options = {"rank": 100, "probes": 3, "tolerance": None, "progress": False}
    table = hessian_trace(view, space, calib, bank, loss, method="hutch++", **options)
    expected = traces(view, space, calib, loss)
    np.testing.assert_allclose(values(table), expected, rtol=1e-8)
    assert expected[1] < 0
    negative = [x.name for x, t in zip(space.layers, expected, strict=True) if t < 0]
    assert table.provenance["negative_traces"] == negative
    assert (table.loss[expected < 0] == 0).all()
    assert (table.loss[expected > 0] > 0).all()


def test_constant_gradients_have_no_curvature():
    """A loss that is linear in the weights has no second derivative to take; that is no error."""
    net, data = nn.Sequential(nn.Linear(4, 3)).double(), [torch.randn(5, 4, dtype=torch.float64)]
    args = prepared(net, data, "W2,W4")
    loss = CallableLoss(lambda output, batch: output.sum(1))
    for method in METHODS[1:]:
        assert values(hessian_trace(*args, loss, method=method, progress=False)) == 0
    assert not top_eigenvalue(*args, loss, progress=False).loss.any()


def test_score_is_the_average_trace_times_the_squared_error():
    args = parts("linear", "W2,W3")
    view, space, _, _ = args
    table = hessian_trace(*args, KLLoss(), exact=True, progress=False)
    for g, layer in enumerate(space.layers):
        for s, scheme in enumerate(space.schemes):
            w = view.weight(layer.name)
            error = (fake_quantize(w, scheme.weight) - w).square().sum().item()
            expected = 0.5 * values(table)[g] / w.numel() * error
            assert table.loss[g, s] == pytest.approx(expected, rel=1e-10)


class Replay:
    """Hands out recorded probes, so that one forward pass serves many independent estimates."""

    setup_passes = 0.0

    def __init__(self, probing, data, count):
        self.left = {id(batch): iter(list(probing.draws(batch, count))) for batch in data.batches}

    def draws(self, batch, probes):
        return itertools.islice(self.left[id(batch)], probes)

    def passes(self, probes):
        return probes


@pytest.mark.parametrize(
    ("method", "count", "probes"),
    [("gauss_newton", 200, 12), ("hutchinson", 200, 24), ("blocks", 200, 24), ("hutch++", 200, 24)],
)
def test_standard_errors_cover_the_dense_traces(method, count, probes):
    """Over many estimates: unbiased, and about as often within two standard errors as Student's t says."""
    view, space, calib, _ = parts("linear")
    generator = torch.Generator().manual_seed(0)
    draw = random_vectors("rademacher", generator)
    probing = {
        "gauss_newton": lambda: GaussNewton(view, space, calib, KLLoss(), generator),
        "hutchinson": lambda: Hutchinson(view, space, calib, KLLoss(), draw),
        "blocks": lambda: Blocks(view, space, calib, KLLoss(), draw),
        "hutch++": lambda: HutchPlusPlus(view, space, calib, KLLoss(), draw, 2, False),
    }[method]()
    recorded = Replay(probing, calib, count * probes)
    found = [estimate(recorded, calib, probes, None, "", False) for _ in range(count)]
    errors = np.array([e.mean for e in found]) - traces(view, space, calib, KLLoss())
    z = errors / np.array([e.stderr for e in found])
    # As unlikely as four standard errors that are known for certain, not from so few probes.
    assert stats.t.sf(np.abs(z), probes - 1).min() > stats.norm.sf(4)
    assert 0.90 < (np.abs(z) < 2).mean() < 0.97
    assert (np.abs(errors.mean(0)) < 4 * errors.std(0) / count**0.5).all()


def test_the_stop_keeps_its_promise():
    args = parts("linear")
    expected = traces(*args[:3], KLLoss())
    tables = [hessian_trace(*args, KLLoss(), probes=999, tolerance=0.1, seed=i, progress=False) for i in range(25)]
    for table in tables:
        assert (stderrs(table) <= 0.1 * values(table)).all()
        assert 4 <= table.provenance["probes"] < 100
    errors = np.array([values(t) / expected - 1 for t in tables])
    assert (np.abs(errors) < 0.2).mean() > 0.9
    assert np.abs(errors.mean(0)).max() < 0.05  # half of the promised standard error


def test_a_real_network_in_single_precision(example):
    """All layers of the bundled network against gradients of one sample and class at a time."""
    model, calib, _ = example
    args = prepared(model, [calib[0][0][:3]], "W4")
    view, space, data, _ = args
    names, loss = [x.name for x in space.layers], KLLoss()
    gradients = []  # of each sample and class, by layer
    for n in range(3):
        batch = view.read(calib[0][0][n : n + 1])
        weights = [view.weight(name).detach().requires_grad_() for name in names]
        with view.swapped(dict(zip(names, weights, strict=True))):
            for scalar in loss.all_probes(view(batch), batch):
                gradients.append(torch.autograd.grad(scalar, weights, retain_graph=True))
    exact = hessian_trace(*args, loss, exact=True, progress=False)
    expected = [sum(g.square().sum().item() for g in each) / 3 for each in zip(*gradients, strict=True)]
    np.testing.assert_allclose(values(exact), expected, rtol=1e-4)
    drawn = hessian_trace(*args, loss, probes=16, tolerance=None, progress=False)
    assert np.abs((values(drawn) - values(exact)) / stderrs(drawn)).max() < 6
    # The Hessian-vector products see the same matrix: v^T H v is the mean of (g . v)^2.
    with hessian_of(view, names, data.batches[0], loss) as hessian:
        for i, (weight, each) in enumerate(zip(hessian.weights, zip(*gradients, strict=True), strict=True)):
            v = torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
            form = (v * hessian.block_product(i, v)).sum().item()
            assert form == pytest.approx(sum((g * v).sum().square().item() for g in each) / 3, rel=2e-3)


def test_gauss_newton_of_a_callable_loss_is_the_empirical_fisher():
    args = parts("linear")
    view, space, calib, _ = args
    loss = CallableLoss(
        lambda output, batch: F.cross_entropy(output, torch.ones(len(output), dtype=torch.long), reduction="none")
    )
    found = hessian_trace(*args, loss, probes=2, tolerance=None, progress=False)
    weights = [view.weight(x.name).detach().requires_grad_() for x in space.layers]
    with view.swapped({x.name: w for x, w in zip(space.layers, weights, strict=True)}):
        each = torch.cat([loss.value(view(b), None, b) for b in calib.batches])
        gradients = [torch.autograd.grad(sample, weights, retain_graph=True) for sample in each]
    expected = [np.mean([g[i].square().sum().item() for g in gradients]) for i in range(2)]
    np.testing.assert_allclose(values(found), expected, rtol=1e-10)
    np.testing.assert_allclose(stderrs(found), 0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic'; known: gauss_newton, hutchinson, blocks"),
        ({"method": "blocks", "exact": True}, "use gauss_newton"),
        ({"distribution": "uniform"}, "use 'rademacher' or 'gaussian'"),
        ({"probes": 0}, "at least 1, not 0"),
        ({"tolerance": 0.0}, "tolerance must be above 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(mpq.MpqError, match=message):
        hessian_trace(*parts("linear"), KLLoss(), progress=False, **options)


def test_broken_losses_are_refused_by_layer():
    args = parts("linear")
    loss = CallableLoss(lambda output, batch: output.square().sum(1) * float("nan"))
    for method in METHODS:
        with pytest.raises(mpq.errors.DataError, match="layer '0' is NaN"):
            hessian_trace(*args, loss, method=method, probes=2, progress=False)
    with pytest.raises(mpq.errors.DataError, match="layer '0' is NaN"):
        top_eigenvalue(*args, loss, progress=False)


class Frozen(nn.Module):
    """One layer that gradients don't reach although it matters, and one that does not matter."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head, self.unused = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            features = self.backbone(x)
        self.unused(features)
        return self.head(features)


@pytest.mark.parametrize("estimator", [*(partial(hessian_trace, method=m) for m in METHODS), top_eigenvalue])
def test_layers_that_no_gradient_reaches_are_refused(estimator):
    data = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
    with pytest.raises(mpq.errors.GraphError, match="no gradient reaches layer 'backbone'"):
        estimator(*prepared(Frozen(), data, "W2"), KLLoss(), progress=False)
    net = Frozen()
    net.backbone = nn.Identity()
    table = estimator(*prepared(net, data, "W2"), KLLoss(), progress=False)
    assert table.loss[table.groups.index("unused")] == 0
    assert table.loss[table.groups.index("head")] > 0


@NETWORKS
@LOSSES
def test_top_eigenvalues_are_the_dense_ones(name, loss):
    args = parts(name)
    found = top_eigenvalue(*args, loss, progress=False)
    dense = blocks(*args[:3], loss)
    expected = [torch.linalg.eigvalsh(h)[-1].item() for h in dense.values()]
    np.testing.assert_allclose(values(found, "eigenvalues"), expected, rtol=1e-4)
    assert found.provenance["unconverged"] == found.provenance["negative_eigenvalues"] == []
    sizes = [len(h) for h in dense.values()]
    order = sorted(dense, key=lambda n: -dict(zip(dense, np.divide(expected, sizes), strict=True))[n])
    assert hawq_order(found) == order


def test_top_eigenvalue_scores_bound_the_quadratic_form():
    args = parts("linear", "W2,W3")
    view, space, _, bank = args
    table = top_eigenvalue(*args, KLLoss(), tolerance=1e-6, progress=False)
    dense = blocks(*args[:3], KLLoss())
    for g, layer in enumerate(space.layers):
        for s, scheme in enumerate(space.schemes):
            d = (bank.weight(layer, scheme.weight) - view.weight(layer.name)).flatten()
            top = torch.linalg.eigvalsh(dense[layer.name])[-1]
            assert table.loss[g, s] == pytest.approx((0.5 * top * d @ d).item(), rel=1e-8)
            assert table.loss[g, s] >= 0.5 * d @ dense[layer.name] @ d


def test_the_largest_eigenvalue_is_meant_even_if_others_are_larger_in_size():
    args = parts("linear")
    loss = CallableLoss(lambda output, batch: -output.square().mean(1))
    table = top_eigenvalue(*args, loss, tolerance=1e-6, progress=False)
    dense = [torch.linalg.eigvalsh(h) for h in blocks(*args[:3], loss).values()]
    assert all(e[0].abs() > e[-1].abs() for e in dense)
    np.testing.assert_allclose(values(table, "eigenvalues"), [e[-1].item() for e in dense], rtol=1e-6, atol=1e-9)
    negative = [x.name for x, e in zip(args[1].layers, dense, strict=True) if e[-1] < -1e-9]
    assert table.provenance["negative_eigenvalues"] == negative == ["2"]
    assert (table.loss[1] == 0).all()


def test_unconverged_eigenvalues_are_named():
    table = top_eigenvalue(*parts("conv"), KLLoss(), iterations=2, tolerance=1e-8, progress=False)
    assert table.provenance["unconverged"] == ["0", "2", "5"]
    with pytest.raises(mpq.MpqError, match="tolerance must be above 0, not 0"):
        top_eigenvalue(*parts("conv"), KLLoss(), tolerance=0, progress=False)
    with pytest.raises(mpq.MpqError, match="has no eigenvalues; use top_eigenvalue"):
        hawq_order(hessian_trace(*parts("linear"), KLLoss(), progress=False))


@pytest.mark.parametrize(
    "spectrum", [np.linspace(0, 1, 200), np.r_[np.zeros(199), 3.0], -np.arange(1.0, 201), -np.arange(6.0), np.zeros(5)]
)
def test_lanczos_finds_the_largest_eigenvalue(spectrum):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.tensor(spectrum)) @ basis.T
    run = Lanczos(torch.randn(len(spectrum), generator=generator), 1e-6)
    for _ in range(len(spectrum)):
        run.advance(matrix @ run.vector)
        if run.converged:
            break
    assert run.converged
    assert run.value == pytest.approx(spectrum.max(), rel=1e-8, abs=1e-12)


def test_the_stated_cost():
    args = parts("linear")
    expected = {
        "gauss_newton": 2 + (1 + 3 * 4),  # finding the batch axis; forward once, backward and norms of each probe
        "hutchinson": 4 + 6 * 4,
        "blocks": 4 + 2 * 2 * 4,
        "hutch++": 2 * (4 + 2 * 2 * 3) + 4 + 2 * 2 * 4,
    }
    for method, passes in expected.items():
        table = hessian_trace(*args, KLLoss(), method=method, probes=4, rank=3, progress=False)
        assert table.provenance["forward_passes"] == passes
