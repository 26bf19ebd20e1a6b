import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.calibration import Calibration
from mpq.cost_models import find_device
from mpq.cost_models.liveness import Tensor, tensors
from mpq.cost_models.memory import active_bytes, peak_memory, resident_bytes
from mpq.cost_models.size import size
from mpq.cost_models.table import Cost
from mpq.errors import BudgetError
from mpq.space import make_space
from mpq.testing import CostContract
from mpq.trace import trace
from mpq.view import ModelView


class TestResident(CostContract):
    @pytest.fixture
    def cost_model(self):
        return resident_bytes


class TestActive(CostContract):
    @pytest.fixture
    def cost_model(self):
        return active_bytes


class TestPeak(CostContract):
    @pytest.fixture
    def cost_model(self):
        return peak_memory


def space_of(net, data, schemes, device="generic", **options):
    view = ModelView(net.eval())
    calib = Calibration.load(data, view.read)
    graph = trace(view, calib.batches[0])
    return make_space(graph, schemes, device=find_device(device), **options)


class Residual(nn.Module):
    """Two blocks; the second changes the width through a convolution on its shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.a, self.b = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)
        self.c, self.d, self.down = nn.Conv2d(4, 5, 1), nn.Conv2d(5, 8, 1), nn.Conv2d(4, 8, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        x = torch.relu(self.d(torch.relu(self.c(x))) + self.down(x))
        return self.fc(x.mean((2, 3)))


class Dense(nn.Module):
    """Outputs are concatenated."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(7, 2), nn.Linear(9, 1)

    def forward(self, x):
        x = torch.cat([x, self.a(x)], 1)
        x = torch.cat([x, self.b(x)], 1)
        return self.c(x)


class Experts(nn.Module):
    """Four experts of which each token sees one."""

    def __init__(self):
        super().__init__()
        self.embed, self.up = nn.Embedding(10, 4), nn.Linear(4, 6)
        self.experts = nn.ModuleList([nn.Linear(6, 6, bias=False) for _ in range(4)])
        self.head = nn.Linear(6, 5)

    def forward(self, ids):
        x = self.up(self.embed(ids))
        flat = x.reshape(-1, 6)
        parts = [expert(flat[i::4]) for i, expert in enumerate(self.experts)]
        return self.head(torch.cat(parts).reshape(x.shape))


@pytest.fixture(scope="module")
def residual():
    return space_of(Residual(), torch.randn(2, 1, 4, 4), "W8A8,W4A4,W8")


def test_tensors_of_residual_blocks(residual):
    """The input of the first block is carried until its sum; the convolution on the shortcut gives a piece."""
    names = [x.name for x in residual.graph]
    assert names == ["stem", "a", "b", "c", "d", "down", "fc"]
    assert tensors(residual.graph) == (
        Tensor((0,), (), -1, 0, ()),
        Tensor((1,), (0,), 0, 2, (0,)),
        Tensor((2,), (1,), 1, 2, (1,)),
        Tensor((3, 5), (2,), 2, 5, (2,)),
        Tensor((4,), (3,), 3, 4, (3,)),
        Tensor((6,), (4, 5), 5, 6, (4, 5)),
    )


def test_peak_of_residual_blocks_by_hand(residual):
    """Elements at each step, 16 positions: the most is at `down`: input 4, piece of d 8, output 8."""
    by_step = [16 * (1 + 4), 16 * (4 + 6), 16 * (6 + 4 + 4), 16 * (4 + 5), 16 * (4 + 5 + 8), 16 * (4 + 8 + 8), 8 + 3]
    cost = peak_memory(residual)
    groups = [[x.name for x in g.layers] for g in residual.groups]
    assert groups == [["stem"], ["a"], ["b"], ["c", "down"], ["d"], ["fc"]]
    assert cost.reference == 4 * max(by_step)
    assert cost.total([0] * 6) == max(by_step)
    assert cost.total([1] * 6) == max(by_step) / 2
    assert cost.total([2] * 6) == 4 * max(by_step)  # weights only: activations stay float
    # The input of the second block in 4 bits, its two outputs in the 8 bits of the classifier that reads them.
    assert cost.total([0, 0, 0, 1, 0, 0]) == 16 * (4 / 2 + 8 + 8)
    # Narrow outputs move the peak to `d`: input 5 and the carried 4 in 8 bits, output in 4.
    assert cost.total([0, 0, 0, 0, 0, 1]) == max(16 * (4 + 5 + 4), 16 * (4 + 8), 16 * 14)


def by_steps(space, pick):
    """The slow twin: every step on its own, every tensor asked whether it is there."""
    graph, group_of = space.graph, {x.name: g for g, group in enumerate(space.groups) for x in group.layers}
    peak, seen = 0.0, tensors(graph)
    for step in range(len(graph)):
        total = 0.0
        for t in seen:
            act = space.schemes[pick[group_of[graph.layers[t.readers[0]].name]]].activation
            width = (act.bits if act else 32) / 8
            if t.ready < step <= t.last:
                total += width * math.prod(graph.layers[t.readers[0]].input_shape)
            total += sum(width * math.prod(graph.layers[p].output_shape) for p in t.pieces if p <= step <= t.ready)
        read = {p for t in seen for p in t.pieces}
        total += sum(4 * math.prod(x.output_shape) for i, x in enumerate(graph) if i not in read and i <= step)
        peak = max(peak, total)
    return peak


def test_no_row_that_matters_is_left_out(residual):
    cost = peak_memory(residual)
    assert cost.rows.shape[2] < len(residual.graph)
    rng = np.random.default_rng(0)
    for pick in rng.integers(0, 3, (60, len(residual.groups))):
        assert cost.total(pick) == by_steps(residual, pick)


def test_concatenations_add_up():
    space = space_of(Dense(), torch.randn(2, 4), "W8A8,W4A4")
    found = tensors(space.graph)
    assert [(t.pieces, t.ready) for t in found] == [((), -1), ((0,), 0), ((1,), 1)]
    assert peak_memory(space).total([0] * 3) == max(4 + 3, 7 + 2, 9 + 4)  # the result stays float


def test_skipped_layers_read_floats(residual):
    skipped = make_space(residual.graph, "W8A8", skip=["down", "c"], device=find_device("generic"))
    assert peak_memory(skipped).total([0] * len(skipped.groups)) == 16 * (4 * 4 + 8 + 8)


def test_batch_counts(residual):
    twice = replace(residual, device=find_device("generic:batch=3"))
    np.testing.assert_allclose(peak_memory(twice).rows, 3 * peak_memory(residual).rows)
    assert peak_memory(twice).reference == 3 * peak_memory(residual).reference


def test_a_peak_can_be_limited_explained_and_not_minimized():
    torch.manual_seed(0)
    analysis = mpq.analyze(Residual().eval(), torch.randn(8, 1, 4, 4), "W8A8,W4A4", progress=False)
    cost = analysis.cost("peak_memory")
    assert cost.rows.shape[2] > 1
    limit = 16 * (4 / 2 + 8 + 8)
    budgets = f"peak_memory<={limit},size<=50%"
    picks, sizes = list(product((0, 1), repeat=len(analysis.space.groups))), analysis.costs["size"]
    fits = [p for p in picks if cost.total(p) <= limit and sizes.total(p) <= sizes.reference / 2]
    problem = analysis.problem(analysis.parse(budgets))
    assert {p for p in picks if problem.feasible(p)} == set(fits)
    solution = analysis.solve(analysis.parse(budgets))
    assert 0 < len(fits) < len(picks)
    assert solution.objective == pytest.approx(min(problem.objective(p) for p in fits))
    explanation = analysis.explain(f"peak_memory<={limit}")
    parts = sum(row["costs"]["peak_memory"] for row in explanation.table())
    assert parts <= cost.total(explanation.pick) <= parts + 4 * 3  # the output of three floats comes on top
    assert "peak_memory" in str(explanation)
    with pytest.raises(BudgetError, match=r"peak_memory is the largest of \d sums; set a budget for it instead"):
        analysis.pareto("peak_memory")
    with pytest.raises(BudgetError, match="peak_memory"):
        analysis.allocate("peak_memory<=10")
    assert not analysis.feasibility("peak_memory<=10,size<=50%").feasible


def test_a_peak_of_one_row_has_a_frontier():
    net = nn.Sequential(nn.Linear(400, 40), nn.ReLU(), nn.Linear(40, 3)).eval()
    analysis = mpq.analyze(net, torch.randn(4, 400), "W8A8,W4A4", progress=False)
    assert analysis.cost("peak_memory").rows.shape[2] == 1
    assert analysis.pareto("peak_memory").cost.min() == (400 + 40) / 2


def test_costs_of_several_rows():
    rows = np.array([[[1.0, 5.0], [3.0, 2.0]], [[2.0, 0.0], [4.0, 4.0]]])
    cost = Cost("peak", "bytes", rows, np.array([1.0, 0.0]), 2.0, 10.0)
    assert cost.total([0, 0]) == max(1 + 2 + 1, 5 + 0) / 2
    assert cost.total([1, 1]) == max(3 + 4 + 1, 2 + 4) / 2
    constraint = cost.constraint(3.0)
    assert constraint.limit.tolist() == [5.0, 6.0]
    allowed = np.ones((2, 2), bool)
    assert cost.cost_floor(allowed).tolist() == [3.0, 2.0]
    assert cost.cost_ceiling(allowed).tolist() == [7.0, 9.0]
    assert cost.part(0, 1, [0, 0]) == 2.0 / 2  # of the second row, which decides for this pick
    one = Cost("sum", "bytes", rows[..., 0], 1.0, 2.0, 10.0)
    assert one.total([1, 0]) == (3 + 2 + 1) / 2
    assert one.constraint(3.0).limit.tolist() == [5.0]
    one.require_sum()


def test_alignment_rounds_each_tensor_up():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 5, bias=False))
    space = space_of(net, torch.randn(2, 3), "W4A8,W8A8")
    aligned = replace(space, device=replace(space.device, alignment=64))
    act = 4 + 1
    assert resident_bytes(aligned).cost.tolist() == [[64 + act, 64 + act], [64 + act, 64 + act]]
    np.testing.assert_array_equal(resident_bytes(space).cost, size(space).cost)
    assert resident_bytes(space).reference == size(space).reference


def test_tied_weights_are_resident_once_and_active_by_use():
    net = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    net[1].weight = net[0].weight
    space = space_of(net, [torch.randint(0, 8, (2, 3))], "W8")
    stored = 8 * 4 + 8 * 4  # codes and one scale a row
    assert resident_bytes(space).cost.tolist() == [[stored]]
    assert active_bytes(space).cost.tolist() == [[stored * (1 / 8 + 1)]]  # one row looked up, all rows multiplied


def test_a_token_reads_the_experts_that_it_is_routed_to():
    space = space_of(Experts(), [torch.randint(0, 10, (2, 8))], "W8")
    cost = dict(zip((g.name for g in space.groups), active_bytes(space).cost[:, 0], strict=True))
    whole = dict(zip((g.name for g in space.groups), resident_bytes(space).cost[:, 0], strict=True))
    experts = [name for name in cost if name.startswith("experts")]
    assert len(experts) == 4
    assert sum(cost[e] for e in experts) == pytest.approx(whole[experts[0]])
    assert cost["embed"] == pytest.approx(whole["embed"] / 10)
    assert cost["up"] == whole["up"]
