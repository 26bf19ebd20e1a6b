"""Estimators that reduce gradients: each against a loop over samples, a dense Hessian or a finite sum."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpq.calibration import Calibration
from mpq.errors import DataError, GraphError, MpqError
from mpq.losses import CallableLoss, KLLoss, MSELoss
from mpq.sensitivity.fisher_trace import fisher_trace
from mpq.sensitivity.saliency import gradient_saliency, output_channel_salience
from mpq.sensitivity.squared_gradient import squared_gradient
from mpq.sensitivity.weight_importance import weight_importance
from mpq.space import layer_scheme
from mpq.testing import dense_hessian, prepared, tiny_networks
from mpq.trees import map_tensors, tensors_in
from mpq.view import channels_first, preserved_state

NETWORKS = tiny_networks()
SCHEMES = "W2A4,W4A8"
GRADIENT_ESTIMATORS = [fisher_trace, squared_gradient, gradient_saliency, output_channel_salience, weight_importance]


def labelled(data):
    generator = torch.Generator().manual_seed(1)
    return [(x, torch.randint(0, 3, (len(x),), generator=generator)) for x in data]


def one_by_one(batches):
    return [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]


def run(estimator, setup, loss, **options):
    view, space, calib, bank = setup
    with preserved_state(0):
        return estimator(view, space, calib, bank, loss, progress=False, **options)


class Overwriting(nn.Module):
    """Two layers read one tensor, a third reads it after it was overwritten; so is an output."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        x = torch.tanh(x)
        made = self.a(x) + self.b(x).square()
        x += 1
        return self.head(made + self.c(x).square_())


class Calls:
    """Every call of every layer with zeros added to its inputs and outputs, so that autograd gives all gradients."""

    def __init__(self, view, names):
        self.view, self.names = view, names
        self.inputs, self.values, self.outputs = [], [], []

    def __call__(self, batch):
        hooks = []
        for name in self.names:
            module = self.view.layers[name]
            hooks.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(self._after(name), with_kwargs=True))
        with self.view.hooked(hooks):
            return self.view(batch)

    def _before(self, name):
        def hook(module, args, kwargs):
            self.values.append((name, map_tensors(lambda t: t.detach().clone(), (args, kwargs))))

            def shift(t):
                if not t.is_floating_point():
                    return t
                self.inputs.append((name, t.detach().clone(), torch.zeros_like(t, requires_grad=True)))
                return t + self.inputs[-1][2]

            return map_tensors(shift, (args, kwargs))

        return hook

    def _after(self, name):
        def hook(module, args, kwargs, output):
            zeros = [torch.zeros_like(t, requires_grad=True) for t in tensors_in(output)]
            self.outputs.append((name, *self.values[-1][1:], zeros))
            shifted = iter([t + z for t, z in zip(tensors_in(output), zeros, strict=True)])
            return map_tensors(lambda t: next(shifted), output)

        return hook


def cross_entropy(view, batch, calls=None, weights=None):
    with view.swapped(weights or {}):
        output = (calls or view)(batch)
    return F.cross_entropy(output, batch.labels, reduction="sum")


def rounded_inputs(bank, layer, scheme, t):
    return bank.inputs(layer, layer_scheme(layer, scheme).activation, ((t,), {}))[0][0]


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


def assert_covered(tables, truth, *, most=4, least=0.90):
    """No bias, none more than 4 standard errors off, and about as many within 2 as Student's t says: 94 %."""
    found, stated = (np.array([getattr(t, k)[:, 0] for t in tables]) for k in ("loss", "stderr"))
    off = (found - truth) / stated
    assert (np.abs(off) < most).all()
    assert least < (np.abs(off) < 2).mean() < 0.97
    bias = (found.mean(0) - truth) / found.std(0, ddof=1) * len(tables) ** 0.5
    assert (np.abs(bias) < 4).all()


def by_sign(setup):
    """What each single sign of a batch's probes gives: gradients of weights ``[K, ...]`` and of outputs ``[K, B, C]``
    by layer, all linear in the signs."""
    view, space, calib, _ = setup
    batch, names = calib.batches[0], [x.name for x in space.layers]
    weights = {n: view.weight(n).detach().requires_grad_() for n in names}
    calls = Calls(view, names)
    with view.swapped(weights):
        log_p = KLLoss()._log_probabilities(KLLoss._logits(calls(batch)))
    outputs = {n: zeros[0] for n, _, zeros in calls.outputs}
    share, rows = KLLoss()._position_weights(log_p, batch), []
    for unit in torch.eye(log_p.numel(), dtype=log_p.dtype):
        scalar = KLLoss._project(log_p, share, unit.view_as(log_p))
        rows.append(torch.autograd.grad(scalar, [*weights.values(), *map(outputs.get, names)], retain_graph=True))
    stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
    return stacked[: len(names)], stacked[len(names) :]


def weight_errors(setup):
    view, space, _, bank = setup
    return [bank.weight(x, space.schemes[0].weight) - view.weight(x.name).detach() for x in space.layers]


def test_standard_errors_of_saliency_cover_the_mean_over_all_signs():
    net, data = NETWORKS["linear"]
    setup = prepared(net, data[:1], "W2")
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=9)), dtype=torch.float64)
    pairs = zip(by_sign(setup)[0], weight_errors(setup), strict=True)
    truth = [((signs @ g.flatten(1)) * e.flatten()).abs().sum(1).mean().item() * 3**0.5 / 3 for g, e in pairs]
    tables = [run(gradient_saliency, setup, KLLoss(), draws=20, seed=seed) for seed in range(200)]
    assert_covered(tables, np.array(truth))


@pytest.mark.parametrize("estimator", [output_channel_salience, squared_gradient], ids=lambda f: f.__name__)
def test_standard_errors_of_squares_cover_the_sum_over_single_signs(estimator):
    """Means of a few squares are skew: where one is low by chance, so is its standard error."""
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
    tables = [run(estimator, setup, KLLoss(), draws=20, seed=seed) for seed in range(200)]
    assert_covered(tables, np.array(truth), most=8, least=0.88)


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


@pytest.mark.parametrize("estimator", GRADIENT_ESTIMATORS)
def test_missing_or_unfit_labels_are_named(estimator):
    net, data = NETWORKS["linear"]
    with pytest.raises(DataError, match="batch 0 of the data has no class labels"):
        run(estimator, prepared(net, data, "W2"), KLLoss(), labels="true")
    with pytest.raises(MpqError, match="unknown labels 'some'"):
        run(estimator, prepared(net, data, "W2"), KLLoss(), labels="some")
    wrong = [(x, torch.full((len(x),), 3)) for x in data]
    with pytest.raises(DataError, match="not one of the model's 3 classes"):
        run(estimator, prepared(net, wrong, "W2"), KLLoss(), labels="true")
    tokens = [(x, torch.zeros(len(x), 2, dtype=torch.long)) for x in data]
    with pytest.raises(DataError, match="don't fit"):
        run(estimator, prepared(net, tokens, "W2"), KLLoss(), labels="true")


@pytest.mark.parametrize("estimator", [fisher_trace, gradient_saliency, output_channel_salience, weight_importance])
def test_a_mean_over_samples_is_refused_where_it_hides_them(estimator):
    net, data = NETWORKS["linear"]
    mean = CallableLoss(lambda output, batch: output.square().mean())
    with pytest.raises(MpqError, match="one loss per sample"):
        run(estimator, prepared(net, data, "W2"), mean)
    run(estimator, prepared(net, [x[i : i + 1] for x in data for i in range(len(x))], "W2"), mean)


def test_squared_gradient_of_a_mean_is_that_of_its_samples():
    net, data = NETWORKS["linear"]
    losses = [lambda out, batch: out.square().sum(1), lambda out, batch: out.square().sum(1).mean()]
    setup = prepared(net, data, SCHEMES)
    by_sample, mean = (run(squared_gradient, setup, CallableLoss(f)).loss for f in losses)
    np.testing.assert_allclose(by_sample, mean, rtol=1e-9)


@pytest.mark.parametrize("estimator", GRADIENT_ESTIMATORS)
def test_the_data_get_no_gradients(estimator):
    net, data = NETWORKS["linear"]
    data = [x.clone().requires_grad_() for x in data]
    run(estimator, prepared(net, data, SCHEMES), KLLoss())
    assert all(x.grad is None for x in data)


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.first(x).detach())


@pytest.mark.parametrize("estimator", GRADIENT_ESTIMATORS)
def test_layers_without_gradient_are_named(estimator):
    with pytest.raises(GraphError, match="no gradient reaches layer 'first'"):
        run(estimator, prepared(Detached(), [torch.randn(4, 4)], "W2"), KLLoss())


@pytest.mark.parametrize("estimator", GRADIENT_ESTIMATORS)
def test_infinite_gradients_are_named(estimator):
    net, data = NETWORKS["linear"]
    # The root's derivative at zero is infinite.
    loss = CallableLoss(lambda output, batch: (output - output.detach()).abs().sum(1).sqrt())
    with pytest.raises(DataError, match="is NaN or infinite"):
        run(estimator, prepared(net, data, "W2"), loss)
