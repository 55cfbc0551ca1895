"""What was measured at a site, and which of its candidates that makes the choice: the whole rule is `decide`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["INDUCTOR", "OURS", "Choice", "Measured", "decide"]

OURS, INDUCTOR = "fxopt", "inductor"
"""The candidates that every site has: the rule's replacement, and the site's own nodes as Inductor compiles them."""

MORE_MEMORY = 1.1
"""Of the memory of ours that Inductor may take and still win where a rule is there to save memory."""

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Measured:
    """One candidate's forward and backward: milliseconds and peak bytes over what was held before, or why it failed.

    tuned: a sentence for each of its kernels of which all configurations were measured, before it was.
    """

    name: str
    milliseconds: float | None
    bytes: int | None = None
    failure: str = ""
    tuned: tuple[str, ...] = ()

    @classmethod
    def read(cls, item: Mapping[str, Any]) -> Measured:
        """What `dataclasses.asdict` and JSON made of one. Raises TypeError where its fields are others."""
        found = cls(**dict(item) | {"tuned": tuple(map(str, item.get("tuned", ())))})
        for value in (found.milliseconds, found.bytes):
            if value is not None and not isinstance(value, int | float):
                raise TypeError(f"{value!r} is no number")
        return found

    def __str__(self) -> str:
        if self.milliseconds is None:
            return f"{self.name} failed ({self.failure})"
        memory = "" if self.bytes is None else f" {self.bytes / MIB:,.3g} MiB"
        return f"{self.name} {self.milliseconds:,.3g} ms{memory}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a site takes, and what was measured to know it.

    winner:   the candidate's name; empty where nothing was measured, and then `unmeasured` says why.
    measured: every candidate, ours first.
    """

    winner: str = ""
    measured: tuple[Measured, ...] = ()
    unmeasured: str = ""

    @property
    def against(self) -> str:
        """The sentence that speaks against a rewrite where Inductor is the choice."""
        return f"Inductor's own code was measured to be the better choice here: {self.times}"

    @property
    def times(self) -> str:
        """Every candidate with its milliseconds and MiB."""
        return ", ".join(map(str, self.measured))

    def __str__(self) -> str:
        if not self.winner:
            return f"not measured: {self.unmeasured}"
        tuned = [f"tuned {line}" for one in self.measured for line in one.tuned]
        return "\n".join([f"chose {self.winner}: {self.times}", *tuned])


def decide(measured: Sequence[Measured], saves_memory: bool) -> str:
    """The candidate to take: the fastest that ran, the first of equals; ours where none ran.

    saves_memory: the rule is there to hold less, and a kernel that recomputes what Inductor stores may take longer by
    design. Inductor then wins only if it is faster *and* holds no more than `MORE_MEMORY` times what the fastest of
    the others does: on time alone a loss would be given its logits back at every small vocabulary, and the batch that
    fitted would not fit any more.
    """
    ran = sorted((one for one in measured if one.milliseconds is not None), key=lambda one: one.milliseconds or 0.0)
    others = [one for one in ran if one.name != INDUCTOR]
    if not ran:
        return OURS
    if ran[0].name != INDUCTOR or not others or not saves_memory:
        return ran[0].name
    return INDUCTOR if (ran[0].bytes or 0) <= MORE_MEMORY * (others[0].bytes or 0) else others[0].name
