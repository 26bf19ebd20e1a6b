"""The explorer on a live JupyterLab page in headless Chromium."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

import mpq

for package in ("jupyterlab", "plotly", "anywidget", "ipywidgets"):
    pytest.importorskip(package)
pytestmark = pytest.mark.slow

CELL = """
import mpq
from mpq.bundled import load_example

model, calib, test = load_example()
images, labels = test[0]
quick = dict(estimator="weight_sqnr", weight_range="minmax", progress=False)
front = mpq.analyze(model, [calib[0][0][:32]], "W2A8,W4A8,W8A8", **quick).pareto()
evaluator = mpq.Evaluator(model, [(images[:32], labels[:32]), (images[32:64], labels[32:64])], progress=False)
front.explore(points={"published": {"size": 150e3, "accuracy": 0.9}}, evaluate=evaluator)
"""
MINUTE = 60_000
BARS = ".js-plotly-plot .subplot.x2y2 .barlayer .point path"
ONE_HEIGHT = f"""() => {{
    const heights = [...document.querySelectorAll("{BARS}")].map(bar => Math.round(bar.getBBox().height));
    return heights.length && Math.max(...heights) - Math.min(...heights) <= 1;
}}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "explore.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(folder):
    """Address of a JupyterLab of our own, without the user's settings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
    ]
    options += ["--LabApp.news_url=None", "--LabApp.extension_manager=readonly"]
    own = {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = {**os.environ, **own, "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "OMP_NUM_THREADS": "1"}
    with (folder / "lab.log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={folder}"]
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (folder / "lab.log").read_text()
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def page(browser, lab):
    """The notebook, run, with the explorer in view."""
    page = browser.new_page(viewport={"width": 1300, "height": 1700})
    page.set_default_timeout(2 * MINUTE)
    page.goto(f"{lab}/lab/tree/explore.ipynb")
    page.locator(".jp-Notebook .jp-CodeCell").first.click()
    page.get_by_text("| Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(BARS).first.wait_for()
    return page


def traces(page):
    """The ring, the frontier, the uniform points and those that were given."""
    return page.locator(".js-plotly-plot .subplot.xy .scatterlayer .trace")


def click_point(page, trace, index):
    """Click on a point as a user does: Plotly listens on a layer above it."""
    box = traces(page).nth(trace).locator("path.point").nth(index).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y)
    page.wait_for_selector(".hoverlayer .hovertext")
    page.mouse.click(x, y)


def bar_heights(page):
    bars = page.locator(BARS)
    return [round(bars.nth(i).bounding_box()["height"]) for i in range(bars.count())]


def shot(page, name):
    if "MPQ_SCREENSHOTS" in os.environ:
        page.screenshot(path=str(Path(os.environ["MPQ_SCREENSHOTS"]) / f"{name}.png"))


def test_plot_appears_with_all_series(page):
    shot(page, "appears")
    assert traces(page).nth(1).locator("path.point").count() > 20
    assert traces(page).nth(2).locator("path.point").count() == 3
    heights = bar_heights(page)
    assert len(heights) == 22
    assert max(heights) > 1.5 * min(heights)  # mixed
    right = page.locator(".js-plotly-plot .main-svg").first.bounding_box()
    assert right["width"] > 800  # as wide as the page, not Plotly's own 700


def test_click_changes_the_layers_and_saving_writes_what_is_shown(page, folder):
    click_point(page, 2, 1)
    page.get_by_placeholder("bits-uniform-W4A8.json").wait_for()
    page.wait_for_function(ONE_HEIGHT)
    shot(page, "uniform")
    assert max(bar_heights(page)) - min(bar_heights(page)) <= 1
    page.get_by_placeholder("bits-uniform-W4A8.json").fill("chosen.json")
    page.get_by_role("button", name="Save JSON").click()
    page.get_by_text("Saved ").wait_for()
    saved = mpq.load(folder / "chosen.json")
    assert set(saved.schemes().values()) == {"W4A8"}


def test_measuring_shows_figures_and_adds_the_point_to_the_accuracy_axis(page):
    page.get_by_role("button", name="Measure now").click()
    page.get_by_text("Measured uniform W4A8: accuracy").wait_for()
    page.get_by_label("up", exact=True).select_option("measured accuracy")
    page.locator(".js-plotly-plot .ytitle", has_text="measured accuracy").wait_for()
    shot(page, "measured")
    assert traces(page).nth(2).locator("path.point").count() == 1
    assert traces(page).nth(3).locator("path.point").count() == 1  # the published one
    page.locator(".js-plotly-plot .annotation", has_text="float ").wait_for()
