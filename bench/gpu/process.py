"""Worker processes as the parent sees them: asked with a timeout, replaced when they die."""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any, Self

from gpu.item import Answer, Settings
from gpu.worker import serve

PATIENCE = 10.0
"""Seconds in which a process that has nothing to do ends by itself."""

_NUMBERS = itertools.count()


class Process:
    """One worker. Its output is in a file of the folder `logs`."""

    def __init__(self, settings: Settings, logs: Path) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self._here, there = context.Pipe()
        self.log = logs / f"worker-{next(_NUMBERS)}.txt"
        self._process = context.Process(target=serve, args=(there, settings, str(self.log)), daemon=True)
        self._process.start()
        there.close()
        self.alive = True

    def ask(self, command: str, argument: Any, timeout: float) -> Answer:
        """The answer; where there is none, {"error": why} and the process is no more."""
        try:
            self._here.send((command, argument))
            if not self._here.poll(timeout):
                self.end()
                return {"error": f"no answer within {timeout:.0f} s", "timeout": True}
            answer: Answer = self._here.recv()
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode
            self.end()
            return {"error": f"the process ended with {code}: {self._last_words()}"}
        if answer.get("lost"):
            self.end()
        return answer

    def _last_words(self) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text.strip()[-500:]

    def close(self) -> None:
        """Let it end when it is done."""
        self.alive = False
        self._here.close()

    def kill(self) -> None:
        """End it now; who waits for its answer gets an error."""
        self._process.kill()

    def end(self, patience: float = 0.0) -> None:
        """Close, wait for so many seconds, and kill it if it is still there."""
        self.close()
        self._process.join(patience)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


class Processes:
    """Workers that are idle, kept to be asked again."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._folder = tempfile.TemporaryDirectory(prefix="fxopt-bench-gpu-")
        self._idle: list[Process] = []

    def take(self, fresh: bool) -> Process:
        """An idle worker, or a new one."""
        if self._idle and not fresh:
            return self._idle.pop()
        return Process(self.settings, Path(self._folder.name))

    def give(self, process: Process, fresh: bool) -> None:
        """Back, for the next item; one that was made for a single item is ended."""
        if fresh or not process.alive:
            process.end(PATIENCE)
        else:
            self._idle.append(process)

    def end_idle(self) -> None:
        """Free the memory that their CUDA contexts take."""
        for process in self._idle:
            process.close()
        while self._idle:
            self._idle.pop().end(PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self.end_idle()
        self._folder.cleanup()
