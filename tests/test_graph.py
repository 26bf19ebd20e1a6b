import pytest
import torch
from torch import nn

import mpq
from mpq.errors import GraphError
from mpq.layers import make_groups
from mpq.view import ModelView, share_weights


class Tied(nn.Module):
    """Embedding and output share a weight; one linear layer runs twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.mix(torch.relu(self.mix(x))) * self.scale)


class Branchy(nn.Module):
    """A shared input, an unused layer, and control flow that symbolic tracing can't follow."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 1e9:
            x = self.unused(x)
        return self.c(self.a(x) + self.b(x))


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv1d(2, 6, 3, padding=1), (2, 2, 10), 6 * 10 * 2 * 3),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 9, 9), 6 * 4 * 4 * 2 * 9),
        (nn.Conv3d(1, 2, 2), (2, 1, 3, 3, 3), 2 * 8 * 1 * 8),
        (nn.ConvTranspose1d(3, 5, 4, stride=2), (2, 3, 7), 3 * 7 * 5 * 4),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5), 4 * 25 * 3 * 9),
        (nn.ConvTranspose3d(1, 2, 2), (2, 1, 2, 2, 2), 8 * 2 * 8),
        (nn.Linear(5, 3), (2, 7, 5), 7 * 5 * 3),
    ],
)
def test_macs_by_formula_and_covered_entirely(layer, shape, macs):
    graph = mpq.trace_model(nn.Sequential(layer), torch.randn(shape))
    assert [x.macs for x in graph] == [macs]
    assert graph.total_macs == macs  # torch's own counter agrees
    assert graph.mac_coverage == 1
    assert graph["0"].op in ("linear", layer._get_name().replace("ConvTranspose", "conv_transpose").lower())


def test_shapes_order_and_subclasses():
    class MyConv(nn.Conv2d):
        pass

    net = nn.Sequential(MyConv(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    graph = mpq.trace_model(net, torch.zeros(3, 1, 6, 6))
    assert [(x.name, x.op, x.input_shape, x.output_shape) for x in graph] == [
        ("0", "conv2d", (1, 6, 6), (2, 4, 4)),
        ("3", "linear", (32,), (4,)),
    ]
    assert list(graph.dataflow.edges) == [("0", "3")]
    assert graph.traced_by == "fx"


def test_tied_storage_counts_once_and_repeated_calls_add_up():
    graph = mpq.trace_model(Tied(), torch.randint(0, 11, (2, 5)))
    assert [x.name for x in graph] == ["embed", "mix", "head"]
    assert graph["embed"].storage == graph["head"].storage
    assert graph["mix"].calls == 2
    assert graph["mix"].macs == 2 * 5 * 36
    assert graph["embed"].source is None
    assert graph.parameters == 66 + 36
    assert {(o.name, o.parameters) for o in graph.outside} == {("(model)", 6), ("mix", 6)}
    assert graph.parameter_coverage == 102 / 114
    assert [g.name for g in make_groups(graph, share_inputs=False)] == ["embed", "mix"]
    assert make_groups(graph, share_inputs=False)[0].reason == "tied"
    assert make_groups(graph, share_inputs=False)[0].parameters == 66


def test_untraceable_model_falls_back_to_hooks_with_the_same_kind_of_dataflow():
    graph = mpq.trace_model(Branchy(), torch.randn(2, 4))
    assert graph.traced_by == "hooks"
    assert set(graph.dataflow.edges) == {("a", "c"), ("b", "c")}
    assert graph["a"].source == graph["b"].source != graph["c"].source
    assert [o.reason for o in graph.outside if o.name == "unused"] == [
        "not called as a module on the first calibration batch"
    ]
    joined = make_groups(graph, share_inputs=True)
    assert [[x.name for x in g.layers] for g in joined] == [["a", "b"], ["c"]]
    assert joined[0].reason == "shared input"


def test_fx_and_hooks_agree_on_a_residual_network(example):
    model, calib, _ = example
    from mpq.trace import _Recorder, trace
    from mpq.view import preserved_state

    with preserved_state(0):
        view = ModelView(model)
        batch = view.read(calib[0][0][:2])
        by_fx = trace(view, batch)
        recorder = _Recorder(view)
        recorder.run(batch)
    assert by_fx.traced_by == "fx"
    assert set(recorder.dataflow().edges) == set(by_fx.dataflow.edges)
    assert len(by_fx) == 22
    assert by_fx.parameters == 270_608


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kdim", [None, 5])
def test_expanded_attention_computes_the_same(batch_first, need_weights, kdim):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=kdim, vdim=kdim).eval()
    q, k = torch.randn(3, 4, 8), torch.randn(3, 6, kdim or 8)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[1, 4:] = True
    if not batch_first:
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    attn_mask = torch.randn(4, 6)
    holder = share_weights(nn.Sequential(attention))
    assert type(holder[0]) is not nn.MultiheadAttention
    args = {
        "key_padding_mask": torch.zeros_like(mask, dtype=torch.float).masked_fill(mask, -1e9),
        "need_weights": need_weights,
        "attn_mask": attn_mask,
    }
    expected, found = attention(q, k, k, **args), holder[0](q, k, k, **args)
    torch.testing.assert_close(found[0], expected[0])
    if need_weights:
        torch.testing.assert_close(found[1], expected[1])


def test_transformer_encoder_layers_use_the_projections():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(3, 5, 8)
    graph = mpq.trace_model(net, x)
    names = [
        n
        for i in range(2)
        for n in (
            f"layers.{i}.self_attn.in_proj",
            f"layers.{i}.self_attn.out_proj",
            f"layers.{i}.linear1",
            f"layers.{i}.linear2",
        )
    ]
    assert [x.name for x in graph] == names
    assert graph["layers.0.self_attn.in_proj"].weight_shape == (24, 8)
    assert graph["layers.0.self_attn.in_proj"].macs == 5 * 24 * 8
    scores = 2 * (2 * 2 * 5 * 5 * 4)  # two layers; heads x queries x keys x width for scores and context
    assert graph.total_macs == graph.macs + scores
    assert [o.macs for o in graph.outside if o.name == "(functional)"] == [scores]
    with torch.no_grad():
        torch.testing.assert_close(share_weights(net)(x), net(x), rtol=1e-5, atol=1e-5)


def test_parametrized_weights_are_named_as_outside():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    graph = mpq.trace_model(net, torch.randn(2, 4))
    assert [x.name for x in graph] == ["1"]
    assert sum(o.parameters for o in graph.outside if o.name.startswith("0")) == 4 + 16 + 4


def test_no_quantizable_layer():
    with pytest.raises(GraphError, match=r"no quantizable layer .*it holds .*ReLU"):
        mpq.trace_model(nn.Sequential(nn.ReLU()), torch.randn(2, 3))


def test_repr_names_layers_coverage_and_what_is_outside():
    text = repr(mpq.trace_model(Tied(), torch.randint(0, 11, (2, 5))))
    assert "3 layers, 102 of 114 parameters (89.5%)" in text
    assert "x2" in text
    assert "outside: 6 parameters in (model): scale of Tied is not quantizable" in text


def test_match_suggests_near_names(analysis):
    graph = analysis.space.graph
    assert len(graph.match("layer1.*")) == 6
    with pytest.raises(GraphError, match=r"'layer1.0.conv9'; did you mean layer1\.0\.conv"):
        graph.match("layer1.0.conv9")
