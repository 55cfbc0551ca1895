"""A limit on what fxopt does in a process, for `fxopt bisect`: so many steps are taken, and none after them.

A step is a stage of a graph that changes something (capture, precision, outputs), a rule that looks for sites, or one
rewritten site. They are counted over all graphs of the process, in order, so that the first step that does harm can be
searched by halving. The limit comes through an environment variable, which processes that a script starts inherit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxopt.errors import OptionError

__all__ = ["COMPILERS", "VARIABLE", "Limit", "Taken", "limit", "read_log"]

VARIABLE = "FXOPT_LIMIT"

COMPILERS = ("inductor", "aot_eager", "eager")


@dataclasses.dataclass(frozen=True)
class Taken:
    """One step that was taken: of which graph, in which stage, and for a site its rule, node and where it is."""

    step: int
    graph: str
    stage: str
    rule: str = ""
    node: str = ""
    source: str = ""
    code: str = ""
    module: str = ""

    def __str__(self) -> str:
        if not self.rule:
            return f"stage {self.stage} of {self.graph}"
        if not self.node:
            return f"rule {self.rule}, as it looks for sites in {self.graph}"
        where = f" ({self.module})" if self.module else ""
        return f"rule {self.rule} at {self.node}{where} of {self.graph}, {self.source or 'source unknown'}"


@dataclasses.dataclass
class Limit:
    """How many steps may be taken, and where they are noted.

    steps:    None for all of them.
    compiler: what compiles the graph in the end. "aot_eager" and "eager" take no time; "eager" has no AOTAutograd.
    log:      a file that gets a line of JSON for each step, before it is taken; None for none.
    keep:     a directory for what the last step is given, for a script that reproduces it; None for none.
    """

    steps: int | None = None
    compiler: str = "inductor"
    log: Path | None = None
    keep: Path | None = None
    taken: int = 0

    def allows(self, write: Callable[[Path], object] | None = None, **about: str) -> bool:
        """Whether one more step may be taken; if so it is counted, and noted with `about`, the fields of `Taken`.

        write: called with `keep` if this is the last step.
        """
        if self.steps is not None and self.taken >= self.steps:
            return False
        self.taken += 1
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(Taken(self.taken, **about))) + "\n")
        if self.keep is not None and write is not None and self.taken == self.steps:
            write(self.keep)
        return True

    def variable(self) -> str:
        """What to set `VARIABLE` to."""
        given = {"steps": self.steps, "compiler": self.compiler, "log": self.log, "keep": self.keep}
        return json.dumps({name: value for name, value in given.items() if value is not None}, default=str)


def limit() -> Limit | None:
    """The limit of this process; None where nothing is limited. Raises `OptionError` for one that cannot be read."""
    return _parsed(os.environ.get(VARIABLE, ""))


@functools.cache
def _parsed(text: str) -> Limit | None:
    """One object a text, since it counts."""
    if not text:
        return None
    try:
        given: dict[str, Any] = json.loads(text)
        found = Limit(**given)
        found.log, found.keep = (None if one is None else Path(one) for one in (found.log, found.keep))
    except (ValueError, TypeError) as error:
        raise OptionError(f"{VARIABLE}={text!r} is not what `fxopt bisect` sets it to ({error}): unset it") from error
    if found.compiler not in COMPILERS:
        raise OptionError(f"{VARIABLE}: compiler={found.compiler!r} is none of {', '.join(COMPILERS)}")
    return found


def read_log(path: Path) -> list[Taken]:
    """The steps that a process noted; none where it did not come to any."""
    return [Taken(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
