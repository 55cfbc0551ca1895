"""Copies between a device and pinned host memory, beside the computation: one side stream a direction and device.

A copy that is under way is known by the address that it writes to. Until somebody waits for it, or it is seen to be
done, both ends are kept alive here: a step that raises in between lets go of them, and their memory must not be another
tensor's while a copy engine reads or writes it. `record_stream` would do that too, but delays every release to whatever
the side stream does at that time, and the memory plan counts on releases.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fxopt.ops.pinned import HOST

__all__ = ["TRANSFERS", "Card", "Immediate", "Streams", "Transfers"]

Direction = Literal["out", "in"]


class Streams(Protocol):
    """The side streams of one device."""

    def copy(self, direction: Direction, target: Tensor, source: Tensor, after: Sequence[Any]) -> Any:
        """Copy once the computation so far and the events `after` are done; the event at which it is done."""

    def wait(self, event: Any) -> None:
        """Let the computation go on only after `event`. The host goes on."""

    def done(self, event: Any) -> bool:
        """Whether `event` has passed."""


class Card:
    """Streams of a CUDA device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.streams = {"out": torch.cuda.Stream(device), "in": torch.cuda.Stream(device)}

    def copy(self, direction: Direction, target: Tensor, source: Tensor, after: Sequence[Any]) -> Any:
        """See `Streams`."""
        stream, event = self.streams[direction], torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        for one in after:
            stream.wait_event(one)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        event.record(stream)
        return event

    def wait(self, event: Any) -> None:
        """See `Streams`."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def done(self, event: Any) -> bool:
        """See `Streams`."""
        return bool(event.query())


class Immediate:
    """Streams of a CPU, which has none: a copy is done when it was begun."""

    def copy(self, direction: Direction, target: Tensor, source: Tensor, after: Sequence[Any]) -> Any:
        """See `Streams`."""
        target.copy_(source)

    def wait(self, event: Any) -> None:
        """See `Streams`."""

    def done(self, event: Any) -> bool:
        """See `Streams`."""
        return True


@functools.cache
def streams_of(device: torch.device) -> Streams:
    """The one set of side streams of `device`."""
    return Card(device) if device.type == "cuda" else Immediate()


@dataclass(frozen=True)
class _Flight:
    """A copy under way: its streams, the event of its end, and what must live until then."""

    streams: Streams
    event: Any
    ends: tuple[Tensor, Tensor]


class Transfers:
    """The copies of this process that nobody has waited for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flying: dict[int, _Flight] = {}

    def send(self, source: Tensor) -> Tensor:
        """Begin to copy contiguous `source` to a tensor in pinned host memory, of the same shape and dtype."""
        memory, buffer = HOST.take(source.nbytes, pinned=source.device.type != "cpu")
        host = memory.view(source.dtype).view(source.shape)
        after = [] if buffer.last_use is None else [buffer.last_use]
        buffer.last_use = self._begin("out", source.device, host, source, after)
        return host

    def fetch(self, host: Tensor, device: torch.device) -> Tensor:
        """Begin to copy `host`, which `send` returned, to a new tensor on `device`."""
        found = torch.empty_like(host, device=device)
        buffer = HOST.buffer_of(host)
        after = [] if buffer is None or buffer.last_use is None else [buffer.last_use]
        event = self._begin("in", device, found, host, after)
        if buffer is not None:
            buffer.last_use = event
        return found

    def land(self, target: Tensor) -> None:
        """Let the computation wait for the copy to `target`, if one is under way."""
        with self._lock:
            flight = self._flying.pop(target.data_ptr(), None)
        if flight is not None:
            flight.streams.wait(flight.event)

    @property
    def flying(self) -> int:
        """Copies that nobody has waited for and that are not known to be done."""
        self._forget()
        return len(self._flying)

    def _begin(
        self, direction: Direction, device: torch.device, target: Tensor, source: Tensor, after: Sequence[Any]
    ) -> Any:
        self._forget()
        streams = streams_of(device)
        event = streams.copy(direction, target, source, after)
        with self._lock:
            self._flying[target.data_ptr()] = _Flight(streams, event, (target, source))
        return event

    def _forget(self) -> None:
        """Let go of what is done."""
        with self._lock:
            for key in [key for key, one in self._flying.items() if one.streams.done(one.event)]:
                del self._flying[key]


TRANSFERS = Transfers()
"""The process's."""
