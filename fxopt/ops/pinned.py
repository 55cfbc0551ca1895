"""Host memory that copies to and from a card go through: pinned once, and used again as soon as nobody reads it.

A buffer is on loan for as long as any tensor over it lives. So nobody need give it back: a backward that has run, a
graph that is dropped and a step that raised all do, and a graph that is retained does not.
"""

from __future__ import annotations

import collections
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["HOST", "Buffer", "Pool"]

FIT = 1.25
"""A free buffer serves a request for at least this part of it (1 / FIT)."""
SPARE = 1.5
"""Memory that is held, over the most that was ever on loan at a time: beyond, sizes have changed and old ones go."""


@dataclass(eq=False)
class Buffer:
    """memory: uint8 [capacity] on the host. last_use: event after which it may be written again, None for now."""

    memory: Tensor
    last_use: Any = None


class Pool:
    """Buffers on loan and free ones. Threads may share it: forward and backward run in different ones."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Buffer] = []
        self._loans: dict[int, Buffer] = {}
        self._returned: collections.deque[Buffer] = collections.deque()
        self._most = 0

    def take(self, size: int, pinned: bool) -> tuple[Tensor, Buffer]:
        """A tensor uint8 [size] on the host and its buffer; the loan ends when all tensors over that memory are gone.

        Raises what torch does where no memory can be pinned.
        """
        with self._lock:
            self._collect()
            buffer = self._fitting(size, pinned) or self._new(size, pinned)
            self._loans[buffer.memory.data_ptr()] = buffer
            self._most = max(self._most, self._lent())
        # torch holds this very array for as long as a tensor over it lives, and the array can be watched.
        lent = buffer.memory.numpy()[:size]
        watch = weakref.finalize(lent, self._returned.append, buffer)  # no lock: it runs wherever the last one dies
        watch.atexit = False
        return torch.from_numpy(lent), buffer

    def buffer_of(self, tensor: Tensor) -> Buffer | None:
        """The buffer on loan that `tensor` lies at the beginning of."""
        return self._loans.get(tensor.data_ptr())

    @property
    def lent(self) -> int:
        """Bytes on loan."""
        with self._lock:
            self._collect()
            return self._lent()

    @property
    def held(self) -> int:
        """Bytes on loan or free."""
        with self._lock:
            self._collect()
            return self._lent() + sum(map(_size, self._free))

    def clear(self) -> None:
        """Let go of what is free."""
        with self._lock:
            self._collect()
            self._free.clear()
            self._most = self._lent()

    def _collect(self) -> None:
        while self._returned:
            buffer = self._returned.popleft()
            del self._loans[buffer.memory.data_ptr()]
            self._free.append(buffer)

    def _lent(self) -> int:
        return sum(map(_size, self._loans.values()))

    def _fitting(self, size: int, pinned: bool) -> Buffer | None:
        """The smallest free one that is not much too large."""
        fitting = [one for one in self._free if size <= _size(one) <= FIT * size and _is_pinned(one.memory) == pinned]
        if not fitting:
            return None
        best = min(fitting, key=_size)
        self._free.remove(best)
        return best

    def _new(self, size: int, pinned: bool) -> Buffer:
        most = SPARE * max(self._most, self._lent() + size)
        while self._free and self._lent() + size + sum(map(_size, self._free)) > most:
            self._free.pop(0)  # the one that was returned first
        return Buffer(torch.empty(size, dtype=torch.uint8, pin_memory=pinned))


def _size(buffer: Buffer) -> int:
    return buffer.memory.numel()


def _is_pinned(memory: Tensor) -> bool:
    return torch.cuda.is_available() and memory.is_pinned()


HOST = Pool()
"""The process's."""
