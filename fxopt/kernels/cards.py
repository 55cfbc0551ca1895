"""What a card can hold: the limits that configurations are pruned by."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

__all__ = [
    "CARDS",
    "GFX942",
    "INTERPRETER",
    "TARGETS",
    "Card",
    "as_if_on",
    "card_of",
    "is_on_card",
    "multiprocessors_of",
]


@dataclass(frozen=True)
class Card:
    """One architecture, or one card of it.

    name: "sm_86". arch: 86; 942 for gfx942, 0 for the interpreter. shared: bytes of shared memory that a block may use
    at most. registers: 32-bit registers of a multiprocessor. model: "NVIDIA GeForce RTX 3090", what timings are kept
    by; empty where there is no card to take any on. backend: "cuda" or "hip".
    """

    name: str
    arch: int
    shared: int
    registers: int = 65536
    model: str = ""
    backend: str = "cuda"


CARDS = tuple(
    Card(f"sm_{arch}", arch, kib * 1024)
    for arch, kib in ((80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99))
)
"""The architectures that kernels are compiled for offline (CUDA programming guide, table of compute capabilities)."""

GFX942 = Card("gfx942", 942, 64 * 1024, registers=4 * 512 * 64, backend="hip")
"""AMD's MI300: compiled offline to see that the source is portable (CDNA3 ISA, 64 KiB of LDS a workgroup)."""

TARGETS = (*CARDS, GFX942)

INTERPRETER = Card("interpreter", 0, 227 * 1024)
"""Triton's interpreter, which takes tiles of any size, and is slow by the tile: small ones show more in tests."""


_PRETENDED: contextvars.ContextVar[Card | None] = contextvars.ContextVar("fxopt_pretended_card", default=None)


@contextlib.contextmanager
def as_if_on(card: Card) -> Iterator[None]:
    """Within, in this thread, every tensor counts as one on `card`: for what would be launched there, not to launch."""
    token = _PRETENDED.set(card)
    try:
        yield
    finally:
        _PRETENDED.reset(token)


def _pretended() -> Card | None:
    """Nothing where Dynamo traces the operators, since it knows no context variables."""
    return None if torch.compiler.is_compiling() else _PRETENDED.get()


def is_on_card(device: torch.device) -> bool:
    """Whether `device` has cards, or counts as one."""
    return device.type == "cuda" or _pretended() is not None


def card_of(device: torch.device) -> Card:
    """The card that `device` is; an architecture that is not known gets the limits that its driver tells.

    Where there is no CUDA to ask (fake tensors on a machine without a card): the first of `CARDS`.
    """
    return _pretended() or _card_of(device)


@functools.cache
def _card_of(device: torch.device) -> Card:
    if device.type != "cuda":
        return INTERPRETER
    if not torch.cuda.is_available():
        return CARDS[0]
    properties = torch.cuda.get_device_properties(device)
    return replace(_architecture(properties), model=torch.cuda.get_device_name(device))


def _architecture(properties: Any) -> Card:
    """By what torch says of a device; ROCm's have a name for their architecture, "gfx942:sramecc+:xnack-"."""
    arch = 10 * properties.major + properties.minor
    name = f"sm_{arch}" if torch.version.hip is None else properties.gcnArchName.split(":")[0]
    limit = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    backend = "cuda" if torch.version.hip is None else "hip"
    known = {card.name: card for card in TARGETS}
    return known.get(name, Card(name, arch, int(limit), backend=backend))


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    """How many multiprocessors `device` has: 1 under the interpreter, an A100's where there is no CUDA to ask."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count if torch.cuda.is_available() else 108
