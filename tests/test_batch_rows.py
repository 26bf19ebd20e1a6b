"""Whose sample is it: batch axes, layers that mix samples, losses by sample, and standard errors over samples."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpq
from mpq.quantizers import fake_quantize


def losses(net, data, schemes="W2,W4", **options):
    """Predicted losses ``[G, S]``."""
    return mpq.analyze(net, data, schemes, estimator="influence", progress=False, **options).table.loss


class Tokens(nn.Module):
    """Flattens samples and tokens; with as many features as samples the axes look alike."""

    def __init__(self, width, sequence_first=False):
        super().__init__()
        self.a, self.b, self.sequence_first = nn.Linear(5, width), nn.Linear(width, width), sequence_first

    def forward(self, x):
        if self.sequence_first:
            return self.b(torch.tanh(self.a(x.transpose(0, 1)))).mean(0)
        tokens = x.reshape(-1, x.shape[-1])
        return self.b(torch.tanh(self.a(tokens))).view(len(x), -1, self.b.out_features).mean(1)


@pytest.mark.parametrize("sequence_first", [False, True])
def test_the_batch_axis_is_found_not_guessed(sequence_first):
    """The same data in batches of other sizes gives the same exact losses."""
    torch.manual_seed(0)
    net, x = Tokens(6, sequence_first).double(), torch.randn(12, 6, 5, dtype=torch.float64)
    exact = {"loss": "mse", "estimator_options": {"exact": True}}
    tables = [losses(net, list(x.split(size)), **exact) for size in (6, 4, 1)]
    np.testing.assert_allclose(tables[1], tables[0], rtol=1e-9)
    np.testing.assert_allclose(tables[2], tables[0], rtol=1e-9)


class Routed(nn.Module):
    """Every second feature sign goes through the expert: written by routing rows, or with a mask."""

    def __init__(self, masked):
        super().__init__()
        self.embed, self.expert, self.head, self.masked = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3), masked

    def forward(self, x):
        h = self.embed(x)
        chosen = x[:, 0] > 0
        if self.masked:
            return self.head(torch.where(chosen[:, None], self.expert(h), h))
        out = h.clone()
        out[chosen] = self.expert(h[chosen])
        return self.head(out)


@pytest.mark.slow
def test_routed_layers_keep_their_expected_loss():
    torch.manual_seed(0)
    routed = Routed(False).double()
    masked = Routed(True).double()
    masked.load_state_dict(routed.state_dict())
    data = [torch.randn(4, 4, dtype=torch.float64) for _ in range(200)]
    expected = losses(masked, data, loss="mse", estimator_options={"exact": True})
    found = mpq.analyze(routed, data, "W2,W4", loss="mse", estimator_options={"draws": 20}, progress=False).table
    assert found.provenance["mixed_layers"] == ["expert"]
    assert (np.abs(found.loss - expected) <= 5 * found.stderr + 1e-12).all()
    np.testing.assert_allclose(found.loss, expected, rtol=0.3)


def test_what_can_not_tell_samples_apart_is_refused_for_routed_layers():
    data = [torch.randn(6, 4) for _ in range(3)]
    with pytest.raises(mpq.MpqError, match="layer 'expert' mixes the samples of a batch, which exact=True"):
        losses(Routed(False), data, loss="mse", estimator_options={"exact": True})
    with pytest.raises(mpq.MpqError, match="return one loss per sample"):
        losses(Routed(False), data, loss=lambda out, batch: out.square().mean())
    assert np.isfinite(losses(Routed(False), data, loss=lambda out, batch: out.square().mean(1))).all()


@pytest.mark.parametrize("positives", [(4, 3), (4, 2), (2, 4)])
@pytest.mark.slow
def test_routing_that_keeps_samples_apart_in_one_batch_only(positives):
    """The first batch may send every sample to the expert, so that its output looks like one row for each."""
    torch.manual_seed(0)
    routed, masked = Routed(False).double(), Routed(True).double()
    masked.load_state_dict(routed.state_dict())
    data = []
    for count in positives * 40:
        x = torch.randn(4, 4, dtype=torch.float64)
        x[:, 0] = torch.where(torch.arange(4) < count, 1.0, -1.0) * x[:, 0].abs()
        data.append(x)
    expected = losses(masked, data, loss="mse", estimator_options={"exact": True})
    found = losses(routed, data, loss="mse", estimator_options={"draws": 60})
    np.testing.assert_allclose(found, expected, rtol=0.25)


class Encoder(nn.Module):
    """Sequence first, with a causal mask as long as the sequence; may insist on its batch size."""

    def __init__(self, batch_size=None):
        super().__init__()
        self.attention = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)
        self.batch_size = batch_size

    def forward(self, x, mask):
        if self.batch_size is not None:
            x = x.reshape(self.batch_size, -1, 4)
        return self.attention(x.transpose(0, 1), src_mask=mask).mean(0)


@pytest.mark.parametrize("batch_size", [None, 5])
def test_shared_masks_and_fixed_batch_sizes(batch_size):
    torch.manual_seed(0)
    net = Encoder(batch_size).double().eval()
    x, mask = torch.randn(10, 5, 4, dtype=torch.float64), nn.Transformer.generate_square_subsequent_mask(5).double()
    exact = {"loss": "mse", "estimator_options": {"exact": True}}
    found = losses(net, [(part, mask) for part in x.split(5)], **exact)
    net.batch_size = None
    np.testing.assert_allclose(found, losses(net, [(part, mask) for part in x.split(1)], **exact), rtol=1e-7)


def test_models_whose_output_mixes_samples_are_known():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            y = self.b(torch.tanh(self.a(x)))
            return y - y.mean(0)

    table = mpq.analyze(Centred(), torch.randn(8, 4), "W2,W4", loss="mse", progress=False).table
    assert table.provenance["mixed_layers"] == ["a", "b"]


def test_random_forwards_do_not_look_like_unreached_layers():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            self.unused(x)
            return self.used(x + 0.01 * torch.randn_like(x))

    table = mpq.analyze(Noisy(), torch.randn(8, 4), "W2,W4", progress=False).table
    assert table.loss[table.groups.index("unused")].tolist() == [0, 0]


def test_position_embeddings_do_not_spoil_the_rows_of_other_layers():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.position, self.head = nn.Embedding(9, 4), nn.Embedding(6, 4), nn.Linear(4, 3)

        def forward(self, ids):
            return self.head(self.token(ids) + self.position(torch.arange(ids.shape[1]))).mean(1)

    torch.manual_seed(0)
    net, ids = Positions().double(), torch.randint(0, 9, (6, 6))  # as many tokens as samples
    table = mpq.analyze(net, [ids, ids.flip(0)], "W2,W4", progress=False).table
    assert table.provenance["mixed_layers"] == ["position"]
    assert table.rows.shape[:2] == (12, 2)  # samples x draws


def test_callable_loss_is_the_empirical_fisher_of_autograd():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.randint(0, 3, (10,))
    found = losses(net, [(x, y)], loss=lambda out, batch: F.cross_entropy(out, batch[1], reduction="none"))
    error = fake_quantize(net[0].weight, mpq.NumberFormat.parse("int2")) - net[0].weight
    slopes = []
    for i in range(10):
        (g,) = torch.autograd.grad(F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), net[0].weight)
        slopes.append((g * error).sum().item())
    assert found[0, 0] == pytest.approx(0.5 * np.square(slopes).mean(), rel=1e-9)


@pytest.mark.slow
def test_standard_errors_are_the_spread_over_data_sets():
    """The stated standard error is the standard deviation of the estimate from data set to data set."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    tables = [
        mpq.analyze(net, torch.randn(64, 4, dtype=torch.float64), "W2", seed=i, progress=False).table for i in range(60)
    ]
    spread = np.std([t.loss for t in tables], axis=0, ddof=1)
    stated = np.mean([t.stderr for t in tables], axis=0)
    np.testing.assert_allclose(stated, spread, rtol=0.35)  # 60 data sets know a deviation to about 9 %


def test_batches_of_any_kind_with_forward():
    net = nn.Linear(4, 3)
    x = torch.randn(10, 4)
    opaque = [SimpleNamespace(pixels=x[:6]), SimpleNamespace(pixels=x[6:])]
    # Probes are drawn by content, which differs: the exact sum needs none.
    exact = {"estimator_options": {"exact": True}}
    options = {"forward": lambda model, batch: model(batch.pixels), "estimator": "influence", **exact}
    analysis = mpq.analyze(net, opaque, "W2,W4", progress=False, **options)
    assert analysis.provenance["samples"] == 10
    # Without tensors to shorten, rows are told by shapes; the numbers are those of plain batches.
    np.testing.assert_allclose(analysis.table.loss, losses(net, [x[:6], x[6:]], **exact), rtol=1e-6)
