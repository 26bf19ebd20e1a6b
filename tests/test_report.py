"""The HTML report, read back: its figures are the config's, names can't break out of it, nothing is loaded."""

import base64
import hashlib
import json
import re
from dataclasses import replace

import html5lib
import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.config import BitConfig, Measured
from mpq.errors import ConfigError
from mpq.explanation import explain_config
from mpq.units import show
from mpq.viz.report_charts import _ink, frontier_chart
from mpq.viz.report_tables import cost_budgets, number

HOSTILE = """evil"><script>alert(1)</script><img src=x onerror='alert(2)'>&amp;{{7*7}}"""


@pytest.fixture(scope="module")
def cfg(analysis):
    measured = Measured(10, 0.9, 0.3, 0.01, 0.95)
    return analysis.allocate("size<=12%, bitops<=3%").with_measured(measured)


@pytest.fixture(scope="module")
def front(analysis):
    return analysis.pareto()


@pytest.fixture(scope="module")
def page(cfg, front, tmp_path_factory):
    uniform = front.analysis.uniform("W3A8").with_measured(Measured(10, 0.8, 0.5, 0.3, 0.95))
    folder = tmp_path_factory.mktemp("report")
    return parse(cfg.report(folder / "report.html", frontier=front, measured={"mixed": cfg, "<three>": uniform}))


def parse(path):
    """The tree of a file; an error in its HTML fails."""
    parser = html5lib.HTMLParser(html5lib.getTreeBuilder("etree"), strict=True, namespaceHTMLElements=False)
    return parser.parse(path.read_text("utf8"))


def text(element):
    return " ".join("".join(element.itertext()).split())


def table(tree, name):
    """Row name -> column name -> text."""
    found = tree.find(f".//table[@id='{name}']")
    heads = [text(h) for h in found.findall("thead/tr/th")]
    rows = [[text(c) for c in row] for row in found.findall("tbody/tr")]
    return {row[0]: dict(zip(heads, row, strict=True)) for row in rows}


def cards(tree):
    return {text(c.find("dt")): [text(x) for x in c.find("dd")] for c in tree.findall(".//dl[@class='cards']/div")}


def test_headline_figures_are_the_configs(page, cfg):
    found = cards(page)
    size = cfg.metrics["size"]
    assert found["size"] == [show(size["value"], "bytes"), f"{size['value'] / size['float']:.1%} of float"]
    assert found["average bits"][0] == f"{cfg.avg_bits:.3g} bits"
    assert found["predicted rise of KL to float (nats)"][0] == number(cfg.predicted["with_interactions"])
    assert found["accuracy"] == ["90.00%", "float 95.00%"]
    verdict = text(page.find(".//p[@class='verdict']"))
    assert "5.00 points below float" in verdict
    assert show(size["value"], "bytes") in verdict


def test_as_good_with_one_scheme_names_the_smallest_that_loses_no_more(page, cfg, analysis):
    uniform = {str(s): analysis.uniform(s) for s in analysis.space.uniform_schemes}
    limit = cfg.predicted["with_interactions"]
    best = min((c.size_bytes, n) for n, c in uniform.items() if c.predicted["with_interactions"] <= limit)
    value, note = cards(page)["as good with one scheme"]
    assert value == show(best[0], "bytes")
    assert note.startswith(f"{best[1]} everywhere, {best[0] / cfg.size_bytes - 1:.1%} larger")


def test_comparison_has_float_uniform_and_measured_configs_once_each(page, cfg, analysis):
    rows = table(page, "comparison")
    assert list(rows) == ["float", "W8A8 everywhere", "W4A8 everywhere", "this config", "<three>", "W2A8 everywhere"]
    assert rows["float"]["size"] == show(cfg.metrics["size"]["float"], "bytes")
    assert rows["float"]["accuracy"] == "95.00%"
    assert rows["W4A8 everywhere"]["size"] == show(analysis.uniform("W4A8").size_bytes, "bytes")
    assert rows["<three>"]["accuracy"] == "80.00%"
    assert rows["<three>"]["KL to float"] == "0.3"
    assert text(page.find(".//tr[@class='marked']/th")) == "this config"


def test_figures_of_the_same_bits_under_a_label_are_the_configs(cfg, tmp_path):
    tree = parse(replace(cfg, measured=None).report(tmp_path / "report.html", measured={"mixed": cfg}))
    assert table(tree, "comparison")["this config"]["accuracy"] == "90.00%"
    assert "5.00 points below float" in text(tree.find(".//p[@class='verdict']"))


def test_every_layer_has_its_figures(page, cfg, analysis):
    rows = table(page, "layers-table")
    assert list(rows) == list(cfg)
    why = {row["group"]: row for row in explain_config(analysis, cfg, cost_budgets(cfg)).table()}
    for i, (name, c) in enumerate(cfg.layers.items()):
        row = rows[name]
        assert row["depth"] == str(i + 1)
        assert (row["op"], row["weight"], row["activation"]) == (c.op, c.weight.name, c.activation.name)
        assert row["parameters"] == f"{c.parameters:,}"
        assert row["weight bytes"] == f"{c.weight.storage_bits(c.weight_shape) / 8:,.0f}"
        assert row["predicted rise"] == f"{number(c.predicted_loss)} ± {number(c.stderr, 1)}"
        assert row["runner-up"] == why[c.group]["runner_up"]
    first = page.find(".//table[@id='layers-table']/tbody/tr")
    assert float(first[5].get("data-value")) == next(iter(cfg.values())).parameters


def test_budgets_say_what_binds_and_at_what_price(page, cfg, analysis):
    rows = table(page, "budget-table")
    assert list(rows) == ["size<=12%", "bitops<=3%"]
    why = analysis.explain("size<=12%, bitops<=3%")
    size, row = why.prices["size"], rows["size<=12%"]
    assert (size.binding, why.prices["bitops"].binding) == (True, False)
    assert row["used"] == show(cfg.size_bytes, "bytes")
    assert row["limit"] == show(0.12 * cfg.metrics["size"]["float"], "bytes")
    assert row["slack"] == show(size.limit - size.used, "bytes")
    assert row["binds"] == "yes"
    assert row["price"] == f"1 kB more would lower the rise by about {number(size.price * size.step, 2)}"
    reach = why.feasibility.metrics["size"]
    assert row["can reach"] == f"{show(reach.least, 'bytes')} to {show(reach.most, 'bytes')}"
    assert (rows["bitops<=3%"]["binds"], rows["bitops<=3%"]["price"]) == ("no", "0: more would buy nothing")


def test_heat_map_holds_the_table_and_marks_the_choice(page, cfg, analysis):
    rows = page.findall(".//table[@id='heat']/tbody/tr")
    assert len(rows) == len(analysis.space.groups)
    pick = analysis.pick(cfg)
    for g, row in enumerate(rows):
        cells = row.findall("td")
        chosen = [s for s, cell in enumerate(cells) if "chosen" in cell.get("class")]
        assert chosen == [pick[g]]
        shown = [float(text(cell).split()[0]) for cell in cells]
        assert shown == pytest.approx(analysis.table.loss[g].tolist(), rel=0.06)
    loss = analysis.table.loss
    darkest, lightest = (np.unravel_index(f(loss), loss.shape) for f in (np.argmax, np.argmin))

    def light(place):
        colour = re.search("background:#(..)(..)(..)", rows[place[0]].findall("td")[place[1]].get("style"))
        return sum(int(part, 16) for part in colour.groups())

    assert light(darkest) < light(lightest)


def test_frontier_is_drawn_where_it_is(front, cfg):
    chart = frontier_chart(front, cfg)
    assert len(chart.points) == len(front)
    assert [p.x for p in chart.points] == sorted(p.x for p in chart.points)
    assert [p.y for p in chart.points] == sorted(p.y for p in chart.points)  # from the top: the loss falls
    assert {m.label for m in chart.uniform} == {"W2A8", "W3A8", "W4A8", "W8A8"}
    assert chart.chosen.x <= chart.limit[0]
    # The places are linear in the cost and in the logarithm of the loss.
    first, last, here = chart.points[0], chart.points[-1], chart.chosen
    share = (cfg.size_bytes - front.cost[0]) / (front.cost[-1] - front.cost[0])
    assert here.x == pytest.approx(first.x + share * (last.x - first.x), abs=0.02)
    logs = np.log10([front.loss[0], cfg.predicted["with_interactions"], front.loss[-1]])
    share = (logs[1] - logs[0]) / (logs[2] - logs[0])
    assert here.y == pytest.approx(first.y + share * (last.y - first.y), abs=0.02)


def test_nothing_is_loaded_and_only_its_own_script_may_run(page):
    links = [(a, v) for e in page.iter() for a, v in e.attrib.items() if a in ("src", "href", "action", "srcset")]
    assert {a for a, _ in links} == {"href"}
    anchors = {e.get("id") for e in page.iter()}
    assert all(v[1:] in anchors for _, v in links if v.startswith("#"))
    assert [v[:29] for _, v in links if not v.startswith("#")] == ["data:application/json;base64,"]
    style = "".join(page.find("head/style").itertext())
    assert "@import" not in style
    assert "url(" not in style
    [script] = page.iter("script")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    policy = page.find("head/meta[@http-equiv='Content-Security-Policy']").get("content")
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_config_is_inside(page, cfg):
    link = page.find(".//a[@download='bits.json']").get("href")
    assert BitConfig.from_json(base64.b64decode(link.partition(",")[2]).decode()) == cfg


def test_names_from_the_model_can_not_break_out(cfg, tmp_path):
    first, *_ = cfg
    layers = {(HOSTILE if n == first else n): replace(c, op=f"conv{HOSTILE}") for n, c in cfg.layers.items()}
    finding = {"group": HOSTILE, "kind": HOSTILE, "message": HOSTILE, "action": HOSTILE}
    provenance = {**cfg.provenance, "model_class": HOSTILE, "schemes": [HOSTILE], "findings": [finding]}
    outside = (replace(cfg.outside[0], reason=HOSTILE),)
    evil = replace(cfg, layers=layers, provenance=provenance, outside=outside)
    tree = parse(evil.report(tmp_path / "r.html", measured={HOSTILE: replace(evil, layers=cfg.layers)}))
    assert len(list(tree.iter("script"))) == 1
    assert not list(tree.iter("img"))
    assert not [a for e in tree.iter() for a in e.attrib if a.startswith("on")]
    assert HOSTILE in table(tree, "layers-table")
    assert HOSTILE in table(tree, "findings-table")
    assert HOSTILE in table(tree, "outside-table")
    assert HOSTILE in table(tree, "comparison")
    assert text(tree.find(".//h1")) == f"Bit allocation of {HOSTILE}"
    assert HOSTILE in text(tree.find(".//pre"))


def test_a_config_alone_says_what_is_left_out_and_how_to_get_it(cfg, tmp_path):
    bare = mpq.load(replace(cfg, measured=None).save(tmp_path / "bits.json"))
    tree = parse(bare.report(tmp_path / "report.html"))
    notes = text(tree.find(".//div[@class='notes']"))
    assert "Left out" in notes
    assert 'analysis = mpq.analyze(model, calib, "W2A8,W3A8,W4A8,W8A8")' in notes
    assert "Not measured" in notes
    assert tree.find(".//section[@id='sensitivity']") is None
    assert tree.find(".//section[@id='frontier']") is None
    assert list(table(tree, "comparison")) == ["float", "this config"]
    row = table(tree, "budget-table")["size<=12%"]
    assert list(row) == ["budget", "used", "limit", "slack", "share used"]
    assert list(table(tree, "layers-table")) == list(cfg)


def test_analysis_alone_brings_the_frontier_of_the_first_budget_that_binds(analysis, tmp_path):
    config = analysis.allocate("size<=50%, bitops<=3%")
    tree = parse(config.report(tmp_path / "r.html", analysis=analysis))
    assert "against bitops" in text(tree.find(".//section[@id='frontier']//figcaption"))
    assert tree.find(".//section[@id='sensitivity']") is not None


def test_budgets_of_accuracy_and_loss_and_none_at_all(cfg, analysis, front, tmp_path):
    dropped = replace(cfg, budgets=("accuracy_drop<=6%",))
    row = table(parse(dropped.report(tmp_path / "a.html", frontier=front)), "budget-table")["accuracy_drop<=6%"]
    assert (row["used"], row["limit"], row["slack"]) == ("5.00 points", "6.00 points", "1.00 points")
    unmeasured = replace(dropped, measured=None)
    row = table(parse(unmeasured.report(tmp_path / "b.html")), "budget-table")["accuracy_drop<=6%"]
    assert (row["used"], row["slack"]) == ("not measured", "not measured")
    least = replace(cfg, budgets=("loss<=0.05", *cfg.budgets))  # as `Analysis.smallest` writes it
    row = table(parse(least.report(tmp_path / "c.html", frontier=front)), "budget-table")["loss<=0.05"]
    assert row["used"] == number(least.predicted["with_interactions"])
    given = parse(analysis.uniform("W4A8").report(tmp_path / "d.html", frontier=front))
    assert "made for no budget" in text(given.find(".//section[@id='budgets']"))


def test_findings_and_notes_of_costs_are_told(cfg, tmp_path):
    finding = {"group": "fc", "kind": "negative", "message": "loss -1", "action": "kept at W8A8"}
    provenance = {**cfg.provenance, "findings": [finding], "cost_notes": {"latency": ["softmax is left out"]}}
    sick = replace(cfg, provenance={**provenance, "coverage": {"parameters": 0.5, "macs": 1.0}})
    sick = replace(sick, solver={**cfg.solver, "status": "feasible", "gap": 0.25})
    tree = parse(sick.report(tmp_path / "report.html"))
    notes = text(tree.find(".//div[@class='notes']"))
    assert sick.findings in notes
    assert "latency: softmax is left out" in notes
    assert "Only 50% of the parameters" in notes
    assert "gap 25.00%" in notes
    assert table(tree, "findings-table")["fc"]["what was seen"] == "loss -1"


def test_provenance_is_complete(page, cfg):
    shown = {text(f.find("dt")): text(f.find("dd")) for f in page.findall(".//section[@id='provenance']/dl/div")}
    assert shown["model hash"] == cfg.provenance["model_hash"]
    assert shown["data hash"] == cfg.provenance["data_hash"]
    assert shown["schemes"] == "W2A8, W3A8, W4A8, W8A8"
    assert f"torch: {torch.__version__}" in shown["versions"]
    assert set(cfg.provenance) - {k.replace(" ", "_") for k in shown} == {"findings", "cost_notes"}


def test_same_config_same_bytes(cfg, front, tmp_path):
    first, second = (cfg.report(tmp_path / n, frontier=front).read_bytes() for n in ("a.html", "b.html"))
    assert first == second


def test_a_hundred_layers_stay_under_a_megabyte(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(100) for m in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 4))
    schemes = "W2A4,W2A8,W3A8,W4A4,W4A8,W6A8,W8A8"
    analysis = mpq.analyze(net, [torch.randn(16, 8)], schemes, estimator="weight_sqnr", progress=False)
    config = analysis.allocate("size<=30%")
    path = config.report(tmp_path / "report.html", analysis=analysis)
    assert len(table(parse(path), "layers-table")) == 101
    assert path.stat().st_size < 1_000_000


def test_config_of_another_model_or_other_schemes_is_refused(cfg, analysis, tmp_path):
    stranger = replace(cfg, provenance={**cfg.provenance, "model_hash": "0" * 64})
    with pytest.raises(ConfigError, match="another model than the analysis"):
        stranger.report(tmp_path / "report.html", analysis=analysis)
    data = json.loads(cfg.to_json())
    data["layers"]["fc"] |= {"scheme": "W5A8", "weight": "int5"}
    with pytest.raises(ConfigError, match=r"'fc' has W5A8, but W2A8, .* are open"):
        analysis.pick(BitConfig.from_json(json.dumps(data), verify=False))


def test_pick_turns_a_config_back(analysis):
    rng = np.random.default_rng(0)
    pick = rng.integers(0, len(analysis.space.schemes), len(analysis.space.groups))
    assert (analysis.pick(analysis.config(pick)) == pick).all()


def test_text_on_the_heat_map_has_contrast():
    """WCAG 2, AA: at least 4.5 to 1, computed here from its definition."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    def luminance(colour):
        parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for i in range(256):
        ground = to_hex(mpl.colormaps["viridis_r"](i))
        ink = {"#000": 0.0, "#fff": 1.0}[_ink(ground)]
        light, dark = sorted((ink, luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_other_types_are_refused(cfg, analysis, tmp_path):
    with pytest.raises(mpq.MpqError, match=r"frontier must be what analysis\.pareto\(\) gives, not Analysis"):
        cfg.report(tmp_path / "x.html", frontier=analysis)
    with pytest.raises(mpq.MpqError, match="measured maps labels to measured configs"):
        cfg.report(tmp_path / "x.html", measured=[cfg])
    assert not list(tmp_path.iterdir())
