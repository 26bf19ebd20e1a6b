"""Models as people have them: torchvision's, a Hugging Face sentence encoder, and our own trained ones."""

import numpy as np
import pytest
import torch

import mpq

SCHEMES = "W2A8,W4A8,W8A8"


def snapshot(model):
    """All that a caller could notice."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    gradients = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return state, hooks, modes, gradients


def check_untouched(model, before, rng):
    state, hooks, modes, gradients = snapshot(model)
    assert all(torch.equal(v, before[0][k]) for k, v in state.items())
    assert (hooks, modes, gradients) == before[1:]
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert np.array_equal(np.random.get_state()[1], rng[1])  # noqa: NPY002 - the global state is the point


def check_model(model, data, **options):
    before = snapshot(model)
    rng = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    analysis = mpq.analyze(model, data, SCHEMES, progress=False, **options)
    graph = analysis.space.graph
    cfg = analysis.allocate("avg_bits<=4")
    check_untouched(model, before, rng)
    assert cfg.avg_bits <= 4
    assert cfg.solver["status"] == "optimal" or cfg.solver["gap"] < 0.5  # large random networks run out of time
    assert graph.parameter_coverage > 0.9
    assert graph.mac_coverage > 0.9
    return analysis, cfg


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", 21),
        pytest.param("mobilenet_v3_small", 54, marks=pytest.mark.slow),
        pytest.param("vit_b_16", 50, marks=pytest.mark.slow),
    ],
)
def test_torchvision(name, layers):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = getattr(models, name)(weights=None)
    model.train()  # random weights; the mode must survive
    data = [torch.randn(2, 3, 224, 224)]
    if name == "vit_b_16":
        torch.nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision starts it at zero
    analysis, cfg = check_model(model, data)
    assert len(analysis.space.graph) == layers
    quantized = mpq.quantize(model, cfg).eval()
    with torch.no_grad():
        out = quantized(data[0])
    assert torch.isfinite(out).all()
    assert quantized.training is False
    assert model.training


@pytest.mark.slow
def test_minilm(shared_loaders):
    model, calib, evaluate = shared_loaders["minilm"](32)
    batches = [inputs for inputs, _ in calib]
    assert isinstance(batches[0], dict)
    analysis, cfg = check_model(model, batches)
    assert analysis.provenance["loss"] == "mse"  # unit-length embeddings
    assert analysis.space.graph.traced_by == "hooks"
    assert sum(x.op == "linear" for x in analysis.space.graph) == 36
    assert sum(x.op == "embedding" for x in analysis.space.graph) == 3
    eight = analysis.uniform("W8A8")
    base, quantized = evaluate(model, 60)["spearman"], evaluate(mpq.quantize(model, eight), 60)["spearman"]
    assert abs(base - quantized) < 2
    assert evaluate(mpq.quantize(model, cfg), 60)["spearman"] > 30


@pytest.mark.slow
def test_depthwise_network_mixed_beats_uniform(shared_loaders):
    model, calib, evaluate = shared_loaders["mobilenetv2"](256)
    analysis, _ = check_model(model, calib)
    uniform = analysis.uniform("W4A8")
    mixed = analysis.allocate(f"size<={uniform.size_bytes:.0f}B")
    assert mixed.size_bytes <= uniform.size_bytes
    accuracy = {k: evaluate(mpq.quantize(model, c), 1000)["top1"] for k, c in (("mixed", mixed), ("uniform", uniform))}
    assert accuracy["mixed"] > accuracy["uniform"]


@pytest.mark.slow
def test_bundled_mixed_beats_uniform_at_equal_size(example, analysis):
    evaluator = mpq.Evaluator(example[0], example[2], progress=False)
    assert evaluator.float_measured.accuracy == pytest.approx(0.9305)
    for scheme in ("W3A8", "W4A8"):
        uniform = analysis.uniform(scheme)
        mixed = analysis.allocate(f"size<={uniform.size_bytes:.0f}B")
        assert mixed.size_bytes <= uniform.size_bytes
        assert evaluator.measure(mixed).accuracy > evaluator.measure(uniform).accuracy
