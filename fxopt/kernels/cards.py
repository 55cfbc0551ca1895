"""What a card can hold: the limits that configurations are pruned by."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["CARDS", "INTERPRETER", "Card", "card_of"]


@dataclass(frozen=True)
class Card:
    """One architecture.

    name: "sm_86". arch: 86; 0 for the interpreter. shared: bytes of shared memory that a block may use at most.
    registers: 32-bit registers of a multiprocessor.
    """

    name: str
    arch: int
    shared: int
    registers: int = 65536


CARDS = tuple(
    Card(f"sm_{arch}", arch, kib * 1024) for arch, kib in ((80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99))
)
"""The architectures that kernels are compiled for offline (CUDA programming guide, table of compute capabilities)."""

INTERPRETER = Card("interpreter", 0, 227 * 1024)
"""Triton's interpreter, which takes tiles of any size, and is slow by the tile: small ones show more in tests."""


def card_of(device: torch.device) -> Card:
    """The card that `device` is; a newer architecture than any known gets the limits that its driver tells."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    known = {card.arch: card for card in CARDS}
    arch = 10 * major + minor
    if arch in known:
        return known[arch]
    limit = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024)
    return Card(f"sm_{arch}", arch, int(limit))
