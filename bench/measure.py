"""What the benchmark scripts share: workers that take turns, medians of ratios, and a description of the machine."""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from fxopt.metering import processor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu"
BUSY = 0.7  # load average; a busy machine gave up to 5 times the step time of a quiet one
PATIENCE = 120  # seconds; the load average of a machine that has just fallen idle needs one minute from 2 to 0.7
PACKAGES = ("torch", "triton", "transformers", "numpy")


class WorkerError(RuntimeError):
    """A worker process ended instead of answering; the message holds the end of what it printed."""


class Worker:
    """A worker process (worker.py) for one case and backend, with caches that nothing else uses."""

    def __init__(self, case: str, backend: str) -> None:
        self.name = f"{backend} on {case}"
        self._caches = tempfile.TemporaryDirectory(prefix="fxopt-bench-")
        self._log = Path(self._caches.name) / "stderr.txt"
        caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        environment = {name: str(Path(self._caches.name) / folder) for name, folder in caches.items()}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("worker.py")), case, backend],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
            )

    def ask(self, command: str, *arguments: object) -> Any:
        """Have the worker run the method `command` of `worker.Trainer` and return its answer.

        Raises WorkerError where the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer below says why
            self._process.stdin.write(json.dumps([command, *arguments]) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            raise WorkerError(f"{self.name}: ended with {code} at {command!r}\n{self._log.read_text()[-4000:]}")
        return json.loads(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if kind is not None:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._caches.cleanup()


def alternate(names: Sequence[str], turn: int) -> list[str]:
    """Return `names` forwards on even turns and backwards on odd ones, so that a drift hits each alike."""
    return list(names) if turn % 2 == 0 else list(reversed(names))


def median_ratio(ours: Sequence[float], base: Sequence[float]) -> float:
    """Return the median over turns of ours / base: a turn's two numbers are taken together, so noise cancels."""
    return statistics.median(a / b for a, b in zip(ours, base, strict=True))


def git(*arguments: str) -> str:
    """Return what git prints for this tree, or "" where there is no repository or no git."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def describe_machine() -> dict[str, Any]:
    """Return what a number depends on: processor, memory, versions, load, commit and whether the tree differs."""
    outputs = (":!bench/results", ":!README.md")  # written by the benchmark itself
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in PACKAGES},
        "load": os.getloadavg()[0],
        "commit": git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--", ".", *outputs)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine_line(machine: dict[str, Any]) -> str:
    """Return the description of a machine as one line for people."""
    commit = machine["commit"][:10] + (" with changes" if machine["dirty"] else "")
    versions = ", ".join(f"{package} {machine[package]}" for package in PACKAGES)
    return f"{machine['cpu']}, {machine['cores']} cores, {versions}; commit {commit}"


def busy_warning(machine: dict[str, Any]) -> str:
    """Return a sentence where something else was running on the machine when it was described, else ""."""
    if machine["load"] <= BUSY:
        return ""
    return f"The machine is busy (load {machine['load']:.1f}): these numbers are not to be quoted."


def wait_until_quiet(console: Console, patience: float = PATIENCE, pause: float = 5) -> None:
    """Wait until the load average of the last minute is low enough to measure, `patience` seconds at most; say so."""
    until = time.monotonic() + patience
    if (load := os.getloadavg()[0]) > BUSY:
        console.print(f"load {load:.1f}: waiting up to {patience:.0f} s for it to fall to {BUSY}", highlight=False)
    while os.getloadavg()[0] > BUSY and time.monotonic() < until:
        time.sleep(pause)


def begin(console: Console, quick: bool = False) -> dict[str, Any]:
    """Wait for a quiet machine, unless `quick`, and return its description, of which the gist is printed."""
    if not quick:
        wait_until_quiet(console)
    machine = describe_machine()
    console.print(machine_line(machine), busy_warning(machine), highlight=False, soft_wrap=True)
    return machine


def write_json(path: Path, machine: dict[str, Any], result: dict[str, Any]) -> None:
    """Write a result beside the description of the machine taken before it, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, **result}, indent=1) + "\n")
