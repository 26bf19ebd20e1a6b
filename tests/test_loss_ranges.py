"""Activation ranges by the network's loss."""

import json

import pytest
import torch
from grouped_layers import Grouped
from random_tensors import inputs
from torch import nn

import mpq
from mpq.errors import DataError, FormatError
from mpq.losses import KLLoss
from mpq.quantizers.clips import least_share
from mpq.quantizers.observers import ActivationObserver
from mpq.quantizers.tensors import fake_quantize_static
from mpq.testing import prepared


class Repeated(nn.Module):
    """A layer that is called twice, in a Sequential, and one on the sum of two tensors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.twice = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(x + self.twice(self.twice(x)))


class Attention(nn.Module):
    """Three layers that read one tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        weights = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.head((weights @ self.v(x)).mean(1))


NETS = [(Grouped, (3, 10, 10)), (Repeated, (8,))]


def batches(shape, count=3, size=32):
    """The largest numbers come first."""
    return [inputs(size, *shape, seed=i).clamp(-2, 2) ** 3 * (3 if i == 0 else 1) for i in range(count)]


def analysed(net, calib, schemes="W8A4,W8A8", rule="loss:5", **options):
    return mpq.analyze(net, calib, schemes, estimator="weight_sqnr", activation_range=rule, progress=False, **options)


@pytest.fixture(params=NETS, ids=lambda case: case[0].__name__)
def case(request):
    net, shape = request.param
    return net().eval(), batches(shape)


def test_ranges_are_the_clips_with_the_least_loss_of_full_passes(case):
    """One layer, format and clip after the other, over the first 64 of 96 samples; ends are those of all."""
    net, calib = case
    config = analysed(net, calib).ranges
    x = torch.cat(calib[:2])
    with torch.no_grad():
        reference = net(x)
    _, space, _, _ = prepared(net, calib, "W8A4,W8A8")
    shares = []
    for layer in space.layers:
        module, seen = net.get_submodule(layer.name), []
        hook = module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        for batch in calib:
            net(batch)
        hook.remove()
        lo, hi = min(0.0, min(t.min().item() for t in seen)), max(0.0, max(t.max().item() for t in seen))
        for scheme in space.schemes:
            fmt, losses = scheme.activation, {}
            for share in torch.linspace(1, least_share(fmt), 5).tolist():
                hook = module.register_forward_pre_hook(
                    lambda m, args, fmt=fmt, ends=(lo * share, hi * share): fake_quantize_static(args[0], fmt, *ends)
                )
                with torch.no_grad():
                    found = (net(x).log_softmax(1), reference.log_softmax(1))
                hook.remove()
                losses[share] = float((found[1].exp() * (found[1] - found[0])).sum())
            chosen = config[layer.name, str(scheme)]
            share = chosen[1] / hi
            assert chosen == pytest.approx((lo * share, hi * share))
            assert losses[min(losses, key=lambda s: abs(s - share))] == pytest.approx(
                min(losses.values()), rel=1e-3, abs=1e-6
            )
            shares.append(share)
    assert min(shares) < 0.95  # some clip


def test_later_samples_have_a_say_in_the_ends_only(case):
    net, calib = case
    other = [*calib[:2], calib[2] * 0.5]
    assert analysed(net, calib).ranges == analysed(net, other).ranges
    assert analysed(net, calib).ranges != analysed(net, [calib[0], calib[1] * 0.1, calib[2]]).ranges


def test_cost_is_counted_and_nothing_is_left_to_chance(case):
    net, calib = case
    first, plain = (analysed(net, calib, rule=rule).provenance for rule in ("loss:5", "mse"))
    layers = len(analysed(net, calib).space.layers)
    more = (1 + layers * 2 * 5) * 64 / 96
    assert first["forward_passes"] == pytest.approx(plain["forward_passes"] + more, abs=0.01)
    assert first["activation_range"] == "loss:5"
    assert analysed(net, calib, rule="loss").ranges == analysed(net, iter(calib), rule="loss:8").ranges
    before = [p.clone() for p in net.parameters()]
    analysed(net, calib, rule="loss")
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_batches_are_taken_whole():
    net, (x, *_) = Repeated().eval(), batches((8,), 1, 96)
    first, plain = (analysed(net, x, "W8A8", rule).provenance["forward_passes"] for rule in ("loss:5", "mse"))
    assert first == plain + 1 + 2 * 5


def test_configs_hold_the_ranges_and_formats_without_one_are_left_alone(case, tmp_path):
    net, calib = case
    analysis = analysed(net, calib, "W8A4,W8A8:token,W8,W8A16")
    assert {scheme for _, scheme in analysis.ranges} == {"W8A4"}
    config = analysis.uniform("W8A4")
    again = mpq.load(config.save(tmp_path / "bits.json"))
    for name, choice in again.layers.items():
        assert choice.activation_range == analysis.ranges[name, "W8A4"]
    kept = mpq.quantize(net, again).get_submodule(next(iter(again))).input_quantizer
    assert kept.limits == analysis.ranges[next(iter(again)), "W8A4"]
    nothing = analysed(net, calib, "W8,W4A8:token")
    assert nothing.provenance["forward_passes"] == analysed(net, calib, "W8", rule="mse").provenance["forward_passes"]


def test_inputs_that_are_smoothed_have_ranges_in_their_basis():
    net, calib = Repeated().eval(), batches((8,))
    _, space, _, bank = prepared(net, calib, "W8:smoothA4")
    found = analysed(net, calib, "W8:smoothA4").ranges
    for layer in space.layers:
        fmt = space.schemes[0].activation
        ends, plain = bank.ends(layer, fmt), ActivationObserver()
        for t in calib:
            plain.update(t)
        shares = [b / a for a, b in zip(ends, found[layer.name, "W8:smoothA4"], strict=True) if a]
        assert all(s == pytest.approx(shares[0]) for s in shares)
        assert min(abs(s - shares[0]) for s in torch.linspace(1, least_share(fmt), 5).tolist()) < 1e-6
        assert layer.name == "head" or ends != (plain.lo, plain.hi)


def test_layers_that_read_one_tensor_share_its_clip():
    """The one after which the loss rises least when all of them read it rounded; runtimes round it once for all."""
    net, x = Attention().eval(), inputs(64, 6, 16, seed=1) ** 3
    analysis = analysed(net, x, "W8A4,W4A8,W8:hadamardA4", "loss:8")
    plain = analysed(net, x, "W8A4,W4A8,W8:hadamardA4", "mse").provenance["forward_passes"]
    assert analysis.provenance["forward_passes"] == plain + 1 + 2 * 3 * 8
    lo, hi = x.min().item(), x.max().item()
    for scheme in analysis.space.schemes:
        chosen = {analysis.ranges[name, str(scheme)] for name in "qkv"}
        assert len(chosen) == 1
        if scheme.activation.recipe:
            continue
        with torch.no_grad():
            reference, losses = net(x).log_softmax(1), {}
            for share in torch.linspace(1, least_share(scheme.activation), 8).tolist():
                ends = lo * share, hi * share
                found = net(fake_quantize_static(x, scheme.activation, *ends)).log_softmax(1)
                losses[ends] = float((reference.exp() * (reference - found)).sum())
        assert chosen.pop() == pytest.approx(min(losses, key=losses.__getitem__))


def test_smoothed_inputs_of_one_tensor_are_other_tensors():
    net, x = Attention().eval(), inputs(64, 6, 16, seed=1) ** 3
    by_loss = analysed(net, x, "W8:smoothA4", "loss:2").provenance["forward_passes"]
    plain = analysed(net, x, "W8:smoothA4", "mse").provenance["forward_passes"]
    assert by_loss == plain + 1 + 4 * 2


@pytest.mark.parametrize("estimator", ["perturbation", "influence", "weight_sqnr"])
def test_schemes_that_a_layer_may_not_have_cost_nothing(estimator):
    """Estimators score them all the same, with whole ranges."""
    net, x = Repeated().eval(), torch.cat(batches((8,)))

    def run(rule):
        return mpq.analyze(
            net, x, "W8A4,W4A8", estimator=estimator, activation_range=rule, pin={"head": "W8A6"}, progress=False
        )

    found, whole = run("loss:5"), run("minmax")
    cost = found.provenance["forward_passes"] - whole.provenance["forward_passes"]
    assert cost == 1 + (2 + 1) * 5
    for layer, group in (("twice.0", 0), ("head", 1)):
        for s, scheme in enumerate(found.space.schemes):
            if not found.space.allowed[group, s]:
                assert found.ranges[layer, str(scheme)] == whole.ranges[layer, str(scheme)]
    assert found.ranges["twice.0", "W8A4"] == analysed(net, x, "W8A4").ranges["twice.0", "W8A4"]
    assert found.ranges["head", "W8A6"] == analysed(net, x, "W8A6").ranges["head", "W8A6"]


def test_ranges_by_loss_are_exported_where_layers_read_one_tensor(tmp_path):
    pytest.importorskip("onnx", reason="pip install 'mpq[export-onnx]'")
    net, x = Attention().eval(), inputs(64, 6, 16, seed=1) ** 3
    config = analysed(net, x, "W4A8", "loss", runtime="aimet").uniform("W4A8")
    path = tmp_path / "net.encodings"
    mpq.export(config, "aimet", path, net, sample=x[:1])
    encodings = json.loads(path.read_text())["activation_encodings"]
    lo, hi = config["q"].activation_range
    scale = next(e["scale"] for e in encodings if e["name"] == "input")
    assert scale == pytest.approx([(hi - lo) / 255])


# What is refused


@pytest.mark.parametrize("rule", ["loss:1", "loss:", "loss:x", "loss:-3", "loss:20000", "loss:\u0663"])
def test_numbers_of_clips_that_make_no_sense_are_refused(rule):
    with pytest.raises(FormatError, match=r"loss:N tries N clips, 2 to 10,000, unlike 'loss"):
        analysed(Repeated().eval(), batches((8,)), rule=rule)


def test_weights_have_no_range_by_loss():
    net, calib = Repeated().eval(), batches((8,))
    with pytest.raises(FormatError, match=r"'loss:5' is .* for activation_range= .*; for weights use mse"):
        mpq.analyze(net, calib, weight_range="loss:5", progress=False)


def test_ranges_that_nobody_chose_are_missed_by_name():
    net, calib = Repeated().eval(), batches((8,))
    _, space, _, bank = prepared(net, calib, "W8A8")
    bank.activation_range = "loss"
    layer, fmt = space.layers[0], space.schemes[0].activation
    with pytest.raises(FormatError, match=r"no range by loss was chosen for the input of layer 'twice.0' in int8"):
        bank.range(layer, fmt)
    bank.set_ranges({(layer.name, fmt): (-1.0, 2.0)})
    assert bank.range(layer, fmt) == (-1.0, 2.0)


def test_formats_without_negative_numbers_are_still_refused():
    with pytest.raises(FormatError, match=r"layer 'twice.0': log2_4:tensor has no negative numbers"):
        analysed(Repeated().eval(), batches((8,)), "W8Alog2_4")


def test_a_loss_that_is_no_number_is_reported_by_layer(monkeypatch):
    usual = KLLoss.value

    def broken(self, output, reference, batch):
        found = usual(self, output, reference, batch)
        return found if torch.equal(output, reference) else found * torch.nan

    monkeypatch.setattr(KLLoss, "value", broken)
    with pytest.raises(DataError, match=r"the input of layer 'twice.0' in int4:tensor:asym: the loss was no finite"):
        analysed(Repeated().eval(), batches((8,)))
