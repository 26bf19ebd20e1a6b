"""What meets a weight: rows of inputs, windows of convolutions, and the statistics of both."""

import pytest
import torch
from random_tensors import drawn
from torch import nn

from mpq import input_statistics
from mpq.attention import PackedProjection
from mpq.calibration import Calibration
from mpq.errors import DataError
from mpq.input_statistics import gather, input_rows, token_weights
from mpq.view import ModelView, channels_first

LAYERS = [
    (nn.Linear(4, 3), (2, 5, 4)),
    (nn.Conv1d(4, 8, 3, padding=1, padding_mode="circular"), (3, 4, 9)),
    (nn.Conv2d(4, 6, 3, 2, 1, groups=2), (3, 4, 9, 8)),
    (nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2), (2, 4, 9, 8)),
    (nn.Conv2d(4, 4, 3, groups=4), (4, 9, 9)),
    (nn.Conv3d(2, 4, 2), (2, 2, 4, 5, 3)),
    (nn.ConvTranspose1d(4, 6, 4, 3, 2, dilation=2), (2, 4, 7)),
    (nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), (3, 4, 5, 6)),
    (nn.ConvTranspose2d(3, 2, 1, 2), (2, 3, 4, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "")
def test_rows_times_the_weight_are_the_outputs(layer, shape):
    layer, x = layer.double().requires_grad_(False), drawn(*shape)
    rows = torch.cat(list(input_rows(layer, [x])), 1)
    weight = channels_first(layer, layer.weight).flatten(1)
    found = (rows @ weight.reshape(len(rows), -1, weight.shape[1]).transpose(1, 2)).transpose(0, 1).flatten(1)
    expected = layer(x)
    if not isinstance(layer, nn.Linear):
        expected = (expected if expected.dim() == weight.dim() + layer.weight.dim() - 2 else expected[None]).movedim(
            1, -1
        )
    torch.testing.assert_close(found + layer.bias, expected.flatten(0, -2))


def test_rows_of_packed_attention_and_of_masked_tokens():
    packed = PackedProjection(nn.Parameter(torch.zeros(12, 4)), None)
    q, k = drawn(2, 5, 4).float(), drawn(2, 3, 4).float()
    (rows,) = input_rows(packed, [q, q, q])
    assert torch.equal(rows[0], q.flatten(0, 1))
    (rows,) = input_rows(packed, [q, k, k])
    assert torch.equal(rows[0], q.flatten(0, 1))
    assert torch.equal(rows[2, :6], k.flatten(0, 1))
    assert not rows[2, 6:].any()
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    (rows,) = input_rows(nn.Linear(4, 3), [q], mask)
    assert torch.equal(rows[0], torch.cat([q[0, :2], q[1, :4]]))


def test_token_weights_go_from_one_to_three_by_norm():
    rows = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [0.0, 2.5]]])
    assert token_weights(rows).tolist() == [3, 1, 2]
    assert token_weights(torch.ones(1, 4, 2)).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("batch", "size"), [(256, 64), (512, 32), (160, 112), (40, 63)])
def test_windows_of_large_inputs_are_taken_from_everywhere(batch, size):
    layer = nn.Conv2d(1, 1, 1)
    x = torch.arange(float(batch * size * size)).view(batch, 1, size, size)
    (rows,) = input_rows(layer, [x])
    assert 2**13 < rows.shape[1] <= 2**14
    places = rows.flatten().long()
    # Of rows, columns and samples alike.
    for found, n in ((places // size % size, size), (places % size, size), (places // size**2, batch)):
        counts = found.bincount(minlength=n)
        assert counts.min() > 0.9 * counts.float().mean() - 2
        assert counts.max() < 1.1 * counts.float().mean() + 2


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, (3, 2), 2, 1, groups=2, dilation=2),
        nn.ConvTranspose2d(4, 2, 3, 2, 1),
        nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_magnitudes_of_large_inputs_are_those_of_all_windows(layer, monkeypatch):
    x = drawn(6, 4, 11, 10).float()
    x[3, 2, 7, 5] = 500
    x[:, 0] = 0
    net = nn.Sequential(layer)
    view = ModelView(net)
    data = Calibration.load([x, -x[:2]], view.read)
    whole = gather(view, data, ["0"], progress=False)["0"]
    monkeypatch.setattr(input_statistics, "_PLACES", 16)
    found = gather(view, data, ["0"], progress=False)["0"]
    assert found.rows <= 2 * 16
    assert torch.equal(found.largest, whole.largest)
    assert found.largest.max() == 500
    torch.testing.assert_close(found.mean_abs, whole.mean_abs)
    chosen = torch.cat(list(input_rows(layer, [x])), 1)
    monkeypatch.undo()
    every = torch.cat(list(input_rows(layer, [x])), 1)
    assert any(torch.equal(chosen, every[:, ::step]) for step in range(2, every.shape[1]))


def test_what_is_not_finite_is_found_in_all_of_a_large_input(monkeypatch):
    monkeypatch.setattr(input_statistics, "_PLACES", 16)
    view = ModelView(nn.Sequential(nn.Conv2d(1, 1, 1)))
    x = torch.zeros(4, 1, 9, 9)
    data = Calibration.load([x], view.read)
    data.batches[0].args[0][1, 0, 3, 4] = torch.nan
    with pytest.raises(DataError, match="the input of layer '0' holds NaN"):
        gather(view, data, ["0"], progress=False)
