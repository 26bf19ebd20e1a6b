"""Which formats gain nothing: against brute force over pairs of schemes, and reasons by hand-made layers."""

import math
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest

from mpq.cost_models import find_device
from mpq.cost_models.friendliness import quantization_friendliness
from mpq.errors import BudgetError, FormatError
from mpq.layers import LayerGraph, LayerSpec

NAMES = ["W4A16", "W8A16", "W16A16", "W4A8", "W8A8", "W4A4"]
BITS = [(4, 16), (8, 16), (16, 16), (4, 8), (8, 8), (4, 4)]


def linear(name, inputs, outputs, tokens):
    shape, macs = (outputs, inputs), tokens * inputs * outputs
    return LayerSpec(name, "linear", shape, shape, (tokens, inputs), (tokens, outputs), macs, inputs * outputs, 1, 0, 0)


def depthwise(name, channels, hw):
    shape, ends = (channels, 1, 3, 3), (channels, hw, hw)
    macs = 9 * channels * hw * hw
    return LayerSpec(name, "conv2d", shape, shape, ends, ends, macs, math.prod(shape), 1, 0, 0)


LAYERS = (
    linear("decode", 4096, 4096, 1),
    linear("prefill", 4096, 4096, 4096),
    linear("tiny", 16, 16, 1),
    depthwise("depthwise", 960, 28),
)
GRAPH = LayerGraph(LAYERS, (), nx.DiGraph(), "hooks", sum(x.macs for x in LAYERS))


@pytest.fixture(scope="module")
def found():
    return quantization_friendliness(GRAPH, "a100", NAMES)


@pytest.mark.parametrize("margin", [0.0, 0.01, 0.3])
def test_agrees_with_trying_all_pairs(margin):
    found = quantization_friendliness(GRAPH, "a100", NAMES, margin)
    total = found.times.total
    expected = np.zeros(total.shape, bool)
    for layer in range(len(LAYERS)):
        for s, narrow in enumerate(BITS):
            for t, wide in enumerate(BITS):
                wider = wide != narrow and wide[0] >= narrow[0] and wide[1] >= narrow[1]
                expected[layer, s] |= wider and total[layer, t] * (1 - margin) <= total[layer, s]
    np.testing.assert_array_equal(found.useless, expected)
    assert found.useless.any()
    assert not found.useless.all()
    assert not found.useless[:, 2].any()  # nothing is wider than W16A16
    np.testing.assert_allclose(found.gain, total.max(1) / total.min(1))


def test_each_layer_has_its_reason(found):
    useless = {x.name: dict(zip(NAMES, row, strict=True)) for x, row in zip(LAYERS, found.useless, strict=True)}
    assert not any(useless["decode"][s] for s in ("W4A16", "W8A16", "W4A8", "W8A8"))  # bytes are what counts
    assert useless["prefill"]["W4A16"]
    assert useless["prefill"]["W8A16"]
    assert not useless["prefill"]["W8A8"]  # arithmetic is
    assert all(useless["tiny"][s] for s in NAMES if s != "W16A16")
    why = {(r.layer, str(r.scheme)): r.why for r in found.reasons()}
    assert len(why) == found.useless.sum()
    assert why["prefill", "W4A16"].startswith("promoted: it multiplies as fp16 x fp16")
    assert why["tiny", "W8A8"].startswith("bound by overhead: 2 us against 2 us")
    for reason in found.reasons():
        assert reason.seconds >= reason.wider_seconds * (1 - found.margin)


def test_padding_and_widening_are_named():
    stem = linear("stem", 9, 4096, 20000)  # 9 products: an int4 instruction takes 64, an int8 one 32, fp16 16
    graph = replace(GRAPH, layers=(stem,))
    slow = find_device("a100")
    figures = slow.figures | {"launch": 0.0, "requantize": 1e30}
    memory = tuple(replace(m, bandwidth=1e30) for m in slow.memory)
    found = quantization_friendliness(graph, replace(slow, figures=figures, memory=memory), "W8A8,W4A4")
    assert [r.why.split(":")[0] for r in found.reasons()] == ["padded"]
    kernels = tuple(replace(k, widen=1e9) if k.widen else k for k in slow.kernels)
    found = quantization_friendliness(GRAPH, replace(slow, kernels=kernels), "W4A16,W16A16")
    assert found.reasons()[0].why.startswith("its weights are widened to fp16, which costs more")


def test_without_schemes_all_kernels_are_compared():
    names = [str(s) for s in quantization_friendliness(GRAPH, "t4").schemes]
    assert names == ["W4A4", "W8A8", "W16A16", "W32"]
    h100 = [str(s) for s in quantization_friendliness(GRAPH, "h100").schemes]
    assert "W4A8" in h100
    assert "W4A4" not in h100


def test_prints_times_and_counts(found):
    text = repr(found)
    assert text.startswith(f"Friendliness on a100: {found.useless.sum()} of 24 choices gain no time")
    lines = text.splitlines()
    assert lines[1].split() == ["layer", *NAMES, "gain"]
    assert [line.split()[0] for line in lines[2:6]] == [x.name for x in LAYERS]
    assert sum(line.count("us-") for line in lines[2:6]) == found.useless.sum()
    assert sum(int(line.split(" x ")[0]) for line in lines[6:]) == found.useless.sum()
    assert found._repr_html_().startswith("<pre>Friendliness on a100")


def test_errors_say_what_runs():
    with pytest.raises(FormatError, match="none of W4A4 has a kernel on h100; it runs fp16 x fp16"):
        quantization_friendliness(GRAPH, "h100", "W4A4")
    with pytest.raises(FormatError, match="none of no scheme has a kernel on generic"):
        quantization_friendliness(GRAPH, "generic")
    with pytest.raises(BudgetError, match="'generic' has no figures for latency"):
        quantization_friendliness(GRAPH, "generic", "W4A4")
