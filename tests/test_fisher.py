"""Fisher traces against loops over samples and dense Hessians."""

import numpy as np
import pytest
import torch
from estimators import NETWORKS, SCHEMES, run
from gradients import Calls, assert_covered, cross_entropy, labelled, one_by_one, rounded_inputs

from mpq.losses import KLLoss, MSELoss
from mpq.sensitivity.fisher_trace import fisher_trace
from mpq.sensitivity.saliency import output_channel_salience
from mpq.testing import dense_hessian, prepared
from mpq.view import channels_first


@pytest.mark.parametrize("name", NETWORKS)
def test_fisher_trace_equals_a_loop_over_samples(name):
    """With one sample in each batch its random sign has no say, so that nothing is left to chance."""
    net, data = NETWORKS[name]
    setup = view, space, calib, bank = prepared(net, one_by_one(labelled(data)), SCHEMES)
    table = run(fisher_trace, setup, KLLoss(), labels="true", draws=1)
    names = [x.name for x in space.layers]
    weight_trace, input_trace, errors, sizes = (dict.fromkeys(names, 0.0) for _ in range(4))
    errors = {(n, s): 0.0 for n in names for s in space.schemes}
    for batch in calib.batches:
        weights = {n: view.weight(n).detach().requires_grad_() for n in names}
        found = torch.autograd.grad(cross_entropy(view, batch, weights=weights), list(weights.values()))
        for n, g in zip(names, found, strict=True):
            weight_trace[n] += g.square().sum().item() / calib.num_samples
        calls = Calls(view, names)
        found = torch.autograd.grad(cross_entropy(view, batch, calls), [z for *_, z in calls.inputs])
        for (n, value, _), g in zip(calls.inputs, found, strict=True):
            input_trace[n] += g.square().sum().item() / calib.num_samples
            sizes[n] += value.numel()
            for s in space.schemes:
                rounded = rounded_inputs(bank, space.graph[n], s, value)
                errors[n, s] += (rounded - value).square().sum().item()
    for g, group in enumerate(space.groups):
        for s, scheme in enumerate(space.schemes):
            expected = 0.0
            for layer in group.layers:
                weight_error = bank.weight(layer, scheme.weight) - view.weight(layer.name)
                expected += 0.5 * weight_trace[layer.name] * weight_error.square().mean().item()
                if sizes[layer.name]:
                    power = errors[layer.name, scheme] / sizes[layer.name]
                    expected += 0.5 * input_trace[layer.name] * power
            assert table.loss[g, s] == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("name", "loss"), [*((n, KLLoss()) for n in NETWORKS), ("conv", MSELoss())])
def test_weight_scores_estimate_those_of_the_dense_hessian(name, loss):
    """Probes of many samples at once: Fisher traces and channel blocks of the Hessian, within the standard error."""
    net, data = NETWORKS[name]
    setup = view, space, calib, bank = prepared(net, data, "W2")
    names = [x.name for x in space.layers]
    hessian = dense_hessian(view, calib, loss, names)
    traces, channels, end = [], [], 0
    for layer in space.layers:
        start, end = end, end + layer.parameters
        block = hessian[start:end, start:end]
        error = bank.weight(layer, space.schemes[0].weight) - view.weight(layer.name)
        traces.append(0.5 * block.trace().item() * error.square().mean().item())
        module = view.layers[layer.name]
        rows = channels_first(module, torch.arange(layer.parameters).view(layer.weight_shape)).flatten(1)
        flat = error.flatten()
        channels.append(sum(0.5 * (flat[r] @ block[r][:, r] @ flat[r]).item() for r in rows))
    for estimator, expected in ((fisher_trace, traces), (output_channel_salience, channels)):
        table = run(estimator, setup, loss, draws=60, seed=3)
        assert (np.abs(table.loss[:, 0] - expected) < 4 * table.stderr[:, 0]).all()
        # A squared form in random signs has a relative deviation of about sqrt(2) at most; two batches average it.
        assert (table.stderr[:, 0] < 2 * np.array(expected) / 60**0.5).all()


def test_label_gradients_of_a_batch_are_told_apart_by_signs():
    net, data = NETWORKS["linear"]
    exact = run(fisher_trace, prepared(net, one_by_one(labelled(data)), "W2"), KLLoss(), labels="true", draws=1)
    table = run(fisher_trace, prepared(net, labelled(data), "W2"), KLLoss(), labels="true", draws=60)
    assert (np.abs(table.loss - exact.loss) < 4 * table.stderr).all()
    assert (table.stderr < 0.25 * exact.loss).all()


def test_standard_errors_cover_the_truth():
    net, data = NETWORKS["linear"]
    setup = view, space, calib, bank = prepared(net, data[1:], "W2")
    names = [x.name for x in space.layers]
    diagonal = dense_hessian(view, calib, KLLoss(), names).diagonal()
    traces = [t.sum().item() for t in torch.split(diagonal, [x.parameters for x in space.layers])]
    errors = [(bank.weight(x, space.schemes[0].weight) - view.weight(x.name)).square().mean() for x in space.layers]
    truth = 0.5 * np.array(traces) * np.array(errors)
    assert_covered([run(fisher_trace, setup, KLLoss(), draws=20, seed=seed) for seed in range(200)], truth)
