"""The model behind the explorer's widgets, clicked as a browser would, without one."""

import json
import time

import pytest
import torch
from torch import nn

import mpq
from mpq.config import Measured
from mpq.explanation import explain_given
from mpq.viz.explorer_points import pick_of

for package in ("plotly", "anywidget", "ipywidgets"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 10)]
    return nn.Sequential(*body).eval()


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(1)
    return [(torch.randn(16, 1, 15, 15), torch.randint(10, (16,))) for _ in range(2)]


@pytest.fixture(scope="module")
def front(net, batches):
    return mpq.analyze(net, batches, "W2A8,W4A8,W8A8", progress=False).pareto()


@pytest.fixture
def explorer(front, net, batches):
    points = {"mine": front.at("avg_bits<=3"), "paper": {"size": 4000.0, "accuracy": 0.25}}
    return front.explore(points, mpq.Evaluator(net, batches, progress=False))


def trace(explorer, series):
    return explorer._figure.trace(series)


def click(explorer, series, index):
    """What the page sends when a point is clicked."""
    figure = explorer._figure.figure
    number = list(figure.data).index(trace(explorer, series))
    points = {"xs": [0.0], "ys": [0.0], "point_indexes": [index], "trace_indexes": [number]}
    figure._js2py_pointsCallback = {"event_type": "plotly_click", "points": points, "device_state": None}


def shown_bits(explorer):
    bars = [t for t in explorer._figure.layer_traces()[0] if t.visible]
    return [y for _, y in sorted((x, y) for bar in bars for x, y in zip(bar.x, bar.y, strict=True))]


def wait(explorer):
    for _ in range(600):
        if explorer._measuring is None:
            return
        time.sleep(0.05)
    raise AssertionError("still measuring")


def test_points_lie_where_the_frontier_says(explorer, front):
    drawn = trace(explorer, "frontier")
    assert list(drawn.x) == pytest.approx(front.cost.tolist())
    assert list(drawn.y) == pytest.approx([x if x > 0 else None for x in front.loss.tolist()])
    assert list(trace(explorer, "uniform").text) == ["W2A8", "W4A8", "W8A8"]
    line = trace(explorer, "uniform").hovertext[1]
    assert line.startswith("<b>uniform W4A8</b>: ")
    assert "4 bits" in line
    assert line.endswith("3 x W4A8")
    assert trace(explorer, "given").x[1] is None  # nobody predicted its loss


def test_click_shows_the_layers_with_runner_up_and_price(explorer, front):
    click(explorer, "uniform", 2)
    assert shown_bits(explorer) == [8, 8, 8]
    click(explorer, "frontier", 0)
    assert shown_bits(explorer) == [c.weight.bits for c in front[0].values()]
    assert explorer.config.schemes() == front[0].schemes()
    index = len(front) // 2
    click(explorer, "frontier", index)
    rows = explain_given(front.analysis, "size", front.picks[index]).table()
    _, ups = explorer._figure.layer_traces()
    assert list(ups.y) == [int(r["runner_up"][1]) for r in rows]
    for row in rows:
        assert f"<td style='padding:1px 8px;white-space:nowrap;text-align:left'>{row['runner_up']}</td>" in (
            explorer._table.value
        )
        assert f">{row['margin']:.2g}<" in explorer._table.value
    assert "more would save" in explorer._about.value


def test_bars_are_coloured_by_op_and_wider_with_more_parameters(explorer, front):
    bars = {t.name: t for t in explorer._figure.layer_traces()[0] if t.visible}
    assert set(bars) == {"conv", "linear"}
    widths = {x: w for bar in bars.values() for x, w in zip(bar.x, bar.width, strict=True)}
    parameters = [c.parameters for c in front[0].values()]
    assert sorted(widths, key=widths.get) == sorted(widths, key=lambda i: parameters[i])
    assert "8 x 1 x 3 x 3, 72 parameters" in bars["conv"].hovertext[0]


def test_axes_switch_between_what_is_known(explorer, front):
    assert [key for _, key in explorer._x.options] == [
        *("size", "avg_bits", "stored_bits", "bitops", "loss", "accuracy", "kl")
    ]
    explorer._x.value = "bitops"
    bitops = [c.metrics["bitops"]["value"] for c in front]
    assert list(trace(explorer, "frontier").x) == pytest.approx(bitops)
    assert trace(explorer, "frontier").mode == "markers"  # no frontier of these axes
    explorer._x.value, explorer._y.value = "size", "accuracy"
    assert explorer._figure.figure.layout.yaxis.type == "linear"
    assert (trace(explorer, "given").x[1], trace(explorer, "given").y[1]) == (4000.0, 0.25)
    explorer._x.value = "kl"
    assert "Nothing is measured" in explorer._figure.figure.layout.annotations[0].text


def test_device_adds_latency_and_energy(front):
    explorer = front.analysis.on("t4").pareto("latency").explore()
    assert explorer._x.value == "latency"
    assert {"latency", "energy", "peak_memory"} <= set(dict(explorer._y.options).values())
    assert explorer._figure.figure.layout.xaxis.ticksuffix == "s"
    assert explorer._measure.disabled


def test_saving_writes_a_config_that_loads(explorer, front, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    click(explorer, "uniform", 0)
    explorer._save.click()
    assert mpq.load("bits-uniform-W2A8.json").schemes() == front.analysis.uniform("W2A8").schemes()
    explorer._file.value = "no/such/folder.json"
    explorer._save.click()
    assert explorer._message.value.startswith("Not saved: ")
    click(explorer, "given", 0)
    explorer._file.value = "mine.json"
    explorer._save.click()
    assert mpq.load("mine.json").budgets == ("avg_bits<=3",)  # the config as it was given
    json.loads((tmp_path / "mine.json").read_text())


def test_measuring_adds_the_point_to_the_accuracy_axis(explorer, front, net, batches):
    explorer._y.value = "accuracy"
    click(explorer, "uniform", 1)
    explorer._measure.click()
    wait(explorer)
    expected = mpq.Evaluator(net, batches, progress=False).measure(front.analysis.uniform("W4A8"))
    assert explorer.config.measured == expected
    assert list(trace(explorer, "uniform").y) == [None, expected.accuracy, None]
    assert explorer._message.value == f"Measured uniform W4A8: {expected}"
    assert [c.measured for c in explorer.measured] == [expected]
    assert explorer._figure.figure.layout.shapes[0].y0 == expected.float_accuracy
    assert explorer._measure.description == "Measure now"


def test_measuring_can_be_stopped_and_says_what_went_wrong(front):
    def broken(config):
        raise RuntimeError("no <data>")

    explorer = front.explore(evaluate=broken)
    explorer._measure.click()
    wait(explorer)
    assert "RuntimeError: no &lt;data&gt;" in explorer._message.value
    assert not explorer._measure.disabled

    def slow(config):
        while explorer._measure.description != "Stop" or not explorer._measuring._stopped.is_set():
            time.sleep(0.01)
        return Measured(1, 1.0, 0.0, 0.0)

    explorer = front.explore(evaluate=slow)
    explorer._measure.click()
    explorer._measure.click()
    wait(explorer)
    assert "stopped" in explorer._message.value
    assert explorer.measured == []


def test_published_points_have_no_layers(explorer):
    click(explorer, "given", 1)
    assert explorer.config is None
    assert shown_bits(explorer) == []
    assert explorer._save.disabled
    assert explorer._measure.disabled
    assert "Only its figures are known" in explorer._about.value


def test_unknown_figures_and_missing_packages_are_refused(front, monkeypatch):
    with pytest.raises(mpq.MpqError, match="'paper' has 'speed', which is on no axis here; there are size, avg_bits"):
        front.explore({"paper": {"speed": 1.0}})
    with pytest.raises(mpq.MpqError, match="must hold numbers"):
        front.explore({"paper": {"size": "small"}})
    with pytest.raises(mpq.MpqError, match="must hold numbers"):
        front.explore({"paper": {"size": float("nan")}})
    with pytest.raises(mpq.MpqError, match="points maps names to configs, or to metrics"):
        front.explore([front[0]])
    with pytest.raises(mpq.MpqError, match=r"evaluate must be mpq\.Evaluator\(model, labelled_batches\), not list"):
        front.explore(evaluate=[torch.zeros(1)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(mpq.MpqError, match=r"plotly is not installed: pip install 'mpq\[explore\]'"):
        front.explore()


def test_configs_of_other_models_show_their_bits_only(front, net, batches):
    torch.manual_seed(5)
    other = nn.Sequential(nn.Flatten(), nn.Linear(225, 10))
    config = mpq.analyze(other, batches, "W4A8", estimator="weight_sqnr", progress=False).allocate("avg_bits<=4")
    assert pick_of(front.analysis, config) is None
    assert pick_of(front.analysis, front[0]).tolist() == front.picks[0].tolist()
    explorer = front.explore({"other": config})
    click(explorer, "given", 0)
    assert shown_bits(explorer) == [4]
    assert "runner-up" not in explorer._table.value


def test_page_that_opens_late_gets_what_was_drawn_since(explorer, capsys):
    click(explorer, "uniform", 0)
    explorer._ipython_display_()
    capsys.readouterr()
    bars = [t for t in explorer._figure.figure._widget_data if t["type"] == "bar" and t["visible"]]
    assert {y for bar in bars for y in bar["y"]} == {2}
