"""A memory plan, for people and for the report."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from fxopt.memory.units import show_bytes
from fxopt.rule import Place

__all__ = ["KEPT", "OFFLOADED", "RECOMPUTED", "Plan", "Row", "Timeline", "Trace", "spans"]

KEPT, RECOMPUTED, OFFLOADED = "kept", "recomputed", "offloaded"


@dataclasses.dataclass(frozen=True)
class Row:
    """What was decided of one tensor that the backward needs.

    bytes: its size. decision: "kept", "recomputed" or "offloaded". reason: a few words. place: where it is made.
    """

    name: str
    bytes: int
    decision: str
    reason: str
    place: Place


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Bytes held over one step, parameters and what else is resident included, at most `POINTS` of each part.

    names: of all points in order, the tensor that is taken or let go there; "" where it has no name in the graph.
    """

    forward: tuple[int, ...] = ()
    backward: tuple[int, ...] = ()
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, forward: Sequence[int], backward: Sequence[int], resident: int, names: Sequence[str] = ()) -> Timeline:
        """From every event; of those that are left out, the highest stays. names: of each event."""
        points = list(zip([*forward, *backward], names or itertools.repeat(""), strict=False))
        parts = points[: len(forward)], points[len(forward) :]
        one, other = ([max(part[at], key=_bytes) for at in spans(len(part))] for part in parts)
        sizes = [tuple(resident + size for size, _ in part) for part in (one, other)]
        return cls(sizes[0], sizes[1], tuple(name for _, name in [*one, *other]))


POINTS = 400


def spans(count: int, most: int = POINTS) -> list[slice]:
    """At most `most` slices that cover `count`."""
    step = -(-count // most) or 1
    return [slice(at, at + step) for at in range(0, count, step)]


def _bytes(point: tuple[int, str]) -> int:
    return point[0]


@dataclasses.dataclass(frozen=True)
class Trace:
    """Every allocation and release of one step, in order; empty where none was replayed.

    names: what each block of memory is in the graph, "" where it has no name. kinds: what each is for ("outputs",
    "working memory"). sizes: bytes of each. moves: n for taking the nth block, -n for letting it go. turn: number of
    moves in the forward.
    """

    names: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    moves: tuple[int, ...] = ()
    turn: int = 0


@dataclasses.dataclass
class Plan:
    """What one graph keeps, makes again and offloads, so that a step fits `budget` bytes.

    budget:    bytes for the process on the device.
    resident:  bytes by what holds them in any case: "parameters", "optimizer", ...
    rows:      a tensor each, largest first.
    predicted: the step's peak in bytes, resident included; by the compiled code's allocations.
    retained:  bytes that are held from the forward to the backward, resident not included.
    default:   the peak without a plan, in the same way; 0 where it was not computed.
    parts:     bytes at the peak by what holds them; their sum is `predicted`.
    measured:  the peak of a step that has run; None where nobody measured (always on a CPU).
    recompute_seconds, step_seconds: modelled, of making values again, and of the products and traffic of a step.
    solver_seconds, trials: what planning took, and how many plans were lowered to see their true peak.
    notes:     what a reader should know besides.
    trace:     every allocation of the step, for `fxopt.memory.snapshot`.
    """

    budget: int
    resident: dict[str, int]
    rows: list[Row]
    predicted: int
    retained: int
    default: int
    parts: dict[str, int]
    timeline: Timeline
    recompute_seconds: float
    step_seconds: float
    solver_seconds: float
    trials: int
    notes: list[str] = dataclasses.field(default_factory=list)
    measured: int | None = None
    trace: Trace = dataclasses.field(default_factory=Trace)

    def bytes_of(self, decision: str) -> int:
        """Bytes of the tensors of which that was decided."""
        return sum(row.bytes for row in self.rows if row.decision == decision)

    @property
    def summary(self) -> str:
        """One line."""
        done = ", ".join(
            f"{decision} {show_bytes(self.bytes_of(decision))}"
            for decision in (KEPT, RECOMPUTED, OFFLOADED)
            if self.bytes_of(decision)
        )
        peak = f"peak {show_bytes(self.predicted)} of {show_bytes(self.budget)}"
        seen = f" (measured {show_bytes(self.measured)})" if self.measured is not None else ""
        without = f"; without a plan {show_bytes(self.default)}" if self.default else ""
        return f"{peak}{seen}: {done or 'nothing is saved'}{without}"

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan that `dataclasses.asdict` gave."""
        rows = [Row(**row | {"place": Place(**row["place"])}) for row in data["rows"]]
        timeline = Timeline(**{name: tuple(part) for name, part in data["timeline"].items()})
        trace = Trace(**{name: tuple(part) if name != "turn" else part for name, part in data["trace"].items()})  # type: ignore[arg-type]
        return cls(**data | {"rows": rows, "timeline": timeline, "trace": trace})
