"""Milliseconds and peak memory of a piece of work, on a GPU; on a CPU only to see that the code works."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from fxopt.metering import peak_bytes
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
    return peak_bytes(work) / MIB
