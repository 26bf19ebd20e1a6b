"""The HTML report in a real browser: by keyboard, in light and dark, from a phone's width to a wide screen."""

import pytest

from mpq.config import Measured

pytestmark = pytest.mark.slow

WIDTHS = [320, 360, 768, 1440, 1920]


@pytest.fixture(scope="module")
def reports(analysis, tmp_path_factory):
    """Pages of a config with all that can be in a report, and of one alone."""
    folder = tmp_path_factory.mktemp("report")
    cfg = analysis.allocate("size<=12%, bitops<=3%")
    measured = cfg.with_measured(Measured(10, 0.9, 0.3, 0.01, 0.95))
    return {
        "full": measured.report(folder / "full.html", frontier=analysis.pareto()),
        "alone": cfg.report(folder / "alone.html"),
    }


@pytest.fixture
def open_page(browser, reports):
    """Opens a report; what the console and the network say is in ``page.told``."""
    contexts = []

    def open_(name="full", width=1440, scheme="light", **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.told = []
        page.on("console", lambda message: page.told.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: page.told.append(f"error: {error}"))
        page.on("request", lambda request: page.told.append(f"request: {request.url}"))
        page.goto(reports[name].as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()


def rows(page):
    """Shown rows of the table of layers, as lists of text."""
    script = "rows => rows.filter(r => !r.hidden).map(r => [...r.cells].map(c => c.textContent.trim()))"
    return page.eval_on_selector_all("#layers-table tbody tr", script)


@pytest.mark.parametrize("name", ["full", "alone"])
def test_no_errors_no_requests_and_no_overflow_at_any_width(open_page, reports, name):
    for width in WIDTHS:
        page = open_page(name, width)
        assert page.told == [f"request: {reports[name].as_uri()}"]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        right = "es => Math.max(...es.map(e => e.getBoundingClientRect().right))"
        assert page.eval_on_selector_all("h1, p, dl, figure, .scroll, .plot, .label, .tick", right) <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["full", "alone"])
def test_accessible_by_the_rules_of_axe_and_all_text_has_contrast(open_page, name, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra 'test'")
    for width in (360, 1440):
        found = axe.Axe().run(open_page(name, width, scheme, bypass_csp=True)).response
        assert not [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]]
        assert "color-contrast" in {v["id"] for v in found["passes"]}
    # On the wide page, where no cell is cut off, nothing is left undecided.
    assert "color-contrast" not in {v["id"] for v in found["incomplete"]}


def test_dark_differs_and_paper_is_light(open_page):
    colours = "() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    light, page = open_page().evaluate(colours), open_page(scheme="dark")
    dark = page.evaluate(colours)
    assert light[0] == "rgb(255, 255, 255)"
    assert dark[0] != light[0]
    assert dark[1] != light[1]
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(colours) == light
    assert page.eval_on_selector("nav", "e => getComputedStyle(e).display") == "none"


def test_first_tab_skips_to_the_report(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    box = page.locator(".skip").bounding_box()
    assert box["x"] >= 0
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('main') !== null")


def test_layers_are_sorted_by_keyboard(open_page):
    page = open_page()
    before = rows(page)
    heads = page.locator("#layers-table thead th")
    column = heads.all_inner_texts().index("parameters")
    page.focus("#filter")
    for _ in range(20):  # from the filter through the region to the button of the column
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "parameters":
            break
    focused = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert focused == "solid"
    page.keyboard.press("Enter")
    assert heads.nth(column).get_attribute("aria-sort") == "descending"
    sizes = [int(row[column].replace(",", "")) for row in rows(page)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    page.keyboard.press("Space")
    assert heads.nth(column).get_attribute("aria-sort") == "ascending"
    assert [int(row[column].replace(",", "")) for row in rows(page)] == sorted(sizes)
    assert page.locator("[aria-sort]").count() == 1
    heads.filter(has_text="depth").get_by_role("button").click()
    heads.filter(has_text="depth").get_by_role("button").click()
    assert rows(page) == before


def test_filter_counts_what_it_shows(open_page):
    page = open_page()
    page.fill("#filter", "LAYER3 conv2d")
    shown = rows(page)
    assert shown
    assert all("layer3" in row[0] and row[2] == "conv2d" for row in shown)
    assert page.inner_text("#count") == f"{len(shown)} of 22 layers"
    page.fill("#filter", "nothing has this name")
    assert rows(page) == []
    page.fill("#filter", "")
    assert len(rows(page)) == 22


def test_without_scripts_the_report_is_complete(open_page):
    page = open_page(java_script_enabled=False)
    assert not page.locator("#tools").is_visible()
    assert page.locator("#layers-table tbody tr").count() == 22
    assert page.locator("#layers-table button").count() == 0


def test_the_config_can_be_saved_from_the_page(open_page, tmp_path):
    import mpq

    page = open_page()
    with page.expect_download() as download:
        page.click("text=save bits.json")
    download.value.save_as(tmp_path / "bits.json")
    assert len(mpq.load(tmp_path / "bits.json")) == 22
