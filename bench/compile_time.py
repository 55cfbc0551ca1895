"""fxopt's own stages as a share of compile time, for models of 2, 8 and 32 layers.

    python bench/compile_time.py
    python bench/compile_time.py --layers 2 8

A model of many narrow layers is compiled in a fresh process with empty caches. Compile time is the first step less a
later one, as the user waits for it: Dynamo, fxopt and Inductor. fxopt's own stages are all in its report but "compile",
which is Inductor's part.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import Worker, begin, write_json
from rich.console import Console
from rich.table import Table

TARGET = 0.10  # of compile time, at 32 layers
TARGET_LAYERS = 32
INDUCTOR_STAGE = "compile"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    about = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(description=about[0], epilog=about[-1])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32], help="depths (default: 2 8 32)")
    parser.add_argument("--samples", type=int, default=3, help="compiles a depth (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one compile a depth, 2 and 8 layers only")
    parser.add_argument("--json", type=Path, help="also write the raw numbers to this file")
    parser.add_argument("--no-check", action="store_true", help="exit with 0 also where the target is missed")
    options = parser.parse_args(arguments)
    if options.quick:
        options.layers, options.samples = [2, 8], 1
    return options


def sample(layers: int) -> dict[str, Any]:
    """Compile a model of `layers` layers once; return the seconds of the whole and of every stage."""
    with Worker(f"deep-{layers}", "fxopt") as worker:
        whole = worker.ask("compile")["compile_s"]
        stages = worker.ask("report")["timings"]
    own = sum(seconds for stage, seconds in stages.items() if stage != INDUCTOR_STAGE)
    return {"compile_s": whole, "own_s": own, "share": own / whole, "stages": stages}


def median(samples: Sequence[dict[str, Any]], name: str) -> float:
    """Return the median of one number over the samples of a depth."""
    return statistics.median(one[name] for one in samples)


def show(results: dict[int, list[dict[str, Any]]], console: Console) -> None:
    """Print a line a depth: compile time, the seconds of each stage of ours, and their share."""
    stages = [stage for stage in next(iter(results.values()))[0]["stages"] if stage != INDUCTOR_STAGE]
    table = Table(title=f"share of compile time (target: {TARGET:.0%} at {TARGET_LAYERS} layers)")
    for heading in ("layers", "compile s", *(f"{stage} s" for stage in stages), "fxopt s", "share"):
        table.add_column(heading, justify="right")
    for layers, samples in results.items():
        parts = [f"{statistics.median(one['stages'].get(stage, 0.0) for one in samples):.2f}" for stage in stages]
        whole, own, share = (median(samples, name) for name in ("compile_s", "own_s", "share"))
        table.add_row(str(layers), f"{whole:.1f}", *parts, f"{own:.2f}", f"{share:.1%}")
    console.print(table)


def main() -> int:
    """Measure, print, write; return 1 where the target is missed."""
    options = parse()
    console = Console()
    machine = begin(console, options.quick)
    results: dict[int, list[dict[str, Any]]] = {}
    for layers in options.layers:
        with console.status(f"{layers} layers, {options.samples} compiles"):
            results[layers] = [sample(layers) for _ in range(options.samples)]
    show(results, console)
    if options.json:
        write_json(options.json, machine, {"target": TARGET, "layers": results})
    missed = TARGET_LAYERS in results and median(results[TARGET_LAYERS], "share") > TARGET
    if missed:
        console.print(f"{TARGET_LAYERS} layers: the share is above {TARGET:.0%}", style="red", highlight=False)
    return 1 if missed and not options.no_check else 0


if __name__ == "__main__":
    sys.exit(main())
