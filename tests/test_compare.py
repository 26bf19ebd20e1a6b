import json
import math
import warnings

import matplotlib as mpl
import numpy as np
import pytest
import torch
from scipy import stats

import mpq
from mpq.comparison import Comparison, EstimatorScore, bootstrap, compare, log10_error, rank_correlation
from mpq.errors import DataError, MpqError
from mpq.random_configs import random_pick
from mpq.sensitivity import SensitivityTable
from mpq.testing import prepared, tiny_networks

mpl.use("Agg")

SCHEMES = "W2,W3,W4,W5,W6,W8"


@pytest.fixture(scope="module")
def tiny():
    return tiny_networks()["conv"]


def quick(tiny, **options):
    net, data = tiny
    given = {"configs": 10, "loss_range": (3e-4, 0.03), "progress": False, **options}
    return compare(net, data, data, SCHEMES, **given)


@pytest.fixture(scope="module")
def found(tiny):
    return quick(tiny)


@pytest.fixture(scope="module")
def on_resnet(example):
    model, calib, test = example
    images = [x[:50] for x, _ in test[:2]]
    chosen = {"influence": "influence", "one draw": ("influence", {"draws": 1}), "untuned": by_bits}
    return compare(model, calib[:1], images, estimators=chosen, configs=10, progress=False)


def by_bits(view, space, data, bank, loss, *, scale=1.0, seed=0, progress=True):
    """Not in the unit of the loss: fewer bits cost more, the same for every group."""
    scores = scale * np.array([[4.0**-s.weight.bits for s in space.schemes]] * len(space.groups))
    names = tuple(g.name for g in space.groups), tuple(map(str, space.schemes))
    return SensitivityTable(*names, scores, np.zeros_like(scores), provenance={"forward_passes": 0, "unit": "bits"})


def test_predictions_are_those_of_analyze_and_losses_those_of_the_evaluator(tiny, found):
    net, data = tiny
    evaluator = mpq.Evaluator(net, data, progress=False)
    for name in ("influence", "hessian_trace"):
        analysis = mpq.analyze(net, data, SCHEMES, estimator=name, progress=False)
        assert found.predictions[name].tolist() == [analysis.table.predict(p) for p in found.picks]
        row = next(r for r in found.table() if r["name"] == name)
        assert row["forward_passes"] == analysis.provenance["forward_passes"]
        assert row["cpu_seconds"] > 0
        assert found.measured.tolist() == [evaluator.measure(analysis.config(p)).kl for p in found.picks]


def test_scores_agree_with_scipy(found, on_resnet):
    for comparison in (found, on_resnet):
        for row in comparison.table():
            predicted, measured = comparison.predictions[row["name"]], comparison.measured
            assert row["spearman"] == pytest.approx(stats.spearmanr(predicted, measured).statistic)
            assert row["kendall"] == pytest.approx(stats.kendalltau(predicted, measured).statistic)
            assert row["low"] <= row["spearman"] <= row["high"]
    order = [row["spearman"] for row in on_resnet.table()]
    assert order == sorted(order, reverse=True)


def test_measured_losses_fill_the_bins_evenly(found, on_resnet):
    assert np.histogram(np.log10(found.measured), 10, np.log10((3e-4, 0.03)))[0].tolist() == [1] * 10
    assert np.histogram(np.log10(on_resnet.measured), 10, (-3, 0))[0].tolist() == [1] * 10
    assert len({tuple(p) for p in on_resnet.picks}) == 10


def test_real_network_is_predicted_well(on_resnet):
    by_name = {row["name"]: row for row in on_resnet.table()}
    assert by_name["influence"]["spearman"] > 0.85
    assert by_name["influence"]["log10_error"] < 0.5
    assert by_name["untuned"]["log10_error"] is None
    assert by_name["one draw"]["forward_passes"] < by_name["influence"]["forward_passes"]


@pytest.mark.slow
def test_same_seed_same_comparison_whatever_the_estimators(tiny, found):
    def without_time(comparison):
        data = json.loads(comparison.to_json())
        for row in data["scores"]:
            row["cpu_seconds"] = 0
        return data

    again = quick(tiny)
    assert without_time(again) == without_time(found)
    alone = quick(tiny, estimators={"x": by_bits})
    np.testing.assert_array_equal(alone.picks, found.picks)
    np.testing.assert_array_equal(alone.measured, found.measured)
    assert quick(tiny, seed=1).picks.tolist() != found.picks.tolist()


@pytest.mark.slow
def test_interval_covers_the_true_correlation_as_often_as_it_says():
    rng = np.random.default_rng(0)
    true = 6 / math.pi * math.asin(0.8 / 2)  # Spearman's of a bivariate normal with correlation 0.8
    inside = 0
    for seed in range(100):
        x = rng.standard_normal(60)
        low, high = bootstrap(x, {"y": 0.8 * x + 0.6 * rng.standard_normal(60)}, 0.9, seed)["y"]
        inside += low <= true <= high
    assert 80 <= inside <= 97


def test_rank_correlation_with_ties_and_constants():
    a, b = np.array([1.0, 2, 2, 3, 3, 3]), np.array([2.0, 1, 4, 4, 5, 3])
    assert float(rank_correlation(a, b)) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert rank_correlation(np.stack([b, -b]), np.stack([b, b])) == pytest.approx([1, -1])
    assert np.isnan(rank_correlation(np.ones(6), b))
    low, high = bootstrap(b, {"flat": np.ones(6)}, 0.9, 0)["flat"]
    assert np.isnan([low, high]).all()


def test_error_is_the_median_factor():
    measured = np.array([1.0, 2, 4])
    assert log10_error(measured * [10, 0.1, 1000], measured) == pytest.approx(1)
    assert log10_error(np.array([-1.0, 0, 4]), measured) == math.inf


def test_an_estimator_without_an_opinion_comes_last(tiny):
    found = quick(tiny, estimators={"none": (by_bits, {"scale": 0.0}), "bits": by_bits})
    assert [row["name"] for row in found.table()] == ["bits", "none"]
    assert math.isnan(found.scores[-1].spearman)
    assert json.loads(found.to_json())["scores"][-1]["spearman"] is None


def test_regression_is_measured_by_squared_error(tiny):
    net, data = tiny
    one_output = {"forward": lambda m, batch: m(batch)[:, :1], "estimators": "influence"}
    found = quick(tiny, loss_range=(1e-3, 0.1), **one_output)
    assert found.quantity == "mse"
    analysis = mpq.analyze(net, data, SCHEMES, forward=one_output["forward"], progress=False)
    quantized = mpq.quantize(net, analysis.config(found.picks[0]))
    with torch.no_grad():
        error = torch.cat([quantized(x) - net(x) for x in data])[:, 0]
    assert found.measured[0] == pytest.approx(error.square().mean().item())
    assert found.scores[0].log10_error < 0.5


def test_prediction_of_another_loss_than_the_measured_has_no_factor(tiny):
    found = quick(tiny, loss="mse", estimators="influence")
    assert found.quantity == "kl"
    assert found.scores[0].log10_error is None
    assert found.scores[0].spearman > 0.5


def test_generators_are_read_once(tiny, found):
    net, data = tiny
    streamed = compare(
        net,
        iter(data),
        iter(data),
        SCHEMES,
        configs=10,
        loss_range=(3e-4, 0.03),
        estimators="influence",
        progress=False,
    )
    np.testing.assert_array_equal(streamed.measured, found.measured)
    np.testing.assert_array_equal(streamed.predictions["influence"], found.predictions["influence"])


def test_picks_respect_pins_and_spread_over_schemes():
    net, data = tiny_networks()["linear"]
    space = prepared(net, data, "W2A4,W2A8,W8A8,W32")[1]
    space.allowed[0] = [False, False, True, False]
    rng = np.random.default_rng(0)
    picks = np.array([random_pick(space, rng) for _ in range(200)])
    assert (picks[:, 0] == 2).all()
    assert (np.bincount(picks[:, 1], minlength=4) >= 5).all()


@pytest.mark.slow
def test_unfilled_range_is_said(tiny):
    with pytest.warns(UserWarning, match=r"only \d+ of 10 configs found .* those tried reached"):
        found = quick(tiny, loss_range=(1e-4, 1e9), estimators=("influence",))
    assert 3 <= len(found.measured) < 10
    with pytest.raises(MpqError, match=r"only 0 of 10 configs found .* Change loss_range"):
        quick(tiny, loss_range=(1e8, 1e9), estimators=("influence",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimators": ("influence", "nonsense")}, "unknown estimator 'nonsense'; known: .*influence"),
        ({"estimators": ()}, "no estimators given"),
        ({"estimators": {"x": ("influence", {"drawz": 1})}}, "estimator 'x' has no option 'drawz'"),
        ({"estimators": {"x": ("noise", {"draws": 0})}}, "draws must be a whole number of at least 1, not 0"),
        ({"configs": 2}, "configs must be at least 3"),
        ({"loss_range": (0, 1)}, "loss_range"),
        ({"loss_range": (1, 0.1)}, "loss_range"),
        ({"confidence": 95}, "confidence must be between 0 and 1"),
    ],
)
def test_errors_come_before_work(tiny, monkeypatch, options, message):
    monkeypatch.setattr("mpq.allocation.analyze", None)
    with pytest.raises(MpqError, match=message):
        quick(tiny, **options)


def test_empty_data_is_refused_before_work(tiny, monkeypatch):
    monkeypatch.setattr("mpq.allocation.analyze", None)
    net, data = tiny
    for calib, test in ((data, []), ([], data)):
        with pytest.raises(DataError, match="empty"):
            compare(net, calib, test, progress=False)


def test_shown_as_text_html_and_picture(on_resnet, tmp_path):
    text = repr(on_resnet)
    assert "10 random configs of 22 groups" in text
    assert text.splitlines()[2].split()[0] == on_resnet.scores[0].name.split()[0]
    assert "95% interval" in text
    assert on_resnet._repr_html_().startswith("<pre>Comparison")
    figure = on_resnet.plot(tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 5000
    assert len(figure.axes) == 3
    for ax, score in zip(figure.axes, on_resnet.scores, strict=True):
        assert ax.get_title(loc="left").startswith(score.name)
        points = ax.collections[0].get_offsets()
        assert points[:, 0].tolist() == on_resnet.predictions[score.name].tolist()
        assert points[:, 1].tolist() == on_resnet.measured.tolist()
        assert len(ax.lines) == (score.name != "untuned")  # where prediction and measurement agree


def broken(view, space, data, bank, loss, *, seed=0, progress=True):
    """One group can't be scored, so that its analysis keeps it at the widest scheme."""
    table = by_bits(view, space, data, bank, loss)
    table.loss[0, 0] = np.nan
    return table


@pytest.mark.slow
def test_configs_are_the_same_whichever_estimator_comes_first(tiny):
    with pytest.warns(UserWarning, match="1 of 3 groups"):
        one, other = (quick(tiny, estimators=e) for e in ({"b": broken, "x": by_bits}, {"x": by_bits, "b": broken}))
    np.testing.assert_array_equal(one.picks, other.picks)
    np.testing.assert_array_equal(one.measured, other.measured)
    np.testing.assert_array_equal(one.picks, quick(tiny, estimators={"x": by_bits}).picks)
    assert len(set(one.picks[:, 0])) > 1
    pinned = quick(tiny, estimators={"b": broken}, pin={"0": "W5"}, configs=3)
    assert {one.schemes[s] for s in pinned.picks[:, 0]} == {"W5"}


def test_panels_beyond_a_row_and_predictions_that_no_log_axis_shows():
    measured = np.array([0.1, 0.2, 0.3])
    names = [f"e{i}" for i in range(5)]
    scores = tuple(EstimatorScore(n, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0) for n in names)
    predictions = {n: measured - 0.1 * (n == "e4") for n in names}
    made = Comparison(("g",), ("W2",), np.zeros((3, 1), np.int64), "mse", measured, predictions, scores, 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = made.plot()
        figure.canvas.draw()
    assert len(figure.axes) == 5
    assert "1 of 3 predicted at or below 0" in figure.axes[4].get_title(loc="left")


def test_few_configs_have_no_interval():
    measured = np.arange(1.0, 13.0)
    assert math.isnan(bootstrap(measured[:9], {"same": measured[:9]}, 0.95, 0)["same"][0])
    assert bootstrap(measured, {"same": measured}, 0.95, 0)["same"] == pytest.approx((1, 1))


def test_one_scheme_is_refused_before_long_work():
    net = torch.nn.Linear(4, 3)
    with pytest.raises(MpqError, match="two schemes or more, not only W8A8"):
        compare(net, torch.randn(8, 4), torch.randn(8, 4), "W8A8", progress=False)
