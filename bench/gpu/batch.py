"""Items that are prepared beside each other, as many as the card's memory allows, and then measured in turn, alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from measure import alternate

from gpu.ahead import Ahead
from gpu.item import Answer, Item
from gpu.process import Process, Processes
from gpu.room import Room

Record = dict[str, Any]
"""{"prepared": Answer, "samples": [Answer, ...], "seconds": ...}, or {"error": why, "seconds": ...}."""


def batches(items: Sequence[Item], room: float, most: int) -> Iterator[list[Item]]:
    """Cut a list of items to be measured: those of a batch are held together, while one of them is measured."""
    batch: list[Item] = []
    for item in items:
        if batch and (held_by([*batch, item]) > room or len(batch) == most or item.group != batch[0].group):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def held_by(batch: Sequence[Item]) -> float:
    """GiB of a batch: what all of it holds between turns, and what the largest takes more when it is at work."""
    return sum(one.rest_gib for one in batch) + max(one.gib - one.rest_gib for one in batch)


def seconds(batch: Sequence[Item], room: float, jobs: int, left: Callable[[Item], float] | None = None) -> float:
    """What a batch takes, by the items' estimates: the longest, or as long as workers or memory are full.

    left: of items that are compiled ahead, what that still takes.
    """
    measuring = sum(one.turns * one.turn_seconds for one in batch)
    if batch[0].ahead_gib:
        preparing = max(one.seconds if left is None else left(one) for one in batch)
        return preparing + sum(one.turn_seconds for one in batch) + measuring
    by_workers = sum(one.seconds for one in batch) / jobs
    by_memory = sum(one.seconds * one.gib for one in batch) / room
    return max(by_workers, by_memory, *(one.seconds for one in batch)) + measuring


@dataclass
class Runner:
    """What batches are run with. left: seconds until the end of the run. ahead: items that were begun before."""

    processes: Processes
    room: Room
    jobs: int
    left: Callable[[], float]
    ahead: Ahead | None = None

    def unmeasured(
        self, items: Sequence[Item], fits: Callable[[Item], bool], done: Callable[[Item, Record], None]
    ) -> None:
        """Items without turns, each as soon as a worker is free, if it then `fits`; `done` is called from threads."""

        def one(item: Item) -> None:
            if not fits(item):
                return
            process, answer = self._prepared(item)
            self._let_go(item, process, item.gib)
            done(item, record_of(answer, []))

        with ThreadPoolExecutor(self.jobs) as threads:
            list(threads.map(one, items))

    def measured(self, batch: Sequence[Item], done: Callable[[Item, Record], None]) -> None:
        """A batch: all prepared, then measured in turns, forwards and backwards."""
        with ThreadPoolExecutor(max(1, min(self.jobs, len(batch)))) as threads:
            prepared = dict(zip([one.name for one in batch], threads.map(self._held, batch), strict=True))
        samples: dict[str, list[Answer]] = {one.name: [] for one in batch}
        items = {one.name: one for one in batch}
        for turn in range(max(one.turns for one in batch)):
            for item in map(items.__getitem__, alternate(list(items), turn)):
                process, answer = prepared[item.name]
                if process.alive and "error" not in answer and turn < item.turns:
                    sample = process.ask("measure", turn, self.patience(item))
                    samples[item.name].append(sample)
                    answer |= {"error": sample["error"]} if "error" in sample else {}
        for item in batch:
            process, answer = prepared[item.name]
            self._let_go(item, process, item.rest_gib)
            done(item, record_of(answer, samples[item.name]))

    def _held(self, item: Item) -> tuple[Process, Answer]:
        """Prepared, and cut to what it holds between turns."""
        process, answer = self._prepared(item)
        self.room.give(item.gib - item.rest_gib)
        return process, answer

    def _prepared(self, item: Item) -> tuple[Process, Answer]:
        self.room.take(item.gib)
        start = time.monotonic()
        process, answer = self._begun(item)
        if "error" not in answer:
            answer = process.ask("prepare", item, self.patience(item))
        if self.ahead:
            self.ahead.release(item)
        return process, answer | {"seconds": round(time.monotonic() - start, 1)}

    def _begun(self, item: Item) -> tuple[Process, Answer]:
        """The process that compiled it ahead, or any that is free."""
        begun = self.ahead.take(item) if self.ahead else None
        return begun or (self.processes.take(item.fresh), {})

    def _let_go(self, item: Item, process: Process, gib: float) -> None:
        if process.alive and not item.fresh:
            process.ask("drop", None, 30)
        self.processes.give(process, item.fresh)
        self.room.give(gib)

    def patience(self, item: Item) -> float:
        """Seconds after which an item is given up: it hangs, or the run is over."""
        return max(1.0, min(item.timeout, self.left()))


def record_of(answer: Answer, samples: list[Answer]) -> Record:
    """What is kept of an item; the seconds are those of preparing it."""
    taken = answer.pop("seconds")
    if "error" in answer:
        return {"error": answer["error"], "seconds": taken} | ({"timeout": True} if answer.get("timeout") else {})
    return {"prepared": answer, "samples": samples, "seconds": taken}
