import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpq
from mpq.errors import DataError
from mpq.quantizers import fake_quantize, fake_quantize_static


@pytest.fixture(scope="module")
def cfg(analysis):
    return analysis.allocate("size<=13%")


def test_quantized_copy_holds_only_values_of_the_formats(example, cfg):
    model = example[0]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quantized = mpq.quantize(model, cfg)
    for name, choice in cfg.layers.items():
        weight = quantized.get_submodule(name).weight
        assert torch.equal(weight, fake_quantize(model.get_submodule(name).weight, choice.weight))
        assert all(len(row.unique()) <= 2**choice.weight.bits for row in weight.flatten(1))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(quantized.state_dict()) == list(model.state_dict())
    assert "InputQuantizer" in repr(quantized)
    assert "InputQuantizer" not in repr(model)
    assert not quantized.training


def test_inputs_are_rounded_with_the_ranges_of_the_config(example, cfg):
    quantized = mpq.quantize(example[0], cfg)
    seen = {}
    layer = quantized.layer2[0].conv2
    layer.register_forward_hook(lambda m, args, out: seen.update(x=args[0]))
    x = example[1][0][0][:4]
    with torch.no_grad():
        quantized(x)
    choice = cfg["layer2.0.conv2"]
    assert len(seen["x"].unique()) <= 256
    torch.testing.assert_close(fake_quantize_static(seen["x"], choice.activation, *choice.activation_range), seen["x"])


def test_evaluator_and_quantized_copy_agree(example, cfg):
    model, _, test = example
    evaluator = mpq.Evaluator(model, test[:2], progress=False)
    measured = evaluator.measure(cfg)
    assert measured == mpq.evaluate(mpq.quantize(model, cfg), test[:2], reference=model, progress=False)
    assert evaluator.measure(cfg) == measured  # nothing of the first config stays behind
    x, y = (torch.cat(t) for t in zip(*test[:2], strict=True))
    with torch.no_grad():
        z, z0 = mpq.quantize(model, cfg)(x), model(x)
    assert measured.accuracy == (z.argmax(1) == y).double().mean().item()
    assert measured.loss == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
    kl = F.kl_div(z.log_softmax(1), z0.log_softmax(1), log_target=True, reduction="batchmean").item()
    assert measured.kl == pytest.approx(kl, rel=1e-4)
    assert measured.float_accuracy == (z0.argmax(1) == y).double().mean().item()


def test_quantized_copy_can_be_copied_trained_and_keeps_the_mode(example, cfg):
    model = copy.deepcopy(example[0]).train()
    quantized = mpq.quantize(model, cfg)
    assert quantized.training
    twin = copy.deepcopy(quantized).eval()
    quantized.eval()
    x = example[1][0][0][:2]
    assert torch.equal(twin(x), quantized(x))
    twin(x).sum().backward()
    assert twin.fc.weight.grad is not None


def test_tied_weights_stay_tied():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    net[1].weight = net[0].weight
    cfg = mpq.allocate(net, [torch.randint(0, 9, (4, 3))], "avg_bits<=4", "W4,W8", progress=False)
    quantized = mpq.quantize(net, cfg)
    assert quantized[1].weight is quantized[0].weight
    assert torch.equal(quantized[0].weight, fake_quantize(net[0].weight, cfg["0"].weight))


def test_attention_is_quantized_through_its_projections():
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False)
    net = nn.Sequential(net, nn.Flatten(), nn.Linear(40, 3)).eval()
    x = torch.randn(6, 5, 8)
    cfg = mpq.allocate(net, x, "avg_bits<=8", "W8A8", progress=False)
    assert "0.layers.0.self_attn.in_proj" in cfg
    quantized = mpq.quantize(net, cfg)
    with torch.no_grad():
        error = (quantized(x) - net(x)).norm() / net(x).norm()
    assert 0 < error < 0.05
    assert mpq.Evaluator(net, [x], progress=False).measure(cfg).kl == pytest.approx(
        mpq.evaluate(quantized, [x], reference=net, progress=False).kl, rel=1e-6
    )
    assert type(net[0].layers[0].self_attn) is nn.MultiheadAttention


def test_evaluate_without_labels_or_classes():
    net = nn.Linear(3, 1)
    with pytest.raises(DataError, match="nothing can be measured: pass batches with labels"):
        mpq.evaluate(net, [torch.randn(5, 3)], progress=False)
    measured = mpq.evaluate(net, [torch.randn(5, 3)], reference=net, progress=False)
    assert (measured.accuracy, measured.loss, measured.kl, measured.mse, measured.samples) == (None, None, None, 0, 5)
    own = mpq.evaluate(net, [torch.ones(4, 3)], loss=lambda out, batch: out.square().mean(), progress=False)
    assert own.loss == pytest.approx(net(torch.ones(1, 3)).square().item())


def test_ignored_labels_do_not_count():
    net = nn.Identity()
    logits = torch.tensor([[[2.0, 0], [0, 2.0], [2.0, 0]]])
    labels = torch.tensor([[0, 0, -100]])
    holder = nn.Sequential(nn.Linear(2, 2), net)
    with torch.no_grad():
        holder[0].weight.copy_(torch.eye(2))
        holder[0].bias.zero_()
    assert mpq.evaluate(holder, [(logits, labels)], progress=False).accuracy == 0.5
