import copy

import pytest
import torch
from random_tensors import inputs
from torch import nn

import mpq
from mpq.corrections import add_noise_bias, correct_bias, equalize, layer_pairs, reestimate_batch_norm, smooth
from mpq.errors import ConfigError, DataError, FormatError, GraphError
from mpq.quantizers.equalization import noise_bias


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.c = nn.ConvTranspose2d(8, 6, 2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = self.norm(self.b(self.a(x).relu()))
        return self.fc(self.c(x).relu().mean((2, 3)))


def quantized(net, data, scheme="W2A8"):
    config = mpq.analyze(net, data, scheme, estimator="influence", progress=False).uniform(scheme)
    return mpq.quantize(net, config)


def outputs(net, name, x):
    found = []
    handle = net.get_submodule(name).register_forward_hook(lambda m, args, out: found.append(out))
    with torch.no_grad():
        net(x)
    handle.remove()
    return found[0].movedim(1, 0).flatten(1)


def test_corrected_biases_make_mean_outputs_equal():
    net, x = Net().eval(), inputs(16, 3, 8, 8) + 0.5
    rounded = quantized(net, [x])
    corrected = correct_bias(rounded, net, [x])
    for name in ("a", "b", "c", "fc"):
        means = [outputs(m, name, x).mean(1) for m in (net, rounded, corrected)]
        assert (means[1] - means[0]).abs().max() > 1e-3
        torch.testing.assert_close(means[2], means[0], rtol=0, atol=1e-5)
        assert torch.equal(corrected.get_submodule(name).weight, rounded.get_submodule(name).weight)
    assert rounded.b.bias is None
    averaged = correct_bias(rounded, net, list(x.split(8)))
    assert (outputs(averaged, "fc", x).mean(1) - outputs(net, "fc", x).mean(1)).abs().max() < 0.01


def test_corrections_want_data_and_the_same_float_model():
    net, x = Net().eval(), inputs(16, 3, 8, 8)
    rounded = quantized(net, [x])
    for correct in (lambda: correct_bias(rounded, net, []), lambda: add_noise_bias(rounded, iter([]))):
        with pytest.raises(DataError, match="the data is empty"):
            correct()
    other = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1))
    with pytest.raises(ConfigError, match=r"not the float model: it has no layer 'a' with a weight \[8, 3, 3, 3\]"):
        correct_bias(rounded, other, [x])


@pytest.mark.parametrize("correct", [smooth, add_noise_bias])
def test_corrections_say_what_is_wrong_with_data_and_models(correct):
    net, x = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5)), inputs(4, 6)
    with pytest.raises(DataError, match="the data is empty"):
        correct(net, [])
    with pytest.raises(DataError, match="a batch must be a tensor"):
        correct(net, ["text"])
    with pytest.raises(DataError, match="batch 0 of the data holds NaN or infinity"):
        correct(net, [x / 0])
    with pytest.raises(GraphError, match="no quantizable layer"):
        correct(nn.Sequential(nn.LayerNorm(6)), [x])
    net[1].weight.data[0, 0] = torch.nan
    with pytest.raises(GraphError, match="the weight of layer '1' holds NaN"):
        correct(net, [x])


@pytest.mark.parametrize(
    ("name", "lo", "message"),
    [
        ("int4", -1.0, "no single scale"),
        ("kmeans_3:tensor", -1.0, "no scale times a grid"),
        ("int4:tensor", 1.0, "a range must hold zero"),
    ],
)
def test_noise_wants_one_scale_and_a_range_with_zero(name, lo, message):
    with pytest.raises(FormatError, match=message):
        noise_bias(inputs(4, 6), mpq.NumberFormat.parse(name), lo, 2.0)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 5)

    def forward(self, x, attention_mask=None):
        return self.fc(x)


def test_padding_does_not_count_in_mean_outputs():
    net, x, mask = Tokens().eval(), inputs(4, 7, 6), torch.ones(4, 7)
    mask[:, 4:] = 0
    x = torch.where(mask[:, :, None] > 0, x + 1, 50.0)
    batch = {"x": x, "attention_mask": mask}
    rounded = quantized(net, [batch], "W2A16")
    corrected = correct_bias(rounded, net, [batch])
    with torch.no_grad():
        means = [m(x)[mask > 0].mean(0) for m in (net, corrected)]
    torch.testing.assert_close(means[1], means[0], rtol=0, atol=1e-5)


def test_padding_has_no_say_in_noise():
    net, x, mask = Tokens().eval(), inputs(64, 8, 6), torch.ones(64, 8)
    mask[:, 3:], mask[5] = 0, 0
    padded = torch.where(mask[:, :, None] > 0, x, inputs(64, 8, 6, seed=1).round())
    rounded = quantized(net, [x], "W16A2")
    one_by_one = [{"x": padded[i : i + 1], "attention_mask": mask[i : i + 1]} for i in range(64)]
    batches = [x[mask > 0]], [{"x": padded, "attention_mask": mask}], one_by_one, [{"x": padded}]
    own, together, apart, all_tokens = (add_noise_bias(rounded, b).fc.input_quantizer.noise for b in batches)
    assert torch.equal(together, own)
    assert torch.equal(apart, own)
    assert not torch.equal(all_tokens, own)
    with pytest.raises(DataError, match="empty"):
        add_noise_bias(rounded, one_by_one[5:6])


def test_batch_norm_gets_the_statistics_of_the_quantized_network():
    net, x = Net(), inputs(16, 3, 8, 8)
    net.train()
    rounded = quantized(net, [x])
    before = copy.deepcopy(rounded.state_dict())
    found = reestimate_batch_norm(rounded, [x])
    seen = outputs(copy.deepcopy(found).eval(), "b", x)
    torch.testing.assert_close(found.norm.running_mean, seen.mean(1))
    torch.testing.assert_close(found.norm.running_var, seen.var(1))
    assert found.training
    assert found.norm.momentum == net.norm.momentum
    assert all(torch.equal(v, before[k]) for k, v in rounded.state_dict().items())
    halves = reestimate_batch_norm(rounded, list(x.split(8)))
    torch.testing.assert_close(halves.norm.running_mean, seen.mean(1))
    with pytest.raises(GraphError, match="no batch norm"):
        reestimate_batch_norm(nn.Sequential(nn.Linear(2, 2)), [torch.ones(2, 2)])


class Chain(nn.Module):
    """All kinds of pairs, one read twice and one through an activation that is not homogeneous."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a = nn.Conv2d(2, 8, 3)
        self.b = nn.Conv2d(8, 8, 3, groups=4)
        self.c = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.d = nn.Conv2d(6, 4, 1, bias=False)
        self.pool = nn.AvgPool2d(2)
        self.e = nn.Conv2d(4, 4, 1)
        self.f = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.d(nn.functional.relu(self.c(self.b(self.a(x).relu()))))
        x = x + self.e(self.pool(x).sigmoid()).mean()
        return self.f(x)


def test_equalized_layers_have_equal_ranges_and_the_same_outputs():
    net = Chain()
    with torch.no_grad():
        net.a.weight[0] *= 100
        net.b.weight[3] *= 50
    assert layer_pairs(net) == (("a", "b"), ("b", "c"), ("c", "d"))
    found, x = equalize(net, sweeps=20), inputs(4, 2, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(found(x), net(x), rtol=1e-4, atol=1e-5)
    rows = found.a.weight.abs().amax((1, 2, 3))
    columns = found.b.weight.abs().view(4, 2, 2, 3, 3).amax((1, 3, 4)).flatten()
    torch.testing.assert_close(rows, columns, rtol=0.01, atol=0)
    rows = found.c.weight.view(2, 4, 3, 2, 2).abs().amax((1, 3, 4)).flatten()
    torch.testing.assert_close(rows, found.d.weight.abs().amax((0, 2, 3)), rtol=0.01, atol=0)
    assert torch.equal(equalize(net, [])(x), net(x))


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(GraphError, match="6 output channels, 'e' 4"):
        equalize(Chain(), [("c", "e")])
    with pytest.raises(GraphError, match="not two linear layers"):
        equalize(Chain(), [("a", "pool")])


def test_pairs_that_change_the_outputs_are_refused():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)), inputs(8, 6)
    with pytest.raises(GraphError, match="are the same layer"):
        equalize(net, [("0", "0")])
    for pair in (("0", "2"), ("2", "0")):
        with pytest.raises(GraphError, match=f"{pair[1]!r} alone reads {pair[0]!r}.*pass calib="):
            equalize(net, [pair])
        with pytest.raises(GraphError, match=r"\('., '.'\): the outputs change".replace("'.,", "'.',")):
            equalize(net, [pair], calib=[x])
    relu = nn.Sequential(net[0], nn.ReLU(), net[2])
    for options in ({}, {"calib": [x]}):
        found = equalize(relu, [("0", "2")], **options)
        torch.testing.assert_close(found(x), relu(x))
        assert not torch.equal(found[0].weight, net[0].weight)
    relu[2].weight = relu[0].weight
    with pytest.raises(GraphError, match="'0' shares its weight"):
        equalize(relu, [("0", "2")])


def test_noise_lowers_the_error_of_outputs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8))
    x = inputs(256, 16)
    rounded = quantized(net, [x], "W16A3")
    noisy = add_noise_bias(rounded, [x])
    with torch.no_grad():
        lost = [float((m(x) - net(x)).square().mean()) for m in (rounded, noisy)]
    assert lost[1] < lost[0]
    assert noisy[2].input_quantizer.noise.abs().max() > 0
    assert rounded[2].input_quantizer.noise is None
    assert noisy.state_dict().keys() == rounded.state_dict().keys()


class Normed(nn.Module):
    """A norm that two linear layers read, and one whose output is added to theirs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.norm, self.after = nn.LayerNorm(12), nn.LayerNorm(12)
        self.q, self.k, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        x = self.norm(x)
        x = self.after(self.q(x) * self.k(x).sigmoid())
        return x + self.out(x)


def test_smoothed_inputs_have_no_outliers_and_outputs_stay():
    net, x = Normed().eval(), inputs(32, 5, 12)
    with torch.no_grad():
        net.norm.weight[4] *= 40
    found = smooth(net, [x])
    with torch.no_grad():
        torch.testing.assert_close(found(x), net(x), rtol=1e-3, atol=1e-4)
        peaks = [m.norm(x).abs().amax((0, 1)) for m in (net, found)]
        columns = torch.cat([found.q.weight, found.k.weight]).abs().amax(0)
    assert peaks[1].max() / peaks[1].min() < 0.3 * peaks[0].max() / peaks[0].min()
    ratio = peaks[1] / columns  # alpha = 0.5 shares the ranges evenly
    torch.testing.assert_close(ratio, ratio.mean().expand(12), rtol=0.01, atol=0)
    assert torch.equal(found.after.weight, net.after.weight)  # something else reads it
    assert torch.equal(found.out.weight, net.out.weight)
    lost = []
    for model in (net, found):
        rounded = quantized(model, [x], "W8A4")
        with torch.no_grad():
            lost.append(float((rounded(x) - net(x)).square().mean()))
    assert lost[1] < 0.7 * lost[0]


class Leaky(Normed):
    """One whose norm something else reads, if only a little."""

    def forward(self, x):
        x = self.norm(x)
        return self.q(x) * self.k(x).sigmoid() + 1e-3 * x


def test_half_precision_is_smoothed_and_small_readers_are_seen():
    net, x = Normed().eval().bfloat16(), inputs(32, 5, 12).bfloat16()
    with torch.no_grad():
        net.norm.weight[4] *= 40
        found = smooth(net, [x])
        assert not torch.equal(found.norm.weight, net.norm.weight)
        torch.testing.assert_close(found(x).float(), net(x).float(), rtol=0.05, atol=0.05)
    leaky = Leaky().eval()
    with pytest.warns(UserWarning, match="smooth changed nothing") as caught:
        same = smooth(leaky, [x.float()])
    assert caught[0].filename == __file__
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in leaky.state_dict().items())
