"""A linear layer under cross-entropy, forward and backward: fxopt's op against what Inductor makes of it with logits.

    python bench/linear_cross_entropy.py
    python bench/linear_cross_entropy.py --quick  two turns: to see that it works, not to quote

Both are compiled by Inductor, each in a process of its own; the processes take turns, and a ratio is the median over
turns of the ratio within a turn. Memory is the operating system's high-water mark of one step over rest.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import alternate, begin, median_ratio, write_json
from rich.console import Console
from rich.table import Table
from rss import peak_over_rest
from torch import Tensor

from fxopt.ops.linear_cross_entropy import linear_cross_entropy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """hidden [rows, width] and weight [classes, width]."""

    rows: int
    width: int
    classes: int


def with_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """As transformers writes it: logits in fp32, mean over the tokens."""
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def without_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The op."""
    return linear_cross_entropy(hidden, weight, None, target)


BACKENDS: dict[str, Loss] = {"inductor": with_logits, "fxopt": without_logits}


class Contender:
    """One backend's compiled loss with its inputs; lives in a process of its own."""

    here: "Contender"

    def __init__(self, backend: str, dtype: str, size: Size) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(size.rows, size.width).to(DTYPES[dtype]).requires_grad_()
        self.weight = (torch.randn(size.classes, size.width) * size.width**-0.5).to(DTYPES[dtype]).requires_grad_()
        self.target = torch.randint(size.classes, (size.rows,))
        self.loss = torch.compile(BACKENDS[backend])

    def step(self) -> float:
        """Run forward and backward once, without old gradients, and return the loss."""
        self.hidden.grad = self.weight.grad = None
        loss = self.loss(self.hidden, self.weight, self.target)
        loss.backward()
        return float(loss.detach())


def start(backend: str, dtype: str, size: Size) -> None:
    """Make this process the backend's, compiled and warm."""
    Contender.here = Contender(backend, dtype, size)
    for _ in range(2):
        Contender.here.step()


def milliseconds() -> float:
    """Return the time of one step in this process."""
    begin = time.perf_counter()
    Contender.here.step()
    return 1000 * (time.perf_counter() - begin)


def peak_mib() -> float:
    """Return the peak of one step over this process at rest, without gradients."""
    Contender.here.hidden.grad = Contender.here.weight.grad = None
    return peak_over_rest(Contender.here.step)


def loss_value() -> float:
    """Return the loss, to see that both compute the same."""
    return Contender.here.step()


@contextmanager
def process(backend: str, dtype: str, size: Size) -> Iterator[ProcessPoolExecutor]:
    """Start a process for one backend, ready when this returns."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=start, initargs=(backend, dtype, size)) as pool:
        pool.submit(os.getpid).result()
        yield pool


def measure(dtype: str, size: Size, turns: int) -> dict[str, dict[str, list[float]]]:
    """Return per backend its times and peaks, one a turn. Raises RuntimeError where the losses differ."""
    samples: dict[str, dict[str, list[float]]] = {backend: {"ms": [], "MiB": []} for backend in BACKENDS}
    with ExitStack() as stack:
        pools = {backend: stack.enter_context(process(backend, dtype, size)) for backend in BACKENDS}
        for turn in range(turns):
            for backend in alternate(list(BACKENDS), turn):
                samples[backend]["ms"].append(pools[backend].submit(milliseconds).result())
        for backend, pool in pools.items():
            samples[backend]["MiB"].append(pool.submit(peak_mib).result())
        losses = {backend: pool.submit(loss_value).result() for backend, pool in pools.items()}
    if abs(losses["fxopt"] - losses["inductor"]) > 1e-2 * losses["inductor"]:
        raise RuntimeError(f"the losses differ, so the times compare nothing: {losses}")
    return samples


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; `--quick` lowers the turns."""
    about = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(description=about[0], epilog=about[-1])
    parser.add_argument("--rows", type=int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="size of the hidden states (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=32_000, help="size of the vocabulary (default: %(default)s)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable (default: all)")
    parser.add_argument("--turns", type=int, default=15, help="steps a backend (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two turns: a check of the script")
    parser.add_argument("--json", type=Path, help="also write the raw numbers to this file")
    options = parser.parse_args(arguments)
    options.turns = 2 if options.quick else options.turns
    options.dtype = options.dtype or list(DTYPES)
    return options


def show(results: dict[str, dict[str, dict[str, list[float]]]], size: Size, console: Console) -> None:
    """Print a line for every dtype and backend: medians, and the ratios to Inductor."""
    table = Table(title=f"{size.rows} x {size.width} -> {size.classes}, forward + backward; x = ratio to Inductor")
    for name in ("dtype", "backend", "step ms", "peak MiB"):
        table.add_column(name, justify="right" if name[-2:] in ("ms", "iB") else "left")
    for dtype, samples in results.items():
        for backend, measures in samples.items():
            cells = [
                f"{statistics.median(numbers):.0f}  {median_ratio(numbers, samples['inductor'][name]):.2f}x"
                for name, numbers in measures.items()
            ]
            first, last = backend == "inductor", backend == "fxopt"
            table.add_row(dtype if first else "", backend, *cells, end_section=last)
    console.print(table)


def main() -> int:
    """Measure, print, write."""
    options, console = parse(), Console()
    machine, size = begin(console, options.quick), Size(options.rows, options.width, options.classes)
    results = {}
    for dtype in options.dtype:
        with console.status(f"{dtype}: {options.turns} turns"):
            results[dtype] = measure(dtype, size, options.turns)
    show(results, size, console)
    if options.json:
        write_json(options.json, machine, {"size": vars(size), "turns": options.turns, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
