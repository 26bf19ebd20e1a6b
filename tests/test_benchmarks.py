"""What benchmarks say of runs that did not end in time, of goals that are missed, and of the phones' fits."""

import json
import sys

import numpy as np
import pytest

from mpq.cost_models import find_device


def test_medians_above_the_limit_meet_no_goal_that_they_flatter(load_benchmark):
    truth = load_benchmark("search_truth")
    nobody = np.inf

    def goals(**counts):
        rows = {"refine": [2, 3, 4], "random": [3000, 4000, 5000], **counts}
        return truth.goals({name: {"3.0": truth.Needed(row, 256)} for name, row in rows.items()})

    found = goals(quantune=[100, 200, nobody])
    assert found["fewer_than_quantune"] == {"value": 66.667, "goal": 10, "met": True}
    assert found["quantune_fewer_than_random"] == {"value": 20.0, "goal": 5, "met": True}
    found = goals(quantune=[100, nobody, nobody])
    assert found["fewer_than_quantune"] == {"value": 85.333, "goal": 10, "met": True, "bound": "at least"}
    assert found["quantune_fewer_than_random"] == {"value": 15.625, "goal": 5, "met": False, "bound": "at most"}
    found = goals(refine=[5, nobody, nobody])
    assert found["refine_median"] == {"value": 256.0, "goal": 8, "met": False, "bound": "at least"}
    assert not found["fewer_than_random"]["met"]
    few = truth.Needed([4.0, nobody, nobody], 256)
    assert (str(few), few.to_json()) == (">256 (>256)", [4.0, None, None])
    assert str(truth.Needed([4.0, 6.0, nobody], 256)) == "6 (>256)"


def test_results_without_a_number_are_json(load_benchmark):
    found = load_benchmark("solvers").finite({"rows": {"cbc": (1.5, np.inf, False)}, "gaps": [np.float64("nan")]})
    assert json.loads(json.dumps(found, allow_nan=False)) == {"rows": {"cbc": [1.5, None, False]}, "gaps": [None]}


@pytest.mark.parametrize("name", ["krishnamoorthi_cpu", "krishnamoorthi_hvx", "tflite_pixel3"])
def test_published_times_of_phones(load_benchmark, name):
    rows = load_benchmark("fidelity_cpu", reference=True).COMPARISONS[name]()
    assert rows
    assert [r.name for r in rows if not r.met] == []
    if name == "krishnamoorthi_cpu":
        assert any("the 5 networks in no fit" in r.name for r in rows)


def test_phones_are_what_their_fits_say(load_benchmark):
    """The shipped curves are the fits', to the four digits that are written."""
    for fitted in load_benchmark("phone_profiles", reference=True).fits():
        shipped = find_device(fitted.name).figures["curves"]
        for ours, theirs in zip(shipped, fitted.figures["curves"], strict=True):
            numbers = {k for k, v in theirs.items() if isinstance(v, float)}
            assert {k: ours[k] for k in ours.keys() - numbers} == {k: theirs[k] for k in theirs.keys() - numbers}
            assert [ours[k] for k in sorted(numbers)] == pytest.approx([theirs[k] for k in sorted(numbers)], rel=2e-3)


def test_no_comparison_goes_missing(load_benchmark, monkeypatch):
    table = load_benchmark("cost_fidelity")
    monkeypatch.setattr(table, "MODULES", ("fidelity_accelerators", "fidelity_that_is_gone"))
    with pytest.raises(ModuleNotFoundError, match="fidelity_that_is_gone"):
        table.comparisons()


def test_a_missed_goal_is_a_failure(load_benchmark, monkeypatch, capsys):
    table = load_benchmark("cost_fidelity", reference=True)
    rows = [table.Row("good", "1", "1", 1.0, "= 1", True), table.Row("bad", "2", "1", 2.0, "= 1", False)]
    monkeypatch.setattr(table, "comparisons", lambda quick: {"made up": lambda: rows})
    monkeypatch.setattr(sys, "argv", ["cost_fidelity.py"])
    with pytest.raises(SystemExit, match="missed: bad"):
        table.main()
    assert "1 of 2 goals met" in capsys.readouterr().out
    rows.pop()
    table.main()
