"""Rewrite the README's measured table from the JSON of the last benchmark run.

python bench/readme.py           rewrite the text between the markers
python bench/readme.py --check   only say whether it is what the JSON says
"""

import argparse
import json
import statistics
import sys
from typing import Any

from measure import RESULTS, ROOT, busy_warning, machine_line

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def load(name: str) -> dict[str, Any]:
    """Return the result called `name` of the last run on a CPU."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def amount(numbers: list[float], digits: int, ratio: float | None, target: float | None) -> str:
    """Return a median, with its ratio to Inductor where there is one, and the target where it is fxopt's."""
    if not numbers:
        return "-"
    text = f"{statistics.median(numbers):,.{digits}f}"
    if ratio is None:
        return text
    return f"{text} ({ratio:.2f}x)" if target is None else f"{text} ({ratio:.2f}x, target {target:.2f}x)"


def step_table(result: dict[str, Any]) -> list[str]:
    """Return the table of steps in Markdown, a line for every case and backend."""
    lines = ["| model | backend | step, ms | peak memory over rest, MiB | compile, s |", "|---|---|--:|--:|--:|"]
    for measured in result["cases"].values():
        for number, (backend, samples) in enumerate(measured["samples"].items()):
            ratio = measured["ratios"].get(backend, {})
            target = measured.get("targets", {}) if backend == "fxopt" else {}
            numbers = [
                amount(samples[name], digits, ratio.get(name), target.get(name))
                for name, digits in (("step", 0), ("memory", 0), ("compile", 1))
            ]
            lines.append(f"| {measured['about'] if number == 0 else ''} | {backend} | {' | '.join(numbers)} |")
    return lines


def share_line(result: dict[str, Any]) -> str:
    """Return the shares of compile time in a sentence."""
    shares = [
        f"{statistics.median(one['share'] for one in samples):.1%} at {layers} layers"
        for layers, samples in result["layers"].items()
    ]
    commit = result["machine"]["commit"][:10]
    return f"fxopt's own stages take {', '.join(shares)} of compile time (commit {commit})."


def measured_text() -> str:
    """Return what stands between the markers."""
    step = load("step")
    machine, turns = step["machine"], step["rounds"]
    warning = busy_warning(machine)
    lines = [
        "Forward and backward of 4 layers, hidden 256, vocabulary 32,000; batch 4 x 512 and SDPA attention unless the",
        f"table says otherwise. In brackets the ratio to Inductor in the same call; medians of {turns} turns.",
        f"Measured by `bench/step.py` on {machine['date'][:10]}, on {machine_line(machine)}.",
        *([warning] if warning else []),
        "",
        *step_table(step),
        "",
        share_line(load("compile_time")),
    ]
    return "\n".join(lines)


def replaced(readme: str, text: str) -> str:
    """Return `readme` with `text` between the markers; ValueError where they are not there once, in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"the README must hold {BEGIN} and then {END}, once each")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """Rewrite or check; return 1 where the check finds a difference."""
    about = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--check", action="store_true", help="write nothing, return 1 on a difference")
    options = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text()
    new = replaced(old, measured_text())
    if not options.check:
        path.write_text(new)
    elif new != old:
        print("the README's table is not what bench/results says: run python bench/readme.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
