"""Choosers for tests: real candidates on real tensors on a CPU, and times that the test makes up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.choice import Choice, Measured
from fxopt.choosing import Chooser
from fxopt.metering import Run
from fxopt.rule import Rule, Site

MIB = 2**20


class ScriptedMeter:
    """Runs what it is given, twice, and says what the script says: milliseconds and MiB by candidate.

    A script without a candidate's name makes that candidate fail.
    """

    def __init__(self, script: Mapping[str, tuple[float, float]]):
        self.script, self.ran = script, list[str]()

    def card(self, device: torch.device) -> str:
        return "Scripted 1"

    def __call__(self, name: str, run: Run) -> tuple[float, int]:
        run()
        run()
        self.ran.append(name)
        milliseconds, mib = self.script[name]
        return milliseconds, int(mib * MIB)


def as_it_is(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A compiler that compiles nothing."""
    return graph


def scripted(
    compiler: Any = as_it_is, tunes: bool = False, **script: tuple[float, float]
) -> tuple[Chooser, ScriptedMeter]:
    """A chooser whose candidates take what `script` says, and its meter."""
    meter = ScriptedMeter(script)
    return Chooser(compiler, meter=meter, tunes=tunes), meter


class Always:
    """A chooser that measures nothing and says the same at every site where that candidate is known."""

    def __init__(self, winner: str):
        self.winner = winner

    def choose(self, rule: Rule, site: Site) -> Choice | None:
        known = [*rule.replacements(site), "inductor"]
        measured = tuple(Measured(name, 1.0 + (name != self.winner), MIB) for name in known)
        return Choice(self.winner, measured) if self.winner in known else None
