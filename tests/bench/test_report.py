"""The report: hostile text, size, and the page itself driven in a real headless browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gramlite.bench.comparison import RunComparison, compare_runs
from gramlite.bench.flips import embedded, shortened
from gramlite.bench.folder import Run, read_run
from gramlite.bench.report import LARGEST_PAGE, PAGE, write_report

from .conftest import Row, judged_row

EVIL = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> <!-- \u2028 \u2029 "
    "&amp; ' \" ]]> <b>bold</b> \u202e $x^2$ @DATA@ "
)
SUBSETS = ["chat", "code", "<i>safety</i>"]


def rows_of(count: int, noise: float, *, seed: int, text: str, length: int = 300) -> list[Row]:
    truth = np.random.default_rng(99).normal(0, 1.5, size=(count, 2)).mean(axis=1)
    margins = truth[:, None] + np.random.default_rng(seed).normal(0, noise, size=(count, 2))
    rows = []
    for i in range(count):
        row = judged_row(f"pair-{i}", list(margins[i]), label="A" if truth[i] > 0.4 else "B")
        row["meta"] = {"subset": SUBSETS[i % 3]}
        row["seconds"] = 1.0 + seed / 10
        for order in row["orders"]:
            order["rationale"] = f"{text}because of {order['verdict']} " + "so it is " * (length // 9)
        rows.append(row)
    return rows


def runs_of(folder: Path, count: int, *, text: str = EVIL, length: int = 300, runs: int = 3) -> list[Run]:
    """Run folders whose names, ids and texts are hostile, with the suite they were read from."""
    suite = folder / "pairs.jsonl"
    pairs = [
        {
            "id": f"pair-{i}", "prompt": f"{text}prompt {i}", "response_a": f"{text}first {i} " + "long " * (length // 5),
            "response_b": f"second {i} " + "long " * (length // 5), "label": "A",
        }
        for i in range(count)
    ]  # fmt: skip
    suite.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    digest = hashlib.sha256(suite.read_bytes()).hexdigest()
    names = ["F16", "Q8_0", "Q4_0 </script>", "Q2_K"][: runs + 1]
    found = []
    for number, name in enumerate(names):
        path = folder / f"run{number}"
        path.mkdir()
        rows = rows_of(count, 0.01 + 0.6 * number, seed=number, text=text, length=length)
        (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        record = {
            "name": name, "suite": {"name": "pairs", "path": str(suite), "sha256": digest},
            "model": {"name": name, "bytes": 270_000_000 // (number + 1), "format": "gguf"},
            "settings": {"mode": "think"}, "versions": {"gramlite": "0.1.0"},
        }  # fmt: skip
        (path / "run.json").write_text(json.dumps(record))
        found.append(read_run(path))
    return found


def compared(runs: list[Run]) -> list[RunComparison]:
    return [compare_runs(runs[0], run) for run in runs[1:]]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = runs_of(folder, 240)
    write_report(folder / "out.html", runs[0], runs[1:], compared(runs))
    return folder / "out.html"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_no_character_can_end_the_data_block() -> None:
    value = {"text": EVIL + "\ud800"}
    text = embedded(value)
    assert not set("<>&\u2028\u2029") & set(text)
    text.encode("utf-8")
    assert json.loads(text) == value


def test_what_is_left_out_is_said() -> None:
    assert shortened("x" * 10, 20) == "x" * 10
    assert shortened("x" * 30, 20) == "x" * 20 + "… (10 more characters)"
    assert shortened(None, 20) is None


def test_hostile_text_adds_no_element(report: Path) -> None:
    tags = Tags()
    tags.feed(report.read_text(encoding="utf-8"))
    names = [tag for tag, _ in tags.found]
    assert names.count("script") == 2 and "img" not in names and "b" not in names and "i" not in names
    references = [
        v for _, attributes in tags.found for k, v in attributes.items() if k in ("src", "href", "xlink:href")
    ]
    assert all(str(reference).startswith(("#", "data:")) for reference in references)
    assert not any(name.startswith("on") for _, attributes in tags.found for name in attributes)
    assert "http:" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", report.read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256((PAGE / "report.js").read_bytes()).digest()).decode()
    policy = next(a["content"] for tag, a in tags.found if tag == "meta" and a.get("http-equiv"))
    assert policy and f"'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_everything_is_written_beside_it(report: Path) -> None:
    beside = {path.suffix: path for path in report.parent.glob("out.*")}
    assert set(beside) == {".html", ".md", ".csv", ".png", ".svg"}
    assert beside[".png"].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in beside[".svg"].read_text()
    assert "| F16 |" in beside[".md"].read_text(encoding="utf-8")


def test_the_same_runs_give_the_same_report(report: Path, tmp_path: Path) -> None:
    runs = [read_run(report.parent / f"run{number}") for number in range(4)]
    write_report(tmp_path / "out.html", runs[0], runs[1:], compared(runs))
    for suffix in (".html", ".svg", ".csv", ".md"):
        assert (tmp_path / f"out{suffix}").read_bytes() == report.with_suffix(suffix).read_bytes(), suffix


@pytest.mark.slow
def test_a_thousand_long_pairs_stay_under_three_megabytes(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, 1000, length=4000)
    flips = [sum(runs[0].rows[i]["verdict"] != row["verdict"] for i, row in run.rows.items()) for run in runs[1:]]
    assert sum(flips) > 400
    path = tmp_path / "large.html"
    write_report(path, runs[0], runs[1:], compared(runs))
    assert 500_000 < path.stat().st_size <= LARGEST_PAGE
    assert "more characters)" in path.read_text(encoding="utf-8")


def test_without_the_suite_file_the_rationales_are_still_there(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, 60)
    (tmp_path / "pairs.jsonl").write_text('{"changed": true}\n')
    write_report(tmp_path / "out.html", runs[0], runs[1:], compared(runs))
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert data["runs"][2]["flips"] and "prompt" not in next(iter(data["pairs"].values()))
    assert data["runs"][2]["flips"][0]["run"]["orders"][0]["rationale"]


# --- in a browser --------------------------------------------------------------------------------------------

CONTRAST = """
function parts(colour) { return colour.match(/[\\d.]+/g).map(Number); }
function luminance(c) {
  const [r, g, b] = c.slice(0, 3).map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
  return .2126 * r + .7152 * g + .0722 * b;
}
function behind(element) {
  for (let e = element; e; e = e.parentElement) {
    const c = parts(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  }
  return [255, 255, 255];
}
const poor = [];
for (const element of document.querySelectorAll("h1,h2,h3,p,li,td,th,th button,button:not(:disabled),select,summary,"
    + ".text,span,output,kbd,label,footer,svg text")) {
  if (!element.textContent.trim() || !element.getClientRects().length) continue;
  const style = getComputedStyle(element), svg = element.closest("svg");
  const a = luminance(parts(svg ? style.fill : style.color)), b = luminance(behind(svg || element));
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (ratio < 4.5) poor.push([element.tagName, element.textContent.slice(0, 30), ratio]);
}
return poor;
"""

NAMELESS = """
const nameless = [];
for (const element of document.querySelectorAll("button,select,[role=img],[role=region],article")) {
  const label = element.getAttribute("aria-label") || (element.labels && element.labels.length && element.labels[0].textContent)
    || (element.tagName === "BUTTON" && element.textContent);
  if (!label || !label.trim()) nameless.push(element.outerHTML.slice(0, 80));
}
const ids = [...document.querySelectorAll("[id]")].map(e => e.id);
return [nameless, ids.filter((id, i) => ids.indexOf(id) !== i), document.documentElement.lang,
  [...document.querySelectorAll("h1,h2,h3")].map(h => Number(h.tagName[1]))];
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("chromium and chromedriver are not installed (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,1000",
        f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


def by(driver: Any, identifier: str) -> Any:
    return driver.find_element("id", identifier)


def choose(driver: Any, identifier: str, text: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(by(driver, identifier)).select_by_visible_text(text)


@pytest.fixture
def opened(browser: Any, report: Path) -> Any:
    browser.get_log("performance")
    browser.get_log("browser")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get(report.as_uri())
    return browser


def test_no_error_and_no_request(opened: Any, report: Path) -> None:
    for _ in range(5):
        by(opened, "next").click()
    assert opened.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    asked = {one["request"]["url"] for one in sent if not one["documentURL"].startswith("chrome:")}  # its own first tab
    assert {url for url in asked if not url.startswith("data:")} == {report.as_uri()}
    assert opened.title != "owned"


def test_the_picture_and_a_flip_are_seen(opened: Any, tmp_path: Path) -> None:
    picture = opened.find_element("css selector", "figure svg")
    assert picture.size["width"] > 300 and picture.size["height"] > 200
    assert "Pareto front" in picture.get_attribute("aria-label")
    assert {"Q8_0", "Q2_K"} <= {element.text for element in opened.find_elements("css selector", "figure svg text")}
    flip = by(opened, "flip")
    sides = flip.find_elements("css selector", ".sides:last-child > section")
    assert len(sides) == 2 and sides[0].location["y"] == sides[1].location["y"]  # side by side
    for side in sides:
        rationale = side.find_element("css selector", "details[open] .text").text
        assert rationale.startswith("</script><script>") and "<b>bold</b>" in rationale  # shown as text
    assert "prompt" in flip.find_element("css selector", ".text").text
    for element, name in ((picture, "picture"), (flip, "flip")):
        opened.execute_script("arguments[0].scrollIntoView()", element)
        png = base64.b64decode(opened.get_screenshot_as_base64())
        assert len(png) > 20_000, name  # an empty page is far smaller


def test_sorting(opened: Any) -> None:
    def column(name: str) -> tuple[Any, list[str]]:
        table = opened.find_element("css selector", "table.sortable")
        heads = table.find_elements("css selector", "th")
        at = [head.text.split(" \u25b2")[0].split(" \u25bc")[0] for head in heads].index(name)
        cells = [row.find_elements("css selector", "td")[at] for row in table.find_elements("css selector", "tbody tr")]
        return heads[at], [cell.get_attribute("data-value") for cell in cells]

    head, before = column("size MB")
    assert [float(value) for value in before] == sorted(map(float, before), reverse=True)
    head.find_element("css selector", "button").click()
    head, up = column("size MB")
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(value) for value in up] == sorted(map(float, up))
    head.find_element("css selector", "button").send_keys("\ue007")  # Enter
    head, down = column("size MB")
    assert head.get_attribute("aria-sort") == "descending" and down == up[::-1]
    flips, _ = column("flips %")
    flips.find_element("css selector", "button").click()
    _, values = column("flips %")
    assert values[-1] == ""  # the base has none, and stays last
    assert [float(value) for value in values[:-1]] == sorted(float(value) for value in values[:-1])


def test_filters_and_keys(opened: Any) -> None:
    choose(
        opened,
        "run",
        next(o.text for o in by(opened, "run").find_elements("css selector", "option") if "Q2_K" in o.text),
    )

    def total() -> int:
        text = by(opened, "position").text
        return 0 if text == "none" else int(text.split(" of ")[1])

    everything = total()
    counts = {}
    for direction in ("right to wrong", "wrong to right", "neither of the two"):
        choose(opened, "direction", direction)
        counts[direction] = total()
        if counts[direction]:
            assert by(opened, "flip").find_element("css selector", ".quiet").text.startswith(direction[:5])
    assert sum(counts.values()) == everything > 20
    assert counts["right to wrong"] > 0 and counts["wrong to right"] > 0
    choose(opened, "direction", "all")
    by_subset = []
    for subset in SUBSETS:
        choose(opened, "subset", subset)
        by_subset.append(total())
        assert subset in by(opened, "flip").text
    assert sum(by_subset) == everything
    choose(opened, "subset", "all")

    body = opened.find_element("css selector", "body")
    opened.execute_script("document.activeElement.blur()")
    first = by(opened, "flip").find_element("css selector", "h3").text
    for keys, position in (("j", 2), ("n", 3), ("\ue014", 4), ("k", 3), ("p", 2), ("\ue012", 1), ("k", 1)):
        body.send_keys(keys)
        assert by(opened, "position").text == f"{position} of {everything}"
    assert by(opened, "flip").find_element("css selector", "h3").text == first
    assert not by(opened, "previous").is_enabled() and by(opened, "next").is_enabled()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_and_names(opened: Any, theme: str) -> None:
    opened.execute_script(f"document.documentElement.dataset.theme = '{theme}'")
    for fold in opened.find_elements("css selector", "details"):
        opened.execute_script("arguments[0].open = true", fold)
    assert opened.execute_script(CONTRAST) == []
    nameless, doubled, language, headings = opened.execute_script(NAMELESS)
    assert nameless == [] and doubled == [] and language == "en"
    assert headings[0] == 1 and all(after - before <= 1 for before, after in zip(headings, headings[1:], strict=False))
    background = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
    by(opened, "theme").click()
    assert opened.execute_script("return getComputedStyle(document.body).backgroundColor") != background


def test_on_a_phone(opened: Any) -> None:
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    opened.refresh()
    assert opened.execute_script("return document.documentElement.scrollWidth") <= 360
    sides = opened.find_elements("css selector", "#flip .sides:last-child > section")
    assert sides[0].location["y"] < sides[1].location["y"]  # one below the other
    size = opened.execute_script("return parseFloat(getComputedStyle(document.body).fontSize)")
    assert size >= 16
    small = opened.execute_script(
        "return [...document.querySelectorAll('#previous,#next,#theme,select')].filter(e => e.offsetHeight < 36).length"
    )
    assert small == 0
