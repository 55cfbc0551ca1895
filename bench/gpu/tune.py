"""Phase `tune`: the fastest configuration of every kernel for the shapes of the phase `kernels`."""

from __future__ import annotations

from gpu.item import Item, Settings


def items(settings: Settings) -> list[Item]:
    """None yet."""
    return []
