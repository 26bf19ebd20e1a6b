"""Explanations held to solving again, to all picks and to finite differences."""

import json
from dataclasses import replace

import numpy as np
import pytest
from picks import every_pick

import mpq
from mpq.analysis import Analysis
from mpq.errors import BudgetError, FormatError, GraphError, MpqError, UnreachableError
from mpq.search import Exhaustive, convex_frontier
from mpq.sensitivity import SensitivityTable
from mpq.testing import tiny_network


@pytest.fixture(scope="module")
def measured():
    net, data = tiny_network()
    return mpq.analyze(net, data, "W2A8,W4A8,W8A8", progress=False)


def separable(analysis: Analysis, seed: int = 0, error: float = 0.0) -> Analysis:
    """The same model with losses made up: no interactions, no rows."""
    shape = analysis.table.loss.shape
    loss = np.random.default_rng(seed).random(shape) * np.array([1, 0.3, 0.05])
    names = analysis.table.groups, analysis.table.schemes
    table = SensitivityTable(*names, loss, np.full(shape, error), provenance=analysis.table.provenance)
    return replace(analysis, table=table)


BUDGET = "avg_bits<=4"


def test_price_is_what_the_next_corner_of_the_frontier_saves(measured):
    analysis = separable(measured)
    front = convex_frontier(analysis.table.loss, analysis.costs["size"].cost)
    cost = [analysis.costs["size"].metric(c) for c in front.cost]
    for i in range(len(cost) - 1):
        price = analysis.explain(f"size<={cost[i]:.0f}").prices["size"]
        saved = analysis.table.predict(front.picks[i]) - analysis.table.predict(front.picks[i + 1])
        assert price.price == pytest.approx(saved / (cost[i + 1] - cost[i]), rel=1e-6)
        assert price.binding
        assert price.used == price.limit == pytest.approx(cost[i])


def test_a_saturated_table_gives_prices_and_parts_of_the_predicted_loss(measured):
    plain = separable(measured)
    analysis = replace(plain, table=replace(plain.table, ceiling=1.0))
    a, b = plain.explain(BUDGET), analysis.explain(BUDGET)
    assert b.loss == pytest.approx(a.loss / (1 + a.loss))
    assert b.prices["avg_bits"].price == pytest.approx(a.prices["avg_bits"].price / (1 + a.loss) ** 2)
    assert sum(r["loss"] for r in b.table()) == pytest.approx(b.loss)


@pytest.mark.parametrize("kind", ["separable", "interacting"])
def test_table_rows_say_what_a_change_would_do(measured, kind):
    analysis = separable(measured) if kind == "separable" else measured
    found = analysis.explain(BUDGET)
    schemes = list(analysis.table.schemes)
    rows = found.table()
    assert sum(r["loss"] for r in rows) == pytest.approx(found.loss)
    for m, cost in analysis.costs.items():
        total = sum(r["costs"][m] for r in rows) + cost.constant / cost.divisor
        assert total == pytest.approx(found.config.metrics[m]["value"])
    for g, row in enumerate(rows):
        assert row["scheme"] == str(found.config[row["layers"][0]].scheme)
        pick = found.pick.copy()
        pick[g] = schemes.index(row["runner_up"])
        assert row["runner_up_loss"] == pytest.approx(analysis.table.predict(pick) - found.loss, abs=1e-12)
        added = analysis.costs["avg_bits"].total(pick) - found.config.avg_bits
        assert row["runner_up_costs"]["avg_bits"] == pytest.approx(added)


@pytest.mark.parametrize("kind", ["separable", "interacting"])
def test_what_if_equals_solving_with_the_pin(measured, kind):
    analysis = separable(measured) if kind == "separable" else measured
    found = analysis.explain(BUDGET)
    problem = found.analysis.problem(found.budgets)
    for g, group in enumerate(analysis.space.groups):
        for s, scheme in enumerate(analysis.table.schemes):
            only = np.arange(problem.loss.shape[1]) != s
            loss = problem.loss.copy()
            loss[g, only] = np.inf
            best = Exhaustive().solve(replace(problem, loss=loss))
            if best.pick is None:
                with pytest.raises(UnreachableError, match="the budget can't be met"):
                    found.what_if({group.layers[0].name: scheme})
                continue
            answer = found.what_if({group.layers[0].name: scheme})
            assert answer.proven
            assert answer.loss[1] == pytest.approx(analysis.table.predict(best.pick), abs=1e-12)
            assert answer.added_loss >= -1e-12
            assert str(answer.after[group.layers[0].name].scheme) == scheme
            names = [x.name for x in analysis.space.groups]
            moved = {n for n, a, b in zip(names, found.pick, best.pick, strict=True) if a != b}
            assert set(answer.changes) == moved
            assert (group.name in answer.changes) == (s != found.pick[g])


def test_what_if_of_unknown_names_and_schemes(measured):
    found = measured.explain(BUDGET)
    with pytest.raises(GraphError, match="no quantizable layer is called 'nothing'"):
        found.what_if({"nothing": "W4A8"})
    with pytest.raises(FormatError, match=r"W3A8 is not open to '0'; it may have W2A8, W4A8, W8A8"):
        found.what_if({"0": "W3A8"})
    both = found.what_if({"*": "W2A8", "0": "W4A8"})
    assert list(both.after.schemes().values()) == ["W4A8", "W2A8", "W2A8", "W2A8"]
    assert set(both.pinned) == {"0", "2", "5", "7"}
    assert "(pinned)" in repr(both)
    same = found.what_if({"0": str(found.config["0"].scheme)})
    assert "nothing changes" in repr(same)


def test_survival_without_errors_is_one_and_falls_with_them(measured):
    sure = separable(measured).explain(BUDGET).survival(10)
    assert set(sure.kept.values()) == {1.0}
    assert (sure.whole, sure.source) == (1.0, "standard errors")
    still = replace(measured, table=replace(measured.table, rows=None, stderr=np.zeros((4, 3))))
    assert still.explain(BUDGET).survival(5).whole == 1.0
    rows = np.repeat(measured.table.rows[:1], 6, 0)  # all samples alike
    alike = replace(measured, table=replace(measured.table, rows=rows))
    assert alike.explain(BUDGET).survival(5).whole == 1.0
    noisy = separable(measured, error=0.5).explain(BUDGET)
    shares = noisy.survival(30, seed=1)
    assert shares.whole < 1
    assert all(sum(s.values()) == pytest.approx(1) for s in shares.schemes.values())
    assert shares == noisy.survival(30, seed=1) != noisy.survival(30, seed=2)
    assert measured.explain(BUDGET).survival(5).source == "samples"
    unknown = replace(measured, table=replace(measured.table, rows=None, stderr=np.full((4, 3), np.nan)))
    with pytest.raises(MpqError, match="no standard errors"):
        unknown.explain(BUDGET).survival(5)
    with pytest.raises(MpqError, match="draws must be at least 1"):
        noisy.survival(0)


def test_feasibility_for_users(measured):
    found = measured.feasibility("avg_bits<=1.9,bitops<=1e12")
    assert not found.feasible
    assert found.binding == ("avg_bits",)
    assert found.relaxation == pytest.approx(2 / 1.9 - 1)
    assert "only avg_bits<=2" in found.message
    assert measured.feasibility([f"{m}<={v:.12g}" for m, v in found.relaxed.items()]).feasible
    reach = found.metrics["avg_bits"]
    assert (reach.least, reach.most, reach.limit, reach.with_others) == (2, 8, 1.9, 2)
    assert measured.feasibility(BUDGET).message == "avg_bits<=4 can be met"
    assert json.loads(found.to_json())["binding"] == ["avg_bits"]
    assert "reachable 2 bits to 8 bits, limit 1.9 bits" in repr(found)
    with pytest.raises(UnreachableError, match=r"all limits by 5\.26% \(avg_bits<=2, bitops<="):
        measured.allocate("avg_bits<=1.9,bitops<=1e12")
    with pytest.raises(BudgetError, match="accuracy_drop is measured"):
        measured.feasibility("accuracy_drop<=1%")


def test_limits_that_can_be_met_alone_but_not_together(example_pair):
    found = example_pair.feasibility("size<=60,bitops<=60")
    assert set(found.binding) == {"size", "bitops"}
    problem = example_pair.problem(example_pair.parse("size<=60,bitops<=60"))
    totals_ = {m: [c.total(p) for p in every_pick(problem)] for m, c in example_pair.costs.items()}
    needed = np.maximum(np.array(totals_["size"]) / 60, np.array(totals_["bitops"]) / 60).min() - 1
    assert found.relaxation == pytest.approx(needed, rel=1e-9)
    for m, other in (("size", "bitops"), ("bitops", "size")):
        fits = [a for a, b in zip(totals_[m], totals_[other], strict=True) if b <= 60]
        assert found.metrics[m].with_others == min(fits)
        alone = f"{m}<={found.metrics[m].with_others:g},{other}<=60"
        assert example_pair.feasibility(alone).feasible
    assert "can be met alone but not together" in found.message


@pytest.fixture
def example_pair(measured):
    """Costs made up so that what is small is slow."""
    cost = np.array([[10.0, 20, 40]] * 4) * np.array([[1], [1], [2], [1]])
    size = replace(measured.costs["size"], cost=cost, constant=0.0)
    slow = replace(measured.costs["bitops"], cost=cost[:, ::-1].copy(), constant=0.0)
    return replace(separable(measured), costs={"size": size, "bitops": slow})


@pytest.mark.parametrize("kind", ["separable", "interacting"])
def test_smallest_config_under_a_loss_limit(measured, kind):
    analysis = separable(measured) if kind == "separable" else measured
    picks = every_pick(analysis.problem())
    loss = analysis.table.predict_all(picks)
    sizes = np.array([analysis.costs["size"].total(p) for p in picks])
    for share in (0.1, 0.4):
        limit = float(np.quantile(loss, share))
        found = analysis.smallest("size", limit)
        assert found.size_bytes == sizes[loss <= limit * (1 + 1e-9)].min()
        assert found.solver["status"] == "optimal"
        assert found.solver["objective"] == found.solver["bound"] == found.size_bytes
        assert found.budgets == (f"loss<={limit:g}",)
        assert mpq.BitConfig.from_json(found.to_json()) == found
    bits = np.array([analysis.costs["avg_bits"].total(p) for p in picks])
    limited = analysis.smallest("bitops", limit, budget="avg_bits<=5")
    ops = np.array([analysis.costs["bitops"].total(p) for p in picks])
    assert limited.metrics["bitops"]["value"] == ops[(loss <= limit * (1 + 1e-9)) & (bits <= 5)].min()


def test_smallest_config_says_why_not(measured):
    with pytest.raises(UnreachableError, match=r"loss<=1e-09 can't be met: the least predicted loss"):
        measured.smallest("size", 1e-9)
    with pytest.raises(BudgetError, match="loss_limit must be a positive number, not 0"):
        measured.smallest("size", 0)
    with pytest.raises(BudgetError, match="size is what is to be least; drop its budget"):
        measured.smallest("size", 0.1, budget="size<=50%")
    with pytest.raises(BudgetError, match="no figures for latency"):
        measured.smallest("latency", 0.1)
    assert measured.smallest("size", measured.table.ceiling * 2).avg_bits == 2


def test_shown_as_text_html_and_json(measured, tmp_path):
    found = measured.explain("avg_bits<=4,bitops<=1e12")
    text = repr(found)
    assert text.startswith("Explanation of avg_bits<=4, bitops<=1e12: predicted kl rise")
    assert "avg_bits" in text.splitlines()[1]
    assert "does not bind: a higher limit would buy nothing" in text
    assert sum(line.startswith(("  0 ", "  2 ", "  5 ", "  7 ")) for line in text.splitlines()) == 4
    html = found._repr_html_()
    assert html.count("<tr>") == 5
    data = json.loads(found.save(tmp_path / "why.json").read_text())
    assert data["groups"] == found.table()
    assert data["prices"]["bitops"]["price"] == 0
    assert found.to_json() == measured.explain("avg_bits<=4,bitops<=1e12").to_json()
    pinned = replace(measured, space=replace(measured.space, allowed=measured.space.allowed & [[1, 0, 0]] * 4 > 0))
    assert "(only choice)" in repr(pinned.explain(BUDGET))
