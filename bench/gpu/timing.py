"""Milliseconds and peak memory of a piece of work, on a GPU; on a CPU only to see that the code works."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

from gpu.item import Settings

MIB = 2**20
WARMUP_MS, TIMED_MS = 10, 40

Work = Callable[[], object]


def milliseconds(work: Work, settings: Settings) -> float:
    """The median by CUDA events, the L2 cache emptied before every run (`triton.testing.do_bench`)."""
    if settings.device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(work, warmup=WARMUP_MS, rep=TIMED_MS, return_mode="median"))
    return statistics.median(_wall_ms(work) for _ in range(2))


def _wall_ms(work: Work) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def peak_mib(work: Work, settings: Settings) -> float | None:
    """The most memory allocated during one run, over what was allocated before; None on a CPU."""
    if settings.device != "cuda":
        work()
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    rest = torch.cuda.memory_allocated()
    result = work()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - rest
    del result
    return peak / MIB


def release() -> None:
    """Give memory that nobody holds back to the card, where other processes wait for it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def brief(error: BaseException) -> str:
    """The kind and the first line of an error."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
