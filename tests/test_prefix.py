"""Reuse of a recorded pass against computing everything, bit for bit, on models that do all they may."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from estimators import NETWORKS, SCHEMES, full_pass
from torch import nn
from torch.overrides import TorchFunctionMode

from mpq.errors import DataError
from mpq.losses import KLLoss
from mpq.sensitivity.interaction import measured_pairs
from mpq.sensitivity.perturbation import names_of, perturbation, quantized
from mpq.sensitivity.prefix import Recording
from mpq.testing import prepared
from mpq.trees import tensors_in
from mpq.view import preserved_state


def same(a, b):
    a, b = tensors_in(a), tensors_in(b)
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Calls(TorchFunctionMode):
    """Counts products."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class Overwriting(nn.Module):
    """Writes into outputs of layers, into inputs, and into a view of one."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        x += 0.5
        y = F.relu(self.first(x), inplace=True)
        z = self.norm(self.second(y))
        z[:, :2] *= 3
        w = self.third(z)
        y += w
        return self.last(F.relu_(w) + y + z)


class Tied(nn.Module):
    """Two layers of one weight around others, one of which runs before and after them."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.first, self.again = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again.weight = self.first.weight

    def forward(self, x):
        x = torch.tanh(self.outer(torch.tanh(self.first(x))))
        x = torch.tanh(self.again(torch.tanh(self.inner(x))))
        return self.last(torch.tanh(self.outer(x)))


class Remembering(nn.Module):
    """A block that also leaves something for later, and one that another block reads."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.kept = nn.Linear(4, 4), []

        def forward(self, x):
            self.kept[:] = [x]
            return torch.tanh(self.layer(x))

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(self.Block(), self.Block())
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        x = self.blocks(x)
        return self.last(x + self.blocks[0].kept.pop() + self.blocks[1].kept.pop())


class Branching(nn.Module):
    """The way depends on values, and the output holds an early one."""

    def __init__(self):
        super().__init__()
        self.first, self.one, self.other, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.first(x)
        early = x
        for _ in range(2):
            x = self.one(x) if x.mean() > 0 else torch.tanh(self.other(x))
        x = x + F.dropout(x, 0.5, training=True)
        return {"logits": self.last(self.drop(x)), "early": early}


class Same(nn.Module):
    """Attention that computes otherwise where its inputs are one tensor; in evaluation, dropout gives that tensor."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.drop, self.attend = nn.Dropout(0.1), nn.MultiheadAttention(4, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
        self.recur = nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.embed(x)
        x = self.attend(x, self.drop(x), self.drop(x))[0]
        x = self.encoder(x)
        out, (hidden, _) = self.recur(x)
        hidden *= 2
        return self.head(out + hidden[0][:, None])


class Shaping(nn.Module):
    """Modules whose output is their input, seen in another way."""

    def __init__(self):
        super().__init__()
        self.conv, self.flat, self.part = nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Unflatten(1, (2, 3))
        self.stage = nn.Sequential(nn.Conv1d(2, 2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Flatten())
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv(x[:, None])
        flat = self.flat(x)
        flat += 1  # x as well
        return self.last(self.stage(self.part(flat) + x))


class Inferring(nn.Module):
    """Makes tensors whose changes are not counted, and changes one."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = (nn.Linear(4, 4) for _ in range(3))

    @torch.inference_mode()
    def forward(self, x):
        x = self.first(x)
        y = self.again(x)
        x *= 2
        return self.last(x + y)


class Meddling(nn.Module):
    """A layer that changes its input, and a hook that keeps an output for later."""

    class Doubling(nn.Linear):
        def forward(self, x):
            return super().forward(x.mul_(2))

    def __init__(self):
        super().__init__()
        self.first, self.last = self.Doubling(4, 4), nn.Linear(4, 3)
        self.stage = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.stage[0].register_forward_hook(self.keep)
        self.kept = []

    def keep(self, module, args, output):
        self.kept.append(output)

    def forward(self, x):
        y = self.stage(self.first(x))
        return self.last(x + y * self.kept.pop())


class Alternating(nn.Module):
    """Takes another way each time."""

    def __init__(self):
        super().__init__()
        self.first, self.one, self.other, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.turn = 0

    def forward(self, x):
        self.turn = 1 - self.turn
        x = self.first(x)
        return self.last(self.one(x) if self.turn else self.other(x))


AWKWARD = [Meddling, Inferring, Overwriting, Tied, Remembering, Branching, Same, Shaping]


def awkward(kind, dtype=torch.float32):
    torch.manual_seed(0)
    shape = (2, 3, 4) if kind is Same else (6, 4)
    return prepared(kind().to(dtype).eval(), [torch.randn(shape, dtype=dtype)], SCHEMES)


def setups():
    for name in NETWORKS:
        yield pytest.param(lambda name=name: prepared(*NETWORKS[name], SCHEMES), id=name)
    for kind in AWKWARD:
        yield pytest.param(lambda kind=kind: awkward(kind), id=kind.__name__)


@pytest.mark.parametrize("make", list(setups()))
def test_reuse_gives_the_bits_of_a_full_pass(make):
    """Every choice; from the float pass, from a recording of another choice, and when that is measured again."""
    view, space, calib, bank = make()
    batch = calib.batches[-1]
    before = full_pass(view, batch)
    float_pass = Recording(view, batch)
    assert same(float_pass.output, before)
    choices = [(group, scheme) for group in space.groups for scheme in space.schemes]
    expected = []
    for choice in choices:
        with quantized(view, bank, [choice]):
            expected.append(full_pass(view, batch))
            assert same(float_pass.run(names_of(choice[0])), expected[-1])
    for first, once in zip(choices, expected, strict=True):
        with quantized(view, bank, [first]):
            one = Recording(view, batch, float_pass, names_of(first[0]))
        assert same(one.output, once)
        for second in choices[1::3]:
            if second[0] is not first[0]:
                with quantized(view, bank, [first, second]):
                    both = full_pass(view, batch)
                    assert same(one.run(names_of(second[0])), both)
                    chained = Recording(view, batch, one, names_of(second[0]))
                    assert same(chained.output, both)
                with quantized(view, bank, [second]):
                    assert same(chained.run(names_of(first[0])), expected[choices.index(second)])
    assert same(full_pass(view, batch), before)
    assert all("forward" not in vars(m) for m in view.module.modules())


def products(recording, name):
    """Products of a run that changes one layer."""
    with Calls() as calls:
        recording.run([name])
    return {k: v for k, v in calls.count.items() if k in ("linear", "conv1d", "layer_norm", "batch_norm", "relu")}


def test_reuse_skips_what_runs_before_the_change():
    view, _, calib, _ = awkward(Overwriting)
    recording = Recording(view, calib.batches[0])
    for _ in range(2):  # what the model overwrites is there the second time, too
        assert products(recording, "last") == {"linear": 1, "relu": 1}
        assert products(recording, "second") == {"linear": 3, "relu": 1, "layer_norm": 1}
    view, _, calib, _ = awkward(Tied)
    recording = Recording(view, calib.batches[0])
    counts = {name: products(recording, name)["linear"] for name in view.layers}
    assert counts == {"first": 6, "outer": 5, "inner": 4, "again": 6, "last": 1}
    with Calls() as calls:
        assert products(Recording(view, calib.batches[0], recording, ["inner"]), "last") == {"linear": 1}
    assert calls.count["linear"] == 4 + 1
    assert calls.count["new_empty"] == 0  # nothing is overwritten here, so nothing is copied
    view, _, calib, _ = awkward(Shaping)
    assert products(Recording(view, calib.batches[0]), "last") == {"linear": 1}


def test_a_recorded_pass_hands_out_tensors_of_the_same_layout():
    """Packed projections give three views of one tensor; kernels may round otherwise for other strides."""
    view, _, calib, _ = prepared(*NETWORKS["attention"], SCHEMES)
    seen = []

    def look(module, args, output):
        seen.append([(t.stride(), t.storage_offset(), t.untyped_storage().nbytes()) for t in output])
        seen.append(len({t.untyped_storage().data_ptr() for t in output}))

    with view.hooked([view.layers["attention.in_proj"].register_forward_hook(look)]):
        full_pass(view, calib.batches[0])
        Recording(view, calib.batches[0])
    assert seen[:2] == seen[2:]
    assert seen[1] == 1


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (perturbation, 3 + 2 * (3 + 2 + 1)),
        (measured_pairs, 3 + 2 * (3 + 2 + 1) + 4 * (2 + 1 + 1)),
    ],
)
def test_estimators_compute_only_what_follows_a_change(estimator, expected):
    """Calls of three layers in a row: of the float pass, of single changes, of the later one in each pair."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    setup = prepared(net, [torch.randn(3, 4, dtype=torch.float64)], SCHEMES)
    with preserved_state(0), Calls() as calls:
        estimator(*setup, KLLoss(), progress=False)
    assert calls.count["linear"] == expected


def test_an_overwritten_recording_is_not_used():
    """Whoever writes into an output that was handed out only costs time."""
    view, space, calib, bank = prepared(*NETWORKS["linear"], SCHEMES)
    batch = calib.batches[0]
    recording = Recording(view, batch)
    hook = view.layers["2"].register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))
    with view.hooked([hook]):
        recording.run(["2"])
    with quantized(view, bank, [(space.groups[1], space.schemes[0])]):
        assert same(recording.run(["2"]), full_pass(view, batch))


def test_another_way_than_recorded_is_computed():
    view, _, calib, _ = awkward(Alternating)
    batch = calib.batches[0]
    ways = [full_pass(view, batch), full_pass(view, batch)]
    assert not torch.equal(*ways)
    recording = Recording(view, batch)
    for way in (recording.run(["last"]), recording.output):
        assert same(way, ways[0]) or same(way, ways[1])
    assert same(recording.run(["last"]), recording.output)
    assert not same(recording.run(["last"]), recording.output)


def test_a_failing_pass_leaves_the_view_as_it_was():
    view, _, calib, _ = prepared(*NETWORKS["shared"], SCHEMES)
    recording = Recording(view, calib.batches[0])

    def fail(module, args):
        raise ValueError("no")

    with view.hooked([view.layers["last"].register_forward_pre_hook(fail)]), pytest.raises(DataError, match="no"):
        recording.run(["again"])
    assert all("forward" not in vars(m) for m in view.module.modules())
