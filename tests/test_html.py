"""The HTML report: complete, self-contained, silent about what is redacted, and working in a real browser."""

from __future__ import annotations

import contextlib
import dataclasses
import html.parser
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import NoBrowserError, chromium
from inspected import report

from fxopt.choice import Choice
from fxopt.errors import ReportError
from fxopt.html.page import render
from fxopt.memory.plan import KEPT, RECOMPUTED, Plan, Row, Timeline
from fxopt.report import Check, Report, SiteKernel
from fxopt.rule import Place, Refusal

SIZES = [(200 + 90 * (at == 7)) * 2**20 for at in range(12)]
PLAN = Plan(
    budget=300 * 2**20,
    predicted=290 * 2**20,
    measured=310 * 2**20,
    retained=150 * 2**20,
    default=400 * 2**20,
    resident={"parameters": 100 * 2**20},
    parts={"parameters": 100 * 2**20, "gradients": 190 * 2**20},
    timeline=Timeline.of(SIZES[:6], SIZES[6:], 0, [f"node_{at}" for at in range(12)]),
    rows=[
        Row("node_7", 2**22, KEPT, "making it again takes 9 us", Place()),
        Row("node_3", 2**20, RECOMPUTED, "cheap", Place("m.py:4", "x + 1", "gate.0")),
    ],
    recompute_seconds=0.1,
    step_seconds=1.0,
    solver_seconds=0.1,
    trials=2,
    notes=["no optimizer was found: node_3 was made up"],
)


def rich_report(folder: Path) -> Report:
    """A report with something in every section."""
    found = report(force=True)
    (graph,) = found.graphs
    kernel = folder / "norm_forward_1.py"
    kernel.write_text('import triton\n\n\ndef norm_forward(X):\n    """Sum."""\n    return "</script>"\n')
    graph.kernels = [SiteKernel("rms_norm", "norm_forward", kernel)]
    graph.plan = PLAN
    reasons = ("mask <b>is</b> f32[2, 8] & requires grad",)
    graph.refusals += [
        Refusal("attention", f"softmax_{at}", Place("/x/model.py:7", "softmax(s)", f"model.layers.{at}"), reasons, 3)
        for at in range(4)
    ]
    graph.refusals.append(
        dataclasses.replace(graph.refusals[0], node="other", cost=True, choice=Choice(unmeasured="no card"))
    )
    graph.checks.append(Check("rule norm", "same outputs", "VerificationError: stride"))
    graph.notes.append("kept as it is: a module")
    return found


class Elements(html.parser.HTMLParser):
    """Every element with its attributes, and the text of those with an id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.data, self.inside = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("id") == "data"

    def handle_data(self, data: str) -> None:
        self.data += data if self.inside else ""


def test_page_is_complete_and_needs_nothing_else(tmp_path: Path) -> None:
    path = rich_report(tmp_path).to_html(tmp_path / "out" / "report.html")
    page = path.read_text()
    elements = Elements(page)
    links = [attrs.get(name) for _, attrs in elements.found for name in ("src", "href") if attrs.get(name)]
    assert set(links) <= {"#", "data:,"}
    assert not re.findall(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page)
    data = json.loads(elements.data)
    assert [stage["name"] for stage in data["graphs"][0]["stages"]] == ["dynamo", "capture", "rewrite", "outputs"]
    assert page.count("</script>") == 2, "source and data end no script"
    assert "mask &lt;b&gt;is&lt;/b&gt; f32[2, 8] &amp; requires grad" in page
    assert '<b class="times">× 4</b>' in page, "sites of repeated layers are one row"
    assert "model.layers.*" in page
    assert "it matches once this is otherwise" in page
    assert "options={&#34;force&#34;: [&#34;norm&#34;]}" in page or "rewrites it nevertheless" in page


def test_what_is_absent_is_not_shown() -> None:
    page = render(report())
    tabs = {attrs["data-tab"]: attrs for _, attrs in Elements(page).found if "data-tab" in attrs}
    assert {name for name, attrs in tabs.items() if "hidden" in attrs} == {"memory", "kernels"}


def test_redacted_page_tells_nothing_of_the_code(tmp_path: Path) -> None:
    found = rich_report(tmp_path)
    page = render(found, redacted=True)
    assert "redacted" in page
    secrets = [
        "node_3",
        "m.py:4",
        "Gated",
        "inspected.py",
        "layers.0",
        "gate",
        "labels",
        "head",
        "norm_forward",
        "model.py",
        "silu(self",
    ]
    data = Elements(page).data
    assert [word for word in secrets if re.search(rf"\b{re.escape(word)}\b", data)] == []
    body = page[page.index("<header>") : page.index('<script type="application/json"')]
    assert [word for word in secrets if re.search(rf"\b{re.escape(word)}\b", body)] == []
    for kept in ("aten.silu", "linear_cross_entropy", "float32[8, 24]"):
        assert kept in page
    (graph,), (other,) = found.graphs, json.loads(data)["graphs"]
    assert [len(stage["nodes"].split()) for stage in other["stages"]] == [
        len(stage.nodes.split()) for stage in (graph.outline.stages if graph.outline else ())
    ]


def test_an_empty_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="there is nothing to show: no graph was compiled"):
        Report().to_html(tmp_path / "empty.html")
    assert not (tmp_path / "empty.html").exists()


def test_a_kernel_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    found = report()
    found.graphs[0].kernels = [SiteKernel("a", "norm_forward", tmp_path / "gone.py")]
    assert "the file is not there any more" in render(found)


# --- in a browser --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, where it is installed."""
    with contextlib.ExitStack() as stack:
        try:
            started = stack.enter_context(chromium())
        except NoBrowserError as error:
            pytest.skip(str(error))
        yield started


def find(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def tab(browser: Any, name: str) -> None:
    find(browser, f"[data-tab={name}]")[0].click()
    assert [one.get_attribute("id") for one in find(browser, "section") if one.is_displayed()] == [name]


def test_browser_shows_every_tab_without_an_error(browser: Any, tmp_path: Path) -> None:
    browser.get(rich_report(tmp_path).to_html(tmp_path / "report.html").as_uri())
    for name in ("sites", "graphs", "memory", "kernels", "checks", "overview"):
        tab(browser, name)
    tab(browser, "memory")
    assert find(browser, "#memory svg .curve")
    parts, tensors = find(browser, "#memory table")
    assert "gradients 190 MiB" in parts.text
    assert "recomputed" in tensors.text
    chart = find(browser, "#memory svg")[0]
    browser.execute_script(
        "const box = arguments[0].getBoundingClientRect(), x = box.left + box.width * 3 / 11;"
        "arguments[0].dispatchEvent(new MouseEvent('mousemove', {clientX: x, clientY: box.top + 5}))",
        chart,
    )
    assert find(browser, "#tip")[0].text == "node_3: 200 MiB · recomputed: cheap · m.py:4"
    assert browser.get_log("browser") == []


def test_browser_selects_in_both_panes_and_searches(browser: Any, tmp_path: Path) -> None:
    browser.get(rich_report(tmp_path).to_html(tmp_path / "report.html").as_uri())
    tab(browser, "graphs")
    assert "capture, " in find(browser, "#name-before")[0].text
    made = next(one for one in find(browser, "#after .node.add") if "fxopt.linear_cross_entropy" in one.text)
    made.click()
    assert [one.text.split(" ")[0] for one in find(browser, "#before .node.sel")] == ["cross_entropy_loss"]
    assert len(find(browser, "#after .node.sel")) == 1
    assert "made by rule linear_cross_entropy" in find(browser, "#detail")[0].text
    assert len(find(browser, "#detail svg .box")) > 3
    find(browser, "#before .node.sel")[0].click()
    assert len(find(browser, "#after .node.sel")) == 1, "and back"
    find(browser, "#near")[0].click()
    assert "layers.0 … layers.1 × 2" in find(browser, "#after")[0].text, "equal layers are folded; the last has a norm"
    find(browser, "#after .head a")[0].click()
    assert "×" not in find(browser, "#after")[0].text
    find(browser, "#search")[0].send_keys("aten.silu layers.2")
    time.sleep(0.4)
    assert find(browser, "#count")[0].text == "1 node found"
    assert len(find(browser, "#after .node.hit")) == 1
    assert browser.get_log("browser") == []


def test_browser_filters_sites_follows_them_and_changes_theme(browser: Any, tmp_path: Path) -> None:
    browser.get(rich_report(tmp_path).to_html(tmp_path / "report.html").as_uri())
    tab(browser, "sites")
    rows = [one for one in find(browser, "#site-table tbody tr") if one.is_displayed()]
    find(browser, "#search")[0].send_keys("cross_entropy")
    time.sleep(0.4)
    left = [one for one in find(browser, "#site-table tbody tr") if one.is_displayed()]
    assert 1 == len(left) < len(rows)
    find(browser, "#site-table tbody tr:not([hidden]) summary")[0].click()
    find(browser, "#site-table tbody tr:not([hidden]) .go")[0].click()
    assert find(browser, "#graphs")[0].is_displayed()
    assert find(browser, "#before .node.sel")[0].text.startswith("cross_entropy_loss")
    theme = "return document.documentElement.dataset.theme"
    before = browser.execute_script(theme)
    find(browser, "#theme")[0].click()
    assert {before, browser.execute_script(theme)} == {"light", "dark"}
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_browser_opens_a_llama_of_32_layers_in_two_seconds(browser: Any, tmp_path: Path, capsys: Any) -> None:
    from fxopt.cli import main

    sizes = "--hidden 256 --layers 32 --heads 4 --kv-heads 2 --vocab 32000 --intermediate 512 --seq 512"
    path = tmp_path / "llama.html"
    assert main(["explain", "--config", "llama", *sizes.split(" "), "--html", str(path)]) == 0
    assert path.stat().st_size < 5 * 2**20
    start = time.perf_counter()
    browser.get(path.as_uri())
    tab(browser, "graphs")
    assert "layers.0 … layers.31 × 32" in find(browser, "#after")[0].text
    assert time.perf_counter() - start < 2
    assert browser.get_log("browser") == []
