"""The layout: links, listed packages, and who may import whom."""

import ast
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mpq

ROOT = Path(__file__).resolve().parents[1]
checkout = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the checkout, not only the wheel")


@checkout
def test_listed_packages_are_the_folders():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    inside = {f"mpq.{p.parent.name}" for p in ROOT.glob("mpq/*/__init__.py")}
    assert set(listed) == inside | {"mpq"}


@checkout
@pytest.mark.parametrize("name", ["search", "sensitivity", "cost_models"])
def test_links_point_to_the_top_level_folders(name):
    assert (ROOT / "mpq" / name).is_symlink()
    assert (ROOT / "mpq" / name).readlink() == Path(f"../{name}")
    assert not [p for p in (ROOT / name).iterdir() if p.is_dir() and p.name != "__pycache__"]  # flat


@checkout
def test_exporters_are_verified_with_versions_that_their_extras_admit():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [Requirement(r) for name, rs in extras.items() if name.startswith("export-") for r in rs]
    lines = (ROOT / ".ci" / "pins.txt").read_text().splitlines()
    pins = {r.name: next(iter(r.specifier)).version for r in map(Requirement, lines[1:])}
    for name in pins:
        assert any(r.name == name for r in asked), name
    for r in asked:
        assert any(s.operator == "<" for s in r.specifier) or r.name == "requests", r
        assert r.name not in pins or r.specifier.contains(pins[r.name]), r


def imported(module_file):
    tree = ast.parse(module_file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module_file}: relative import"
            yield node.module


def files(package):
    return [f for f in Path(str(resources.files(package))).iterdir() if f.suffix == ".py"]


def test_search_knows_arrays_only():
    allowed = {"mpq.problem", "mpq.errors", "mpq.warning", "mpq._lazy"}
    for file in files("mpq.search"):
        for name in imported(file):
            assert not name.startswith(("torch", "scipy.sparse.csgraph"))
            assert not name.startswith("mpq.") or name in allowed or name.startswith("mpq.search"), (file, name)


def test_cost_models_never_see_weights_and_quantizers_never_see_layers():
    for file in files("mpq.cost_models"):
        assert not any(name.split(".")[0] == "torch" for name in imported(file)), file
    for file in files("mpq.quantizers"):
        assert not any(name in ("mpq.layers", "mpq.view", "mpq.bank") for name in imported(file)), file


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light_and_configs_load_without_torch():
    loaded = "import sys, mpq; print([m for m in ('torch', 'numpy', 'matplotlib', 'pulp') if m in sys.modules])"
    assert run(loaded) == "[]"
    code = "import sys, mpq.config, mpq.search, mpq.cost_models, mpq.analysis; print('torch' in sys.modules)"
    assert run(code) == "False"


def test_every_public_name_exists():
    for name in mpq.__all__:
        assert getattr(mpq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mpq.nonsense


@pytest.mark.slow
def test_functions_stay_functions_after_their_modules_are_imported():
    code = (
        "import mpq, mpq.allocation, mpq.evaluation, mpq.export, mpq.cli; "
        "print(all(map(callable, (mpq.allocate, mpq.evaluate, mpq.quantize, mpq.export, mpq.load))))"
    )
    assert run(code) == "True"


@checkout
def test_sources_stay_small():
    for folder in ("mpq", "search", "sensitivity", "cost_models"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 400, file
