from __future__ import annotations

import importlib
import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import mpq
from mpq.bundled import load_example

SHARED = Path(os.environ.get("MPQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))

settings.register_profile("mpq", deadline=None)  # of no use on a machine with other work
settings.load_profile("mpq")
torch.set_num_threads(1)  # tiny networks: a second thread costs more than it gives


@pytest.fixture(scope="session")
def example():
    return load_example()


@pytest.fixture(scope="session")
def analysis(example):
    """The bundled ResNet-20, measured once."""
    model, calib, _ = example
    return mpq.analyze(model, calib[:4], "W2A8,W3A8,W4A8,W8A8", progress=False)


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium, without a window; tests skip where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra mpq[test]")
    chromium = os.environ.get("MPQ_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs the system's chromium (apt-get install chromium), or its path in MPQ_CHROMIUM")
    with playwright.sync_playwright() as player:
        found = player.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


@pytest.fixture(scope="session")
def load_benchmark():
    """Imports a script of ``benchmarks/`` by name; tests skip where it, or figures it is asked for, are not at hand."""
    folder = Path(__file__).parents[1] / "benchmarks"

    def load(name, reference=False):
        if not folder.is_dir():
            pytest.skip("needs the checkout, not only the wheel")
        module = importlib.import_module(name)
        if reference and not (SHARED / "reference").is_dir():
            pytest.skip("no reference figures in ../shared; set MPQ_SHARED")
        return module

    sys.path.append(str(folder))
    yield load
    sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def shared_loaders():
    """The real models that are not shipped; tests skip where they are absent."""
    folder = SHARED / "data"
    if not (folder / "load.py").is_file():
        pytest.skip(f"no real models at {folder}; set MPQ_SHARED")
    sys.path.insert(0, str(folder))
    from load import LOADERS

    yield {name: _skipping(load) for name, load in LOADERS.items()}
    sys.path.remove(str(folder))


def _skipping(load):
    """Skip where the package that a model comes with is not installed."""

    def loaded(*args, **kwargs):
        try:
            return load(*args, **kwargs)
        except ModuleNotFoundError as error:
            pytest.skip(f"needs the package {error.name}")

    return loaded


@pytest.fixture(scope="session")
def mixed():
    """Makes a config without a search: groups take turns with the schemes that each may have.

    ``pick`` says which scheme the groups that hold the named layers have instead.
    """

    def make(model, calib, schemes, *, pick=None, weight_range="minmax", **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers that a runtime leaves float
            analysis = mpq.analyze(
                model, calib, schemes, estimator="weight_sqnr", weight_range=weight_range, progress=False, **options
            )
        space, chosen = analysis.space, []
        for i, (group, allowed) in enumerate(zip(space.groups, space.allowed, strict=True)):
            names = {str(s): k for k, s in enumerate(space.schemes) if allowed[k]}
            wanted = next(
                (scheme for layer in group.layers for n, scheme in (pick or {}).items() if n == layer.name), None
            )
            chosen.append(names[wanted or list(names)[i % len(names)]])
        return analysis.config(chosen)

    return make
