from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

import mpq
from mpq.bundled import load_example

SHARED = Path(os.environ.get("MPQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))

torch.set_num_threads(1)  # tiny networks: a second thread costs more than it gives


@pytest.fixture(scope="session")
def example():
    return load_example()


@pytest.fixture(scope="session")
def analysis(example):
    """The bundled ResNet-20, measured once."""
    model, calib, _ = example
    return mpq.analyze(model, calib[:4], "W2A8,W3A8,W4A8,W8A8", progress=False)


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

    yield LOADERS
    sys.path.remove(str(folder))
