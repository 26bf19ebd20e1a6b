import numpy as np
import pytest

import mpq
from mpq.budget import parse_budgets
from mpq.bundled import load_example
from mpq.errors import BudgetError, MpqError
from mpq.search import Cqap, EarlierStudy, Quantune
from mpq.testing import tiny_network

OPTIONS = {
    "granularity": ("tensor", "channel"),
    "symmetric": (True, False),
    "weight_range": ("mse", "minmax"),
    "activation_range": ("mse", "percentile:99"),
    "samples": (2, 8),
}


@pytest.fixture(scope="module")
def tiny():
    net, data = tiny_network()
    batches = [part for batch in data for part in batch.split(2)]
    return net, batches


def bits_lost(config):
    """Uniform 8 bits with one scale a channel are best, percentile ranges worst."""
    formats = [c.weight for c in config.layers.values()]
    lost = sum(4.0**-f.bits * (2.0 if f.granularity == "tensor" else 1.0) for f in formats)
    return lost * (1.5 if config.provenance["activation_range"] != "mse" else 1.0)


def test_settings_reach_quantizers_and_calibration(tiny):
    choices = mpq.GlobalChoices(*tiny, OPTIONS, "W3A8,W4A8", estimator="weight_sqnr", progress=False)
    G = len(choices.reference.space.groups)
    first, last = choices.config([0] * (G + 5)), choices.config([1] * (G + 5))
    for config, granularity, symmetric, bits in (first, "tensor", True, 3), (last, "channel", False, 4):
        formats = {c.weight for c in config.layers.values()}
        assert [(f.granularity, f.symmetric, f.bits) for f in formats] == [(granularity, symmetric, bits)]
    keys = ("weight_range", "activation_range", "samples")
    assert [first.provenance[k] for k in keys] == ["mse", "mse", 2]
    assert [last.provenance[k] for k in keys] == ["minmax", "percentile:99", 8]
    ranges = [[c.activation_range for c in config.layers.values()] for config in (first, last)]
    assert ranges[0] != ranges[1]
    own = mpq.analyze(
        *tiny,
        "W3:asymA8,W4:asymA8",
        weight_range="minmax",
        activation_range="percentile:99",
        max_samples=8,
        estimator="weight_sqnr",
        progress=False,
    ).config([1] * G)
    assert [c.activation_range for c in own.layers.values()] == ranges[1]
    assert own.metrics == last.metrics


def test_budgets_hold_with_every_option(tiny):
    choices = mpq.GlobalChoices(*tiny, OPTIONS, "W2A8,W4A8,W8A8", estimator="weight_sqnr", progress=False)
    problem = choices.problem(parse_budgets(["size<=30%", "avg_bits<=5"]))
    rng, fitting = np.random.default_rng(0), 0
    for _ in range(40):
        pick = np.array([rng.choice(np.flatnonzero(row)) for row in problem.allowed])
        config = choices.config(pick)
        size = config.metrics["size"]
        if problem.feasible(pick):
            fitting += 1
            assert size["value"] <= 0.3 * size["float"]
            assert config.avg_bits <= 5
    assert 5 <= fitting <= 35


@pytest.mark.parametrize("method", [Quantune(initial=6), Cqap(training=12, population=20, generations=10)])
def test_searches_schemes_and_global_choices_together(tiny, method):
    choices = mpq.GlobalChoices(*tiny, OPTIONS, "W3A8,W4A8", estimator="weight_sqnr", progress=False)
    study = choices.search(bits_lost, "avg_bits<=3.5", method, evaluations=40, progress=False)
    assert study.config.avg_bits <= 3.5
    assert (study.settings["granularity"], study.settings["activation_range"]) == ("channel", "mse")
    assert study.solution.loss == bits_lost(study.config) == min(r["loss"] for r in study.table())
    assert [r["evaluation"] for r in study.table()] == list(range(1, len(study.solution.trace) + 1))
    assert "granularity=channel" in repr(study)


def test_uniform_bits_are_one_more_choice(tiny):
    options = {"uniform": True, "estimator": "weight_sqnr", "pin": {"*": "W8A8"}, "progress": False}
    with pytest.raises(MpqError, match="unknown global choices clipping; known: granularity"):
        mpq.GlobalChoices(*tiny, {"clipping": ("mse",)}, **options)
    name = mpq.GlobalChoices(*tiny, {"samples": (2,)}, **options).reference.space.layers[0].name
    choices = mpq.GlobalChoices(*tiny, OPTIONS, "W3A8,W4A8", **{**options, "pin": {name: "W8A8"}})
    assert len(choices.problem().loss) == 6
    study = choices.search(bits_lost, evaluations=200, progress=False)
    assert study.solution.evaluations == 2 * 2**5
    assert {c.weight.bits for n, c in study.config.layers.items() if n != name} == {4}
    assert study.config[name].weight.bits == 8


def test_ledger_and_earlier_studies(tiny, tmp_path):
    kept = {"ledger": tmp_path / "ledger.db", "about": "bits", "progress": False}
    choices = mpq.GlobalChoices(*tiny, OPTIONS, "W3A8,W4A8", estimator="weight_sqnr", progress=False)
    study = choices.search(bits_lost, evaluations=12, **kept)
    again = choices.search(bits_lost, evaluations=14, **kept)
    assert (again.solution.reused, again.solution.evaluations) == (12, 2)
    trace = study.solution.trace
    earlier = (EarlierStudy(study.problem, trace.picks, trace.losses),)
    taught = choices.search(bits_lost, method=Quantune(earlier=earlier), evaluations=5, progress=False)
    assert taught.solution.loss <= np.median(trace.losses)
    fewer = mpq.GlobalChoices(*tiny, {"samples": (2, 8)}, "W3A8,W4A8", estimator="weight_sqnr", progress=False)
    assert fewer.search(bits_lost, evaluations=2, **kept).solution.reused == 0


def test_says_what_is_out_of_reach(tiny):
    choices = mpq.GlobalChoices(*tiny, {"symmetric": (True,)}, estimator="weight_sqnr", progress=False)
    with pytest.raises(BudgetError, match="avg_bits<=1 can't be met with every option"):
        choices.search(bits_lost, "avg_bits<=1", progress=False)


@pytest.mark.slow
def test_on_the_bundled_network():
    """Quantune with the real evaluator: clipping at 1 % of the inputs is found to be wrong, in seven evaluations."""
    model, calib, test = load_example()
    options = {"activation_range": ("percentile:90", "mse"), "granularity": ("tensor", "channel"), "samples": (16, 32)}
    batches = [(x[i : i + 16], y[i : i + 16]) for x, y in calib[:1] for i in (0, 16)]
    choices = mpq.GlobalChoices(model, batches, options, "W4A8", estimator="weight_sqnr", uniform=True, progress=False)
    evaluator = mpq.Evaluator(model, [(x[:64], y[:64]) for x, y in test[:1]], progress=False)
    study = choices.search(evaluator, "size<=20%", Quantune(initial=4, batch=2), evaluations=7, progress=False)
    assert study.quantity == "kl"
    assert study.solution.evaluations == 7
    assert (study.settings["activation_range"], study.settings["granularity"]) == ("mse", "channel")
    assert study.config.measured.kl == study.solution.loss == min(r["kl"] for r in study.table())
    assert study.solution.loss < 0.5 * max(r["kl"] for r in study.table())
