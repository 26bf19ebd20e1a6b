import pytest

from mpq import Budget
from mpq.budget import parse_budgets
from mpq.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "metric", "value", "relative"),
    [
        ("size<=25%", "size", 0.25, True),
        ("size <= 300KB", "size", 300e3, False),
        ("size<=1.5MiB", "size", 1.5 * 2**20, False),
        ("size<=1e6", "size", 1e6, False),
        ("avg_bits<=4", "avg_bits", 4, False),
        ("stored_bits≤4.5bits", "stored_bits", 4.5, False),
        ("latency<=3ms", "latency", 3e-3, False),
        ("bitops<=50G", "bitops", 50e9, False),
        ("accuracy_drop<=0.5%", "accuracy_drop", 0.005, False),
        ("accuracy_drop<=0%", "accuracy_drop", 0, False),
    ],
)
def test_budgets_parse(text, metric, value, relative):
    budget = Budget.parse(text)
    assert (budget.metric, budget.value, budget.relative) == (metric, pytest.approx(value), relative)
    assert Budget.parse(budget.text) == budget


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("size", "is not a budget"),
        ("size>=3", "is not a budget"),
        ("size<=", "is not a budget"),
        ("size<=-3", "the limit in 'size<=-3' must be a positive number"),
        ("volume<=3", "unknown metric 'volume'"),
        ("size<=3ms", "unknown unit 'ms' for size"),
        ("avg_bits<=4%", "unknown unit '%'"),
        ("size<=0", "must be a positive number"),
        ("size<=1.2.3MB", "must be a positive number"),
        ("latency<=3", "unknown unit ''"),
    ],
)
def test_unparsable_budgets_say_why(text, match):
    with pytest.raises(BudgetError, match=match):
        Budget.parse(text)


def test_several_budgets_and_contradictions():
    assert [b.metric for b in parse_budgets("size<=25%, bitops<=50G")] == ["size", "bitops"]
    with pytest.raises(BudgetError, match=r"contradictory budgets: both size<=25% and size<=1MB"):
        parse_budgets(["size<=25%", "size<=1MB"])
    with pytest.raises(BudgetError, match="no budget given"):
        parse_budgets([])


def test_limit_of_a_share():
    assert Budget.parse("size<=25%").limit(1000) == 250
    assert Budget.parse("size<=25kB").limit(1000) == 25000


@pytest.mark.parametrize("text", ["accuracy_drop<=0.5", "accuracy_drop<=101%"])
def test_drops_are_percentage_points(text):
    with pytest.raises(BudgetError, match=r"unit|100 percentage points"):
        Budget.parse(text)
