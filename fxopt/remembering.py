"""What was measured at sites, kept in this process and on disk: each spec is measured once a machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
import triton

from fxopt.choice import OURS, Measured
from fxopt.kernels.source import cache_directory, write_whole
from fxopt.version import VERSION

__all__ = ["Key", "forget", "recall", "remember"]


@dataclasses.dataclass(frozen=True)
class Key:
    """What a measurement holds for: a rule, all of a site that its time depends on (`Excerpt.text`), a card's model."""

    rule: str
    text: str
    card: str

    @property
    def path(self) -> Path:
        """A file of its own, so that processes that measure at once lose nothing of each other's."""
        parts = (self.rule, self.text, self.card, VERSION, triton.__version__, torch.__version__)
        digest = sha256(repr(parts).encode()).hexdigest()[:24]
        return cache_directory() / "chosen" / re.sub(r"\W+", "_", self.card) / f"{self.rule}_{digest}.json"


_KNOWN: dict[Path, tuple[Measured, ...]] = {}
"""What this process has read or measured: the disk is asked once, and need not take what is measured."""


def recall(key: Key) -> tuple[Measured, ...]:
    """What was measured, by this process or an earlier one; empty where nothing was."""
    path = key.path
    if path not in _KNOWN:
        found = _read(path)
        if found:
            _KNOWN[path] = found
    return _KNOWN.get(path, ())


def remember(key: Key, measured: Sequence[Measured]) -> None:
    """Keep `measured`; on disk only what the next process would measure too: memory may have been short in this one, or
    a disk full on which our kernel was to be compiled."""
    _KNOWN[key.path] = tuple(measured)
    if not any("OutOfMemory" in one.failure or (one.failure and one.name == OURS) for one in measured):
        with contextlib.suppress(OSError):
            write_whole(key.path, json.dumps([dataclasses.asdict(one) for one in measured], indent=1))


def forget() -> None:
    """Let go of what this process holds; what is on disk stays."""
    _KNOWN.clear()


def _read(path: Path) -> tuple[Measured, ...]:
    try:
        return tuple(map(Measured.read, json.loads(path.read_text())))
    except (OSError, ValueError, TypeError, AttributeError):  # none, or a file that somebody broke
        return ()
