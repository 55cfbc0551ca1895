"""Memory of the card, counted by estimates."""

from __future__ import annotations

import threading


class Room:
    """Memory of the card, of which every item takes a part while it needs it."""

    def __init__(self, gib: float) -> None:
        self.gib, self._used, self._changed = gib, 0.0, threading.Condition()

    def take(self, gib: float) -> None:
        """Wait until there is as much, or nobody else."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + gib <= self.gib)
            self._used += gib

    def give(self, gib: float) -> None:
        """Back."""
        with self._changed:
            self._used = max(0.0, self._used - gib)
            self._changed.notify_all()
