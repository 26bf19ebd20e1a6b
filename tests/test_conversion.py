from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from mpq.calibration import Calibration
from mpq.cost_models import find_device
from mpq.cost_models.conversion import conversions
from mpq.cost_models.devices import Memory
from mpq.errors import BudgetError
from mpq.space import make_space
from mpq.trace import trace
from mpq.view import ModelView

BANDWIDTH, LAUNCH = 1e9, 1e-5
DEVICE = replace(find_device("generic"), memory=(Memory("dram", 1e9, BANDWIDTH),))


class Branches(nn.Module):
    """A sum of two branches that read the same tensor, then a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(4, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(self.left(x) + self.right(x))


def space_of(net, data, schemes, device=DEVICE, **options):
    view = ModelView(net.eval())
    calib = Calibration.load(data, view.read)
    return make_space(trace(view, calib.batches[0]), schemes, device=device, **options)


def passing(elements, have, want):
    """Seconds of reading a tensor in one width and writing it in another."""
    return LAUNCH + elements * (have + want) / 8 / BANDWIDTH


def test_a_chain_by_hand():
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    found = conversions(space_of(net, torch.randn(4, 3), "W8A8,W4A4,W8"), LAUNCH)
    assert found.groups.tolist() == [[0, 1]]
    bits = [8, 4, 32]
    expected = [[0 if s == t else passing(5, s, t) for t in bits] for s in bits]
    np.testing.assert_allclose(found.cost[0], expected)
    # The input comes as floats; what reads floats needs no pass, and what the last layer leaves is not read.
    np.testing.assert_allclose(found.own, [[passing(3, 32, 8), passing(3, 32, 4), 0], [0, 0, 0]])


def test_same_formats_cost_nothing_and_weights_do_not_matter():
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    found = conversions(space_of(net, torch.randn(4, 3), "W8A8,W2A8,W4:g2A8"), LAUNCH)
    assert not found.cost.any()
    np.testing.assert_allclose(found.own[0], passing(3, 32, 8))


def test_symmetric_and_asymmetric_codes_differ():
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    found = conversions(space_of(net, torch.randn(4, 3), "W8A8,W8A8:sym"), LAUNCH)
    np.testing.assert_allclose(found.cost[0], [[0, passing(5, 8, 8)], [passing(5, 8, 8), 0]])


def test_a_tensor_is_converted_once_for_its_readers_and_a_sum_in_each_part():
    space = space_of(Branches(), torch.randn(4, 3), "W8A8,W4A4")
    assert [[x.name for x in g.layers] for g in space.groups] == [["first"], ["left", "right"], ["last"]]
    found = conversions(space, LAUNCH)
    assert found.groups.tolist() == [[0, 1], [1, 2]]
    assert found.cost[0, 0, 1] == pytest.approx(passing(4, 8, 4))
    assert found.cost[1, 1, 0] == pytest.approx(2 * passing(6, 4, 8))


class ReadAlone(nn.Module):
    """A sum whose operands are each read alone too, as in feature pyramids."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)
        self.c, self.d, self.e = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x, y):
        a, b = self.a(x), self.b(y)
        return self.c(a) + self.d(b) + self.e(a + b)


def test_a_sum_of_tensors_that_are_all_read_alone_converts_each_of_them():
    data = [(torch.randn(2, 3), torch.randn(2, 3))]
    space = space_of(ReadAlone(), data, "W8A8,W4A4")
    names = [g.name for g in space.groups]
    found = conversions(space, LAUNCH)
    pairs = {(names[g], names[h]): cost for (g, h), cost in zip(found.groups.tolist(), found.cost, strict=True)}
    assert set(pairs) == {("a", "c"), ("b", "d"), ("a", "e"), ("b", "e")}
    np.testing.assert_allclose(pairs["b", "e"], [[0, passing(4, 8, 4)], [passing(4, 4, 8), 0]])
    assert not found.own[names.index("e")].any()  # the sum is no float input


def test_pairs_go_from_lower_to_higher_groups():
    """A group can read what a later one writes: the matrix is turned round."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2))
    space = space_of(net, torch.randn(4, 4), "W8A8,W4A4,W8", groups=[["0", "2"]])
    found = conversions(space, LAUNCH)
    assert found.groups.tolist() == [[0, 1], [0, 2]]
    there = [[0 if s == t else passing(4, s, t) for t in (8, 4, 32)] for s in (8, 4, 32)]
    back = [[0 if s == t else passing(6, s, t) for t in (8, 4, 32)] for s in (8, 4, 32)]
    np.testing.assert_allclose(found.cost[0], np.array(there) + np.array(back).T)


def test_skipped_layers_and_embeddings_stay_float():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 2))
    space = space_of(net, [torch.randint(0, 9, (2, 3))], "W8A8,W4A4", skip=["2"])
    found = conversions(space, LAUNCH)
    assert not len(found.groups)
    tokens = 3
    into = [passing(4 * tokens, 32, b) for b in (8, 4)]  # the embedding writes floats
    out = [passing(5 * tokens, b, 32) for b in (8, 4)]  # the skipped layer reads floats ...
    last = [passing(6 * tokens, 32, b) for b in (8, 4)]  # ... and writes them
    np.testing.assert_allclose(found.own, [[0, 0], np.add(into, out), last])


def test_total_of_a_pick_is_the_sum_of_its_passes():
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7), nn.Linear(7, 2))
    found = conversions(space_of(net, torch.randn(4, 3), "W8A8,W4A4"), LAUNCH)
    bits = [8, 4]
    for pick in product((0, 1), repeat=3):
        widths = [32, *(bits[s] for s in pick)]
        sizes = (3, 5, 7)
        expected = sum(passing(n, a, b) for n, a, b in zip(sizes, widths, widths[1:], strict=False) if a != b)
        assert found.total(pick) == pytest.approx(expected)


def test_faster_memory_and_smaller_batches_cost_less():
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    space = space_of(net, torch.randn(4, 3), "W8A8,W4A4")
    base = conversions(space, LAUNCH)
    faster = replace(DEVICE, memory=(Memory("dram", 1e9, 2 * BANDWIDTH),))
    assert (conversions(replace(space, device=faster), LAUNCH).cost <= base.cost).all()
    assert (conversions(replace(space, device=DEVICE.at(batch=2)), LAUNCH).cost >= base.cost).all()


def test_a_device_without_bandwidth_is_refused():
    space = space_of(nn.Sequential(nn.Linear(3, 5)), torch.randn(4, 3), "W8A8", find_device("generic"))
    with pytest.raises(BudgetError, match="'generic' has no memory bandwidth"):
        conversions(space)
