"""The report in a browser, opened as a file: charts answer to the pointer and the keyboard, and nothing is loaded."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import validate
from pipeline.report.html import write_report
from pipeline.report.spec import ReportSpec
from tests.support.browser import CHROMEDRIVER, CHROMIUM, Browser, open_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or CHROMEDRIVER is None, reason="needs chromium and chromedriver"),
]

HOSTILE = '<img src="http://example.invalid/x.png" onerror="document.title=1"></script>'
ARROW_RIGHT, ESCAPE = "\ue014", "\ue00c"
PLOTS = "document.querySelectorAll('.plot')"
DRAWN = f"[...{PLOTS}].every(plot => !plot.checkVisibility() || plot.querySelector('canvas'))"
TIP = "[...document.querySelectorAll('.tip')].filter(tip => !tip.hidden).map(tip => tip.innerText)"
ZOOMED = "[...document.querySelectorAll('.all')].filter(button => !button.hidden).length"
INK = """
const canvas = document.querySelector('.plot canvas');
const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
const counts = {};
for (let i = 0; i < pixels.length; i += 4)
  if (pixels[i + 3] === 255) { const key = pixels.slice(i, i + 3).join(); counts[key] = (counts[key] || 0) + 1; }
return counts;
"""


@pytest.fixture
def report(make_run: Any, tmp_path: Path) -> Path:
    """Two labels of one stage, one with two seeds and long curves."""
    long = [2 + 2 * math.exp(-step / 40) for step in range(200)]
    figures = [{f"heldout/top{k}": share for k in (1, 2, 3, 4)} for share in (0.2, 0.4)]
    first = [make_run(f"seed-{i}", seed=i, losses=long, evaluations=figures) for i in range(2)]
    second = make_run("other", losses=[value / 2 for value in long], evaluations=figures)
    matrix = {"heldout/zeroshot_confusion": [[3, 1], [0, 4]], "classes": [HOSTILE, "blue star"]}
    third = make_run("flip", stage="flip", evaluations=figures, details=matrix, pictures=[HOSTILE])
    runs = {"first": first, HOSTILE: second, "FLIP": third}
    rows = [{"title": "Top-1", "run": "first", "figure": "heldout/top1", "baselines": {"chance": 0.1}}]
    spec = validate(ReportSpec, {"title": "A report", "runs": runs, "rows": rows}, where="test")
    return Path(write_report(spec, str(tmp_path / "report.html")))


@pytest.fixture
def browser(report: Path) -> Iterator[Browser]:
    with open_browser() as window:
        window.open(report)
        window.wait_for(DRAWN)
        yield window


def ink(browser: Browser) -> dict[str, int]:
    """Opaque pixels of the first chart, by colour."""
    counts: dict[str, int] = browser.script(INK)
    return counts


def area(browser: Browser, place: int = 0) -> tuple[float, float, float, float]:
    """Left, top, width and height of a chart's plotting area, scrolled into the window."""
    code = f"""
    const over = {PLOTS}[arguments[0]].querySelector('.u-over');
    over.scrollIntoView({{block: 'center'}});
    const box = over.getBoundingClientRect();
    return [box.left, box.top, box.width, box.height];
    """
    left, top, width, height = browser.script(code, place)
    return left, top, width, height


def test_nothing_is_loaded_and_the_console_stays_empty(browser: Browser) -> None:
    events = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith("data:")] == [url for url in urls if url.endswith("/report.html")]
    assert browser.log("browser") == []
    assert browser.script("return document.title") == "A report"
    assert browser.script("return document.querySelectorAll('main img').length") == 3, "the panels, nothing hostile"


def test_a_script_that_is_not_the_report_s_own_does_not_run(browser: Browser, report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    report.write_text(text.replace("<main>", "<main><script>document.title = 'taken over'</script>"))
    browser.open(report)
    browser.wait_for(DRAWN)
    assert browser.script("return document.title") == "A report"
    assert "Content Security Policy" in browser.log("browser")[0]["message"]


def test_values_appear_at_the_pointer_and_go_with_it(browser: Browser) -> None:
    left, top, width, height = area(browser)
    browser.move(left + width / 2, top + height / 2)
    (text,) = browser.wait_for(TIP)
    lines = text.replace("\n\n", "\n").splitlines()
    assert lines[0].endswith(" samples")
    samples = int(lines[0].removesuffix(" samples").replace(",", ""))
    assert abs(samples - 256 * 100) <= 512
    value = 2 + 2 * math.exp(-(samples / 256 - 1) / 40)
    values = dict(zip(lines[1::2], lines[2::2], strict=True))
    assert set(values) == {"first, seed 0", "first, seed 1", HOSTILE}
    assert float(values["first, seed 0"]) == pytest.approx(value, rel=0.02), "smoothed"
    assert float(values[HOSTILE]) == pytest.approx(value / 2, rel=0.02)
    browser.move(5, 5)
    browser.wait_for(f"!{TIP}.length")


def test_dragging_zooms_every_chart_of_the_stage_and_a_double_click_shows_all(browser: Browser) -> None:
    left, top, width, height = area(browser)
    before = ink(browser)
    browser.drag((left + width * 0.25, top + height / 2), (left + width * 0.5, top + height / 2))
    num_charts = browser.script("return document.querySelector('.stage').querySelectorAll('canvas').length")
    browser.wait_for(f"{ZOOMED} === {num_charts}")
    assert ink(browser) != before
    browser.move(left + 1, top + height / 2)
    (text,) = browser.wait_for(TIP)
    assert abs(int(text.split()[0].replace(",", "")) - 256 * 50) <= 512, "the left end is a quarter of the whole"
    browser.script(f"{PLOTS}[0].querySelector('.u-over').dispatchEvent(new MouseEvent('dblclick', {{bubbles: true}}))")
    browser.wait_for(f"{ZOOMED} === 0")
    assert ink(browser) == before


def test_the_keyboard_reads_values_zooms_and_shows_all(browser: Browser) -> None:
    browser.script(f"{PLOTS}[0].focus()")
    browser.press(ARROW_RIGHT)
    assert browser.wait_for(TIP)[0].startswith("256 samples")
    browser.press(ARROW_RIGHT)
    browser.wait_for(f"{TIP}[0].startsWith('512 samples')")
    browser.press("+")
    browser.wait_for(ZOOMED)
    browser.press(ESCAPE)
    browser.wait_for(f"{ZOOMED} === 0 && {TIP}.length === 0")


def test_the_legend_hides_a_run(browser: Browser) -> None:
    browser.script("document.querySelectorAll('.legend button')[1].click()")
    left, top, width, height = area(browser)
    browser.move(left + width / 2, top + height / 2)
    (text,) = browser.wait_for(TIP)
    assert "first, seed 0" in text
    assert HOSTILE not in text


def test_charts_take_the_colours_of_dark_mode_and_print_in_light_ones(browser: Browser) -> None:
    light, dark = "11,98,176", "109,179,242"  # --s0

    def drawn_in(colour: str) -> str:
        return f"(() => {{ {INK} }})()['{colour}'] > 50"

    browser.wait_for(drawn_in(light))
    browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.wait_for(f"{drawn_in(dark)} && !({drawn_in(light)})")
    # What is printed is drawn in a microtask of this event.
    browser.script(
        "addEventListener('beforeprint', () => queueMicrotask(() => queueMicrotask(() => {"
        f"  window.printed = [{drawn_in(light)}, {drawn_in(dark)}]; }})))"
    )
    pdf = base64.b64decode(browser.devtools("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF")
    assert browser.script("return window.printed") == [True, False]
    browser.wait_for(drawn_in(dark))


def test_a_narrow_page_scrolls_its_tables_and_nothing_else(browser: Browser) -> None:
    browser.devtools("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=False)
    browser.wait_for("innerWidth === 400")
    browser.wait_for("[...document.querySelectorAll('canvas')].every(canvas => canvas.clientWidth <= 400)")
    assert browser.script("return document.documentElement.scrollWidth") == 400


def test_without_scripts_the_numbers_are_there(browser: Browser, report: Path) -> None:
    browser.devtools("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(report)
    text = browser.script("return document.querySelector('main').innerText")
    assert "a script, which didn't run" in text
    assert browser.script("return document.querySelectorAll('.plot canvas').length") == 0
    browser.script("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert "first, seed 0" in browser.script("return document.querySelector('.numbers').innerText")


def test_a_chart_unfolded_later_shows_the_same_stretch(browser: Browser) -> None:
    folded = "document.querySelector('.stage details:not(.numbers)')"
    browser.script(f"{PLOTS}[0].focus()")
    browser.press(ARROW_RIGHT, "+")
    num_open = browser.wait_for(ZOOMED)
    browser.script(f"{folded}.open = true")
    browser.wait_for(f"{ZOOMED} > {num_open}")
