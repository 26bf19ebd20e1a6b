"""What tests of estimators that reduce gradients share."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mpq.losses import KLLoss
from mpq.space import layer_scheme
from mpq.trees import map_tensors, tensors_in


def labelled(data):
    generator = torch.Generator().manual_seed(1)
    return [(x, torch.randint(0, 3, (len(x),), generator=generator)) for x in data]


def one_by_one(batches):
    return [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]


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


def assert_covered(tables, truth):
    """No bias, none more than 4 standard errors off, and about as many within 2 as Student's t says: 94 %."""
    found, stated = (np.array([getattr(t, k)[:, 0] for t in tables]) for k in ("loss", "stderr"))
    off = (found - truth) / stated
    assert (np.abs(off) < 4).all()
    assert 0.90 < (np.abs(off) < 2).mean() < 0.97
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
