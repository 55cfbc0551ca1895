"""Launch configurations: tile sizes, warps and stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.kernels.cards import Card
from fxopt.kernels.source import Kernel


@dataclass(frozen=True)
class Config:
    """How a kernel is launched: its tile sizes by name, and Triton's num_warps and num_stages."""

    tiles: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.tiles)
        return f"{sizes} warps={self.num_warps} stages={self.num_stages}"


def config_for(kernel: Kernel, candidates: Sequence[Config], card: Card) -> Config:
    """What to launch `kernel` with on `card`: what was measured to be fastest, else the first of `candidates`."""
    return candidates[0]
