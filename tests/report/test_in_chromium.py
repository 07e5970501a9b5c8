"""The report as people meet it: a real browser, a file, no network."""

import json

import pytest

from report.page import SECTIONS
from report.words import percent, score
from runtime.verification.report import ParityReport
from tests.report import runs
from tests.report.chromium import NARROW, browser, executable, open_file
from tests.runtime.tiny import LAYERS

pytestmark = pytest.mark.skipif(
    executable() is None, reason="the report is not looked at: no Chromium here (apt-get install chromium)"
)

CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const channels = (color, below) => {
    canvas.fillStyle = below; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => rgb.map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (!/^rgba\\(.*, 0\\)$/.test(color)) return color;
    }
    return "#fff";
  };
  const poor = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest(".hidden, script, style")) continue;
    const style = getComputedStyle(element);
    const paint = element instanceof SVGElement ? style.fill : style.color;
    if (parseFloat(style.fontSize) === 0) continue;
    const ground = channels(behind(element), "#fff");
    const [light, dark] = [luminance(channels(paint, `rgb(${ground})`)), luminance(ground)].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05);
    if (ratio < 4.5) poor.push(`${element.tagName} ${element.className.baseVal ?? element.className}: ` +
      `${element.textContent.trim().slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return poor;
}"""
"""Texts whose colour is nearer to what is behind them than WCAG's AA asks for."""


@pytest.fixture(scope="module")
def started():
    with browser() as one:
        yield one


@pytest.fixture(scope="module")
def opened(started, page_file):
    return open_file(started, page_file, color_scheme="light")


@pytest.fixture
def page(opened):
    """The page as it was when it was opened."""
    opened.page.set_viewport_size({"width": 1280, "height": 900})
    opened.page.emulate_media(color_scheme="light", media="screen")
    opened.page.mouse.move(0, 0)
    return opened.page


def test_it_opens_from_a_file_and_asks_for_nothing(opened, page_file):
    assert opened.requests == [page_file.resolve().as_uri()]
    assert opened.complaints == []


def test_every_section_is_there_and_can_be_reached(page):
    for name, _ in SECTIONS:
        section = page.locator(f"main > section#{name}")
        assert section.get_attribute("aria-labelledby") == f"{name}-title"
        assert page.locator(f"#{name}-title").is_visible()
        assert page.locator(f'nav a[href="#{name}"]').count() == 1
    assert [page.locator(tag).count() for tag in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    assert page.evaluate("[...document.querySelectorAll('table')].every((table) => table.caption)")
    titles = page.evaluate(
        "[...document.querySelectorAll('h2, [role=region]')].map((one) => one.ariaLabel ?? one.innerText)"
    )
    assert len(titles) == len(set(titles)) > 10  # a screen reader lists them
    assert page.evaluate("[...document.querySelectorAll('svg')].every((svg) => svg.getAttribute('aria-label'))")


@pytest.mark.parametrize("expert", range(4))
def test_hovering_a_cell_shows_what_the_artifacts_hold(page, run_directory, expert):
    (layer, _) = json.loads((run_directory / "three" / "plan.json").read_text())["layers"]
    report = ParityReport.load(run_directory / "three" / "parity.json")
    assert report.layers is not None
    usage = report.layers[0].usage
    page.locator(".map", has_text="three keeps").locator("tbody tr").first.locator("td").nth(expert).hover()
    assert page.locator("#tip").inner_text().splitlines() == [
        f"{LAYERS[0]}, expert {expert}: {'kept' if expert in layer['keep'] else 'dropped'}",
        f"score: {score(layer['scores'][expert])}",
        f"share before: {percent(runs.TOKENS[expert] / 1000)}",
        f"share after: {percent(usage[expert] / sum(usage))}",
    ]


def test_hovering_a_point_shows_its_accuracy(page, run_directory):
    accuracy = ParityReport.load(run_directory / "three" / "parity.json").accuracy
    assert accuracy is not None
    page.locator('#accuracy .wide [aria-label^="three: "]').hover()
    assert page.locator("#tip").inner_text().startswith(f"three: {percent(accuracy.candidate)} with 3 experts a layer")
    page.locator('#verdict .wide [aria-label^="three: "]').hover()
    assert f"{percent(accuracy.candidate)} of 40 examples" in page.locator("#tip").inner_text()
    page.locator('#cost .wide [aria-label^="one: "]').last.hover()
    assert "0.75\N{NO-BREAK SPACE}ms" in page.locator("#tip").inner_text()
    page.mouse.move(0, 0)
    assert page.locator("#tip").is_hidden()


def test_a_map_and_a_chart_are_walked_with_the_keyboard(page):
    page.locator(".map .scroll").first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert page.locator("#tip").inner_text().startswith(f"{LAYERS[1]}, expert 1: dropped")
    page.locator("#accuracy .wide svg").focus()
    page.keyboard.press("ArrowRight")
    assert "experts a layer" in page.locator("#tip").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_cells_are_shaded_by_what_is_asked_for(page):
    cell = page.locator(".map tbody td").nth(2)
    before = cell.evaluate("(cell) => getComputedStyle(cell, '::after').content")
    page.get_by_label("share before").check()
    assert cell.evaluate("(cell) => getComputedStyle(cell, '::after').content") == f'"{percent(0.25)}"' != before
    page.get_by_label("score").check()


def test_what_is_dropped_is_told_without_colour(page):
    dropped, kept = (page.locator(f".map td.{name}").first for name in "dk")
    image = "(cell) => getComputedStyle(cell).backgroundImage"
    assert "repeating-linear-gradient" in dropped.evaluate(image)
    assert kept.evaluate(image) == "none"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_and_nothing_is_wider_than_a_telephone(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(247, 247, 244)", "dark": "rgb(14, 17, 21)"}[scheme]
    assert page.evaluate(CONTRASTS) == []
    page.set_viewport_size({"width": NARROW, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == NARROW
    assert page.locator("#accuracy .narrow").is_visible()


def test_the_switch_overrules_the_system(page):
    button = page.locator("#theme")
    assert button.inner_text() == "Dark"
    button.click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(14, 17, 21)"
    button.click()
    assert button.inner_text() == "Dark"


def test_it_prints(page):
    assert page.pdf(format="A4").startswith(b"%PDF-")
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden()
    assert page.locator("#verdict-title").is_visible()


def test_without_javascript_all_numbers_are_there(started, page_file):
    page = open_file(started, page_file, java_script_enabled=False).page
    assert page.locator(".map tbody td").first.text_content() == "kept; 0.25; 10.0\N{NO-BREAK SPACE}%; " + str(
        page.locator(".map tbody td").first.get_attribute("data-a")
    )
    assert page.locator("#accuracy .wide svg").is_visible()


def test_markup_in_names_stays_text(started, hostile_file):
    opened = open_file(started, hostile_file)
    assert (opened.complaints, len(opened.requests)) == ([], 1)
    assert opened.page.evaluate("[window.hacked, document.scripts.length, document.images.length]") == [None, 1, 0]
    opened.page.locator(".map tbody td").first.hover()
    assert runs.EVIL in opened.page.locator("#tip").inner_text()


def test_the_page_forbids_itself_the_network(started, hostile_file):
    opened = open_file(started, hostile_file)
    opened.page.evaluate("fetch('https://example.invalid/').catch(() => 0)")
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)
