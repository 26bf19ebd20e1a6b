"""Latency, energy and memory as budgets on a device, together and solved exactly; estimates explained."""

import itertools
import json
import re
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.cost_models import COST_MODELS, default_costs, find_device
from mpq.cost_models.energy import layer_energy
from mpq.cost_models.latency import latency
from mpq.cost_models.workload import make_workload
from mpq.errors import BudgetError, FormatError, UnreachableError
from mpq.layers import LayerGraph, LayerSpec, Outside
from mpq.problem import Status
from mpq.quantizers import Scheme
from mpq.search import Ilp
from mpq.sensitivity import SensitivityTable
from mpq.space import make_space
from mpq.testing import tiny_network

SCHEMES = "W4A4,W8A8"


@pytest.fixture(scope="module")
def analysis():
    model, calib = tiny_network()
    return mpq.analyze(model, calib, SCHEMES, device="t4:batch=4", estimator="influence", progress=False)


def every_pick(analysis):
    return np.array(list(itertools.product(range(2), repeat=len(analysis.space.groups))))


def test_five_budgets_at_once_are_solved_exactly(analysis):
    picks = every_pick(analysis)
    names = ("latency", "size", "bitops", "energy", "peak_memory")
    costs = {n: np.array([analysis.cost(n).total(p) for p in picks]) for n in names}
    limits = {n: float(np.quantile(v, 0.7)) for n, v in costs.items()}
    fits = np.all([costs[n] <= limits[n] * (1 + 1e-9) for n in names], 0)
    problem = analysis.problem(tuple(mpq.Budget(n, v, False, f"{n}<={v}") for n, v in limits.items()))
    losses = np.array([problem.objective(p) for p in picks])
    found = analysis.solve(tuple(mpq.Budget(n, v, False, f"{n}<={v}") for n, v in limits.items()))
    assert found.status is Status.OPTIMAL
    assert found.objective == pytest.approx(losses[fits].min(), rel=1e-6)
    assert losses[fits].min() > losses.min()  # something binds


def test_conversions_between_neighbours_are_in_the_latency(analysis):
    cost = analysis.cost("latency")
    assert cost.pairs is not None
    uniform = [cost.total(p) for p in ([0] * len(cost.cost), [1] * len(cost.cost))]
    mixed = np.arange(len(cost.cost)) % 2
    assert cost.pairs.total(mixed) > 0
    assert cost.pairs.total([0] * len(mixed)) == 0
    assert cost.total(mixed) > min(uniform)


def test_frontier_over_latency_is_of_the_metric_itself(analysis):
    front = analysis.pareto("latency")
    picks = every_pick(analysis)
    cost = np.array([analysis.cost("latency").total(p) for p in picks])
    loss = analysis.table.predict_all(picks)
    np.testing.assert_allclose(front.cost, [analysis.cost("latency").total(p) for p in front.picks])
    best = [loss[cost <= c * (1 + 1e-12)].min() for c in front.cost]
    np.testing.assert_allclose(front.loss, best, rtol=1e-6)


def test_least_latency_under_a_loss_limit(analysis):
    picks = every_pick(analysis)
    loss = analysis.table.predict_all(picks)
    limit = float(np.quantile(loss, 0.3))
    cfg = analysis.smallest("latency", limit)
    cost = np.array([analysis.cost("latency").total(p) for p in picks])
    assert cfg.metrics["latency"]["value"] == pytest.approx(cost[loss <= limit].min(), rel=1e-5)


def test_results_state_what_the_device_takes(analysis):
    least, most = sorted(analysis.cost("latency").total([s] * len(analysis.space.groups)) for s in (0, 1))
    cfg = analysis.allocate(f"latency<={(least + most) / 2e-6}us")
    assert {"latency", "energy", "peak_memory"} <= set(cfg.metrics)
    assert cfg.metrics["latency"]["value"] <= (least + most) / 2 * (1 + 1e-9)
    assert cfg.metrics["latency"]["float"] == analysis.cost("latency").reference > 0


class Scores(nn.Module):
    """A product of activations: 3 x 4 x 3 multiply-accumulates that are in no layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.a(x) @ self.b(x).transpose(1, 2)).mean(1)


@pytest.mark.parametrize("device", ["hexagon_690", "zcu104", "bitfusion"])
def test_what_a_cost_leaves_out_reaches_the_config(device):
    """No float kernel: products outside the layers are not timed, and it is said."""
    found = mpq.analyze(Scores(), torch.randn(4, 3, 4), "W8A8", device=device, progress=False)
    cfg = found.allocate("size<=100%")
    noted = cfg.provenance["cost_notes"]
    assert any("36 multiply-accumulates outside the layers: no fp" in x for x in noted["latency"])
    assert noted["energy"] == ["36 multiply-accumulates outside the layers are not counted"]
    assert mpq.BitConfig.from_json(cfg.to_json()).cost_notes == cfg.cost_notes
    assert repr(cfg).splitlines()[-1] == f"  notes: {cfg.cost_notes}"


@pytest.mark.parametrize("device", ["x86_vnni", "hexagon_690"])
def test_what_runs_as_bytes_costs_as_bytes(device):
    """Neither has 4-bit activations, nor takes packed weights in convolutions; the file is smaller all the same."""
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 2))
    space = mpq.analyze(net, torch.randn(4, 4, 6, 6), SCHEMES, device=device, progress=False).space
    for name in ("energy", "peak_memory", "resident_bytes", "latency"):
        cost = COST_MODELS[name](space)
        narrow, wide = cost.rows[:, 0], cost.rows[:, 1]
        np.testing.assert_array_equal(narrow, wide, name)
        assert wide.any()
        assert name != "latency" or not cost.pairs.cost.any()  # both are bytes: nothing to convert
    assert COST_MODELS["size"](space).total([0, 0, 0]) < COST_MODELS["resident_bytes"](space).total([0, 0, 0])


def test_kernels_that_take_packed_weights_hold_them_packed():
    """A product on x86_vnni: int4 weights stay so, activations are bytes."""
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    space = mpq.analyze(net, torch.randn(4, 64), SCHEMES, device="x86_vnni", progress=False).space
    work = make_workload(space.layers)
    parts = layer_energy(work, space.schemes, space.device)
    for same in (parts.products, parts.sums, parts.activations):
        np.testing.assert_array_equal(same[:, 0], same[:, 1])
    assert (parts.weights[:, 0] < parts.weights[:, 1]).all()
    np.testing.assert_array_equal(COST_MODELS["resident_bytes"](space).cost, COST_MODELS["size"](space).cost)


def test_energy_notes_what_is_skipped():
    cost = mpq.analyze(Scores(), torch.randn(4, 3, 4), "W8A8", device="t4", skip=["a"], progress=False).cost("energy")
    assert cost.notes[0] == "48 multiply-accumulates in skipped layers are not counted"


def test_a_limit_below_reach_says_what_can_be_reached(analysis):
    with pytest.raises(UnreachableError, match="smallest reachable"):
        analysis.allocate("latency<=1ns")


def test_metrics_without_figures_say_so():
    model, calib = tiny_network()
    analysis = mpq.analyze(model, calib, SCHEMES, estimator="influence", progress=False)
    assert set(analysis.costs) == {"size", "avg_bits", "stored_bits", "bitops"}
    assert analysis.cost("energy").unit == "J"  # needs no device
    with pytest.raises(BudgetError, match="no figures for latency"):
        analysis.allocate("latency<=1ms")
    with pytest.raises(BudgetError, match="no figures for latency"):
        mpq.analyze(model, calib, SCHEMES, budget="latency<=1ms", progress=False)


def test_shares_of_a_float_model_that_does_not_run_are_refused():
    model, calib = tiny_network()
    analysis = mpq.analyze(model, calib, SCHEMES, device="zcu104", estimator="influence", progress=False)
    assert analysis.allocate("latency<=1s").metrics["latency"]["value"] < 1
    with pytest.raises(BudgetError, match="absolute limit"):
        analysis.allocate("latency<=50%")


def test_skipped_layers_cost_time_as_floats():
    model, calib = tiny_network()
    first = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))
    options = {"device": "t4", "estimator": "influence", "progress": False}
    whole = mpq.analyze(model, calib, SCHEMES, **options).cost("latency")
    part = mpq.analyze(model, calib, SCHEMES, skip=[first], **options).cost("latency")
    assert whole.constant == 0
    assert part.constant > 0
    assert part.reference == whole.reference
    with pytest.raises(BudgetError, match=f"{first}.*pin it"):
        mpq.analyze(model, calib, SCHEMES, skip=[first], **{**options, "device": "zcu104"})


@pytest.mark.parametrize("device", ["t4", "x86_vnni", "hexagon_690", "zcu104", "bitfusion"])
def test_default_costs_of_every_kind(device):
    model, calib = tiny_network()
    analysis = mpq.analyze(model, calib, "W8A8", device=device, estimator="influence", progress=False)
    found = default_costs(analysis.space)
    assert set(found) <= set(COST_MODELS)
    assert all(found[n].total([0] * len(analysis.space.groups)) > 0 for n in ("latency", "energy", "peak_memory"))


@pytest.mark.parametrize(
    ("device", "same"), [("x86_vnni", "W32"), ("cortex_m7", "W32"), ("hexagon_htp", "W16"), ("t4", "W16")]
)
def test_activations_in_the_float_format_are_those_that_stay_float(device, same):
    found = find_device(device)
    explicit = found.kernel(Scheme.parse(f"{same}A{same[1:]}"))
    assert explicit is not None
    assert explicit == found.kernel(Scheme.parse(same))


def test_estimates_explain_what_binds():
    model, calib = tiny_network()
    found = mpq.estimate(model, "t4", "W4A4,W8A8,W2A2", calib[0])
    assert [str(s) for s in found.schemes] == ["W4A4", "W8A8"]  # no kernel for the third
    text = found.explain(found.layers[0])
    assert "bound by" in text
    assert "W4A4" in text
    assert len(repr(found).splitlines()) == len(found.layers) + 3
    cfg = mpq.analyze(model, calib, SCHEMES, device="t4", estimator="influence", progress=False).allocate("avg_bits<=8")
    columns = [found.schemes.index(cfg[n].scheme) for n in found.layers]
    assert found.seconds(cfg) == pytest.approx(found.times.total[np.arange(len(columns)), columns].sum())
    assert len(found.plot().lines) == 2
    with pytest.raises(BudgetError, match="no layer is called"):
        found.explain("nothing")
    with pytest.raises(BudgetError, match="none of W2A2"):
        mpq.estimate(model, "t4", "W2A2", calib[0])
    with pytest.raises(BudgetError, match="pass batch"):
        mpq.estimate(model, "t4", "W4A4")


def test_one_analysis_serves_every_device():
    model, calib = tiny_network()
    options = {"estimator": "influence", "progress": False}
    every = mpq.analyze(model, calib, "W2A8,W4A4,W8A8", **options)
    moved = every.on("t4:batch=4")
    assert [str(s) for s in moved.space.schemes] == ["W4A4", "W8A8"]
    alone = mpq.analyze(model, calib, "W4A4,W8A8", device="t4:batch=4", **options)
    np.testing.assert_array_equal(moved.cost("latency").cost, alone.cost("latency").cost)
    picks = every_pick(alone)
    np.testing.assert_allclose(moved.table.loss, alone.table.loss)
    assert moved.provenance["device"] == "t4"
    assert moved.table.predict_all(picks).shape == (len(picks),)
    assert every.costs.keys() == {"size", "avg_bits", "stored_bits", "bitops"}  # the first is as it was
    with pytest.raises(FormatError, match="no scheme with a kernel on t4"):
        mpq.analyze(model, calib, "W2A8,W3A8", **options).on("t4")


def test_useless_schemes_leave_the_space():
    model, calib = tiny_network()
    every = mpq.analyze(model, calib, "W2A8,W4A8,W8A8", estimator="influence", progress=False)
    kept = every.on("x86_vnni", drop_useless=True)
    # No arithmetic is narrower than int8 there, and such small layers are bound by their set-up.
    assert kept.space.allowed.tolist() == [[False, False, True]] * len(every.space.groups)
    assert every.on("x86_vnni").space.allowed.all()
    allowed = every.space.allowed.copy()
    allowed[0, 2] = False  # what a layer may not have is no reason to drop others
    some = replace(every, space=replace(every.space, allowed=allowed)).on("x86_vnni", drop_useless=True)
    assert some.space.allowed.tolist() == [[False, True, False], *[[False, False, True]] * (len(allowed) - 1)]


def test_frontier_says_what_it_counts(alternating):
    front = alternating.pareto("latency")
    data = json.loads(front.to_json())
    assert (front.kind, data["interactions"], data["conversions"]) == ("conversion-aware", False, True)
    assert "conversion-aware frontier" in repr(front)
    data = json.loads(alternating.pareto("size").to_json())
    assert (data["interactions"], data["conversions"]) == (False, False)


@pytest.fixture(scope="module")
def alternating(analysis):
    """With losses made up so that neighbours like different formats."""
    loss = np.where([[True, False], [False, True]] * 2, 0.0, [[4.0], [3.0], [2.0], [1.0]])
    names = analysis.table.groups, analysis.table.schemes
    table = SensitivityTable(*names, loss, np.zeros((4, 2)), provenance=analysis.table.provenance)
    return replace(analysis, table=table)


def test_rows_of_an_explanation_count_conversions(alternating):
    analysis, cost = alternating, alternating.cost("latency")
    loose, found = analysis.explain("latency<=1ms"), analysis.explain("latency<=12us")
    assert not loose.prices["latency"].binding
    assert "does not bind" in repr(loose)
    assert found.prices["latency"].binding
    assert "latency 11.1" in repr(found)
    assert "does not bind" not in repr(found)
    assert cost.pairs.total(found.pick) > 0
    rows = found.table()
    assert sum(r["costs"]["latency"] for r in rows) + cost.constant == pytest.approx(cost.total(found.pick))
    for g, row in enumerate(rows):
        pick = found.pick.copy()
        pick[g] = 1 - pick[g]
        assert row["runner_up_costs"]["latency"] == pytest.approx(cost.total(pick) - cost.total(found.pick))


def test_feasibility_counts_conversions(alternating):
    """The first two layers may have one format each: they convert whatever is picked."""
    allowed = np.array([[True, False], [False, True], [True, True], [True, True]])
    analysis = replace(alternating, space=replace(alternating.space, allowed=allowed))
    cost = analysis.cost("latency")
    picks = [p for p in every_pick(analysis) if allowed[np.arange(4), p].all()]
    totals = np.array([cost.total(p) for p in picks])
    limit = (totals.min() + cost.metric(cost.cost_floor(allowed))) / 2  # between, without conversions it is met
    budget = f"latency<={limit:.9g}s"
    found = analysis.feasibility(budget)
    reach = found.metrics["latency"]
    assert reach.least == pytest.approx(totals.min())
    assert reach.most >= totals.max() * (1 - 1e-9)
    assert found.binding == ("latency",)
    assert found.relaxation == pytest.approx(totals.min() / limit - 1)
    assert found.proven
    assert "is below the smallest reachable" in found.message
    assert "together" not in found.message
    assert "with what neighbours add to latency" in Ilp().solve(analysis.problem(analysis.parse(budget))).message


def test_relaxed_limits_can_be_typed_as_they_are(alternating):
    size, energy = (alternating.cost(m) for m in ("size", "energy"))
    least = [min(c.total(p) for p in every_pick(alternating)) for c in (size, energy)]
    found = alternating.feasibility(f"energy<={least[1] * 0.9e9}nJ,latency<=7us,size<={least[0] * 2:.0f}")
    assert not found.feasible
    limits = re.search(r"all limits by [\d.]+% \((.*)\)", found.message).group(1)
    assert alternating.feasibility(limits).feasible
    assert "size<=" in limits
    assert re.search(r"latency<=[\d.]+us", limits)
    assert re.search(r"energy<=[\d.]+[munp]J", limits)


def test_limits_that_fit_with_other_neighbours_are_no_conflict(alternating):
    """What takes least without conversions misses the limits with them, but another config meets both."""
    picks, names = every_pick(alternating), ("latency", "size")
    totals = np.array([[alternating.cost(m).total(p) for m in names] for p in picks])
    for limits in totals * (1 + 1e-9):
        budget = f"latency<={limits[0] * 1e6:.12g}us,size<={limits[1]:.12g}"
        assert alternating.feasibility(budget).feasible


def test_a_metric_that_was_asked_for_changes_no_other_config():
    model, calib = tiny_network()
    first = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))
    analysis = mpq.analyze(model, calib, SCHEMES, skip=[first], estimator="influence", progress=False)
    before = analysis.allocate("avg_bits<=6")
    assert analysis.cost("energy").notes  # of what is skipped
    assert analysis.allocate("avg_bits<=6").to_json() == before.to_json()
    assert "energy" in analysis.allocate("energy<=90%").metrics


def test_products_outside_the_layers_grow_with_the_square_of_the_tokens():
    layers = [LayerSpec("fc", "linear", (64, 64), (64, 64), (16, 64), (16, 64), 16 * 64 * 64, 64 * 64, 1, 0, 0)]
    attention = Outside("scores", 0, 0, 16 * 16 * 64, "a product of two activations", "products")
    flow = nx.DiGraph()
    flow.add_node("fc")
    graph = LayerGraph(tuple(layers), (attention,), flow, "hooks", 16 * 64 * 64 + attention.macs)

    def outside(tokens):
        space = make_space(graph, "W8A8", device=find_device(f"x86_vnni:tokens={tokens}"))
        cost = latency(space)
        return cost.constant, cost.notes

    plain, noted = outside(16)
    grown, said = outside(16 * 64)
    assert any(f"{attention.macs:,} multiply-accumulates outside" in n for n in noted)
    assert any(f"{attention.macs * 64**2:,} multiply-accumulates outside" in n for n in said)
    assert grown > 64 * 16 * plain  # each product is quicker in a larger kernel, but there are 4,096 times as many
