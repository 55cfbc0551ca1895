"""The demo: train the same model on the same batches under several backends, each in a process of its own.

    make demo
    python examples/compare.py --backends inductor,fxopt,fxopt+bf16 --steps 100 --layers 8

Shows the runs as they go, then one table, and writes out/demo.png and out/demo.json. The training itself is
train_llama.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chart import draw
from compare_one import WARM, WATCHED
from corpus import prepare
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from train_llama import BATCH, CACHE, LENGTH, VOCAB

FEWEST = WARM + WATCHED + 1


@dataclass
class Run:
    """What one backend did: a loss and the seconds a step, the peak over the process at rest, fxopt's verdict."""

    backend: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_mib: float = float("nan")
    verdict: str = ""

    @property
    def step_ms(self) -> float:
        """Median of the steps between the first ones and those whose memory was watched, in ms."""
        return 1000 * statistics.median(self.seconds[WARM:-WATCHED])

    @property
    def compile_s(self) -> float:
        """Seconds by which the first step was longer than the later ones."""
        return self.seconds[0] - self.step_ms / 1000


def parse() -> argparse.Namespace:
    """Return the options."""
    about = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(description=about[0], epilog=about[-1])
    parser.add_argument("--backends", default="eager,inductor,fxopt", help="comma-separated (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help=f"batches, at least {FEWEST} (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="depth of the model (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=CACHE.parent, help="folder to write to (default: out)")
    options = parser.parse_args()
    if options.steps < FEWEST:
        parser.error(f"--steps must be at least {FEWEST}: the first {WARM} and the last {WATCHED} are not timed")
    return options


def messages(backend: str, layers: int, tokens: Path) -> Iterator[dict[str, Any]]:
    """Train in a child process with empty compile caches and yield what it says; RuntimeError where it fails."""
    with tempfile.TemporaryDirectory(prefix="fxopt-demo-") as folder:
        log = Path(folder) / "stderr.txt"
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        script = Path(__file__).with_name("compare_one.py")
        command = [sys.executable, str(script), backend, str(layers), str(tokens)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **caches}
        with (
            log.open("w") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as child,
        ):
            assert child.stdout is not None
            try:
                yield from map(json.loads, child.stdout)
            except BaseException:  # interrupted, or not read to the end
                child.kill()
                raise
        if child.returncode:
            raise RuntimeError(f"{backend} ended with {child.returncode}\n{log.read_text()[-4000:]}")


def train_all(options: argparse.Namespace, tokens: Path, console: Console) -> list[Run]:
    """Run the backends one after the other behind a progress bar each."""
    runs = [Run(backend) for backend in options.backends.split(",")]
    columns = (BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[now]}"))
    with Progress(TextColumn("{task.description:<9}"), *columns, console=console) as progress:
        bars = [progress.add_task(run.backend, total=options.steps, start=False, now="waiting") for run in runs]
        for run, bar in zip(runs, bars, strict=True):
            progress.start_task(bar)
            progress.update(bar, now="first step" if run.backend == "eager" else "first step: compiling")
            for message in messages(run.backend, options.layers, tokens):
                if "loss" in message:
                    run.losses.append(message["loss"])
                    run.seconds.append(message["seconds"])
                    now = f"loss {message['loss']:.3f}  {1000 * message['seconds']:.0f} ms a step"
                    progress.update(bar, advance=1, now=now)
                else:
                    run.peak_mib, run.verdict = message["peak_mib"], message["verdict"]
    return runs


def show(runs: list[Run], steps: int, console: Console) -> None:
    """Print one table of all runs and fxopt's verdict."""
    middle = (steps + 1) // 2
    table = Table(
        title=f"the same {steps} batches of {BATCH} x {LENGTH} tokens, fp32 parameters, {os.cpu_count()} cores"
    )
    table.add_column("backend")
    for heading in (*(f"loss @{step}" for step in (1, middle, steps)), "ms a step", "peak MiB over rest", "compile s"):
        table.add_column(heading, justify="right")
    for run in runs:
        losses = (f"{run.losses[step - 1]:.4f}" for step in (1, middle, steps))
        compiled = "-" if run.backend == "eager" else f"{run.compile_s:.1f}"
        table.add_row(run.backend, *losses, f"{run.step_ms:.0f}", f"{run.peak_mib:.0f}", compiled)
    console.print(table)
    for run in runs:
        if run.verdict:
            console.print(run.verdict, highlight=False, soft_wrap=True)


def main() -> None:
    """Prepare the text, train, print the table, write the chart and the numbers."""
    options = parse()
    console = Console()
    with console.status(f"training a byte-pair tokenizer of {VOCAB:,} entries on Python's standard library"):
        tokens = prepare(CACHE, VOCAB, options.steps * BATCH * LENGTH)
    runs = train_all(options, tokens, console)
    show(runs, options.steps, console)
    rows = [{**asdict(run), "step_ms": run.step_ms, "compile_s": run.compile_s} for run in runs]
    chart, numbers = options.out / "demo.png", options.out / "demo.json"
    options.out.mkdir(parents=True, exist_ok=True)
    numbers.write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, chart)
    console.print(f"chart: {os.path.relpath(chart)}   numbers: {os.path.relpath(numbers)}")


if __name__ == "__main__":
    main()
