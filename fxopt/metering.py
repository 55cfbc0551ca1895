"""What a piece of work takes on a device: milliseconds and peak memory on a GPU, seconds also on a CPU."""

from __future__ import annotations

import contextlib
import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch

from fxopt.kernels.cards import card_of

__all__ = ["CudaMeter", "Meter", "Run", "machine_of", "peak_bytes", "processor", "release", "seconds", "undisturbed"]

Run = Callable[[], object]

CACHE_BYTES = 256 * 2**20
"""More than the second cache of any card (an H200 has 50 MiB). Writing it empties that, as Triton's `do_bench` does."""

WARM_UPS, TIMED_MS, LEAST_RUNS, MOST_RUNS, MOST_CLEARS = 3, 40.0, 5, 50, 64


class Meter(Protocol):
    """Measures candidates of sites; tests have one of their own."""

    def card(self, device: torch.device) -> str:
        """What times on `device` are kept by, its model's name; empty where nothing is to be measured."""
        ...

    def __call__(self, name: str, run: Run) -> tuple[float, int]:
        """Milliseconds, and bytes held at most over what was held before, of `run`, which is candidate `name`."""
        ...


class CudaMeter:
    """The meter of CUDA devices, on the current one."""

    def card(self, device: torch.device) -> str:
        """The card's model; nothing is measured on a CPU, nor on tensors without a card."""
        return card_of(device).model if device.type == "cuda" else ""

    def __call__(self, name: str, run: Run) -> tuple[float, int]:
        """The median of some runs by CUDA events, and the peak of one. Raises what `run` raises."""
        for _ in range(WARM_UPS):
            run()
        return milliseconds(run), peak_bytes(run)


def milliseconds(run: Run) -> float:
    """The median by CUDA events, the second cache emptied before every run.

    A site that is timed alone has calls into autograd on the host that a whole compiled step does not have, and small
    kernels would wait for them: the cache is written as often as gives the host the time to be done.
    """
    cache = torch.empty(CACHE_BYTES // 4, dtype=torch.int32, device="cuda")
    of_run, host = _once(run)
    of_clear, _ = _once(cache.zero_)
    clears = min(max(1, math.ceil(2 * host / max(of_clear, 1e-3))), MOST_CLEARS)
    runs = min(max(LEAST_RUNS, int(TIMED_MS / max(of_run, 1e-3))), MOST_RUNS)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        for _ in range(clears):
            cache.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def _once(run: Run) -> tuple[float, float]:
    """Milliseconds of the device and of the host for one run."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before = time.perf_counter()
    start.record()
    run()
    end.record()
    host = 1000 * (time.perf_counter() - before)
    torch.cuda.synchronize()
    return start.elapsed_time(end), host


def peak_bytes(run: Run) -> int:
    """The most memory allocated during one run, over what was allocated before. The process's own peak is forgotten."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    rest = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - rest
    del result
    return peak


RUNS = 3
"""On a CPU, of which the quickest counts: what else the machine does only adds."""


def seconds(run: Run, device: torch.device) -> float:
    """Of `run` on `device`, once it is warm."""
    if device.type == "cuda":
        for _ in range(WARM_UPS):
            run()
        return milliseconds(run) / 1e3
    run()
    return min(_timed(run) for _ in range(RUNS))


def _timed(run: Run) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def machine_of(device: torch.device) -> str:
    """What times on `device` are kept by: a card's model, "" where there is none; a processor's, and its threads."""
    if device.type == "cuda":
        return card_of(device).model
    return f"{processor()} {torch.get_num_threads()} threads"


def processor() -> str:
    """The processor's name as the kernel gives it, or else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Within, `device` is the current one, and random numbers are drawn that the training run never misses."""
    cuda = device.type == "cuda"
    with (
        torch.cuda.device(device) if cuda else contextlib.nullcontext(),
        torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else []),
    ):
        yield


def release() -> None:
    """Give memory that nobody holds back to the card, where other processes wait for it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
