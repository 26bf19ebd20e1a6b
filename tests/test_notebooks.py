"""The notebooks run from start to end, and show what they promise."""

import re
from pathlib import Path

import pytest

# What each prints, and how many pictures it has at least.
SAYS = {
    "00_quickstart": ("avg 3.00 bits", "is below the smallest reachable", "read back as it was: True", "report.html"),
    "01_pareto": ("Frontier:", "BitConfig:", "accuracy"),
    "02_sensitivity": (
        "SensitivityTable(",
        "is off by a factor of",
        "Comparison",
        "anchored",
        "BitConfig:",
        "accuracy",
    ),
    "03_search": ("interaction", "greedy_path", "proven gap", "Study: refine", "Study: bisection"),
    "05_formats": ("all formats", "predicted loss", "stored"),
    "04_devices": ("bound by", "layers where a scheme gains no time", "FPGA (ZCU104)", "optimal for latency", "binds"),
    "06_your_own_model": (
        "GRU is not quantizable",
        "position of Classifier is not quantizable",
        "second call: ",
        "did you mean head.0",
        "DataError: the data is empty",
        "UnreachableError: the budget can't be met",
        "ConfigError: the config was made for a model with other weights",
    ),
    "07_onnx": ("22 exact of 22 layers", "INT4 weight, UINT8 input", "QLinearConv"),
}
PICTURES = {"00_quickstart": 1, "06_your_own_model": 2, "07_onnx": 1}
NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


def texts(notebook):
    """What the code cells of a notebook print and show."""
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error"]
    return "".join(out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in outputs)


def pictures(notebook):
    """How many there are."""
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    return sum("image/png" in out.get("data", {}) for out in outputs)


def holds(name, text):
    """Facts that no wording tells."""
    if name == "00_quickstart":
        uniform, mixed = (float(x) for x in re.findall(r"bits .*accuracy ([\d.]+)%", text))
        assert mixed > uniform + 3  # at equal size
    if name == "06_your_own_model":
        first, second = (float(x) for x in re.findall(r"(?:first|second) call: ([\d.]+) s", text))
        assert second < first / 2
    if name == "07_onnx":
        rows = re.findall(r"onnxruntime ([\d.]+)%, mpq ([\d.]+)%, same class for ([\d.]+)%", text)
        assert len(rows) == 4
        for theirs, ours, same in rows:
            assert abs(float(theirs) - float(ours)) <= 0.5
            assert float(same) >= 99.5
        sizes = {n: float(kb) for n, kb in re.findall(r"^(\w+) +([\d.]+) kB$", text, re.MULTILINE)}
        assert sizes["W4A8"] <= sizes["mixed"] < 0.7 * sizes["W8A8"] < 0.3 * sizes["float"]
        counted = {row[0]: int(row[1]) for row in re.findall(r"^(\w+) +(\d+) +\d+ +\d+ +\d+ +\d+$", text, re.MULTILINE)}
        assert counted["float"] == counted["W4A8"] == 0 < counted["mixed"] < counted["W8A8"]


@pytest.mark.skipif(not NOTEBOOKS, reason="needs the checkout, not only the wheel")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_real_and_hold_no_paths(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, 4)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    text = texts(notebook)
    holds(path.stem, text)
    assert [said for said in SAYS[path.stem] if said not in text] == []
    assert not re.search(r"(?:/home|/root|/tmp|/work|/Users)/|site-packages", text)
    assert f"({path.name})" in (path.parent / "README.md").read_text("utf8")


@pytest.mark.slow
@pytest.mark.skipif(not NOTEBOOKS, reason="needs the checkout, not only the wheel")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two busy threads are slower than one where others compute
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel shows figures inline
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, 4)
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3").execute()
    text = texts(notebook)
    assert pictures(notebook) >= PICTURES.get(path.stem, 3)
    for said in SAYS[path.stem]:
        assert said in text
    holds(path.stem, text)
