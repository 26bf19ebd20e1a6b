"""The documentation: every code block runs and prints what its page says; nothing that it should list is left out."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import mpq
from mpq.cost_models import all_devices
from mpq.export import EXPORTERS
from mpq.export.importing import IMPORTERS
from mpq.export.runtimes import RUNTIMES
from mpq.fingerprint import Fingerprint

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("[!_]*.md"))] if (DOCS / "hooks.py").is_file() else []
PAGES = [p for p in PAGES if p.parent.name != "snippets"]
checkout = pytest.mark.skipif(not PAGES, reason="needs the checkout, not only the wheel")


def name(page):
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def measured_once():
    """Pages measure the same network again and again; the same call has the same result."""
    import mpq.allocation as allocation

    kept, measure = {}, mpq.analyze  # imported before it is replaced, so that it comes back afterwards

    def analyze(*args, **options):
        given = inspect.signature(measure).bind(*args, **options).arguments
        given["calib"] = list(given["calib"])
        told = {k: v for k, v in given.items() if v and k not in ("model", "budget", "progress")}
        told["schemes"] = str(given.get("schemes") or allocation.DEFAULT_SCHEMES)
        key = Fingerprint(code=True)
        key.add([allocation.model_hash(allocation.plain(given["model"])), sorted(told.items())])
        if key.opaque or given.get("store"):
            return measure(**given)
        if key.hexdigest() not in kept:
            kept[key.hexdigest()] = measure(**given)
        return kept[key.hexdigest()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "analyze", analyze)
        patch.setattr(mpq, "analyze", analyze)
        yield


@checkout
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_run(page, hooks, subtests, tmp_path, monkeypatch):
    from pages import Page

    monkeypatch.chdir(tmp_path)
    for example in Page(page, hooks.expand(page.read_text("utf8"))).document.examples():
        with subtests.test(f"{name(page)}, block of line {example.line} with its marks filled in"):
            example.evaluate()


@checkout
def test_every_device_runtime_exporter_and_module_has_its_place():
    text = "\n".join(p.read_text("utf8") for p in PAGES)
    assert set(re.findall(r"<!-- mpq device (\S+) -->", text)) == set(all_devices()) - {"generic"}
    assert set(re.findall(r"<!-- mpq runtime (\S+) -->", text)) == set(RUNTIMES)
    pages = {p.stem for p in (DOCS / "how-to" / "export").glob("*.md")}
    assert {e.replace(".", "-") for e in EXPORTERS} == pages - {"index"}
    assert set(IMPORTERS) <= set(EXPORTERS)
    listed = set(re.findall(r"<!-- mpq public (\S+) -->", text))
    packages = {f"mpq.{p.parent.name}" for p in ROOT.glob("mpq/*/__init__.py")}
    assert packages | {"mpq"} <= listed | {"mpq.schema"}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("```python\nprint(2 / 3, 'of', 22)\n# 0.667 of 22\n```\n", None),
        ('```python\nprint(2 / 3)\n```\n\n```text title="output"\n0.667\n```\n', None),
        ("```python\nx = 1\n```\n\n```python\nprint(x, 'and more')\n# 1 ...\n```\n", None),
        ("```python\nprint(2 / 3)\n# 0.75\n```\n", "the page says 0.75"),
        ("```python\nprint('exact')\n# approximated\n```\n", "the page says"),
        ("```console\n$ mpq --version\n7.7\n```\n", "the page says"),
        ("```console\n$ pip install 'mpq[nonsense]'\n```\n", "nonsense"),
        ("```py\nimport modelopt\n```\n", "is it to be run"),
    ],
)
def test_pages_that_say_something_else_fail(text, wrong, tmp_path):
    from pages import Page

    def run():
        for example in Page(tmp_path / "page.md", text).document.examples():
            example.evaluate()

    if wrong is None:
        run()
    else:
        with pytest.raises((AssertionError, ValueError), match=wrong):
            run()
