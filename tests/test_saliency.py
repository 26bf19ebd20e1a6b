"""Scores of weights, inputs and noise: each against counting, a sum over single weights or a closed form."""

import math
import statistics

import numpy as np
import pytest
import torch
from estimators import NETWORKS, SCHEMES, run
from torch import nn

from mpq.errors import FormatError
from mpq.losses import CallableLoss, KLLoss, MSELoss
from mpq.sensitivity.kernel_share import kernel_share
from mpq.sensitivity.noise import noise
from mpq.sensitivity.saliency import activation_saliency, lim, outlier_share
from mpq.sensitivity.weight_only import weight_sqnr, zd
from mpq.testing import dense_hessian, prepared
from mpq.trees import tensors_in
from mpq.view import channels_first


def summed(space, score):
    """A score of (layer, number of the scheme) summed over each group's layers ``[G, S]``."""
    return [[sum(score(x, s) for x in g.layers) for s in range(len(space.schemes))] for g in space.groups]


def calls_of(view, space, calib):
    """Inputs of every call: layer name -> list of lists of tensors."""
    found = {x.name: [] for x in space.layers}
    hooks = [view.layers[n].register_forward_hook(lambda m, args, out, n=n: found[n].append((args, {}))) for n in found]
    with view.hooked(hooks), torch.no_grad():
        for batch in calib.batches:
            view(batch)
    return found


def noise_ratio(exact, rounded):
    return ((rounded - exact).square().sum() / exact.square().sum()).item()


@pytest.mark.parametrize("name", NETWORKS)
def test_activation_saliency_adds_up_what_single_weights_do(name):
    """Each weight changed alone by its error: squared change of all outputs, summed over weights."""
    net, data = NETWORKS[name]
    setup = view, space, calib, bank = prepared(net, data, SCHEMES)
    table = run(activation_saliency, setup)
    calls = calls_of(view, space, calib)

    def score(layer, s):
        weight, total = view.weight(layer.name), 0.0
        error = bank.weight(layer, space.schemes[s].weight) - weight
        for inputs in calls[layer.name]:
            exact = tensors_in(bank.run(layer, None, inputs))
            for i in range(weight.numel()):
                moved = weight.detach().clone()
                moved.view(-1)[i] += error.reshape(-1)[i]
                with view.swapped({layer.name: moved}):
                    made = tensors_in(bank.run(layer, None, inputs))
                total += sum((m - e).square().sum().item() for m, e in zip(made, exact, strict=True))
        return total / calib.num_samples

    np.testing.assert_allclose(table.loss, summed(space, score), rtol=1e-8)


@pytest.mark.parametrize("name", NETWORKS)
def test_kernel_share_counts_what_becomes_zero(name):
    net, data = NETWORKS[name]
    with torch.no_grad():
        data = [x.clamp(min=0) for x in data]  # zeros in the data don't count
    setup = view, space, calib, bank = prepared(net, data, SCHEMES)
    calls = calls_of(view, space, calib)

    def lost(exact, rounded):
        return sum(a != 0 and b == 0 for a, b in zip(exact.flatten().tolist(), rounded.flatten().tolist(), strict=True))

    def score(layer, s):
        scheme = space.schemes[s]
        share = lost(view.weight(layer.name), bank.weight(layer, scheme.weight)) / layer.parameters
        if layer.source is None:
            return share
        pairs = [
            (t, r)
            for inputs in calls[layer.name]
            for t, r in zip(tensors_in(inputs), tensors_in(bank.inputs(layer, scheme.activation, inputs)), strict=True)
        ]
        return share + sum(lost(*p) for p in pairs) / sum(t.numel() for t, _ in pairs)

    table = run(kernel_share, setup)
    np.testing.assert_allclose(table.loss, summed(space, score), rtol=1e-12)
    assert table.loss.max() > 0.2


def test_kernel_share_refuses_formats_without_a_zero():
    net, data = NETWORKS["linear"]
    with pytest.raises(FormatError, match="int1 has no code for zero"):
        run(kernel_share, prepared(net, data, "W1,W2"))
    table = run(kernel_share, prepared(net, data, "W32,W16"))
    assert (table.loss == 0).all()
    assert table.provenance["forward_passes"] == 0
    assert run(kernel_share, prepared(net, data, "W2:hadamard")).loss.max() > 0  # a recipe has the zero of its format


@pytest.mark.parametrize("name", NETWORKS)
def test_weight_scores_count_single_weights(name):
    """Every kind of layer, one weight after the other."""
    setup = view, space, _, bank = prepared(*NETWORKS[name], "W2,W4")

    def parts(layer, s):
        weight = view.weight(layer.name).flatten().tolist()
        rounded = bank.weight(layer, space.schemes[s].weight).flatten().tolist()
        ratio = sum((r - w) ** 2 for w, r in zip(weight, rounded, strict=True)) / sum(w**2 for w in weight)
        mean, deviation = statistics.mean(weight), statistics.pstdev(weight)
        return ratio, sum(abs(w - mean) <= deviation for w in weight) / len(weight)

    ratios = summed(space, lambda x, s: parts(x, s)[0])
    np.testing.assert_allclose(run(weight_sqnr, setup).loss, ratios, rtol=1e-9)
    np.testing.assert_allclose(run(zd, setup).loss, summed(space, lambda x, s: math.prod(parts(x, s))), rtol=1e-9)


def test_weight_scores_by_hand():
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(-16.0, 16).view(4, 8))
        net[1].weight.zero_()
    setup = view, space, _, bank = prepared(net, [torch.randn(5, 8, dtype=torch.float64)], "W2,W4")
    ratios = [noise_ratio(view.weight("0"), bank.weight(space.layers[0], s.weight)) for s in space.schemes]
    np.testing.assert_allclose(run(weight_sqnr, setup).loss, [ratios, [0, 0]], rtol=1e-10)
    # -16 .. 15 has the mean -0.5 and the deviation sqrt((32**2 - 1) / 12) = 9.23; beyond it lie -16 .. -10, 9 .. 15.
    np.testing.assert_allclose(run(zd, setup).loss, [np.array(ratios) * (1 - 14 / 32), [0, 0]], rtol=1e-10)


def test_outlier_share_by_hand():
    net = nn.Sequential(nn.Linear(10, 6, bias=False), nn.Linear(6, 3, bias=False)).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 10, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        net[0].weight.view(-1)[:2] = torch.tensor([9.0, -9.0], dtype=torch.float64)
    setup = view, space, _, bank = prepared(net, [x[:10], x[10:]], SCHEMES)

    def far(t):
        t = t.detach().numpy()
        return (np.abs(t - t.mean()) > 2 * t.std()).sum()

    inputs = [[x[:10], x[10:]], [net[0](x[:10]).detach(), net[0](x[10:]).detach()]]
    weight_share = np.array([far(view.weight(n.name)) / n.parameters for n in space.layers])
    input_share = np.array([sum(map(far, parts)) / sum(p.numel() for p in parts) for parts in inputs])
    assert weight_share[0] == 2 / 60

    def score(layer, s, factors):
        i, scheme = int(layer.name), space.schemes[s]
        exact = torch.cat(inputs[i])
        of_weight = noise_ratio(view.weight(layer.name), bank.weight(layer, scheme.weight))
        of_input = noise_ratio(exact, bank.inputs(layer, scheme.activation, ((exact,), {}))[0][0])
        return factors[0][i] * of_weight + factors[1][i] * of_input

    factors = [1 + weight_share / weight_share.mean(), 1 + input_share / input_share.mean()]
    found = run(outlier_share, setup, sigmas=2).loss
    np.testing.assert_allclose(found, summed(space, lambda x, s: score(x, s, factors)), rtol=1e-10)
    nowhere = run(outlier_share, setup, sigmas=50).loss
    np.testing.assert_allclose(nowhere, summed(space, lambda x, s: score(x, s, np.ones((2, 2)))), rtol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_outlier_share_counts_on_every_kind_of_layer(name):
    setup = view, space, calib, bank = prepared(*NETWORKS[name], SCHEMES)
    calls = {
        n: [t for call in found for t in tensors_in(call) if t.is_floating_point()]
        for n, found in calls_of(view, space, calib).items()
    }

    def far(t):
        return float(((t - t.mean()).abs() > 1.5 * t.std(correction=0)).sum())

    shares = {
        n: (far(view.weight(n)) / view.weight(n).numel(), sum(map(far, ts)) / max(sum(t.numel() for t in ts), 1))
        for n, ts in calls.items()
    }
    means = np.mean(list(shares.values()), 0)
    assert (means > 0).all()

    def score(layer, s):
        of_weight, of_input = 1 + np.array(shares[layer.name]) / means
        total = of_weight * noise_ratio(view.weight(layer.name), bank.weight(layer, space.schemes[s].weight))
        if not calls[layer.name]:  # whole numbers are not rounded
            return total
        exact = torch.cat([t.flatten() for t in calls[layer.name]])
        fmt = space.schemes[s].activation
        rounded = torch.cat([bank.inputs(layer, fmt, ((t,), {}))[0][0].flatten() for t in calls[layer.name]])
        return total + of_input * noise_ratio(exact, rounded)

    np.testing.assert_allclose(run(outlier_share, setup, sigmas=1.5).loss, summed(space, score), rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("conv", []),
        ("depthwise", []),
        ("linear", []),
        ("attention", ["attention.in_proj", "attention.out_proj"]),
        ("shared", ["first", "again"]),
    ],
)
def test_lim_scores_layers_that_keep_the_shape(name, modules):
    """Of every kind of layer: its own score, of the queries where several are projected at once, or none."""
    setup = view, space, calib, bank = prepared(*NETWORKS[name], "W2,W4")
    cosines = {}

    def hook(n):
        def compare(module, args, kwargs, output):
            before, after = tensors_in((args, kwargs))[0], tensors_in(output)[0]
            for a, b in zip(before, after, strict=True):
                cosines.setdefault(n, []).append(float((a * b).sum() / (a.norm() * b.norm())))

        return compare

    hooks = [view.module.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True) for n in modules]
    with view.hooked(hooks), torch.no_grad():
        for batch in calib.batches:
            view(batch)

    def score(layer, s):
        turn = 0.5 - 0.5 * np.mean(cosines.get(layer.name, 0.0))
        return turn * noise_ratio(view.weight(layer.name), bank.weight(layer, space.schemes[s].weight))

    np.testing.assert_allclose(run(lim, setup).loss, summed(space, score), rtol=1e-9)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


def test_lim_compares_what_keeps_its_shape():
    """Layers that change the width take the score of the block around them; the head has none."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for name, module in (("block", Residual()), ("square", nn.Linear(4, 4)), ("head", nn.Linear(4, 3))):
        net.add_module(name, module)
    net.double()
    x = torch.randn(7, 4, dtype=torch.float64)
    setup = view, space, _, bank = prepared(net, [x[:3], x[3:]], "W2,W4")
    with torch.no_grad():
        after = net.block(x)
        cosines = [
            np.mean([a @ b / (a.norm() * b.norm()) for a, b in zip(*p, strict=True)])
            for p in ((x, after), (after, net.square(after)))
        ]
    turns = {"block.up": (1 - cosines[0]) / 2, "square": (1 - cosines[1]) / 2, "head": 0.5}
    turns["block.down"] = turns["block.up"]

    def score(layer, s):
        exact = view.weight(layer.name)
        return turns[layer.name] * noise_ratio(exact, bank.weight(layer, space.schemes[s].weight))

    np.testing.assert_allclose(run(lim, setup).loss, summed(space, score), rtol=1e-10)


def channel_power(view, bank, layer, fmt):
    """Mean squared error of each output channel, as large as the weight."""
    module = view.layers[layer.name]
    error = channels_first(module, bank.weight(layer, fmt) - view.weight(layer.name))
    power = error.flatten(1).square().mean(1)
    return channels_first(module, power.view(-1, *[1] * (error.dim() - 1)).expand_as(error))


@pytest.mark.parametrize("name", NETWORKS)
def test_noise_in_the_head_has_a_closed_form(name):
    """Outputs are linear in the head's weight: the mean squared error is a sum of variances, however large."""
    net, data = NETWORKS[name]
    setup = view, space, calib, bank = prepared(net, data, "W2,W4")
    head = space.layers[-1]
    table = run(noise, setup, MSELoss(), draws=60)
    power = torch.cat([args[0].square() for args, _ in calls_of(view, space, calib)[head.name]]).mean(0)
    for s, scheme in enumerate(space.schemes):
        expected = (channel_power(view, bank, head, scheme.weight) @ power).mean().item()
        assert abs(table.loss[-1, s] - expected) < 4 * table.stderr[-1, s]
        assert table.stderr[-1, s] < 0.25 * expected


@pytest.mark.parametrize("name", NETWORKS)
def test_small_noise_raises_the_loss_by_half_the_hessians_diagonal(name):
    net, data = NETWORKS[name]
    setup = view, space, calib, bank = prepared(net, data, "W8")
    names = [x.name for x in space.layers]
    diagonal = dense_hessian(view, calib, KLLoss(), names).diagonal()
    table = run(noise, setup, draws=60)
    for g, part in enumerate(torch.split(diagonal, [x.parameters for x in space.layers])):
        variance = channel_power(view, bank, space.layers[g], space.schemes[0].weight).flatten()
        expected = 0.5 * (part * variance).sum().item()
        assert abs(table.loss[g, 0] - expected) < 4 * table.stderr[g, 0]
        assert table.stderr[g, 0] < 0.25 * expected


def test_noise_standard_errors_cover_the_closed_form():
    net = nn.Linear(3, 2).double()
    setup = view, space, calib, bank = prepared(net, [torch.randn(4, 3, dtype=torch.float64)], "W2")
    power = calib.batches[0].args[0].square().mean(0)
    truth = (channel_power(view, bank, space.layers[0], space.schemes[0].weight) @ power).mean().item()
    tables = [run(noise, setup, MSELoss(), draws=20, seed=seed) for seed in range(200)]
    off = np.array([(t.loss[0, 0] - truth) / t.stderr[0, 0] for t in tables])
    assert np.abs(off).max() < 4
    assert 0.88 < (np.abs(off) < 2).mean() < 0.98


def test_noise_in_inputs_has_the_power_of_their_rounding():
    net = nn.Linear(3, 2).double()
    setup = view, space, calib, bank = prepared(net, [torch.randn(20, 3, dtype=torch.float64)], "W16A3")
    x, layer = calib.batches[0].args[0], space.layers[0]
    rounded = bank.inputs(layer, space.schemes[0].activation, ((x,), {}))[0][0]
    expected = (rounded - x).square().mean().item() * view.weight(layer.name).square().sum(1).mean().item()
    table = run(noise, setup, MSELoss(), draws=80)
    assert abs(table.loss[0, 0] - expected) < 4 * table.stderr[0, 0]
    assert table.stderr[0, 0] < 0.1 * expected


class Twins(nn.Module):
    """The difference of two equal layers that read one tensor."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.b = nn.Linear(3, 2)
        self.b.load_state_dict(self.a.state_dict())

    def forward(self, x):
        return self.a(x) - self.b(x)


def test_layers_that_read_one_tensor_see_the_same_noise():
    setup = prepared(Twins().double(), [torch.randn(4, 3, dtype=torch.float64)] * 2, "W32A2,W32A3")
    assert len(setup[1].groups) == 1
    assert (run(noise, setup, MSELoss()).loss < 1e-12).all()


def test_noise_is_relative_to_the_float_model_and_never_negative():
    """A loss of the user's own need not be zero, nor smallest, at the float model."""
    net, data = NETWORKS["linear"]
    loss = CallableLoss(lambda output, batch: 100 - output.square().sum(1))
    table = run(noise, prepared(net, data, "W2,W8"), loss, draws=8)
    assert (table.loss[:, 1] < 1).all()
    assert (table.loss >= 0).all()
