"""What benchmarks say of runs that did not end in time."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the checkout, not only the wheel")


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_medians_above_the_limit_meet_no_goal_that_they_flatter(monkeypatch):
    truth = load("search_truth", monkeypatch)
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


def test_results_without_a_number_are_json(monkeypatch):
    found = load("solvers", monkeypatch).finite({"rows": {"cbc": (1.5, np.inf, False)}, "gaps": [np.float64("nan")]})
    assert json.loads(json.dumps(found, allow_nan=False)) == {"rows": {"cbc": [1.5, None, False]}, "gaps": [None]}
