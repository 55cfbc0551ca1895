"""Items that are compiled before their turn, beside whatever else the run does, as far as memory and cores allow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from gpu.item import Answer, Item
from gpu.process import Process, Processes
from gpu.room import Room

Begun = tuple[Process, Answer]
"""A process that holds a compiled item, or has none, and what it said."""


@dataclass
class _Started:
    """An item in a process of its own since `at`."""

    item: Item
    at: float
    answer: Future[Begun]


class Ahead:
    """Starts `items` in order, each as soon as `room` has its `ahead_gib` and one of `jobs` threads is free.

    patience: seconds that one may take. What is asked for with `take` before it was started is left to who asks:
    nobody waits for memory that is held by items that come later.
    """

    def __init__(
        self, processes: Processes, items: Sequence[Item], room: Room, jobs: int, patience: Callable[[Item], float]
    ) -> None:
        self._processes, self._room, self._patience = processes, room, patience
        self._started: dict[str, _Started] = {}
        self._taken, self._lock = set[str](), threading.Lock()
        self._compiling: dict[str, Process] = {}
        self._closed = False
        self._compilers = ThreadPoolExecutor(max(1, jobs))
        ours = [one for one in items if 0 < one.ahead_gib <= room.gib]
        threading.Thread(target=self._start, args=(ours,), daemon=True).start()

    def _start(self, items: Sequence[Item]) -> None:
        for item in items:
            self._room.take(item.ahead_gib)
            with self._lock:
                if self._closed:
                    return
                if item.name not in self._taken:
                    future = self._compilers.submit(self._compiled, item)
                    self._started[item.name] = _Started(item, time.monotonic(), future)
                    continue
            self._room.give(item.ahead_gib)

    def _compiled(self, item: Item) -> Begun:
        process = self._processes.take(fresh=True)
        with self._lock:
            self._compiling[item.name] = process
            if self._closed:
                process.kill()
        return process, process.ask("compile", item, self._patience(item))

    def seconds_left(self, item: Item) -> float:
        """Until `item` is compiled, by its estimate."""
        started = self._started.get(item.name)
        if started is None:
            return item.seconds
        return 0.0 if started.answer.done() else max(5.0, started.at + item.seconds - time.monotonic())

    def take(self, item: Item) -> Begun | None:
        """The process that has compiled `item`, waited for; None where that was not begun. `release` comes next."""
        with self._lock:
            self._taken.add(item.name)
            started = self._started.get(item.name)
        return started.answer.result() if started else None

    def release(self, item: Item) -> None:
        """What `item` holds is accounted for elsewhere now."""
        if item.name in self._started:
            self._room.give(item.ahead_gib)

    def close(self) -> None:
        """End what nobody took, and what is being compiled."""
        with self._lock:
            self._closed = True
            left = [process for name, process in self._compiling.items() if name not in self._taken]
        self._room.give(self._room.gib)  # lets the thread that waits for memory see it
        for process in left:
            process.kill()
        self._compilers.shutdown(cancel_futures=True)
        for process in left:
            process.end()
