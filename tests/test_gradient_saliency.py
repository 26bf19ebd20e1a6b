"""Magnitudes of gradients times errors, against plain autograd and sums over all signs."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from estimators import NETWORKS, SCHEMES, run
from gradients import Calls, Overwriting, assert_covered, by_sign, labelled, rounded_inputs, weight_errors

from mpq.losses import KLLoss
from mpq.sensitivity.fisher_trace import fisher_trace
from mpq.sensitivity.saliency import gradient_saliency
from mpq.sensitivity.weight_importance import weight_importance
from mpq.testing import prepared


def test_standard_errors_of_saliency_cover_the_mean_over_all_signs():
    net, data = NETWORKS["linear"]
    setup = prepared(net, data[:1], "W2")
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=9)), dtype=torch.float64)
    pairs = zip(by_sign(setup)[0], weight_errors(setup), strict=True)
    truth = [((signs @ g.flatten(1)) * e.flatten()).abs().sum(1).mean().item() * 3**0.5 / 3 for g, e in pairs]
    tables = [run(gradient_saliency, setup, KLLoss(), draws=20, seed=seed) for seed in range(200)]
    assert_covered(tables, np.array(truth))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("labels", ["true", "probe"])
def test_gradient_saliency_equals_plain_autograd(name, labels):
    net, data = NETWORKS[name]
    setup = view, space, calib, bank = prepared(net, labelled(data), SCHEMES)
    table = run(gradient_saliency, setup, KLLoss(), labels=labels, draws=2, seed=5)
    generator = torch.Generator().manual_seed(5)
    names = [x.name for x in space.layers]
    expected = np.zeros((len(names), len(space.schemes)))
    draws = 1 if labels == "true" else 2
    for batch in calib.batches:
        weights = {n: view.weight(n).detach().requires_grad_() for n in names}
        calls = Calls(view, names)
        with view.swapped(weights):
            output = calls(batch)
        for _ in range(draws):
            if labels == "true":
                scalar = F.cross_entropy(output, batch.labels, reduction="sum")
            else:
                scalar = KLLoss().probe(output, batch, generator)
            wanted = [*weights.values(), *(z for *_, z in calls.inputs)]
            found = torch.autograd.grad(scalar, wanted, retain_graph=True)
            factor = 1 if labels == "true" else batch.size**0.5
            for s, scheme in enumerate(space.schemes):
                for i, (n, w) in enumerate(weights.items()):
                    error = bank.weight(space.graph[n], scheme.weight) - w.detach()
                    expected[i, s] += factor * (found[i] * error).abs().sum().item()
                for (n, value, _), g in zip(calls.inputs, found[len(names) :], strict=True):
                    error = rounded_inputs(bank, space.graph[n], scheme, value) - value
                    expected[names.index(n), s] += (g * error).abs().sum().item()
    by_group = [expected[[names.index(x.name) for x in g.layers]].sum(0) for g in space.groups]
    np.testing.assert_allclose(table.loss, np.array(by_group) / draws / calib.num_samples, rtol=1e-8)
    assert ((table.stderr == 0) if labels == "true" else (table.stderr > 0)).all()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("labels", ["true", "probe"])
def test_weight_importance_equals_plain_autograd(name, labels):
    net, data = NETWORKS[name]
    setup = view, space, calib, bank = prepared(net, labelled(data), "W2A4,W4A8")
    table = run(weight_importance, setup, KLLoss(), labels=labels, draws=2, seed=5)
    generator = torch.Generator().manual_seed(5)
    names = [x.name for x in space.layers]
    importance, draws = dict.fromkeys(names, 0.0), 1 if labels == "true" else 2
    for batch in calib.batches:
        weights = {n: view.weight(n).detach().requires_grad_() for n in names}
        with view.swapped(weights):
            output = view(batch)
        for _ in range(draws):
            if labels == "true":
                scalar = F.cross_entropy(output, batch.labels, reduction="sum")
            else:
                scalar = batch.size**0.5 * KLLoss().probe(output, batch, generator)
            for n, g in zip(names, torch.autograd.grad(scalar, weights.values(), retain_graph=True), strict=True):
                importance[n] += (weights[n] * g).abs().sum().item() / draws / calib.num_samples

    def score(layer, scheme):
        weight = view.weight(layer.name)
        noise = (bank.weight(layer, scheme.weight) - weight).square().sum() / weight.square().sum()
        return importance[layer.name] * noise.item()

    expected = [[sum(score(x, s) for x in g.layers) for s in space.schemes] for g in space.groups]
    np.testing.assert_allclose(table.loss, expected, rtol=1e-8)
    assert ((table.stderr == 0) if labels == "true" else (table.stderr > 0)).all()
    assert table.provenance["forward_passes"] == 1 + 2 * draws


def test_an_input_read_twice_counts_once_with_both_gradients():
    torch.manual_seed(0)
    net = Overwriting().double()
    data = [(torch.randn(1, 4, dtype=torch.float64), torch.tensor([i % 4])) for i in range(3)]
    setup = _, space, calib, bank = prepared(net, data, "W32A3,W32A8")
    table = run(fisher_trace, setup, KLLoss(), labels="true", draws=1)
    assert {x.name for x in space.groups[0].layers} == {"a", "b", "c"}  # for the graph it is one tensor
    traces, error, size = [0.0, 0.0], [0.0, 0.0], 0
    for batch in calib.batches:
        first = batch.args[0].tanh().requires_grad_()
        second = (first.detach() + 1).requires_grad_()
        output = net.head(net.a(first) + net.b(first).square() + net.c(second).square())
        loss = F.cross_entropy(output, batch.labels)
        for i, (name, t) in enumerate((("a", first), ("c", second))):
            (g,) = torch.autograd.grad(loss, t, retain_graph=True)
            traces[i] += g.square().sum().item() / 3
            rounded = rounded_inputs(bank, space.graph[name], space.schemes[0], t.detach())
            error[i] += (rounded - t.detach()).square().sum().item()
        size += first.numel()
    # The second version of the tensor is a tensor of its own.
    expected = sum(0.5 * t * e / size for t, e in zip(traces, error, strict=True))
    assert table.loss[0, 0] == pytest.approx(expected, rel=1e-6)  # weights in fp32 add 1e-8
