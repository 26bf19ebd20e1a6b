import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.errors import BudgetError, ConfigError, DataError, GraphError, MpqError
from mpq.problem import Problem
from mpq.search import Exhaustive


def test_budget_is_met_and_proven(analysis):
    cfg = analysis.allocate("avg_bits<=4")
    assert cfg.avg_bits <= 4
    assert cfg.solver["status"] == "optimal"
    assert cfg.solver["gap"] == 0
    assert cfg["layer1.0.conv1"].weight.bits in (2, 3, 4, 8)
    assert cfg["layer1.0.conv1"].activation.bits == 8
    assert cfg.predicted["loss"] < analysis.uniform("W4A8").predicted["loss"]


def test_optimum_equals_exhaustive_search_on_a_part(analysis):
    rows = slice(0, 7)
    cost = analysis.costs["size"].cost[rows]
    problem = Problem(analysis.table.loss[rows], (mpq.problem.Constraint("size", "B", cost, cost[:, 2].sum()),))
    from mpq.search import Knapsack

    assert Knapsack().solve(problem).objective == pytest.approx(Exhaustive().solve(problem).objective, rel=1e-12)


def test_several_budgets_hold_at_once(analysis):
    cfg = analysis.allocate(["size<=13%", "bitops<=3%"])
    assert cfg.size_bytes <= 0.13 * cfg.metrics["size"]["float"]
    assert cfg.metrics["bitops"]["value"] <= 0.03 * cfg.metrics["bitops"]["float"]
    assert cfg.solver["name"] == "interaction"
    assert cfg.predicted["loss"] >= analysis.allocate("size<=13%").predicted["loss"]


@pytest.mark.parametrize("solver", ["knapsack", "ilp"])
def test_solvers_agree(analysis, solver):
    with pytest.raises(MpqError, match="takes no interactions"):
        analysis.allocate("size<=12%", solver=solver)
    separable = replace(analysis, table=replace(analysis.table, interactions=None))
    cfg = separable.allocate("size<=12%", solver=solver)
    assert cfg.solver["name"] == solver
    assert cfg.predicted["loss"] == pytest.approx(separable.allocate("size<=12%").predicted["loss"], rel=1e-9)


def test_solving_with_interactions_is_no_worse_than_without(analysis):
    separable = replace(analysis, table=replace(analysis.table, interactions=None))
    for budget in ("avg_bits<=2.5", "avg_bits<=3", "avg_bits<=4"):
        cfg = analysis.allocate(budget)
        pick = [analysis.table.schemes.index(str(separable.allocate(budget)[n].scheme)) for n in analysis.table.groups]
        assert cfg.predicted["with_interactions"] <= analysis.table.predict(pick) + 1e-15


def test_unreachable_budget_says_what_is_reachable(analysis):
    with pytest.raises(
        BudgetError,
        match=r"size<=5% .* is below the smallest reachable 77\.25 kB \(7\.1%\)\. "
        r"Smallest reachable: size 77\.25 kB.*avg_bits 2",
    ):
        analysis.allocate("size<=5%")


def test_budgets_that_exclude_each_other_say_so(example):
    """Cheap bits with expensive activations against the reverse: each budget alone can be met."""
    model, calib, _ = example
    quick = {"estimator": "weight_sqnr", "progress": False}
    analysis = mpq.analyze(model, calib[:1], "W2A16,W8A4", **quick)
    low_size, low_ops = (analysis.uniform(s) for s in ("W2A16", "W8A4"))
    middle = (low_size.metrics["bitops"]["value"] + low_ops.metrics["bitops"]["value"]) / 2
    assert low_size.metrics["bitops"]["value"] == low_ops.metrics["bitops"]["value"] == middle
    analysis = mpq.analyze(model, calib[:1], "W2A16,W4A4", **quick)
    low_size, low_ops = (analysis.uniform(s) for s in ("W2A16", "W4A4"))
    budgets = [f"size<={low_size.size_bytes:.0f}", f"bitops<={low_ops.metrics['bitops']['value']:.0f}"]
    with pytest.raises(BudgetError, match=r"can be met alone but not together; under the others, size reaches"):
        analysis.allocate(budgets)


def test_latency_needs_a_cost_model(example, analysis):
    with pytest.raises(BudgetError, match="no figures for latency"):
        analysis.allocate("latency<=3ms")
    with pytest.raises(BudgetError, match="no figures for latency"):
        mpq.allocate(example[0], example[1], "latency<=3ms")


def test_pin_skip_and_groups(example):
    model, calib, _ = example
    analysis = mpq.analyze(
        model,
        calib[:1],
        "W2A8,W4A8",
        pin={"conv1": "W8A8"},
        skip=["fc"],
        groups=[["layer1.*"]],
        estimator="influence",
        progress=False,
    )
    cfg = analysis.allocate("avg_bits<=3")
    assert cfg["conv1"].weight.bits == 8
    assert "fc" not in cfg
    assert next(o.reason for o in cfg.outside if o.name == "fc") == "skipped by the user"
    assert len({str(cfg[n].scheme) for n in cfg if n.startswith("layer1.")}) == 1
    assert cfg["layer1.2.conv2"].group == "layer1.0.conv1"
    quantized = mpq.quantize(model, cfg)
    assert torch.equal(quantized.fc.weight, model.fc.weight)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pin": {"conv9": "W8A8"}}, "no quantizable layer is called 'conv9'"),
        ({"skip": ["layer9.*"]}, "no quantizable layer is called"),
        ({"groups": [["conv1", "nope"]]}, "no quantizable layer is called 'nope'"),
        ({"skip": ["*"]}, "every layer is skipped"),
        (
            {"pin": {"layer1.0.conv1": "W2A8", "layer1.0.conv2": "W4A8"}, "groups": [["layer1.0.*"]]},
            "must share a scheme",
        ),
    ],
)
def test_bad_layer_names_are_refused(example, options, match):
    model, calib, _ = example
    with pytest.raises(GraphError, match=match):
        mpq.analyze(model, calib[:1], progress=False, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"estimator": "magic"}, "unknown estimator 'magic'; known: anchored, influence, hessian_trace"),
        ({"loss": "l7"}, "unknown loss 'l7'"),
        ({"device": "gpu9000"}, "unknown device"),
        ({"weight_range": "median"}, "unknown range method"),
        ({"schemes": "W4A8,huh"}, "'huh' is not a scheme"),
        ({"loss": lambda out, batch: out}, "must return a scalar"),
        ({"loss": lambda out, batch: out.sum() * float("nan")}, "callable loss of the float model is NaN"),
    ],
)
def test_bad_options_are_refused(example, options, match):
    with pytest.raises(mpq.MpqError, match=match):
        mpq.analyze(example[0], example[1][:1], progress=False, **options)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], "the data is empty"),
        (iter(()), "the data is empty"),
        ([torch.zeros(0, 1, 28, 28)], "the data is empty"),
        ([torch.randn(2, 3, 28, 28)], r"can't run a batch of inputs \[\(2, 3, 28, 28\)"),
        ([torch.full((2, 1, 28, 28), float("nan"))], "batch 0 of the data holds NaN"),
        (["text"], "must be a tensor"),
        ([{"pixels": torch.randn(2, 1, 28, 28)}], "can't run a batch"),
        ([torch.randn(2, 1, 28, 28).double()], r"weights are torch\.float32: convert the batch, such as x\.to\(torch"),
        ([torch.zeros(2, 1, 28, 28, dtype=torch.uint8)], r"weights are torch\.float32: convert the batch"),
    ],
)
def test_bad_data_is_refused(example, data, match):
    with pytest.raises(DataError, match=match):
        mpq.analyze(example[0], data, progress=False)


def test_quantized_models_are_refused(example, analysis):
    quantized = mpq.quantize(example[0], analysis.allocate("avg_bits<=4"))
    with pytest.raises(ConfigError, match="quantized already; pass the float model"):
        mpq.allocate(quantized, example[1][:1], "avg_bits<=4", progress=False)


def test_warnings_name_the_users_line():
    model, batch = nn.Sequential(nn.Linear(4, 3)), torch.ones(3, 4)
    with pytest.warns(UserWarning, match="all 3 calibration samples have the same inputs") as caught:
        mpq.allocate(model, [batch[:2], batch[:1]], "avg_bits<=4", "W4", estimator="weight_sqnr", progress=False)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mpq.analyze(model, [batch, 2 * batch], "W4", estimator="weight_sqnr", progress=False)


def test_nan_weights_activations_and_outputs_are_named(example):
    calib = example[1][:1]
    model = mpq.bundled.resnet20()
    with torch.no_grad():
        model.layer2[0].conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(mpq.MpqError, match="NaN or infinity"):
        mpq.analyze(model, calib, progress=False)

    class Hidden(nn.Module):
        """Infinite inside, finite outside."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.b(self.a(x) / 0.0).nan_to_num(0, 0, 0)

    with pytest.raises(DataError, match="the input of layer 'b': it holds NaN or infinity"):
        mpq.analyze(Hidden(), torch.randn(4, 3), progress=False)
    broken = nn.Sequential(nn.Linear(3, 2))
    broken[0].bias.data[0] = float("inf")
    with pytest.raises(DataError, match="output holds NaN or infinity on the first calibration batch"):
        mpq.analyze(broken, torch.randn(4, 3), progress=False)
    dead = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    dead[0].weight.data[0, 0] = float("inf")
    with pytest.raises(mpq.MpqError, match="NaN or infinity"):
        mpq.analyze(dead, torch.zeros(4, 3), progress=False)


def test_generators_are_consumed_only_as_far_as_needed(example):
    model, calib, _ = example
    seen = []

    def endless():
        while True:
            seen.append(1)
            yield calib[0]

    mpq.analyze(model, endless(), "W4,W8", max_samples=128, estimator="influence", progress=False)
    assert len(seen) == 2


def test_batches_of_any_kind_give_the_same_answer():
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, left, right):
            return self.a(left) * self.b(right)

    torch.manual_seed(0)
    net, x, y = TwoInputs(), torch.randn(8, 3), torch.randn(8, 3)
    labels = torch.zeros(8, dtype=torch.long)
    forms = [
        ([(x, y)], {}),
        ([(x, y, labels)], {}),
        ([{"left": x, "right": y, "labels": labels}], {}),
        ([({"left": x, "right": y}, labels)], {}),
        ([[x, y]], {}),
        ([torch.stack([x, y], 1)], {"forward": lambda model, batch: model(batch[:, 0], batch[:, 1])}),
        (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8), {}),
    ]
    exact = {"estimator": "influence", "estimator_options": {"exact": True}}  # probes are drawn by content
    losses = [mpq.analyze(net, data, "W2A8,W4A8", progress=False, **exact, **opts).table.loss for data, opts in forms]
    for loss in losses[1:]:
        np.testing.assert_array_equal(loss, losses[0])


@pytest.mark.slow
def test_same_seed_same_bytes(example, tmp_path):
    model, calib, _ = example
    configs = [
        mpq.allocate(
            model, calib[:1], "avg_bits<=4", "W2A8,W8A8", seed=5, estimator_options={"anchors": 6}, progress=False
        )
        for _ in range(2)
    ]
    paths = [c.save(tmp_path / f"{i}.json") for i, c in enumerate(configs)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    code = (
        "import torch, mpq; torch.set_num_threads(2); model, calib, _ = mpq.bundled.load_example(); "
        "mpq.allocate(model, calib[:1], 'avg_bits<=4', 'W2A8,W8A8', seed=5, estimator_options={'anchors': 6}, "
        "progress=False)"
        f".save({str(tmp_path / 'other.json')!r})"
    )
    # Threads that wait without spinning: two busy ones are slow where other processes compute.
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([sys.executable, "-c", f"import mpq.bundled; {code}"], check=True, env=environment)
    assert (tmp_path / "other.json").read_bytes() == paths[0].read_bytes()
    assert configs[0].provenance["seed"] == 5


@pytest.mark.slow
def test_accuracy_budget_is_measured(example, analysis):
    model, calib, test = example
    with pytest.raises(BudgetError, match="must be measured: pass eval_data"):
        mpq.allocate(model, calib, "accuracy_drop<=1%")
    with pytest.raises(BudgetError, match=r"is measured: use mpq\.allocate"):
        analysis.allocate("accuracy_drop<=1%")
    part, options = test[:2], {"estimator": "influence", "progress": False}
    cfg = mpq.allocate(
        model, calib[:2], "accuracy_drop<=1%,size<=16%", "W2A8,W3A8,W4A8,W8A8", eval_data=part, **options
    )
    assert cfg.measured.float_accuracy - cfg.measured.accuracy <= 0.01 + 1e-12
    assert mpq.evaluate(mpq.quantize(model, cfg), part, progress=False).accuracy == cfg.measured.accuracy
    assert cfg.size_bytes < 0.14 * cfg.metrics["size"]["float"]
    assert cfg.budgets == ("accuracy_drop<=1%", "size<=16%")
    assert (cfg.solver["name"], cfg.solver["status"]) == ("bisection", "feasible")
    with pytest.raises(BudgetError, match=r"accuracy_drop<=1% is met by none of the \d+ configs .* the least drop is"):
        mpq.allocate(model, calib[:1], "accuracy_drop<=1%", "W2A8", eval_data=part, **options)
    with pytest.raises(DataError, match="accuracy can't be measured"):
        mpq.allocate(model, calib[:1], "accuracy_drop<=1%", eval_data=[x for x, _ in part], **options)


@pytest.mark.slow
def test_accuracy_budget_beside_one_that_needs_a_larger_size(example):
    """W5A8 is smaller, W6A2 has fewer BitOps: the second budget forces the larger size."""
    model, calib, test = example
    budgets = ["accuracy_drop<=90%", "bitops<=1.5%"]
    options = {"estimator": "influence", "progress": False}
    cfg = mpq.allocate(model, calib[:1], budgets, "W5A8,W6A2", eval_data=test[:1], **options)
    assert cfg.metrics["bitops"]["value"] <= 0.015 * cfg.metrics["bitops"]["float"]


def test_frontier(analysis):
    front = analysis.pareto("size")
    assert front.interacting
    assert not front.exact
    assert (np.diff(front.cost) > 0).all()
    assert (np.diff(front.loss) < 0).all()
    assert front[0].avg_bits == 2
    assert front[-1].avg_bits == pytest.approx(8, abs=0.5)
    assert [c.size_bytes for c in front[:3]] == front.cost[:3].tolist()
    assert [c.predicted["with_interactions"] for c in front[:3]] == pytest.approx(front.loss[:3].tolist())
    # Solved by itself a budget is met at least as well as by the points.
    cfg = front.at("size<=12%")
    assert cfg.size_bytes <= 0.12 * cfg.metrics["size"]["float"]
    within = front.loss[front.cost <= 0.12 * cfg.metrics["size"]["float"]]
    assert cfg.predicted["with_interactions"] <= within.min() + 1e-15


def test_frontier_without_interactions_is_exact_and_dominated_with_them(analysis):
    alone = replace(analysis, table=replace(analysis.table, interactions=None))
    plain, front = alone.pareto("size"), analysis.pareto("size")
    assert plain.exact
    assert "exact frontier" in repr(plain)
    assert plain[-1].avg_bits == 8
    predicted = analysis.table.predict_all(plain.picks)
    better = [front.loss[front.cost <= c].min() for c in plain.cost]
    assert (better <= predicted + 1e-12).all()
    assert np.median(better / predicted) < 0.98


def test_frontier_as_json(analysis):
    front = analysis.pareto("size")
    data = json.loads(front.to_json())
    assert len(data["points"]) == len(front)
    assert data["points"][0]["schemes"]["conv1"] == "W2A8"
    assert data["interactions"]
    assert "interaction-aware frontier" in repr(front)
    assert "<pre>" in front._repr_html_()
    with pytest.raises(BudgetError, match="no figures for latency"):
        analysis.pareto("latency")


def test_original_layers_named_in_errors_of_other_models(example, analysis):
    cfg = analysis.allocate("avg_bits<=4")
    with pytest.raises(
        ConfigError, match=r"another model: 22 of its 22 layers are not in Sequential, the first is 'conv1'"
    ):
        mpq.quantize(nn.Sequential(nn.Linear(2, 2)), cfg)
    wider = mpq.bundled.resnet20()
    wider.fc = nn.Linear(64, 12)
    with pytest.raises(ConfigError, match=r"layer 'fc' has weight \(12, 64\), the config expects \(10, 64\)"):
        mpq.quantize(wider, cfg)
    trained = mpq.bundled.resnet20()
    with torch.no_grad():
        trained.fc.weight += 1e-3
    with pytest.raises(ConfigError, match=r"other weights .* strict=False"):
        mpq.quantize(trained, cfg)
    assert isinstance(mpq.quantize(trained, cfg, strict=False), type(trained))
