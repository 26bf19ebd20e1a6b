"""Measured losses against full passes and `mpq.Evaluator`."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from estimators import NETWORKS, SCHEMES, full_pass
from torch import nn

import mpq
from mpq.errors import DataError, MpqError
from mpq.losses import CallableLoss, KLLoss, MSELoss
from mpq.sensitivity.perturbation import perturbation, quantized, smallest_precision
from mpq.testing import EstimatorContract, prepared
from mpq.view import preserved_state


class TestPerturbation(EstimatorContract):
    @pytest.fixture(params=["sqnr", "prediction_difference"])
    def estimator(self, request):
        return partial(perturbation, measure=request.param)


def run(setup, loss=KLLoss(), **options):  # noqa: B008 - frozen
    view, space, calib, bank = setup
    with preserved_state(0):
        return perturbation(view, space, calib, bank, loss, progress=False, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_are_those_of_the_evaluator(name):
    net, data = NETWORKS[name]
    net = copy.deepcopy(net).float()  # which is what W32 holds
    data = [x.float() if x.is_floating_point() else x for x in data]
    analysis = mpq.analyze(net, data, f"{SCHEMES},W32", estimator=perturbation, progress=False)
    evaluator = mpq.Evaluator(net, data, progress=False)
    groups, schemes = analysis.space.groups, analysis.space.schemes
    for g in range(len(groups)):
        for s in range(len(schemes)):
            config = analysis.config([s if i == g else len(schemes) - 1 for i in range(len(groups))])
            assert analysis.table.loss[g, s] == pytest.approx(evaluator.measure(config).kl, rel=1e-12, abs=1e-12)
    assert analysis.table.loss[:, 0].all()


def outputs(setup, g, s):
    """Outputs of the float model and with one choice, all samples ``[N, C]``."""
    view, space, calib, bank = setup
    exact = torch.cat([full_pass(view, b) for b in calib.batches])
    with quantized(view, bank, [(space.groups[g], space.schemes[s])]):
        return exact, torch.cat([full_pass(view, b) for b in calib.batches])


@pytest.mark.parametrize("name", NETWORKS)
def test_measures_are_what_they_say(name):
    setup = prepared(*NETWORKS[name], SCHEMES)
    tables = {m: run(setup, MSELoss(), measure=m) for m in ("loss", "sqnr", "prediction_difference")}
    for g, s in np.ndindex(*tables["loss"].loss.shape):
        exact, changed = outputs(setup, g, s)
        error = (changed - exact).square()
        shares = {
            "loss": error.mean(1),
            "sqnr": error.sum(1) / exact.square().sum(1),
            "prediction_difference": F.kl_div(
                F.log_softmax(changed / 4, 1), F.log_softmax(exact / 4, 1), log_target=True, reduction="none"
            ).sum(1),
        }
        for measure, each in shares.items():
            assert tables[measure].loss[g, s] == pytest.approx(each.mean().item(), rel=1e-10)
            assert tables[measure].stderr[g, s] == pytest.approx(each.std().item() / len(each) ** 0.5, rel=1e-10)
    assert tables["loss"].provenance["forward_passes"] == 1 + tables["loss"].loss.size
    assert tables["sqnr"].provenance["measure"] == "sqnr"


def test_probabilities_are_softened_as_logits_are():
    net, data = NETWORKS["linear"]
    logits = run(prepared(net, data, SCHEMES), measure="prediction_difference")
    softmax = run(prepared(nn.Sequential(*net, nn.Softmax(1)), data, SCHEMES), measure="prediction_difference")
    np.testing.assert_allclose(softmax.loss, logits.loss, rtol=1e-8)


def test_callable_losses_rise_from_that_of_the_float_model():
    """Per sample or as a mean, which has its standard error over batches; a falling loss costs nothing."""
    net, data = NETWORKS["conv"]
    setup = prepared(net, data, SCHEMES)
    calib = setup[2]
    by_sample = CallableLoss(lambda out, batch: out[:, 0].square())
    each, mean = run(setup, by_sample), run(setup, CallableLoss(lambda out, batch: out[:, 0].square().mean()))
    np.testing.assert_allclose(each.loss, mean.loss, rtol=1e-10)
    falling = run(setup, CallableLoss(lambda out, batch: -out[:, 0].square()))
    assert ((each.loss == 0) != (falling.loss == 0)).all()
    for g, s in np.ndindex(*each.loss.shape):
        exact, changed = outputs(setup, g, s)
        rise = (changed[:, 0].square() - exact[:, 0].square()).numpy()
        assert each.loss[g, s] - falling.loss[g, s] == pytest.approx(rise.mean(), rel=1e-10)
        assert each.stderr[g, s] == pytest.approx(rise.std(ddof=1) / len(rise) ** 0.5, rel=1e-10)
        first, second = (r.mean() for r in np.split(rise, [calib.batches[0].size]))
        assert mean.stderr[g, s] == pytest.approx(abs(first - second) / 2, rel=1e-9)  # the jackknife of two batches


def test_errors_name_the_layer_and_the_fix():
    setup = prepared(*NETWORKS["linear"], SCHEMES)
    with pytest.raises(MpqError, match="unknown measure 'mse'; known: loss, sqnr, prediction_difference"):
        run(setup, measure="mse")
    exact = [full_pass(setup[0], b) for b in setup[2].batches]
    spoilt = CallableLoss(lambda out, b: out[:, 0] / any(torch.equal(out, e) for e in exact))
    with pytest.raises(DataError, match="layer '0' at W2A4 is NaN or infinite"):
        run(setup, spoilt)
    single = prepared(nn.Linear(4, 1).double(), [torch.randn(3, 4, dtype=torch.float64)], SCHEMES)
    with pytest.raises(MpqError, match="at least two classes"):
        run(single, measure="prediction_difference")


def on_grid(bits, count=64):
    """Weights that a symmetric integer format of these bits holds exactly, with all its levels."""
    top = 2 ** (bits - 1) - 1
    levels = torch.arange(-top, top + 1, dtype=torch.float64)
    return levels.repeat(count // len(levels) + 1)[:count][None] / (top + 1)  # a scale that float32 holds


def test_smallest_precision_keeps_the_distribution():
    """Weights on the grid of a format need that format; the divergence is that of the histograms."""
    net = nn.Sequential(nn.Linear(64, 1, bias=False), nn.Tanh(), nn.Linear(1, 200, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(on_grid(4))
        net[2].weight.copy_(torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None])
    view, space, _, bank = prepared(net, [torch.randn(3, 64, dtype=torch.float64)], "W2,W3,W4,W8")
    found = smallest_precision(view, space, bank, eps=1e-9, resolution=15)
    assert found["0"].bits == 4
    assert found["2"].bits == 2  # one weight for each channel: its scale holds it
    assert smallest_precision(view, space, bank, eps=1e-9, resolution=1)["0"].bits == 2
    few = prepared(net, [torch.randn(3, 64, dtype=torch.float64)], "W3,W2")
    assert smallest_precision(few[0], few[1], few[3], eps=1e-9, resolution=15)["0"] is None
    weight = view.weight("0").numpy()
    by_hand = {}
    for scheme in space.schemes:
        rounded = bank.weight(space.layers[0], scheme.weight).numpy()
        p, q = (np.histogram(t, 5, (weight.min(), weight.max()))[0] + 0.5 for t in (weight, rounded))
        by_hand[scheme.weight.bits] = F.kl_div(*map(torch.tensor, (np.log(q / q.sum()), p / p.sum())), reduction="sum")
    assert by_hand[2] > by_hand[3] > by_hand[4] == 0
    for bits in (2, 3):
        for scale in (1.01, 0.99):
            found = smallest_precision(view, space, bank, eps=by_hand[bits] * scale, resolution=5)["0"]
            assert (found.bits == bits) == (scale > 1)
    with pytest.raises(MpqError, match="at least 1, not 0"):
        smallest_precision(view, space, bank, resolution=0)
