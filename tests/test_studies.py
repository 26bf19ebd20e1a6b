import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from tqdm import tqdm

import mpq
from mpq.analysis import Analysis
from mpq.errors import MpqError, UnreachableError
from mpq.search import SEARCHES, Genetic, OptunaSearch, Refine
from mpq.studies import measure_of
from mpq.testing import tiny_network


@pytest.fixture(scope="module")
def measured():
    """A tiny network with its own predictions as labels: analysis, and evaluators of two sets of data."""
    net, _ = tiny_network()
    generator = torch.Generator().manual_seed(1)
    sets = [torch.randn(6, 20, 1, 6, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    analysis = mpq.analyze(net, list(sets[0]), "W2,W3,W4,W8", progress=False)
    with torch.no_grad():
        labelled = [[(x, net(x).argmax(1)) for x in data] for data in sets]
    return analysis, *(mpq.Evaluator(net, data, progress=False) for data in labelled)


def test_search_with_an_evaluator(measured, tmp_path):
    analysis, evaluator, _ = measured
    run = partial(analysis.search, evaluator, "avg_bits<=3", progress=False, ledger=tmp_path / "ledger.db")
    cut = run(evaluations=3)
    study = run(evaluations=6)
    assert (study.solution.reused, study.solution.evaluations) == (3, 3)
    assert study.quantity == "kl"
    assert study.config.avg_bits <= 3
    assert study.config.budgets == ("avg_bits<=3",)
    assert study.config.measured.kl == study.solution.loss == evaluator.measure(study.config).kl
    assert study.solution.loss <= cut.solution.loss <= evaluator.measure(analysis.allocate("avg_bits<=3")).kl
    rows = study.table()
    assert [r["kl"] for r in rows] == study.solution.trace.losses.tolist()
    assert max(r["avg_bits"] for r in rows) <= 3
    assert min(r["kl"] for r in rows) == study.solution.loss
    assert "<- best" in repr(study)
    assert "after 3 evaluations and 3 from the ledger" in repr(study)
    assert mpq.BitConfig is type(study.config)
    json.loads(study.config.to_json())


def test_noise_is_the_standard_error_of_a_difference_over_batches(measured, tmp_path):
    analysis, evaluator, _ = measured
    picks = np.array([[0] * len(analysis.space.groups), [1] * len(analysis.space.groups)])
    measure = measure_of(analysis, evaluator, False)
    batches = [np.diff([6 * 0.0, *((i + 1) * x for i, x in enumerate(measure.in_parts(pick)))]) for pick in picks]
    differences = batches[0] - batches[1]
    assert len(differences) == 6
    wanted = differences.std(ddof=1) / np.sqrt(6)
    assert measure.noise(*picks) == pytest.approx(wanted, rel=1e-9)
    assert measure_of(analysis, evaluator, False).noise(*picks) == pytest.approx(wanted, rel=1e-9)
    assert measure.noise(picks[0], picks[0]) == 0
    alone = batches[0].std(ddof=1) / np.sqrt(6)
    assert measure.noise(picks[1], picks[1]) < wanted < 2 * alone


def test_refine_ends_below_the_noise_of_the_evaluator(measured):
    """Twenty samples a batch: the best picks can't be told apart better than by some per cent."""
    analysis, evaluator, _ = measured

    def run(evaluate):
        return analysis.search(
            evaluate, "avg_bits<=3", Refine(handful=3, least_gain=1e-4), evaluations=20, progress=False
        ).solution

    noisy, blind = run(evaluator), run(lambda config: evaluator.measure(config).kl)
    assert "less than the noise of" in noisy.message
    assert noisy.evaluations < blind.evaluations


def test_the_ledger_knows_data_and_quantity(measured, tmp_path):
    analysis, evaluator, other = measured
    options = {"progress": False, "ledger": tmp_path / "ledger.db", "evaluations": 2}
    analysis.search(evaluator, "avg_bits<=3", **options)
    assert analysis.search(other, "avg_bits<=3", **options).solution.reused == 0
    assert analysis.search(evaluator, "avg_bits<=3", **options).solution.evaluations == 0
    with pytest.raises(MpqError, match="needs about="):
        analysis.search(lambda config: 1.0, "avg_bits<=3", **options)
    assert analysis.search(lambda config: 1.0, "avg_bits<=3", about="ones", **options).solution.reused == 0


def test_search_with_a_function_and_another_method(measured):
    analysis = measured[0]

    def loss(config):
        return sum(c.parameters * 4.0**-c.weight.bits for c in config.layers.values())

    study = analysis.search(loss, "size<=20%", Genetic(population=6), evaluations=30, progress=False)
    assert study.quantity == "loss"
    assert study.config.measured is None
    assert study.solution.loss == pytest.approx(loss(study.config))
    assert study.config.solver["name"] == "genetic"
    with pytest.raises(MpqError, match="unknown search 'magic'; known: refine"):
        analysis.search(loss, "size<=20%", "magic", progress=False)
    with pytest.raises(UnreachableError, match="Smallest reachable"):
        analysis.search(loss, "size<=1%", progress=False)
    with pytest.raises(MpqError, match="evaluations must be a whole number of at least 1, not 0"):
        analysis.search(loss, "size<=20%", evaluations=0, progress=False)
    for seconds in (0, -1, float("nan")):
        with pytest.raises(MpqError, match="seconds must be a positive number"):
            analysis.search(loss, "size<=20%", seconds=seconds, progress=False)
    # What is predicted to be best is measured however short the time.
    assert analysis.search(loss, "size<=20%", seconds=1e-9, progress=False).config.budgets == ("size<=20%",)


def test_the_documentation_names_every_method_and_what_needs_an_extra():
    core, extra = Analysis.search.__doc__.split("method:")[1].split("or a search")[0].split("with the extra")
    for name, search in SEARCHES.items():
        assert f"``{name}``" in (extra if search.needs else core)


def test_the_bar_is_closed_when_a_measurement_fails(measured, monkeypatch):
    bar = tqdm(disable=True)
    closed = []
    monkeypatch.setattr(bar, "close", lambda: closed.append(True))
    monkeypatch.setattr("mpq.studies.open_bar", lambda *_: bar)

    def fail(config):
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        measured[0].search(fail, "size<=20%")
    assert closed == [True]


def test_pruned_by_early_batches(measured):
    """Optuna drops bad configs after the first batches; their partial losses are no evaluations."""
    analysis, evaluator, _ = measured
    study = analysis.search(evaluator, "avg_bits<=5", OptunaSearch(seeded=False), evaluations=20, progress=False)
    trace = study.solution.trace
    assert 5 <= len(trace) < 20
    assert trace.losses[-1] == evaluator.measure(analysis.config(trace.picks[-1])).kl


def test_accuracy_budget_takes_no_method(measured):
    analysis, evaluator, _ = measured
    for method, match in (("magic", "unknown search"), ("genetic", r"accuracy_drop<=2% .* leave out method='genetic'")):
        with pytest.raises(MpqError, match=match):
            analysis.search(evaluator, "accuracy_drop<=2%", method, progress=False)


def test_accuracy_budget_returns_its_trace(measured):
    analysis, evaluator, _ = measured
    study = analysis.search(evaluator, "accuracy_drop<=2%", evaluations=8, progress=False)
    drops = [evaluator.accuracy_drop(analysis.config(p))[0] for p in study.solution.trace.picks]
    np.testing.assert_allclose(study.solution.trace.losses, drops)
    assert len(drops) <= 8
    passing = [r["size"] for r in study.table() if r["accuracy_drop"] <= 0.02 + 1e-12]
    assert study.config.size_bytes == min(passing)
    assert study.config.measured.float_accuracy - study.config.measured.accuracy <= 0.02 + 1e-12


def test_threads_measure_what_one_alone_does(measured):
    """An evaluator swaps weights in: threads take turns."""
    analysis, evaluator, _ = measured
    options = {"evaluations": 6, "progress": False}
    alone = analysis.search(evaluator, "avg_bits<=3", "random", **options).solution.trace
    with ThreadPoolExecutor(3) as executor:
        together = analysis.search(evaluator, "avg_bits<=3", "random", executor=executor, **options).solution.trace
    np.testing.assert_array_equal(together.picks, alone.picks)
    np.testing.assert_array_equal(together.losses, alone.losses)
