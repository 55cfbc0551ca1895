"""Launch configurations: tile sizes, warps and stages, and what was measured to be the fastest of them on a card."""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import triton

from fxopt.kernels.cards import Card
from fxopt.kernels.source import Kernel, cache_directory, write_whole
from fxopt.version import VERSION

__all__ = ["ALIGNMENT", "TRIAL", "Config", "Trial", "config_for", "remember", "remembered", "tuning_is_on"]

ALIGNMENT = 16
"""What Triton specialises a kernel on: arguments that it divides (bytes of an address, or the integer itself)."""


@dataclass(frozen=True)
class Config:
    """How a kernel is launched: its tile sizes by name, and Triton's num_warps and num_stages."""

    tiles: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2

    def tile(self, name: str) -> int:
        """One of the tile sizes. Raises KeyError for a name that is none."""
        return dict(self.tiles)[name]

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.tiles)
        return f"{sizes} warps={self.num_warps} stages={self.num_stages}"


@dataclass
class Trial:
    """What `config_for` does in a thread that tries candidates.

    instead:  the configuration of each kernel that is tried.
    launched: the kernels that were asked for, with their candidates.
    """

    card: Card
    instead: dict[Kernel, Config] = field(default_factory=dict)
    launched: dict[Kernel, tuple[Config, ...]] = field(default_factory=dict)


TRIAL: contextvars.ContextVar[Trial | None] = contextvars.ContextVar("fxopt_trial", default=None)


def config_for(kernel: Kernel, candidates: Sequence[Config], card: Card) -> Config:
    """What to launch `kernel` with on `card`: what was measured to be fastest, else the first of `candidates`.

    What is remembered and is no candidate any more is left out: candidates fit the card, and it need not.
    """
    trial = TRIAL.get()
    if trial is not None and trial.card == card:
        trial.launched[kernel] = tuple(candidates)
        if kernel in trial.instead:
            return trial.instead[kernel]
    found = remembered(kernel, card) if card.model and tuning_is_on() else None
    return found if found is not None and found in candidates else candidates[0]


def tuning_is_on() -> bool:
    """Whether measured configurations are used and made: not with ``FXOPT_TUNE=0``."""
    return os.environ.get("FXOPT_TUNE", "1") != "0"


# --- what is remembered: a file for each kernel, so that processes that tune at once lose nothing of each other's ---


_KNOWN: dict[tuple[Kernel, Card], Config | None] = {}
"""What this process has read or measured: the disk is asked once, and needs not take what is measured."""


def remembered(kernel: Kernel, card: Card) -> Config | None:
    """What was measured to be fastest, by this process or an earlier one."""
    if (kernel, card) not in _KNOWN:
        _KNOWN[kernel, card] = _read(_place(kernel, card))
    return _KNOWN[kernel, card]


def remember(kernel: Kernel, card: Card, config: Config) -> None:
    """Keep `config` as the fastest, on disk where that can be written."""
    _KNOWN[kernel, card] = config
    with contextlib.suppress(OSError):
        write_whole(_place(kernel, card), json.dumps(asdict(config)))


def _read(path: Path) -> Config | None:
    try:
        found = json.loads(path.read_text())
        tiles = tuple((str(name), int(size)) for name, size in found["tiles"])
        return Config(tiles, int(found["num_warps"]), int(found["num_stages"]))
    except (OSError, ValueError, TypeError, KeyError):  # none, or a file that somebody broke
        return None


def _place(kernel: Kernel, card: Card) -> Path:
    """By the card's model, not its architecture alone: an RTX 3060 and a 3090 differ in bandwidth and in units."""
    versions = (VERSION, triton.__version__, torch.__version__)
    parts: tuple[Any, ...] = (kernel.source, kernel.signature, card, versions)
    digest = sha256(repr(parts).encode()).hexdigest()[:24]
    return cache_directory() / "tuned" / re.sub(r"\W+", "_", card.model) / f"{kernel.name}_{digest}.json"
