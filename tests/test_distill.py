import copy

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.distill import _amplitudes, _batch_norms, _Statistics, _statistics_loss, distilled_data
from mpq.errors import DataError, GraphError, MpqError
from mpq.view import ModelView


def filled(net):
    """A copy whose batch norms have statistics, as after training."""
    net = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return net


class FrozenNorm(nn.Module):
    """As in detection libraries: no subclass of torch's batch norm, no epsilon by that name."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        shape = -1, *[1] * (x.dim() - 2)
        return (x - self.running_mean.view(shape)) / (self.running_var.view(shape) + 1e-5).sqrt()


class Mixed(nn.Module):
    """Norms of images and of vectors, a frozen one, one that is called twice and one that never runs."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, eps=0.1)
        self.frozen = FrozenNorm(3)
        self.linear, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.unused = nn.BatchNorm1d(7)

    def forward(self, image):
        x = torch.tanh(self.norm(self.conv(image)))
        x = self.frozen(self.norm(x).relu())
        return self.last(input=self.linear(x.mean((2, 3))))


def mixed():
    torch.manual_seed(0)
    return filled(Mixed().double()).eval()


def plain_loss(x, calls):
    """The documented formula, written out; ``calls`` are (input, mean, variance, eps) of every norm that ran."""
    total = 0.0
    for t, mean, variance, eps in [(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1]), 1e-6), *calls]:
        rows = t.transpose(0, 1).flatten(1)
        wanted, found = (variance + eps).sqrt(), (rows.var(1, correction=0) + eps).sqrt()
        total += (((rows.mean(1) - mean) / wanted) ** 2 + (found / wanted - 1) ** 2).mean()
    return total


def norm_inputs(net, x):
    """What every norm of a network is given."""
    calls = []

    def hook(norm, args, kwargs):
        t = args[0] if args else kwargs["input"]
        calls.append((t, norm.running_mean, norm.running_var, getattr(norm, "eps", 1e-5)))

    norms = [m for m in net.modules() if getattr(m, "running_mean", None) is not None]
    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in norms]
    net(x)
    for handle in handles:
        handle.remove()
    return calls


def test_loss_and_gradient_are_those_of_the_formula():
    net = mixed()
    x = torch.randn(5, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    calls = norm_inputs(net, x)
    assert len(calls) == 4
    expected = plain_loss(x, calls)
    view = ModelView(net)
    found = _statistics_loss(view, _batch_norms(view.module), x, torch.float64)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, x), torch.autograd.grad(expected, x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 4, 5)])
def test_statistics_match_autograd(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    variance, mean = torch.var_mean(x, [i for i in range(x.dim()) if i != 1], correction=0)
    torch.testing.assert_close(_Statistics.apply(x), (mean, variance))
    assert torch.autograd.gradcheck(_Statistics.apply, (x,))


def test_one_norm_is_matched_as_the_closed_form_says():
    """Norm and input term see the same tensor: m = M / (1 + S^2), s = S (1 + S) / (1 + S^2)."""
    net = nn.Sequential(nn.BatchNorm2d(2, eps=0.0), nn.Conv2d(2, 2, 1)).double()
    mean, deviation = torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.5])
    net[0].running_mean.copy_(mean)
    net[0].running_var.copy_(deviation**2)
    (x,) = distilled_data(net, (2, 3, 2), samples=4, iterations=150, lr=0.1, progress=False)
    torch.testing.assert_close(x.mean((0, 2, 3)), (mean / (1 + deviation**2)).double(), atol=1e-3, rtol=0)
    wanted = (deviation * (1 + deviation) / (1 + deviation**2)).double()
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), wanted, atol=1e-3, rtol=0)


def test_statistics_come_near_those_of_real_data(example):
    model, _, _ = example

    def loss(x):
        with torch.no_grad():
            return float(plain_loss(x, norm_inputs(model, x)))

    noise = distilled_data(model, (28, 28), samples=8, iterations=1, lr=1e-9, progress=False)[0]
    distilled = distilled_data(model, (28, 28), samples=8, iterations=25, progress=False)[0]
    assert loss(distilled) < loss(noise) / 4


def test_spectrum_falls_as_documented():
    size = 6, 33
    amplitudes = _amplitudes(size, torch.float64)
    assert amplitudes.shape == (6, 17)
    frequency = torch.from_numpy(np.hypot(np.fft.fftfreq(6)[:, None], np.fft.rfftfreq(33)[None]))
    slope = np.polyfit(frequency.flatten()[1:].log(), amplitudes.flatten()[1:].log(), 1)[0]
    assert slope == pytest.approx(-1.25)
    assert amplitudes[0, 0] == amplitudes.max()
    noise = torch.randn(2000, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made = torch.fft.irfftn(torch.fft.rfftn(noise, dim=(1, 2)) * amplitudes, s=size, dim=(1, 2))
    assert made.square().mean() == pytest.approx(1, abs=0.03)


def test_model_is_left_alone():
    net = mixed().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        data = distilled_data(net, (6, 6), samples=4, iterations=2, progress=False)
    assert not data[0].requires_grad
    assert all(m.training for m in net.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_seed_reproduces_and_batches_differ():
    def make(seed):
        return distilled_data(mixed(), (6, 6), samples=5, batch_size=3, iterations=2, seed=seed, progress=False)

    a, b, c = make(1), make(1), make(2)
    assert [len(x) for x in a] == [3, 2]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0])
    assert not torch.allclose(a[0][:2], a[1])


def test_allocation_from_distilled_data_beats_equal_bits(example):
    model, _, test = example
    data = distilled_data(model, (28, 28), samples=8, iterations=5, progress=False)
    analysis = mpq.analyze(model, data, "W2,W3,W4,W6", progress=False)
    cfg, equal = analysis.allocate("avg_bits<=4"), analysis.uniform("W4")
    assert cfg.avg_bits <= 4
    assert len(cfg) == 22
    evaluator = mpq.Evaluator(model, [test[0][0][:100]], progress=False)
    assert evaluator.measure(cfg).kl < evaluator.measure(equal).kl


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("net", "given", "shape"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), None, (3,)),
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)), (7,), (2, 7)),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), [5, 7], (2, 5, 7)),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), torch.Size([2, 5, 7]), (2, 5, 7)),
    ],
)
def test_shapes_and_types(net, given, shape, dtype):
    (x,) = distilled_data(filled(net).to(dtype), given, samples=3, iterations=2, progress=False)
    assert x.shape == (3, *shape)
    assert x.dtype == dtype
    assert torch.isfinite(x).all()


def test_forward_of_the_users_own():
    made = distilled_data(mixed(), (6, 6), samples=3, iterations=3, progress=False)
    named = distilled_data(
        mixed(), (6, 6), samples=3, iterations=3, progress=False, forward=lambda model, x: model(image=x)
    )
    assert torch.equal(made[0], named[0])


class NoGradient(Mixed):
    def forward(self, image):
        with torch.no_grad():
            return super().forward(image)


@pytest.mark.parametrize(
    ("net", "options", "error", "message"),
    [
        (
            nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)),
            {},
            MpqError,
            "no batch norm .* only LayerNorm .*weights only",
        ),
        (nn.Sequential(nn.Linear(3, 4)), {}, MpqError, "only layers without normalisation"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, track_running_stats=True)),
            {"input_shape": (4, 4)},
            MpqError,
            "only InstanceNorm2d",
        ),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), {}, MpqError, "still have mean 0 and variance 1"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)),
            {},
            MpqError,
            "only BatchNorm1d",
        ),
        (Mixed(), {}, DataError, "not None; 'conv' takes 2 channels"),
        (Mixed(), {"input_shape": (2, 0, 4)}, DataError, "input_shape must be"),
        (Mixed(), {"input_shape": (3, 6, 6)}, DataError, r"can't run a batch of inputs \[\(4, 3, 6, 6\)"),
        (NoGradient(), {"input_shape": (6, 6)}, GraphError, "no gradient"),
        (Mixed(), {"input_shape": (6, 6), "samples": 0}, MpqError, "at least 1"),
        (Mixed(), {"input_shape": (6, 6), "lr": 0.0}, MpqError, "lr above 0"),
        (Mixed(), {"input_shape": (6, 6), "lr": 1e30, "iterations": 3}, MpqError, "use an lr below 1e"),
    ],
)
def test_errors(net, options, error, message):
    net = filled(net) if isinstance(net, Mixed) else net
    with pytest.raises(error, match=message):
        distilled_data(net, **{"samples": 4, "progress": False, **options})
