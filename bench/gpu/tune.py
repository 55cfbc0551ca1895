"""Phase `tune`: the fastest configuration of every kernel for the shapes of the phase `kernels`, which is remembered.

What is remembered lies in fxopt's cache directory, where later phases and other processes find it.
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch

from fxopt.kernels.cards import card_of
from fxopt.kernels.configs import TRIAL, Trial
from fxopt.kernels.tuning import Tuned, tune
from gpu import kernels
from gpu.contender import Contender
from gpu.item import Answer, Item, Settings


def items(settings: Settings) -> list[Item]:
    """One a case of `kernels`; a case has up to 35 candidates, which are compiled beside other cases."""
    return [
        dataclasses.replace(one, phase="tune", seconds=150.0, gib=one.rest_gib + 2.0, turns=1, turn_seconds=8.0)
        for one in kernels.items(settings)
    ]


class Tuning:
    """Our operator on one case, called by itself: within a compiled function the configurations are chosen already."""

    def __init__(self, item: Item, settings: Settings) -> None:
        self.settings = settings
        problem = kernels.problem_of(item.spec, settings)
        self.contender = Contender.of(problem, problem.ours)
        self.card = card_of(torch.device(settings.device))

    def prepare(self) -> Answer:
        """Compile every candidate, which can be done beside others; what does not compile is left out when measured."""
        seen = Trial(self.card)
        self._run_under(seen)
        for kernel, candidates in seen.launched.items():
            for one in candidates:
                with contextlib.suppress(Exception):
                    self._run_under(Trial(self.card, {kernel: one}))
        return {"candidates": {kernel.name: len(found) for kernel, found in seen.launched.items()}}

    def _run_under(self, trial: Trial) -> None:
        token = TRIAL.set(trial)
        try:
            with torch.autograd.set_multithreading_enabled(False):  # else backwards would not see the trial
                self.contender.both()
        finally:
            TRIAL.reset(token)

    def measure(self, turn: int) -> Answer:
        """The times of all candidates; nothing where there is no card."""
        return {"kernels": [told(one) for one in tune(self.contender.both, self.card, again=True)]}


def told(one: Tuned) -> Answer:
    """What is kept of a kernel: its candidates' milliseconds of forward and backward, the default first."""
    return {
        "kernel": one.kernel.name,
        "best": str(one.best),
        "times": {str(config): ms for config, ms in one.times},
    }
