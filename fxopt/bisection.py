"""The search of `fxopt bisect`: the first step that makes a script fail, found by limiting how many are taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from fxopt.limits import Taken

__all__ = ["Culprit", "Trial", "first_bad"]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of the script. steps: what fxopt did in it. said: the end of what it printed."""

    failed: bool
    steps: Sequence[Taken]
    said: str = ""


@dataclasses.dataclass(frozen=True)
class Culprit:
    """The step without which the script passes and with which it fails; bad: the shortest run that failed."""

    step: Taken
    bad: Trial


def first_bad(attempt: Callable[[int], Trial], full: Trial) -> Culprit:
    """The culprit, given that no steps pass and that all of them, `full`, fail: log2 of their number of attempts.

    Where several steps do harm this is one of them; where harm takes two, the later one.
    """
    passes, fails, bad = 0, len(full.steps), full
    while fails - passes > 1:
        middle = (passes + fails) // 2
        trial = attempt(middle)
        if trial.failed:
            fails, bad = middle, trial
        else:
            passes = middle
    steps = bad.steps if len(bad.steps) >= fails else full.steps
    return Culprit(steps[fails - 1], bad)
