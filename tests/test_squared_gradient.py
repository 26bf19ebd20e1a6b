"""Squared gradients times errors of outputs, against loops over samples and finite sums."""

import numpy as np
import pytest
import torch
from estimators import NETWORKS, SCHEMES, run
from gradients import Calls, Overwriting, assert_covered, by_sign, cross_entropy, labelled, one_by_one, weight_errors
from torch import nn

from mpq.calibration import Calibration
from mpq.losses import CallableLoss, KLLoss, MSELoss
from mpq.sensitivity.saliency import output_channel_salience
from mpq.sensitivity.squared_gradient import squared_gradient
from mpq.space import layer_scheme
from mpq.testing import prepared
from mpq.trees import tensors_in


@pytest.mark.parametrize("estimator", [output_channel_salience, squared_gradient], ids=lambda f: f.__name__)
@pytest.mark.slow
def test_standard_errors_of_squares_cover_the_sum_over_single_signs(estimator):
    """Means of a few squares are skew (where one is low by chance, so is its standard error): it takes more draws."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.5)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    setup = prepared(net, [x], "W2")
    of_weights, of_outputs = by_sign(setup)
    errors, inputs = weight_errors(setup), [x, net[:2](x).detach()]
    if estimator is output_channel_salience:
        truth = [0.5 * (g * e).sum(2).square().sum().item() / 16 for g, e in zip(of_weights, errors, strict=True)]
    else:
        moved = [i @ e.T for i, e in zip(inputs, errors, strict=True)]
        truth = [0.5 * (g * m).square().sum().item() / 16 for g, m in zip(of_outputs, moved, strict=True)]
    assert_covered([run(estimator, setup, KLLoss(), draws=100, seed=seed) for seed in range(200)], np.array(truth))


@pytest.mark.parametrize("name", [*NETWORKS, "overwriting"])
def test_squared_gradient_equals_a_loop_over_samples(name):
    torch.manual_seed(0)
    net, data = NETWORKS.get(name) or (Overwriting().double(), [torch.randn(5, 4, dtype=torch.float64)])
    batches = labelled(data)
    setup = view, space, calib, bank = prepared(net, batches, SCHEMES)
    table = run(squared_gradient, setup, KLLoss(), labels="true", draws=2)
    names = [x.name for x in space.layers]
    single = Calibration.load(one_by_one(batches), view.read)
    scores = {(n, s): 0.0 for n in names for s in space.schemes}
    for batch in single.batches:
        calls = Calls(view, names)
        loss = cross_entropy(view, batch, calls)
        with torch.no_grad():
            for n, inputs, zeros in calls.outputs:
                layer = space.graph[n]
                gradients = torch.autograd.grad(loss, zeros, retain_graph=True)
                exact = tensors_in(bank.run(layer, None, inputs))
                for s in space.schemes:
                    read = bank.inputs(layer, layer_scheme(layer, s).activation, inputs)
                    made = tensors_in(bank.run(layer, s.weight, read))
                    for g, m, e in zip(gradients, made, exact, strict=True):
                        scores[n, s] += 0.5 * (g * (m - e)).square().sum().item() / calib.num_samples
    for g, group in enumerate(space.groups):
        for s, scheme in enumerate(space.schemes):
            expected = sum(scores[x.name, scheme] for x in group.layers)
            assert table.loss[g, s] == pytest.approx(expected, rel=1e-8)
    np.testing.assert_allclose(table.stderr, 0, atol=1e-12)


def test_squared_gradient_of_probes_is_the_diagonal_of_the_output_hessian():
    """The head's outputs are the model's, so that the expected squared gradient is the Hessian's diagonal."""
    net, data = NETWORKS["linear"]
    setup = view, space, calib, bank = prepared(net, data, "W2")
    table = run(squared_gradient, setup, KLLoss(), draws=150)
    head = space.layers[-1]
    expected = 0.0
    for batch in calib.batches:
        hidden = net[:-1](batch.args[0])
        p = net(batch.args[0]).softmax(1)
        error = hidden @ (bank.weight(head, space.schemes[0].weight) - view.weight(head.name)).T
        expected += 0.5 * ((p - p**2) * error**2).sum().item() / calib.num_samples
    assert abs(table.loss[-1, 0] - expected) < 4 * table.stderr[-1, 0]
    assert table.stderr[-1, 0] < 0.15 * expected


def test_squared_gradient_takes_labels_where_there_are_some():
    net, data = NETWORKS["linear"]
    for batches, expected in ((data, "probe"), (labelled(data), "true")):
        assert run(squared_gradient, prepared(net, batches, "W2"), KLLoss()).provenance["labels"] == expected
    assert run(squared_gradient, prepared(net, labelled(data), "W2"), MSELoss()).provenance["labels"] == "probe"


def test_squared_gradient_of_a_mean_is_that_of_its_samples():
    net, data = NETWORKS["linear"]
    losses = [lambda out, batch: out.square().sum(1), lambda out, batch: out.square().sum(1).mean()]
    setup = prepared(net, data, SCHEMES)
    by_sample, mean = (run(squared_gradient, setup, CallableLoss(f)).loss for f in losses)
    np.testing.assert_allclose(by_sample, mean, rtol=1e-9)
