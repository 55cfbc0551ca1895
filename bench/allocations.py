"""Bytes that work allocates, by the allocator's own events."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch


def allocated(work: Callable[[], object]) -> tuple[int, int]:
    """(at most, at the end, with the result held). What earlier work left is collected first, not in between."""
    gc.collect()
    gc.disable()
    try:
        with torch.profiler.profile(profile_memory=True) as profile:
            result = work()
    finally:
        gc.enable()
    now = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda one: one.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    del result
    return most, now


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that `work` has allocated at a time."""
    return allocated(work)[0]
