"""Labels that models are measured with: some missing, out of range, or of another shape."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mpq
from mpq.errors import DataError


def test_partly_labelled_data_is_refused():
    x = torch.randn(6, 4)
    with pytest.raises(DataError, match="only 6 of 12 samples have labels"):
        mpq.evaluate(nn.Linear(4, 3), [(x, torch.zeros(6, dtype=torch.long)), x], progress=False)


def test_labels_out_of_range_other_types_and_next_tokens():
    net = nn.Linear(4, 3)
    x = torch.randn(6, 4)
    assert mpq.evaluate(net, [(x, torch.zeros(6, dtype=torch.int32))], progress=False).accuracy is not None
    with pytest.raises(DataError, match=r"not one of the model's 3 classes \(0 to 2\)"):
        mpq.evaluate(net, [(x, torch.full((6,), 3))], progress=False)

    class Next(nn.Module):
        """Predicts that each token is followed by the next number."""

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(8, 8)
            self.table.weight.data = 20 * torch.eye(8).roll(1, 1)

        def forward(self, input_ids):
            return SimpleNamespace(logits=self.table(input_ids))

    ids = torch.arange(6)[None].repeat(3, 1)
    texts = {"input_ids": ids, "labels": torch.tensor([2, 0, 1])[: len(ids)]}  # one label for a whole text
    whole = mpq.evaluate(Next(), [texts], forward=lambda m, b: m(b["input_ids"]).logits[:, -1], progress=False)
    assert whole.accuracy is not None
    measured = mpq.evaluate(Next(), [{"input_ids": ids, "labels": ids.clone()}], progress=False)
    assert measured.accuracy == 1.0


def test_labels_that_do_not_fit_are_named():
    model, x = nn.Linear(8, 4), torch.randn(6, 8)
    with pytest.warns(UserWarning, match=r"no accuracy of these batches: labels of shape \(5,\) don't fit .* \(6, 4\)"):
        found = mpq.evaluate(model, [(x, torch.zeros(5, dtype=torch.long))], reference=model, progress=False)
    assert (found.accuracy, found.kl) == (None, pytest.approx(0, abs=1e-6))
