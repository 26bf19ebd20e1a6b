"""Measured losses against full passes and `mpq.Evaluator`; reuse against computing everything, bit for bit."""

import copy
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import mpq
from mpq.errors import DataError, MpqError
from mpq.losses import CallableLoss, KLLoss, MSELoss
from mpq.sensitivity.interaction import measured_pairs
from mpq.sensitivity.perturbation import names_of, perturbation, quantized, smallest_precision
from mpq.sensitivity.prefix import Recording
from mpq.testing import EstimatorContract, prepared, tiny_networks
from mpq.trees import tensors_in
from mpq.view import preserved_state

NETWORKS = tiny_networks()
SCHEMES = "W2A4,W4A8"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks are tiny here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TestPerturbation(EstimatorContract):
    @pytest.fixture(params=["loss", "sqnr", "prediction_difference"])
    def estimator(self, request):
        return partial(perturbation, measure=request.param)


def run(setup, loss=KLLoss(), estimator=perturbation, **options):  # noqa: B008 - frozen
    view, space, calib, bank = setup
    with preserved_state(0):
        return estimator(view, space, calib, bank, loss, progress=False, **options)


def full_pass(view, batch):
    with preserved_state(0), torch.no_grad():
        return view(batch)


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


AWKWARD = [Inferring, Overwriting, Tied, Remembering, Branching, Same, Shaping]


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
    with Calls() as calls:
        run(setup, estimator=estimator)
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


def test_a_failing_pass_leaves_the_view_as_it_was():
    view, _, calib, _ = prepared(*NETWORKS["shared"], SCHEMES)
    recording = Recording(view, calib.batches[0])

    def fail(module, args):
        raise ValueError("no")

    with view.hooked([view.layers["last"].register_forward_pre_hook(fail)]), pytest.raises(DataError, match="no"):
        recording.run(["again"])
    assert all("forward" not in vars(m) for m in view.module.modules())


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
        parts = [r.sum() * 2 / len(rise) for r in np.split(rise, [calib.batches[0].size])]
        assert mean.stderr[g, s] == pytest.approx(np.std(parts, ddof=1) / 2**0.5, rel=1e-9)


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
    return levels.repeat(count // len(levels) + 1)[:count][None] / top


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
    few = prepared(net, [torch.randn(3, 64, dtype=torch.float64)], "W2,W3")
    assert smallest_precision(few[0], few[1], few[3], eps=10, resolution=15)["0"] is None  # a bin is empty
    weight = view.weight("0").numpy()
    by_hand = {}
    for scheme in space.schemes:
        p, q = (
            np.histogram(t, 5, (weight.min(), weight.max()))[0] / 64
            for t in (weight, bank.weight(space.layers[0], scheme.weight).numpy())
        )
        by_hand[scheme.weight.bits] = (p * np.log(p / np.where(q > 0, q, 1e-300))).sum()
    assert by_hand[2] > by_hand[3] > by_hand[4] == 0
    for bits in (2, 3):
        for scale in (1.01, 0.99):
            found = smallest_precision(view, space, bank, eps=by_hand[bits] * scale, resolution=5)["0"]
            assert (found.bits == bits) == (scale > 1 and by_hand[bits] < 100)
    with pytest.raises(MpqError, match="at least 1, not 0"):
        smallest_precision(view, space, bank, resolution=0)
