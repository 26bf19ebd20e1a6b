"""Models and data that bite: each of these once gave a silent wrong result or an unclear error."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import mpq
from mpq.errors import ConfigError, DataError, GraphError
from mpq.quantizers import fake_quantize


def losses(net, data, schemes="W2,W4", **options):
    """Predicted losses ``[G, S]``."""
    return mpq.analyze(net, data, schemes, progress=False, **options).table.loss


class Frozen(nn.Module):
    """The backbone runs without gradients, as in many fine-tuned models."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head, self.pooler = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            features = self.backbone(x)
        self.pooler(features)  # an unused branch: a loss of zero is right for it
        return self.head(features)


@pytest.mark.parametrize("estimator", ["influence", "hessian_trace"])
def test_layers_that_no_gradient_reaches_are_refused(estimator):
    with pytest.raises(GraphError, match=r"no gradient reaches layer 'backbone' .* skip=\['backbone'\]"):
        losses(Frozen(), torch.randn(8, 4), estimator=estimator)
    table = mpq.analyze(
        Frozen(), torch.randn(8, 4), "W2,W4", skip=["backbone"], estimator=estimator, progress=False
    ).table
    assert table.loss[table.groups.index("pooler")].tolist() == [0, 0]
    assert table.loss[table.groups.index("head")].min() > 0


def test_forward_under_no_grad_is_refused():
    class Decorated(nn.Linear):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        @torch.no_grad()
        def forward(self, x):
            return self.layer(x)

    with pytest.raises(GraphError, match="its forward runs under"):
        losses(Net(), torch.randn(8, 4))
    with pytest.raises(GraphError, match="no gradient reaches"):
        losses(nn.Sequential(nn.Linear(4, 4), Decorated(4, 3)), torch.randn(8, 4))


@pytest.mark.parametrize("tied", [False, True])
def test_hessian_trace_in_absolute_terms(tied):
    """One weight of one element: every sign vector gives its second derivative exactly, tied uses included."""

    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
            if tied:
                self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    torch.manual_seed(0)
    net, x = Scalar().double(), torch.randn(16, 1, dtype=torch.float64)
    options = {
        "loss": "mse",
        "estimator": "hessian_trace",
        "skip": () if tied else ("b",),
        "schemes": "W2:tensor,W3:tensor",
    }
    table = mpq.analyze(net, x, progress=False, **options).table
    reference = net(x).detach()

    def loss(w):
        out = torch.tanh(x * w) * (w if tied else net.b.weight.detach())
        return (out - reference).square().mean()

    w = net.a.weight.detach().clone().squeeze()
    second = torch.func.hessian(loss)(w).item()
    for s, name in enumerate(("int2:tensor", "int3:tensor")):
        error = (fake_quantize(net.a.weight, mpq.NumberFormat.parse(name)) - net.a.weight).item()
        assert table.loss[0, s] == pytest.approx(0.5 * second * error**2, rel=1e-9)


def test_skipping_one_of_two_tied_layers_keeps_both_float():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
    net[2].weight = net[0].weight
    ids = torch.randint(0, 9, (5, 3))
    cfg = mpq.allocate(net, [ids], "avg_bits<=4", "W2,W4", skip=["2"], progress=False)
    assert list(cfg) == ["1"]
    assert [(o.name, o.parameters) for o in cfg.outside if "skipped" in o.reason] == [("0", 36), ("2", 0)]
    assert torch.equal(mpq.quantize(net, cfg)[0].weight, net[0].weight)
    assert cfg.metrics["size"]["float"] == 4 * (36 + 16 + 4)


@pytest.mark.parametrize(
    "head",
    [
        lambda x, w: F.linear(x, w),
        lambda x, w: x @ w.T,
        lambda x, w: x @ w.t(),
        lambda x, w: F.linear(x, w.data),
        lambda x, w: torch.einsum("btd,vd->btv", x, w),
    ],
)
def test_weights_that_are_also_used_functionally_are_left_out(head):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, ids):
            hidden = self.mix(self.embed(ids).to(self.mix.weight.dtype))  # reading the dtype is harmless
            return head(hidden, self.embed.weight)

    graph = mpq.trace_model(Functional(), torch.randint(0, 9, (4, 3)))
    assert [x.name for x in graph] == ["mix"]
    assert [o.reason for o in graph.outside if o.name == "embed"] == [
        "its weight is used outside the module's own forward, which mpq can't observe"
    ]


def test_models_that_write_to_weights_inputs_or_lists_leave_no_trace():
    class Writer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, 3)

        def forward(self, ids, scale):
            return self.head(self.embed(ids) * scale.mul_(0.5))

    net, ids, scale = Writer(), torch.randint(0, 9, (5,)), torch.ones(5, 4)
    before = copy.deepcopy(net.state_dict())
    first = losses(net, [(ids, scale)])
    assert torch.equal(scale, torch.ones(5, 4))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    np.testing.assert_array_equal(losses(net, [(ids, scale)]), first)


def test_grouped_transposed_convolutions_have_a_scale_for_each_output_channel():
    net = nn.Sequential(nn.ConvTranspose2d(6, 6, 3, groups=3)).eval()
    with torch.no_grad():
        net[0].weight[:2] *= 100  # one group much larger: a shared scale would erase the others
    cfg = mpq.allocate(net, torch.randn(4, 6, 5, 5), "avg_bits<=4", "W4", loss="mse", progress=False)
    assert cfg.size_bytes == (4 * 108 + 6 * 32) / 8 + 4 * 6
    rounded = mpq.quantize(net, cfg)[0].weight
    for group in range(3):
        for channel in range(2):
            own = net[0].weight[2 * group : 2 * group + 2, channel]
            assert torch.equal(
                rounded[2 * group : 2 * group + 2, channel], fake_quantize(own, mpq.NumberFormat.parse("int4:tensor"))
            )


def test_layers_called_by_keyword():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.h = nn.Linear(4, 3)

        def forward(self, x):
            return self.h(input=x)

    torch.manual_seed(0)
    net, plain, x = Keywords(), nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4)
    plain[0].load_state_dict(net.h.state_dict())
    np.testing.assert_allclose(losses(net, x, "W4A4"), losses(plain, x, "W4A4"), rtol=1e-5)
    cfg = mpq.allocate(net, x, "avg_bits<=4", "W4A4", progress=False)
    twin = mpq.allocate(plain, x, "avg_bits<=4", "W4A4", progress=False)
    assert torch.equal(mpq.quantize(net, cfg)(x), mpq.quantize(plain, twin)(x))


@pytest.mark.slow
def test_callers_in_inference_mode_no_grad_and_autocast(example):
    model, calib, _ = example
    data = [calib[0][0][:8]]
    expected = losses(model, data)
    with torch.no_grad():
        np.testing.assert_array_equal(losses(model, data), expected)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(losses(model, data), expected)
    with torch.inference_mode():
        made_here = mpq.bundled.resnet20()
        np.testing.assert_array_equal(losses(made_here, [data[0] * 1.0]), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    x = torch.randn(16, 8, dtype=dtype)
    cfg = mpq.allocate(net, x, "avg_bits<=5", "W2A8,W4A8,W8A8", progress=False)
    assert cfg.metrics["size"]["float"] == 2 * sum(p.numel() for p in net.parameters())
    out = mpq.quantize(net, cfg)(x)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 32, batch_first=True), nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def test_recurrent_layers_count_their_macs():
    graph = mpq.trace_model(Recurrent(), torch.randn(2, 7, 4))
    assert graph.macs == 32 * 3
    assert graph.total_macs == 32 * 3 + 7 * 4 * 32 * (4 + 32)
    assert graph.mac_coverage < 0.01
    assert [o.reason for o in graph.outside if o.name == "rnn"] == ["LSTM is not quantizable"]


def test_one_attention_in_two_places():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.blocks, self.head = nn.ModuleList([attention, attention]), nn.Linear(8, 3)

        def forward(self, x):
            for block in self.blocks:
                x = x + block(x, x, x)[0]
            return self.head(x).mean(1)

    torch.manual_seed(0)
    net, x = Twice().eval(), torch.randn(6, 4, 8)
    cfg = mpq.allocate(net, x, "avg_bits<=4", "W4A8", progress=False)
    graph = mpq.trace_model(net, x)
    assert graph["blocks.0.in_proj"].calls == 2
    evaluator = mpq.Evaluator(net, [x], progress=False)
    copied = mpq.evaluate(mpq.quantize(net, cfg), [x], reference=net, progress=False)
    assert evaluator.measure(cfg).kl == pytest.approx(copied.kl, rel=1e-6)


def test_evaluation_keeps_the_random_state_with_a_shuffling_loader(example):
    model, _, test = example
    loader = torch.utils.data.DataLoader(list(zip(*[t[:20] for t in test[0]], strict=True)), batch_size=8, shuffle=True)
    state = torch.get_rng_state()
    mpq.evaluate(model, loader, progress=False)
    mpq.Evaluator(model, loader, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluator_refuses_configs_of_other_models(example, analysis):
    cfg = analysis.allocate("avg_bits<=4")
    other = mpq.bundled.resnet20()
    with torch.no_grad():
        other.fc.weight *= 1.01
    evaluator = mpq.Evaluator(other, example[2][:1], progress=False)
    with pytest.raises(ConfigError, match="other weights"):
        evaluator.measure(cfg)
    assert evaluator.measure(cfg, strict=False).accuracy > 0.8
    wider = nn.Sequential(nn.Linear(4, 5))
    small = mpq.allocate(nn.Sequential(nn.Linear(4, 3)), torch.randn(4, 4), "avg_bits<=4", "W4", progress=False)
    with pytest.raises(ConfigError, match=r"layer '0' has weight \(5, 4\)"):
        mpq.Evaluator(wider, [torch.randn(4, 4)], progress=False).measure(small)


def test_uniform_needs_a_scheme_open_to_every_group(example):
    analysis = mpq.analyze(
        example[0], example[1][:1], "W2A8,W4A8", pin={"fc": "W8A8"}, estimator="influence", progress=False
    )
    with pytest.raises(mpq.MpqError, match="W8A8 is not open to every group; uniform schemes here: W2A8, W4A8"):
        analysis.uniform("W8A8")
    assert analysis.uniform("W4A8")["fc"].weight.bits == 8
    texts = [t.get_text() for t in analysis.pareto().plot().texts]
    assert texts == ["W2A8", "W4A8"]


def test_clear_errors_for_models_that_are_not_ready():
    with pytest.raises(GraphError, match="lazy layers without weights yet"):
        losses(nn.Sequential(nn.LazyLinear(3)), torch.randn(4, 4))
    pruned = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    prune.random_unstructured(pruned[0], "weight", 0.5)
    pruned(torch.randn(2, 4))
    with pytest.raises(GraphError, match=r"prune\.remove"):
        losses(pruned, torch.randn(4, 4))
    broken = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    broken[1].weight.data[0, 0] = float("nan")
    with pytest.raises(GraphError, match="the weight of layer '1' holds NaN"):
        losses(broken, torch.randn(4, 4))


def test_nothing_long_runs_before_the_errors(example):
    model, calib, test = example
    calls = []

    def estimator(*args, **options):
        calls.append(1)
        raise AssertionError("measured before the budget was checked")

    cases = [
        ({"budget": "avg_bits<=1"}, "can't be met"),
        ({"budget": "avg_bits<=4", "solver": "magic"}, "unknown solver"),
        ({"budget": 4}, "is not a budget"),
        ({"budget": {"avg_bits": 4}}, "dict is not a budget"),
        ({"budget": "avg_bits<=4", "schemes": ["W4", 3]}, "3 is no scheme"),
        ({"budget": "avg_bits<=4", "seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"budget": "accuracy_drop<=1%", "eval_data": [x for x, _ in test[:1]]}, "accuracy can't be measured"),
    ]
    for options, match in cases:
        with pytest.raises(mpq.MpqError, match=match):
            mpq.allocate(model, calib, **{"schemes": "W2,W4", **options}, estimator=estimator, progress=False)
    assert not calls


def test_low_coverage_warns():
    with pytest.warns(
        UserWarning, match=r"only 2% of the parameters .* rnn \(4,864 parameters\): LSTM is not quantizable"
    ):
        mpq.analyze(Recurrent(), torch.randn(2, 7, 4), "W4", progress=False)


def test_empty_weights_compiled_models_and_things_that_are_no_models(example):
    net = nn.Sequential(nn.Linear(4, 3))
    net.add_module("empty", nn.Linear(3, 0))
    holder = nn.Sequential(net[0], nn.Linear(3, 3))
    holder[1].extra = nn.Linear(3, 0)
    assert [x.name for x in mpq.trace_model(holder, torch.randn(2, 4))] == ["0", "1"]
    compiled = torch.compile(net[0], backend="eager")
    cfg = mpq.allocate(nn.Sequential(net[0]), torch.randn(4, 4), "avg_bits<=4", "W4", progress=False)
    assert list(cfg) == ["0"]
    assert [x.name for x in mpq.trace_model(nn.Sequential(compiled), torch.randn(2, 4))] == ["0._orig_mod"]
    with pytest.raises(GraphError, match=r"must be a torch\.nn\.Module or an ONNX file, not a NoneType"):
        losses(None, torch.randn(4, 4))
    with pytest.raises(GraphError, match="not a OrderedDict; a state dict holds weights only"):
        losses(net.state_dict(), torch.randn(4, 4))
    with pytest.raises(GraphError, match="TorchScript module has no layers to replace"):
        losses(torch.jit.trace(net[0], torch.randn(2, 4)), torch.randn(4, 4))
    with pytest.raises(GraphError, match="layer '0' is on the meta device"):
        losses(nn.Sequential(nn.Linear(4, 3, device="meta")), torch.randn(4, 4))
    with pytest.raises(ConfigError, match="takes a BitConfig"):
        mpq.quantize(example[0], "bits.json")
    with pytest.raises(DataError, match="must be an iterable of batches, not 3"):
        losses(net[0], 3)

    class Images(torch.utils.data.Dataset):
        def __getitem__(self, i):
            return torch.randn(4)

    with pytest.raises(DataError, match="a Dataset gives batches through a DataLoader"):
        losses(net[0], Images())
    with pytest.raises(DataError, match="max_samples must be at least 1"):
        losses(example[0], example[1], max_samples=0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pin": {"fc": "W2"}, "skip": ["fc"]}, "layer 'fc' is skipped, so it can't be pinned"),
        ({"groups": [["fc", "conv1"]], "skip": ["fc"]}, "layer 'fc' is skipped"),
        ({"groups": ["fc", "conv1"]}, "groups is a list of lists"),
        ({"pin": ["fc"]}, "pin maps layer names to schemes"),
    ],
)
def test_contradictory_overrides(example, options, match):
    with pytest.raises(GraphError, match=match):
        mpq.analyze(example[0], example[1][:1], "W2,W4", progress=False, **options)


def test_squared_error_is_measured_where_outputs_are_not_classes():
    net, x = nn.Linear(4, 1), torch.randn(64, 4)
    cfg = mpq.allocate(net, x, "avg_bits<=4", "W4", progress=False)
    measured = mpq.evaluate(mpq.quantize(net, cfg), [x], reference=net, progress=False)
    assert measured.kl is None
    # A linear network is its own tangent: the prediction differs by the random probes only.
    assert measured.mse == pytest.approx(cfg.predicted_loss, rel=1e-5)
    assert mpq.Evaluator(net, [x], progress=False).measure(cfg).mse == pytest.approx(measured.mse, rel=1e-6)
