"""Whose turn the card is: who measures is alone on it, who only warms up shares it, who compiles does not need it.

A lock of the file system, so that a worker that dies gives it back.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fxopt.metering import CudaMeter, Run

VARIABLE = "FXOPT_BENCH_TURNS"
"""Names the folder of the lock to the workers; without it nobody waits."""


@contextlib.contextmanager
def among_workers() -> Iterator[None]:
    """Within, processes that are started take turns."""
    with tempfile.TemporaryDirectory(prefix="fxopt-bench-gpu-turns-") as folder:
        os.environ[VARIABLE] = folder
        try:
            yield
        finally:
            del os.environ[VARIABLE]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """The card, once nobody else is at it."""
    with _locked(fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def beside_others() -> Iterator[None]:
    """The card, once nobody is alone at it."""
    with _locked(fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def _locked(how: int) -> Iterator[None]:
    folder = os.environ.get(VARIABLE)
    if folder is None:
        yield
        return
    with open(Path(folder) / "lock", "a") as file:
        fcntl.flock(file, how)
        yield  # closing the file unlocks it


def measure_sites_alone() -> None:
    """From now on fxopt times the candidates of a site alone on the card, while it compiles beside others."""
    measure = CudaMeter.__call__

    def measured(self: CudaMeter, name: str, run: Run) -> tuple[float, int]:
        with alone():
            return measure(self, name, run)

    CudaMeter.__call__ = measured  # type: ignore[method-assign]
