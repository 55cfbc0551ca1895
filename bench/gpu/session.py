"""A run: the phases in order, each within its share of the time, then what is left over while there is time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gpu.ahead import Ahead
from gpu.batch import Record, Runner, batches, held_by, seconds
from gpu.item import Item
from gpu.room import Room
from gpu.store import Store

SHARES = {"check": 2.1, "tune": 2.0, "kernels": 3.0, "step": 3.9}
"""Minutes of nine, or that part of the time that the phases asked for have."""


class Clock:
    """Time until the end of the run."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


@dataclass
class Session:
    """What a run works with, and what came of it.

    said: called with a line for people. skipped: names of items for which there was no time, by phase.
    """

    runner: Runner
    store: Store
    clock: Clock
    said: Callable[[str], None]
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def go(self, phases: dict[str, list[Item]]) -> None:
        """Run every phase within its share; then go through what was left out again, with all the time there is."""
        waiting = {phase: self._that_fit(items) for phase, items in phases.items()}
        try:
            self._go(waiting)
        finally:
            if self.runner.ahead:
                self.runner.ahead.close()

    def _go(self, waiting: dict[str, list[Item]]) -> None:
        for at, phase in enumerate(phases := list(waiting)):
            if any(one.turns for one in waiting[phase]) and not self.runner.ahead:
                self._look_ahead([one for later in phases[at:] for one in waiting[later]])
            shares = [SHARES[one] for one in phases[at:]]
            seconds_now = self.clock.left() * shares[0] / sum(shares)
            self.said(f"{phase}: {len(waiting[phase])} items, {seconds_now:.0f} s")
            start = time.monotonic()
            waiting[phase] = self._phase(waiting[phase], start + seconds_now)
            self.said(f"{phase}: {time.monotonic() - start:.0f} s, {len(waiting[phase])} items left")
        for phase, items in waiting.items():
            self.skipped[phase] = [one.name for one in self._phase(items, self.clock.end)] if items else []

    def _look_ahead(self, items: Sequence[Item]) -> None:
        """Begin to compile, from the first phase that measures on: checks leave no core free.

        What compiles ahead has the memory that no batch needs. Three cores of sixteen are left to what is measured.
        """
        room, jobs, ahead = self.runner.room, self.runner.jobs, [one for one in items if one.ahead_gib]
        groups = [[one for one in ahead if one.group == group] for group in {one.group for one in ahead}]
        most = max([one.gib for one in items if not one.ahead_gib] + [held_by(group) for group in groups], default=0.0)
        if ahead and most < room.gib:
            self.runner.room = Room(most)
            self.runner.ahead = Ahead(
                self.runner.processes, ahead, Room(room.gib - most), jobs - min(3, jobs // 4), self.runner.patience
            )

    def _that_fit(self, items: Sequence[Item]) -> list[Item]:
        """Without checks that need more memory than there is; of what is timed, some contenders may fit."""
        large = [one for one in items if not one.turns and one.gib > self.runner.room.gib]
        for one in large:
            self.said(f"{one.name}: left out, it needs {one.gib:.0f} GiB")
        return [one for one in items if one not in large]

    def _phase(self, items: Sequence[Item], end: float) -> list[Item]:
        """Returns those for which there was no time."""
        waiting: dict[str, Item] = {one.name: one for one in items}

        def done(item: Item, record: Record) -> None:
            if record.get("timeout") and self.clock.left() < 5:
                return
            self.store.add(item.phase, item.name, {"spec": item.spec, **record})
            waiting.pop(item.name, None)
            if "error" in record:
                self.said(f"{item.name}: {record['error'][:200]}")

        self.runner.unmeasured(
            [one for one in items if not one.turns], lambda one: time.monotonic() + one.seconds < end, done
        )
        room, jobs = self.runner.room.gib, self.runner.jobs
        for batch in batches([one for one in items if one.turns], room, jobs):
            if any(one.fresh for one in batch):
                self.runner.processes.end_idle()
            left = self.runner.ahead.seconds_left if self.runner.ahead else None
            if time.monotonic() + seconds(batch, room, jobs, left) <= end:
                self.runner.measured(batch, done)
                self._again(batch, done)
        return list(waiting.values())

    def _again(self, batch: Sequence[Item], done: Callable[[Item, Record], None]) -> None:
        """What found no memory beside others is run once more by itself."""
        records = self.store.phase(batch[0].phase)
        for item in batch if len(batch) > 1 else ():
            fits = seconds([item], self.runner.room.gib, 1) < self.clock.left()
            if fits and records.get(item.name, {}).get("error", "").startswith("OutOfMemoryError"):
                self.runner.measured([item], done)
