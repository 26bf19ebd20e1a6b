"""Gradient norms by sample: every kind of layer against autograd of one sample at a time."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import mpq
from mpq.losses import KLLoss, MSELoss
from mpq.sensitivity import sample_norms
from mpq.sensitivity.aggregate import distinct_layers
from mpq.sensitivity.gradient_norms import GradientNorms
from mpq.sensitivity.hessian_trace import hessian_trace
from mpq.sensitivity.rows import layouts_of
from mpq.testing import prepared, tiny_networks

# Every kind of layer, and everything about it that changes where its gradient comes from. Inputs have three samples.
GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


class Calls(nn.Module):
    """Modules and how they are called: the output is one tensor of each sample's sums."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return torch.tanh(self.run(self, x)).flatten(1)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 2), nn.Linear(2, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids))).flatten(1)


class Standardized(nn.Linear):
    """A subclass with its own forward, whose weight gradient is not that of a linear layer."""

    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm())


def cross_attention(m, x):
    return m.attention(x[:, :2], x, x[:, 1:2].expand(-1, 4, -1), need_weights=False)[0]


IDS = torch.tensor([[0, 1, 0, 3], [2, 2, 2, 2], [4, 0, 1, 4]])
ZOO = {
    "few positions": (lambda: nn.Linear(6, 5), randn(3, 2, 6)),
    "many positions": (lambda: nn.Linear(2, 3), randn(3, 20, 2)),
    "sequence first": (lambda: Calls(lambda m, x: m.a(x.transpose(0, 1)).mean(0), a=nn.Linear(4, 3)), randn(3, 5, 4)),
    "positions as rows": (
        lambda: Calls(lambda m, x: m.a(x.flatten(0, 1)).view(len(x), -1), a=nn.Linear(4, 3)),
        randn(3, 5, 4),
    ),
    "called twice": (lambda: Calls(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Linear(4, 4)), randn(3, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1, dilation=2), randn(3, 2, 9)),
    "grouped conv2d": (lambda: nn.Conv2d(4, 6, (2, 3), groups=2, padding=(1, 0)), randn(3, 4, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3), randn(3, 3, 5, 5)),
    "same padding": (lambda: nn.Conv2d(2, 3, 2, padding="same"), randn(3, 2, 4, 4)),
    "circular padding": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), randn(3, 2, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2, stride=2), randn(3, 2, 4, 4, 4)),
    "several images": (
        lambda: Calls(lambda m, x: m.a(x.flatten(0, 1)).view(len(x), -1), a=nn.Conv1d(2, 3, 2)),
        randn(3, 4, 2, 5),
    ),
    "conv called twice": (lambda: Calls(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Conv1d(2, 2, 2)), randn(3, 2, 5)),
    "transposed": (
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        randn(3, 4, 5),
    ),
    "transposed 2d": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2, dilation=2), randn(3, 2, 3, 3)),
    "embedding": (lambda: nn.Embedding(5, 3), IDS),
    "padding index": (lambda: nn.Embedding(5, 3, padding_idx=2), IDS),
    "tied": (Tied, IDS),
    "self-attention": (
        lambda: Calls(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2, batch_first=True)),
        randn(3, 4, 4),
    ),
    "cross-attention": (
        lambda: Calls(cross_attention, attention=nn.MultiheadAttention(4, 2, batch_first=True)),
        randn(3, 4, 4),
    ),
    "overwritten": (
        lambda: Calls(lambda m, x: m.a(m.b(x).add_(1)).mul_(2), a=nn.Linear(3, 3), b=nn.Linear(4, 3)),
        randn(3, 4),
    ),
}


@pytest.mark.parametrize("case", list(ZOO))
@pytest.mark.parametrize("largest", [1 << 24, 1], ids=["at once", "one by one"])
def test_norms_by_sample_are_those_of_one_sample_at_a_time(case, largest, monkeypatch):
    monkeypatch.setattr(sample_norms, "_LARGEST", largest)
    torch.manual_seed(0)
    make, x = ZOO[case]
    view, space, calib, _ = prepared(make().double(), [x], "W2A4,W4A8")
    batch = calib.batches[0]
    norms = GradientNorms(
        view, space, batch, layouts_of(view, [x.name for x in space.layers], calib)[0], weights=True, activations=False
    )
    assert not norms.mixed
    u = torch.randn(norms.output.shape, dtype=torch.float64)
    found = torch.stack(norms.of((u * norms.output).sum()))
    names = [layer.name for layer in distinct_layers(space)]
    for n in range(len(x)):
        weights = [view.weight(name).detach().requires_grad_() for name in names]
        with view.swapped(dict(zip(names, weights, strict=True))):
            gradients = torch.autograd.grad((u[n] * view.module(x[n : n + 1])).sum(), weights)
        torch.testing.assert_close(found[:, n], torch.stack([g.square().sum() for g in gradients]), rtol=1e-10, atol=0)


class Routed(nn.Module):
    """Rows of several samples in one call, as in a mixture of experts."""

    def __init__(self):
        super().__init__()
        self.embed, self.expert, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.embed(x))
        chosen = x[:, 0] > 0
        out = h.clone()
        out[chosen] = self.expert(h[chosen])
        return self.head(out)


def hooked():
    layer = nn.Linear(4, 3)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


MIXED = {
    "own forward": (lambda: Standardized(4, 3), randn(4, 4)),
    "hooked": (hooked, randn(4, 4)),
    "wide output padding": (lambda: nn.ConvTranspose1d(2, 2, 2, dilation=3, output_padding=1), randn(4, 2, 3)),
    "routed": (Routed, torch.tensor([[1.0], [-1], [1], [1]], dtype=torch.float64) * randn(4, 4).abs()),
}


@pytest.mark.parametrize("case", list(MIXED))
def test_where_samples_mix_the_batch_gradient_has_the_right_expectation(case):
    """Over all signs of the samples, the squared batch gradient averages to the sum of squared sample gradients."""
    torch.manual_seed(0)
    make, x = MIXED[case]
    view, space, calib, bank = prepared(make().double(), [x], "W2,W4")
    norms = GradientNorms(
        view,
        space,
        calib.batches[0],
        layouts_of(view, [x.name for x in space.layers], calib)[0],
        weights=True,
        activations=False,
    )
    assert norms.mixed == {"expert" if case == "routed" else ""}
    u = torch.randn(norms.output.shape, dtype=torch.float64)
    signs = [torch.tensor(s, dtype=torch.float64) for s in itertools.product([-1, 1], repeat=4)]
    found = [torch.stack([t.sum() for t in norms.of((u * norms.output).flatten(1).sum(1) @ e)]) for e in signs]
    weights = [view.weight(layer.name).detach().requires_grad_() for layer in space.layers]
    with view.swapped({layer.name: w for layer, w in zip(space.layers, weights, strict=True)}):
        each = (u * view.module(x)).flatten(1).sum(1)
    gradients = [torch.autograd.grad(sample, weights, retain_graph=True) for sample in each]
    expected = [sum(g[i].square().sum() for g in gradients) for i in range(len(weights))]
    torch.testing.assert_close(torch.stack(found).mean(0), torch.stack(expected), rtol=1e-10, atol=0)
    with pytest.raises(mpq.MpqError, match="mixes the samples of a batch, which exact=True"):
        hessian_trace(view, space, calib, bank, MSELoss(), exact=True, progress=False)


class Positions(nn.Module):
    """A layer whose input has no batch axis."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.positions = nn.Parameter(randn(5, 3))

    def forward(self, x):
        return self.head(torch.tanh(x + self.mix(torch.tanh(self.positions)))).mean(1)


def test_inputs_of_the_whole_batch_have_the_right_expectation():
    x = randn(4, 5, 4)
    view, space, calib, bank = prepared(Positions().double(), [x], "W4A4,W4A8")
    batch, layouts = calib.batches[0], layouts_of(view, [x.name for x in space.layers], calib)[0]
    norms = GradientNorms(view, space, batch, layouts, weights=False, activations=True)
    assert norms.mixed == {"mix"}
    u = randn(4, 2)
    signs = [torch.tensor(s, dtype=torch.float64) for s in itertools.product([-1, 1], repeat=4)]
    found = [torch.stack([t.sum() for t in norms.of((u * norms.output).sum(1) @ e)]) for e in signs]
    read = []

    def leaf(module, args):
        read.append(args[0].detach().requires_grad_() if not read else args[0])
        return tuple(read[-1:])

    with view.hooked([view.layers[name].register_forward_pre_hook(leaf) for name in ("mix", "head")]):
        each = (u * view(batch)).sum(1)
    gradients = [torch.autograd.grad(sample, read, retain_graph=True) for sample in each]
    expected = [sum(g[i].square().sum() for g in gradients) for i in range(2)]
    torch.testing.assert_close(torch.stack(found).mean(0), torch.stack(expected), rtol=1e-10, atol=0)
    with pytest.raises(mpq.MpqError, match="layer 'mix' mixes the samples of a batch, which exact=True"):
        hessian_trace(view, space, calib, bank, MSELoss(), exact=True, progress=False)


class TwoReaders(nn.Module):
    """Two layers read one tensor, and a third runs twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.again, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(x)
        hidden = torch.tanh(self.a(x)) * self.b(x) + x.sum(1, keepdim=True)
        return self.head(torch.tanh(self.again(torch.tanh(self.again(hidden)))))


def dense_input_traces(view, space, calib, loss):
    """Of each layer's inputs over all calls; a tensor that several layers read is one variable, of the first one."""
    totals = dict.fromkeys((x.name for x in space.layers), 0.0)
    for batch in calib.batches:
        with torch.no_grad():
            reference = view(batch)
        read = {}  # id -> (first reader, tensor, offset in the vector of all inputs)

        def note(name, read=read):
            def hook(module, args):
                for t in args:
                    if t.is_floating_point() and id(t) not in read:
                        read[id(t)] = name, t, sum(v[1].numel() for v in read.values())

            return hook

        with view.hooked([view.layers[x.name].register_forward_pre_hook(note(x.name)) for x in space.layers]):
            view(batch)
        order = list(read.values())

        def shifted(flat, batch=batch, order=order, reference=reference):
            given, count = {}, itertools.count()

            def move(module, args):
                def moved(t):
                    if id(t) not in given:
                        _, like, start = order[next(count)]
                        given[id(t)] = t, t + flat[start : start + like.numel()].view_as(like)
                    return given[id(t)][1]

                return tuple(moved(t) if t.is_floating_point() else t for t in args)

            hooks = [view.layers[x.name].register_forward_pre_hook(move) for x in space.layers]
            with view.hooked(hooks), sdpa_kernel(SDPBackend.MATH):
                return loss.value(view(batch), reference, batch).sum()

        size = sum(t.numel() for _, t, _ in order)
        diagonal = torch.func.hessian(shifted)(torch.zeros(size, dtype=torch.float64)).diagonal()
        for name, t, start in order:
            totals[name] += diagonal[start : start + t.numel()].sum().item()
    return np.array(list(totals.values())) / calib.num_samples


@pytest.mark.parametrize("name", ["conv", "linear", "attention", "two readers"])
def test_activation_traces_are_the_dense_ones(name):
    torch.manual_seed(0)
    data = [randn(3, 3), randn(5, 3)]
    net, data = (TwoReaders().double(), data) if name == "two readers" else tiny_networks()[name]
    args = prepared(net, data, "W4A4,W4A8")
    view, space, calib, bank = args
    table = hessian_trace(*args, KLLoss(), exact=True, progress=False)
    expected = dense_input_traces(view, space, calib, KLLoss())
    found = [t["value"] for t in table.provenance["activation_traces"].values()]
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    if name == "two readers":
        assert expected[1] == 0
        assert space.groups[0].reason == "shared input"
    # The score is half the trace times the mean squared rounding error of an input element.
    noise = {}

    def hook(layer, column):
        def add(module, inputs):
            fmt = mpq.Scheme.parse("W4A4" if column == 0 else "W4A8").activation
            for t in {id(t): t for t in inputs if t.is_floating_point()}.values():
                error, count = noise.get((layer.name, column), (0, 0))
                rounded = bank.inputs(layer, fmt, ((t,), {}))[0][0]
                noise[layer.name, column] = error + (rounded - t).square().sum().item(), count + t.numel()

        return add

    for column in range(2):
        with (
            view.hooked([view.layers[x.name].register_forward_pre_hook(hook(x, column)) for x in space.layers]),
            torch.no_grad(),
        ):
            for batch in calib.batches:
                view(batch)
    weights_only = hessian_trace(*args, KLLoss(), exact=True, activations=False, progress=False)
    rounding = {k: 0.5 * error / count for k, (error, count) in noise.items()}
    by_layer = {
        (x.name, c): t * rounding.get((x.name, c), 0)
        for x, t in zip(space.layers, expected, strict=True)
        for c in (0, 1)
    }
    added = [[sum(by_layer[x.name, c] for x in g.layers) for c in (0, 1)] for g in space.groups]
    np.testing.assert_allclose(table.loss - weights_only.loss, added, rtol=1e-6, atol=1e-15)


def test_activations_are_scored_where_the_schemes_differ_in_them():
    net, data = tiny_networks()["linear"]
    for schemes, scored in (("W2A8,W4A8", False), ("W4A4,W4A8", True), ("W2,W4", False)):
        table = hessian_trace(*prepared(net, data, schemes), KLLoss(), progress=False)
        assert bool(table.provenance["activation_traces"]) == scored
    args = prepared(net, data, "W2A8,W4A8")
    table = hessian_trace(*args, KLLoss(), method="blocks", activations=True, progress=False)
    assert len(table.provenance["activation_traces"]) == 2
