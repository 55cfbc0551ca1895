"""What an explanation takes beside a compilation, and how large its HTML page is and how soon it opens.

    python bench/explain.py
    python bench/explain.py --layers 8

Each sample is a fresh process with empty caches: one explains a model of many narrow layers and writes the page, the
other compiles it. Both are what the user waits for. The page is opened in headless Chromium, where that is installed,
until its graphs are shown.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from browser import NoBrowserError, chromium
from measure import Worker, begin, write_json
from rich.console import Console
from rich.table import Table

TARGETS = {"ratio": 2.0, "mib": 5.0, "open_s": 2.0}
"""Explanation over compilation, MiB of the page, and seconds until it is open."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    about = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(description=about[0], epilog=about[-1])
    parser.add_argument("--layers", type=int, default=32, help="depth of the Llama (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=3, help="explanations and compilations (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="2 layers, once: a check of the script")
    parser.add_argument("--json", type=Path, help="also write the raw numbers to this file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.layers, options.samples = 2, 1
    return options


def opened(path: Path) -> dict[str, Any]:
    """Seconds until Chromium shows the graphs of the page, and what its console said; why it was not measured."""
    try:
        with chromium() as browser:
            browser.get("about:blank")  # the first page waits for the browser itself
            start = time.perf_counter()
            browser.get(path.as_uri())
            browser.find_element("css selector", "[data-tab=graphs]").click()
            shown = bool(browser.find_element("css selector", "#after").text)
            seconds = time.perf_counter() - start
            return {
                "open_s": seconds,
                "shown": shown,
                "console": [one["message"] for one in browser.get_log("browser")],
            }
    except NoBrowserError as error:
        return {"not_measured": str(error)}


def sample(layers: int, folder: Path) -> dict[str, Any]:
    """One explanation and one compilation."""
    page = folder / "report.html"
    with Worker(f"deep-{layers}", "fxopt") as worker:
        found: dict[str, Any] = worker.ask("explain", str(page))
    with Worker(f"deep-{layers}", "fxopt") as worker:
        found["compile_s"] = worker.ask("compile")["compile_s"]
    return found | {"ratio": (found["explain_s"] + found["html_s"]) / found["compile_s"]} | opened(page)


def summary(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians by name; a page that was not opened has no "open_s"."""
    names = ("explain_s", "html_s", "compile_s", "ratio", "open_s")
    found = {
        name: statistics.median(one[name] for one in samples if name in one) for name in names if name in samples[0]
    }
    return found | {"mib": max(one["bytes"] for one in samples) / 2**20}


def problems(samples: Sequence[dict[str, Any]]) -> list[str]:
    """What misses its target, a sentence each."""
    found = summary(samples)
    over = [name for name, target in TARGETS.items() if found.get(name, 0.0) > target]
    wrong = [f"{name} is {found[name]:.2f}, target {TARGETS[name]:.2f}" for name in over]
    wrong += ["Chromium shows no graphs"] if not all(one.get("shown", True) for one in samples) else []
    return wrong + [f"Chromium's console: {line}" for one in samples for line in one.get("console", [])]


def show(layers: int, samples: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the medians with their targets."""
    found = summary(samples)
    table = Table("", "median", "target", title=f"explaining a Llama of {layers} layers")
    for name, label in (
        ("explain_s", "explanation, s"), ("html_s", "its page, s"), ("compile_s", "compilation, s"),
        ("ratio", "explanation over compilation"), ("mib", "page, MiB"), ("open_s", "page opens, s"),
    ):  # fmt: skip
        value = f"{found[name]:.2f}" if name in found else f"not measured: {samples[0]['not_measured']}"
        table.add_row(label, value, f"{TARGETS[name]:.1f}" if name in TARGETS else "")
    console.print(table)


def main() -> int:
    """Measure, print, write; return 1 where a target is missed."""
    options = parse()
    console = Console()
    machine = begin(console, options.quick)
    with tempfile.TemporaryDirectory() as folder, console.status(f"{options.samples} samples"):
        samples = [sample(options.layers, Path(folder)) for _ in range(options.samples)]
    show(options.layers, samples, console)
    if options.json:
        write_json(options.json, machine, {"targets": TARGETS, "layers": options.layers, "samples": samples})
    wrong = problems(samples)
    for sentence in wrong:
        console.print(sentence, style="red", highlight=False)
    return 1 if wrong and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())
