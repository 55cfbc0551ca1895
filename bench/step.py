"""Time, peak memory and compile time of a training step, as ratios to Inductor measured in the same call.

    python bench/step.py                          every case, eager, inductor and fxopt
    python bench/step.py --case llama-4L --quick  one case, two rounds: to see that it works, not to quote

Every backend has a process of its own. The processes live at the same time and take turns, so that what else the
machine does hits each alike; a ratio is the median over turns of the ratio within a turn. On two cores a case takes 6
to 10 minutes, those of one sequence of 4,096 longest, and all of them an hour.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import (
    Worker,
    WorkerError,
    alternate,
    begin,
    median_ratio,
    write_json,
)
from rich.console import Console
from rich.table import Table

BASE = "inductor"


@dataclass(frozen=True)
class Targets:
    """What fxopt must reach, as ratios to Inductor."""

    step: float
    memory: float
    compile: float


CASES = {  # built in cases.py: what it is, and its targets
    "llama-4L": ("Llama, fp32", Targets(1.00, 0.38, 1.00)),
    "gemma-tied": ("Gemma, tied embeddings, fp32", Targets(1.00, 0.40, 1.00)),
    "llama-bf16-params": ("Llama, bf16 parameters", Targets(1.00, 0.40, 1.00)),
    "llama-eager-2048": ("Llama, fp32, eager attention, 1 x 2048", Targets(0.75, 0.25, 1.10)),
    "llama-padded": ("Llama, fp32, padding mask", Targets(1.00, 0.40, 1.10)),
    "llama-packed": ("Llama, fp32, 8 packed documents, 1 x 4096", Targets(0.80, 0.40, 1.10)),
    "mistral-window": ("Mistral, fp32, sliding window of 256, 1 x 4096", Targets(0.80, 0.40, 1.10)),
}
UNITS = {"step": "step ms", "memory": "peak MiB", "compile": "compile s"}
Samples = dict[str, dict[str, list[float]]]  # backend -> measure -> one number a turn


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; `--quick` lowers the rounds."""
    about = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(description=about[0], epilog=about[-1])
    parser.add_argument("--case", action="append", choices=CASES, help="a case, repeatable (default: all)")
    parser.add_argument("--backends", default="eager,inductor,fxopt", help="comma-separated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns a backend gets (default: %(default)s)")
    parser.add_argument("--compiles", type=int, default=3, help="fresh compiles a backend (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two turns, one compile: a check of the script")
    parser.add_argument("--json", type=Path, help="also write the raw numbers to this file")
    parser.add_argument("--no-check", action="store_true", help="exit with 0 also where a target is missed")
    options = parser.parse_args(arguments)
    options.backends = options.backends.split(",")
    options.case = options.case or list(CASES)
    if options.quick:
        options.rounds, options.compiles = 2, 1
    return options


def compile_again(case: str, backends: list[str], samples: Samples, count: int) -> None:
    """Add `count` compile times a backend, each in a fresh process with empty caches, taken in turn."""
    compiled = [backend for backend in backends if backend != "eager"]
    for turn in range(1, count + 1):
        for backend in alternate(compiled, turn):
            with Worker(case, backend) as worker:
                samples[backend]["compile"].append(worker.ask("compile")["compile_s"])


def take_turns(workers: dict[str, Worker], samples: Samples, rounds: int) -> None:
    """Add `rounds` step times and up to three memory peaks a backend, taken in turn."""
    for turn in range(rounds):
        for backend in alternate(list(workers), turn):
            samples[backend]["step"].append(1000 * statistics.mean(workers[backend].ask("steps", 2)))
    for turn in range(min(rounds, 3)):
        for backend in alternate(list(workers), turn):
            samples[backend]["memory"].append(workers[backend].ask("memory"))


def measure_case(case: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return the samples of every backend for one case, what each computed, and fxopt's report."""
    samples: Samples = {backend: {measure: [] for measure in UNITS} for backend in options.backends}
    with ExitStack() as stack:
        workers = {backend: stack.enter_context(Worker(case, backend)) for backend in options.backends}
        for backend, worker in workers.items():
            with console.status(f"{case}: first step under {backend}"):
                first = worker.ask("compile")
            if backend != "eager":
                samples[backend]["compile"].append(first["compile_s"])
        with console.status(f"{case}: {options.rounds} rounds of steps"):
            take_turns(workers, samples, options.rounds)
        checks = {backend: worker.ask("check") for backend, worker in workers.items()}
        report = workers["fxopt"].ask("report") if "fxopt" in workers else {}
    with console.status(f"{case}: {options.compiles - 1} more compiles a backend"):
        compile_again(case, options.backends, samples, options.compiles - 1)
    about, targets = CASES[case]
    return {
        "about": about,
        "targets": asdict(targets),
        "samples": samples,
        "ratios": ratios(samples),
        "checks": checks,
        "report": report,
    }


def measure_all(options: argparse.Namespace, console: Console) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Measure every case asked for; a case whose worker fails is left out and named, and the others go on."""
    results: dict[str, dict[str, Any]] = {}
    failed = []
    for case in options.case:
        try:
            results[case] = measure_case(case, options, console)
        except WorkerError as error:
            failed.append(str(error))
    return results, failed


def ratios(samples: Samples) -> dict[str, dict[str, float]]:
    """Return per backend and measure the median ratio to Inductor, where both were measured."""
    base = samples.get(BASE, {})
    return {
        backend: {name: median_ratio(ours[name], base[name]) for name in UNITS if ours[name] and base.get(name)}
        for backend, ours in samples.items()
        if backend != BASE
    }


def problems(case: str, result: dict[str, Any]) -> list[str]:
    """Return what is wrong with fxopt's numbers, a sentence each: targets missed, another loss or gradient."""
    targets = asdict(CASES[case][1])
    found = [
        f"{case}: {name} is {ratio:.2f}x Inductor's, target {targets[name]:.2f}x"
        for name, ratio in result["ratios"].get("fxopt", {}).items()
        if ratio > targets[name]
    ]
    if "fxopt" in result["checks"] and not result["report"].get("rewrites"):
        found.append(f"{case}: fxopt rewrote nothing, so these numbers are Inductor's")
    # Only against having measured another computation; the tests compare each gradient with fp64. bf16 has 8 bits.
    allowed = 2**-7 if "bf16" in case else 1e-4
    ours, base = (result["checks"].get(backend, {}) for backend in ("fxopt", BASE))
    found += [
        f"{case}: {name} is {ours[name]!r}, Inductor's {base[name]!r}"
        for name in ours.keys() & base.keys()
        if not abs(ours[name] - base[name]) <= allowed * abs(base[name])
    ]
    return found


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    """Print one table: a line for every case and backend, medians with their ratio to Inductor, and the targets."""
    table = Table(title="forward + backward; x = ratio to Inductor in the same call")
    table.add_column("case", no_wrap=True)
    table.add_column("backend")
    for unit in UNITS.values():
        table.add_column(unit, justify="right")
    for case, result in results.items():
        for number, (backend, measures) in enumerate(result["samples"].items()):
            cells = [cell(result, backend, name) for name in measures]
            table.add_row(case if number == 0 else "", backend, *cells)
        table.add_row("", "target", *(f"{result['targets'][name]:.2f}x" for name in UNITS), end_section=True)
    console.print(table)


def cell(result: dict[str, Any], backend: str, name: str) -> str:
    """Return one number with its ratio, coloured by its target where it is fxopt's."""
    numbers = result["samples"][backend][name]
    if not numbers:
        return "-"
    text = f"{statistics.median(numbers):.{1 if name == 'compile' else 0}f}"
    ratio = result["ratios"].get(backend, {}).get(name)
    if ratio is None:
        return text
    if backend != "fxopt":
        return f"{text}  {ratio:.2f}x"
    colour, word = ("green", "pass") if ratio <= result["targets"][name] else ("red", "FAIL")
    return f"{text}  [{colour}]{ratio:.2f}x {word}[/]"


def main() -> int:
    """Measure, print, write; return 1 where a target is missed."""
    options = parse()
    console = Console(width=None if sys.stdout.isatty() else 120)  # else 80 in a file, which breaks the cells
    machine = begin(console, options.quick)
    results, wrong = measure_all(options, console)
    show(results, console)
    for case, result in results.items():
        if verdict := result["report"].get("verdict"):
            console.print(f"{case}: {verdict}", highlight=False, soft_wrap=True)
    if options.json:
        write_json(options.json, machine, {"rounds": options.rounds, "cases": results})
    wrong += [sentence for case, result in results.items() for sentence in problems(case, result)]
    for sentence in wrong:
        console.print(sentence, style="red", highlight=False, soft_wrap=True)
    return 1 if wrong and not options.no_check else 0


if __name__ == "__main__":
    sys.exit(main())
