"""The notebooks run from start to end, and show what they promise."""

from pathlib import Path

import pytest

SAYS = {
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
    "04_devices": ("bound by", "layers where a scheme gains no time", "FPGA (ZCU104)", "optimal for latency", "binds"),
}
NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


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
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error"]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    text = "".join(out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in outputs)
    assert len(pictures) >= 3
    for said in SAYS[path.stem]:
        assert said in text
