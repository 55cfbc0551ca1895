"""Offloading as operators, so that compiled graphs can hold it: a copy begins, and what must not be before it ends.

    fxopt::send   (source) -> host                       begin a copy to pinned host memory
    fxopt::fetch  (host, after) -> tensor                begin the copy back, once `after` is computed
    fxopt::hold   (value, landed, alive) -> value        go on only when the copies to `landed` are done

A compiler orders operators by what they read, and by nothing else. `hold` returns its argument itself: whoever reads
the result comes after the copies that it waits for, and after everything in `alive` was begun; and the memory of what
is in `alive` is nobody else's before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.ops.registry import OpMemory
from fxopt.ops.transfer import TRANSFERS

__all__ = ["FETCH", "HOLD", "MEMORY", "SEND"]


@torch.library.custom_op("fxopt::send", mutates_args=())
def _send(source: Tensor) -> Tensor:
    return TRANSFERS.send(source)


@_send.register_fake
def _fake_send(source: Tensor) -> Tensor:
    return torch.empty(source.shape, dtype=source.dtype, device="cpu")


@torch.library.custom_op("fxopt::fetch", mutates_args=())
def _fetch(host: Tensor, after: Tensor) -> Tensor:
    return TRANSFERS.fetch(host, after.device)


@_fetch.register_fake
def _fake_fetch(host: Tensor, after: Tensor) -> Tensor:
    return torch.empty(host.shape, dtype=host.dtype, device=after.device)


# A custom_op may not return its argument, hence the schema in full.
_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_LIBRARY.define("hold(Tensor(a) value, Tensor[] landed, Tensor[] alive) -> Tensor(a)")


@torch.library.impl(_LIBRARY, "hold", "CompositeExplicitAutograd")
def _hold(value: Tensor, landed: Sequence[Tensor], alive: Sequence[Tensor]) -> Tensor:
    for one in landed:
        TRANSFERS.land(one)
    return value


@torch.library.register_fake("fxopt::hold", lib=_LIBRARY)
def _fake_hold(value: Tensor, landed: Sequence[Tensor], alive: Sequence[Tensor]) -> Tensor:
    return value


def _on_host(source: Tensor) -> OpMemory:
    return OpMemory(0, 0)


def _fetched(host: Tensor, after: Tensor) -> OpMemory:
    return OpMemory(host.nbytes, 0)


def _nothing(value: Tensor, landed: Sequence[Tensor], alive: Sequence[Tensor]) -> OpMemory:
    return OpMemory(0, 0)


SEND = torch.ops.fxopt.send.default
FETCH = torch.ops.fxopt.fetch.default
HOLD = torch.ops.fxopt.hold.default
MEMORY = {SEND: _on_host, FETCH: _fetched, HOLD: _nothing}
"""On the device: what is sent lies in the host's memory."""
