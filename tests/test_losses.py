"""Losses and their probes, against torch, finite sums and plain gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import mpq
from mpq.calibration import Batch
from mpq.errors import DataError, MpqError
from mpq.losses import KLLoss, MSELoss, resolve_loss
from mpq.sensitivity.labels import label_losses


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (torch.randn(4, 10), KLLoss()),
        (torch.randn(4, 7, 10), KLLoss()),
        (torch.randn(2, 5, 4, 4), KLLoss()),
        (torch.randn(4, 10).softmax(1), KLLoss(probabilities=True)),
        (F.normalize(torch.randn(4, 10)), MSELoss()),
        (torch.randn(4, 1), MSELoss()),
        (torch.randn(4), MSELoss()),
        ({"boxes": torch.randn(4, 4)}, MSELoss()),
        ((torch.randn(4, 8), torch.randn(4, 3)), MSELoss()),
        ({"logits": torch.randn(4, 10), "hidden": torch.randn(4, 6)}, KLLoss()),
    ],
)
def test_auto_loss(output, expected):
    assert resolve_loss("auto", output) == expected


def test_kl_value_matches_torch_and_ignores_padding():
    a, b = torch.randn(3, 6, 5), torch.randn(3, 6, 5)
    batch = Batch((a,), {}, 3, None, a)
    expected = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(KLLoss().value(b, a, batch), expected.mean(1))
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6, [1, 0, 0, 0, 0, 0]])
    masked = Batch((), {"attention_mask": mask}, 3, None, None)
    torch.testing.assert_close(KLLoss().value(b, a, masked), (expected * mask).sum(1) / mask.sum(1))


@pytest.mark.parametrize("options", [{"draw": "sampled"}, {"positions": 2}, {"reduction": "sum"}], ids=str)
def test_all_kinds_of_probes_have_the_same_expectation(options):
    """Average outer product of many probes against the exact one, for three tokens of which one is hidden."""
    loss, exact = KLLoss(**options), KLLoss(reduction=options.get("reduction", "mean"))
    z = torch.randn(1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    batch = Batch((z,), {"attention_mask": torch.tensor([[1, 1, 0]])}, 1, None, z)

    def outer(probe):
        (u,) = torch.autograd.grad(probe, z, retain_graph=True)
        return torch.outer(u.flatten(), u.flatten())

    expected = sum(outer(p) for p in exact.all_probes(z, batch))
    generator, draws = torch.Generator().manual_seed(0), 4000
    found = torch.stack([outer(loss.probe(z, batch, generator)) for _ in range(draws)])
    error = found.std(0) / draws**0.5
    assert ((found.mean(0) - expected).abs() <= 4.5 * error + 1e-12).all()


def test_true_labels_give_the_empirical_fisher():
    z = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([0, 2, 1, -100])
    batch = Batch((z,), {}, 4, labels, z)
    (u,) = torch.autograd.grad(KLLoss(draw="true").probe(z, batch, torch.Generator().manual_seed(0)), z)
    (expected,) = torch.autograd.grad(F.cross_entropy(z, labels, reduction="sum"), z)
    torch.testing.assert_close(u.abs(), expected.abs())
    with pytest.raises(DataError, match="integer labels"):
        KLLoss(draw="true").probe(z, Batch((z,), {}, 4, None, z), torch.Generator())
    for wrong in (3, -1):
        batch = Batch((z,), {}, 4, torch.tensor([0, 1, 2, wrong]), z)
        with pytest.raises(DataError, match="a label is not one of the model's 3 classes"):
            KLLoss(draw="true").probe(z, batch, torch.Generator())
    with pytest.raises(MpqError, match="draw 'signs', 'sampled' or 'true', not 'mean' and 'labels'"):
        KLLoss(draw="labels")


def test_true_labels_of_tokens_are_those_of_the_next_and_only_of_what_counts():
    """Summed over all signs, squares are those of each label's own gradient, shared among the labels that count."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator).requires_grad_()
    ids = torch.randint(0, 4, (2, 5), generator=generator)
    labels = ids.clone()
    labels[0, 1] = -100
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 4] = 0
    batch = Batch((), {"input_ids": ids, "attention_mask": mask}, 2, labels, None)
    (u,) = torch.autograd.grad(KLLoss(draw="true").probe(z, batch, generator), z)
    p = z.detach().softmax(-1)
    expected = torch.zeros_like(p)
    for b, t in [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]:  # predict tokens 2, 3, 4 and 1, 2, 3
        expected[b, t] = (p[b, t] - F.one_hot(ids[b, t + 1], 4)).abs() / 3**0.5
    torch.testing.assert_close(u.abs(), expected)


@pytest.mark.parametrize("draw", ["signs", "sampled", "true"])
def test_a_sample_that_is_hidden_as_a_whole_counts_nothing(draw):
    z = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    batch = Batch((z,), {"attention_mask": mask}, 2, torch.zeros(2, 3, dtype=torch.long), z)
    for positions in (None, 2):
        (u,) = torch.autograd.grad(KLLoss(draw=draw, positions=positions).probe(z, batch, torch.Generator()), z)
        assert u[0].any()
        assert not u[1].any()


def test_probe_has_the_hessian_as_second_moment():
    """All sign vectors instead of random ones: the average outer product is diag(p) - p p^T exactly."""
    z = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss, batch = KLLoss(), Batch((z,), {}, 1, None, z)
    moment = torch.zeros(4, 4, dtype=torch.float64)
    for signs in itertools.product([-1.0, 1.0], repeat=4):
        log_p = loss._log_probabilities(loss._logits(z))
        (u,) = torch.autograd.grad(
            loss._project(log_p, loss._position_weights(log_p, batch), torch.tensor(signs, dtype=z.dtype)), z
        )
        moment += u.T @ u / 16
    p = z.softmax(1)[0]
    torch.testing.assert_close(moment, torch.diag(p) - p[:, None] * p)


def test_label_losses_are_the_cross_entropies_of_what_counts():
    logits = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, -100, 0, 6], [-100, -100, 3, -100, -100]])
    batch = Batch((), {}, 2, labels, None)
    losses, weights = label_losses(logits, batch, KLLoss())
    expected = [F.cross_entropy(logits[i], labels[i]).item() for i in range(2)]
    torch.testing.assert_close((losses * weights).sum(1).tolist(), expected)
    maps = logits.movedim(-1, 1)[..., None].expand(-1, -1, -1, 3)
    spread, shares = label_losses(maps, Batch((), {}, 2, labels[..., None].expand(-1, -1, 3), None), KLLoss())
    torch.testing.assert_close((spread * shares).sum(1).tolist(), expected)
    known, _ = label_losses(logits.softmax(-1), batch, KLLoss(probabilities=True))
    torch.testing.assert_close(known, losses)


def test_language_models_are_scored_on_the_next_token():
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 3, 4], [6, 5, 0, 0]])
    labels = torch.tensor([[1, 2, 3, 4], [6, 5, -100, -100]])
    losses, weights = label_losses(logits, Batch((), {"input_ids": ids}, 2, labels, None), KLLoss())
    expected = [F.cross_entropy(logits[i, :-1], labels[i, 1:]).item() for i in range(2)]
    torch.testing.assert_close((losses * weights).sum(1).tolist(), expected)


@pytest.mark.parametrize("estimator", ["influence", "hessian_trace"])
def test_a_loss_without_gradient_is_refused_by_what_it_is(estimator):
    net = torch.nn.Linear(4, 3)
    with pytest.raises(MpqError, match="no gradient leads from the loss"):
        mpq.analyze(
            net,
            torch.randn(8, 4),
            "W2,W4",
            estimator=estimator,
            loss=lambda output, batch: output.detach().sum(1),
            progress=False,
        )
