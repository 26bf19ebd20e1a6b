"""Recipes that look at the data, on the way from analysis to the quantized network."""

import warnings

import pytest
import torch
from grouped_layers import Grouped
from random_tensors import inputs
from torch import nn

import mpq
from mpq.bank import QuantizerBank
from mpq.calibration import Calibration
from mpq.config import load
from mpq.errors import ConfigError, FormatError
from mpq.input_statistics import gather
from mpq.kept_codes import codes_of
from mpq.quantizers.recipes import apply_recipe
from mpq.testing import prepared
from mpq.trace import trace
from mpq.view import ModelView, channels_first


class Tied(nn.Module):
    """Tokens in, tokens out, by one weight; and an embedding with a weight of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(30, 16), nn.Embedding(5, 16)
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        x = self.tokens(x) + self.places.weight.new_zeros(()) + self.places(torch.arange(x.shape[1]))
        return self.head(x + self.inner(x).relu())


def uniform(net, calib, scheme):
    return mpq.analyze(net, calib, scheme, estimator="influence", progress=False).uniform(scheme)


@pytest.fixture(scope="module")
def grouped():
    net, calib = Grouped().eval(), [inputs(16, 3, 10, 10, seed=i) for i in range(2)]
    return net, calib, uniform(net, calib, "W3:gptq")


def test_config_saves_loads_and_gives_the_same_bytes(grouped, tmp_path):
    net, calib, config = grouped
    assert config.provenance["forward_passes"] > uniform(net, calib, "W3").provenance["forward_passes"]
    config = load(config.save(tmp_path / "bits.json"))
    assert config["grouped"].weight.name == "int3:gptq"
    first, second = (mpq.quantize(net, config, calib=c) for c in (calib, iter(calib)))
    plain = mpq.quantize(net, uniform(net, calib, "W3"))
    for name in config:
        weights = [m.get_submodule(name).weight for m in (first, second, plain)]
        assert torch.equal(weights[0], weights[1])
        # Rounded otherwise than to nearest, to values on the same grid.
        assert not torch.equal(weights[0], weights[2])
    more = mpq.quantize(net, config, calib=[*calib, inputs(16, 3, 10, 10, seed=9)])  # only what was used then counts
    assert torch.equal(more.fc.weight, first.fc.weight)
    x = inputs(64, 3, 10, 10, seed=5)
    with torch.no_grad():
        lost = [float((m(x) - net(x)).square().mean()) for m in (first, plain)]
    assert lost[0] < 0.7 * lost[1]


def test_evaluator_measures_what_quantize_makes(grouped):
    net, calib, config = grouped
    x = [inputs(32, 3, 10, 10, seed=7)]
    found = mpq.Evaluator(net, x, calib=calib, progress=False).measure(config)
    made = mpq.evaluate(mpq.quantize(net, config, calib=calib), x, reference=net, progress=False)
    assert found.kl == pytest.approx(made.kl, rel=1e-6)


def test_missing_and_other_data_are_refused_by_name(grouped):
    net, calib, config = grouped
    for run in (lambda: mpq.quantize(net, config), lambda: mpq.Evaluator(net, calib, progress=False).measure(config)):
        with pytest.raises(FormatError, match=r"layer 'first': int3:gptq .* pass calib="):
            run()
    other = [c + 1 for c in calib]
    with pytest.raises(ConfigError, match="not the calibration data"):
        mpq.quantize(net, config, calib=other)
    with pytest.raises(ConfigError, match="not the calibration data"):
        mpq.Evaluator(net, calib, calib=other, progress=False).measure(config)
    loose = mpq.quantize(net, config, calib=other, strict=False)
    assert not torch.equal(loose.fc.weight, mpq.quantize(net, config, calib=calib).fc.weight)


@pytest.mark.parametrize("recipe", ["adaround", "awq:gptq", "hadamard:gptq", "qera2", "rsq:gptq", "sparse10:gptq"])
def test_all_layers_take_all_recipes(recipe):
    view, space, data, bank = prepared(Grouped(), [inputs(8, 3, 10, 10)], f"W4,W4:{recipe}")
    stats = gather(view, data, view.layers, progress=False)
    for layer in space.layers:
        weight, module = view.weight(layer.name), view.layers[layer.name]
        plain, rounded = (bank.weight(layer, s.weight) - weight for s in space.schemes)
        assert rounded.shape == weight.shape
        lost = [stats[layer.name].output_error(channels_first(module, e).flatten(1)).sum() for e in (plain, rounded)]
        assert lost[1] < lost[0]


def test_depthwise_and_grouped_weights_are_rounded_by_their_own_inputs():
    """Against the rows of each group, by hand."""
    net, x = Grouped().eval(), inputs(8, 3, 10, 10)
    view, space, _, bank = prepared(net, [x], "W3:gptq")
    with torch.no_grad():
        middle = net.depthwise(net.first(x).relu()).relu()
    patches = nn.functional.unfold(middle, 3, stride=2).unflatten(1, (4, 36))
    for g in range(4):
        rows = patches[:, g].transpose(1, 2).flatten(0, 1)
        stats = gather(view, Calibration.load([x], view.read), ["grouped"], progress=False)["grouped"]
        torch.testing.assert_close(stats.hessian[g], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats.mean_abs[g], rows.abs().mean(0))
    layer = space.graph["grouped"]
    fmt = space.schemes[0].weight
    assert torch.equal(bank.weight(layer, fmt), apply_recipe(view.weight("grouped"), fmt, stats=stats))


def test_one_pass_serves_all_layers_and_formats():
    net, calib = Grouped().eval(), Calibration.load([inputs(4, 3, 10, 10)], ModelView(Grouped()).read)
    view = ModelView(net)
    graph = trace(view, calib.batches[0])
    bank = QuantizerBank(view, graph, data=calib, progress=False)
    bank.prepare(mpq.quantizers.parse_schemes("W4,W4:hadamard,W4:lorc2"), progress=False)
    assert bank.passes == 0
    bank.prepare(mpq.quantizers.parse_schemes("W4:gptq,W3:awq,W3:qera2:adaround"), progress=False)
    assert bank.passes == 1
    bank.prepare(mpq.quantizers.parse_schemes("W4:gptq,W4:rsq:gptq"), progress=False)
    assert bank.passes == 2


def test_ranges_are_those_of_the_data_that_was_observed_last():
    _, space, data, bank = prepared(Grouped(), [inputs(4, 3, 10, 10)], "W8A8")
    layer, fmt = space.graph["first"], space.schemes[0].activation
    bank.observe(data, progress=False)
    lo, hi = bank.range(layer, fmt)
    bank.observe(Calibration.load([inputs(4, 3, 10, 10) * 100], bank.view.read), progress=False)
    assert bank.range(layer, fmt) == pytest.approx((100 * lo, 100 * hi))


@pytest.mark.parametrize("scheme", ["W3:gptq", "W3:weighted"])
def test_embeddings_are_rounded_to_nearest_unless_they_share_a_weight(scheme):
    net, calib = Tied().eval(), [torch.arange(40).reshape(8, 5) % 30]
    config = uniform(net, calib, scheme)
    rounded = mpq.quantize(net, config, calib=calib)
    plain = mpq.quantize(net, uniform(net, calib, "W3"))
    assert rounded.head.weight is rounded.tokens.weight
    assert torch.equal(rounded.places.weight, plain.places.weight)
    assert not torch.equal(rounded.head.weight, plain.head.weight)
    found = mpq.Evaluator(net, calib, calib=calib, progress=False).measure(config)
    assert found.kl == pytest.approx(mpq.evaluate(rounded, calib, reference=net, progress=False).kl, rel=1e-5)


def test_search_picks_gptq_where_it_helps(example):
    model, calib, _ = example
    part = [calib[0][0][:32]]
    options = {"estimator": "influence", "estimator_options": {"draws": 1}, "eval_data": part, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that fewer bits lose less by another recipe is no wonder
        found = mpq.allocate(model, part, "avg_bits<=3.5", "W3,W3:gptq,W4,W4:gptq", **options)
    recipes = [choice.weight.recipe == ("gptq",) for choice in found.layers.values()]
    assert sum(recipes) > 0.8 * len(recipes)
    assert {choice.weight.bits for choice in found.layers.values()} == {3, 4}
    assert found.measured.kl < 0.05


def test_store_tells_data_apart(tmp_path):
    """More data rounds weights differently, so that what was measured with less is of no use for them."""
    net, calib = Grouped().eval(), [inputs(8, 3, 10, 10, seed=i) for i in range(2)]

    def run(batches, schemes, **options):
        return mpq.analyze(net, batches, schemes, estimator="influence", progress=False, **options).table.loss

    run(calib[:1], "W3,W3:gptq", store=tmp_path)
    again = run(calib, "W3,W3:gptq", store=tmp_path)
    assert (again == run(calib, "W3,W3:gptq")).all()


def test_weights_too_large_for_their_format_are_refused_by_the_layers_name():
    net, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double(), inputs(8, 6).double()
    config = mpq.allocate(net, x, "avg_bits<=4", "W4", progress=False)
    net[1].weight.data *= 1e300
    assert codes_of(net, config, "0").fmt.name == "int4"
    with pytest.raises(FormatError, match="layer '1': scales of int4 are stored in fp32"):
        codes_of(net, config, "1")
