"""A plan as a snapshot of an allocator, which opens in PyTorch's memory_viz (https://pytorch.org/memory_viz).

The format is that of ``torch.cuda.memory._snapshot()``: what is held at the end by segment, and every event before it.
Addresses are made up, the lowest that is free, as if the allocator never lost anything to fragmentation.
"""

from __future__ import annotations

import bisect
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fxopt.memory.plan import Plan
from fxopt.rule import Place

__all__ = ["snapshot_of", "write"]

BASE = 1 << 40
"""The first address."""
ROUND = 512
"""Bytes to a multiple of which blocks begin, as on CUDA."""


def write(plan: Plan, path: Path) -> Path:
    """Write `snapshot_of` to `path` as a pickle, its directory too. Returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(snapshot_of(plan)))
    return path


def snapshot_of(plan: Plan) -> dict[str, Any]:
    """Plain dicts and lists: "segments" and "device_traces"; of residents first, then of the step as it was replayed.

    Frames name the tensor, what it is for and what was decided of it, with the line of the model that makes it.
    """
    space, events = _Space(), list[dict[str, Any]]()
    held: dict[Any, dict[str, Any]] = {}
    frames = _frames(plan)
    for key, size, frame in _moves(plan, frames):
        if size is None:
            block = held.pop(key)
            space.free(block["addr"])
            events += [block | {"action": f"free_{how}"} for how in ("requested", "completed")]
        else:
            block = {"addr": space.take(size), "size": size, "stream": 0, "frames": frame}
            held[key] = block
            events.append(block | {"action": "alloc"})
    first = {"action": "segment_alloc", "addr": BASE, "size": space.top - BASE, "stream": 0, "frames": []}
    return {
        "segments": [_segment(list(held.values()), space.top)],
        "device_traces": [[one | {"time_us": at} for at, one in enumerate([first, *events])]],
    }


def _moves(plan: Plan, frames: Mapping[str, Any]) -> Iterator[tuple[Any, int | None, Any]]:
    """(what, its bytes, its frames) where it is taken, (what, None, None) where it is let go."""
    for name, size in plan.resident.items():
        yield name, size, [_frame(name)]
    trace = plan.trace
    for move in trace.moves:
        at = abs(move) - 1
        if not trace.sizes[at]:
            continue
        name, kind = trace.names[at], trace.kinds[at]
        yield at, (trace.sizes[at] if move > 0 else None), frames.get(name, [_frame(f"{name} {kind}".strip())])


def _frames(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """By name, of the tensors that something was decided of."""
    return {
        row.name: [_frame(f"{row.name}, {row.decision}: {row.reason}", row.place), _frame(row.place.module)]
        for row in plan.rows
    }


def _frame(name: str, place: Place | None = None) -> dict[str, Any]:
    file, _, line = (place.source if place is not None else "").rpartition(":")
    return {"name": name, "filename": file or "fxopt", "line": int(line) if line.isdigit() else 0}


def _segment(held: list[dict[str, Any]], top: int) -> dict[str, Any]:
    """The one segment, from `BASE` to `top`, with what is held and the gaps between."""
    blocks, at = list[dict[str, Any]](), BASE
    for one in sorted(held, key=lambda block: block["addr"]):
        blocks += _gap(at, one["addr"])
        at = one["addr"] + one["size"]
        state = {"state": "active_allocated", "requested_size": one["size"]}
        blocks.append({"address": one["addr"], "size": one["size"], "frames": one["frames"], **state})
    blocks += _gap(at, top)
    allocated = sum(one["size"] for one in held)
    return {
        "device": 0, "address": BASE, "total_size": top - BASE, "allocated_size": allocated,
        "active_size": allocated, "requested_size": allocated, "stream": 0, "segment_type": "large",
        "segment_pool_id": (0, 0), "is_expandable": False, "frames": [], "blocks": blocks,
    }  # fmt: skip


def _gap(begin: int, end: int) -> list[dict[str, Any]]:
    gap = {"address": begin, "size": end - begin, "requested_size": 0, "state": "inactive", "frames": []}
    return [gap] if end > begin else []


class _Space:
    """Addresses. top: the end of the highest block there ever was."""

    def __init__(self) -> None:
        self.top = BASE
        self.taken: list[tuple[int, int]] = []

    def take(self, size: int) -> int:
        """The lowest address with room for `size` bytes."""
        size = -(-size // ROUND) * ROUND
        ends = [BASE, *(end for _, end in self.taken)]
        begins = [*(begin for begin, _ in self.taken), None]
        address = next(end for end, begin in zip(ends, begins, strict=True) if begin is None or begin - end >= size)
        bisect.insort(self.taken, (address, address + size))
        self.top = max(self.top, address + size)
        return address

    def free(self, address: int) -> None:
        """Let go of the block at `address`."""
        del self.taken[bisect.bisect_left(self.taken, (address, 0))]
