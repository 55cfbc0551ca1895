"""Random modules through the whole backend, judged against fp64: how many were wrong, and how long it took.

    python bench/fuzz.py                 10,000 cases in two processes, about half an hour on two cores
    python bench/fuzz.py --cases 500     a check of the script

Each process has a corpus of its own, with which a later call goes on. It is begun anew every few minutes: one that has
compiled some hundred modules is slower than a new one.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure import ROOT, describe_machine, machine_line, write_json
from rich.console import Console

MINUTES = 2.5
SEED = 41
"""Of the first process; the next ones count on."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    about = (__doc__ or "").split("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about[0], epilog="\n\n".join(about[1:]), formatter_class=raw)
    parser.add_argument("--cases", type=int, default=10_000, help="in all (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="at a time (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, default=ROOT / "out" / "bench_fuzz", help="folder (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args(arguments)


def fuzzed(folder: Path, seed: int, cases: int, console: Console) -> dict[str, Any]:
    """Fuzz into `folder` until it has seen `cases`, or one that is wrong. Return the last summary."""
    while True:
        summary = turn(folder, seed, cases)
        wrong = summary["failures"]
        console.print(f"seed {seed}: {summary['all_cases']:,} cases, {len(wrong)} failures", highlight=False)
        if wrong or summary["all_cases"] >= cases:
            return summary


def turn(folder: Path, seed: int, cases: int) -> dict[str, Any]:
    """Return the summary of one process. Raises RuntimeError where it says nothing."""
    out = folder / "summary.json"
    options = {"--minutes": MINUTES, "--cases": cases, "--seed": seed, "--corpus": folder, "--json": out}
    command = [sys.executable, "-m", "fxopt.testing.fuzz", *(str(part) for pair in options.items() for part in pair)]
    alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    out.unlink(missing_ok=True)
    done = subprocess.run(command, env={**os.environ, **alone}, capture_output=True, text=True, check=False)
    if not out.exists():
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def main() -> int:
    """Fuzz, print, write; return 1 where something was wrong."""
    options = parse()
    console = Console(width=None if sys.stdout.isatty() else 120)
    machine = describe_machine()  # also a busy one, which only takes longer
    console.print(machine_line(machine), highlight=False)
    each = -(-options.cases // options.processes)
    folders = [options.corpus / str(at) for at in range(options.processes)]
    with ThreadPoolExecutor(options.processes) as pool:
        works = [pool.submit(fuzzed, folder, SEED + at, each, console) for at, folder in enumerate(folders)]
        found = [work.result() for work in works]
    result = {
        "cases": sum(one["all_cases"] for one in found),
        "minutes": max(one["all_seconds"] for one in found) / 60,
        "processes": options.processes,
        "failures": [failure for one in found for failure in one["failures"]],
    }
    console.print(f"{result['cases']:,} cases in {result['minutes']:.0f} minutes, {len(result['failures'])} failures")
    if options.json:
        write_json(options.json, machine, result)
    return int(bool(result["failures"]))


if __name__ == "__main__":
    sys.exit(main())
