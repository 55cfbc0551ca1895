"""The closed loop: solve, lower, see the true peak, correct the model by the difference, solve again.

The difference between the modelled peak and that of the code is nearly the same for all plans of a graph, so two or
three turns do (shared/evidence.md, section 10).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from fxopt.memory.joint import Array, Joint
from fxopt.memory.program import Program
from fxopt.memory.replay import Replay
from fxopt.memory.solution import NO_BIAS, Peaks, Solution, recompute_seconds
from fxopt.memory.solve import solve

__all__ = ["Decision", "Infeasible", "decide"]

MOST_TRIALS, TURNS, DESCENTS = 6, 10, 3
ENOUGH = 0.965
"""Share of the budget from which on a plan that fits is not made better."""
UNDER = 0.85
"""The graph's own liveness gives from 0.82 to 1.1 of the true peak: below this share of the budget it may well fit."""


class Infeasible(Exception):
    """No plan fits; `lowest` is that with the lowest peak there is."""

    def __init__(self, lowest: Decision):
        super().__init__("no plan fits the budget")
        self.lowest = lowest


@dataclasses.dataclass(frozen=True)
class Decision:
    """What to do, and what came of it.

    solution: None where torch's own choice is taken. replay: of its code. default: of the code of torch's own choice,
    None where it was clear that it does not fit.
    """

    solution: Solution | None
    replay: Replay
    default: Replay | None
    solver_seconds: float
    trials: int


Trial = Callable[[Solution | None], Replay]
"""Lowers a plan, or torch's own for None."""


class _Loop:
    def __init__(self, joint: Joint, stock: Array, budget: float, trial: Trial, link: float):
        begin = time.perf_counter()
        self.joint, self.budget, self.trial, self.program = joint, budget, trial, Program(joint, link)
        self.own = Solution.keeping(stock)
        self.bias = NO_BIAS
        self.seconds, self.trials = time.perf_counter() - begin, 0
        self.default: Replay | None = None
        self.tried: list[tuple[Solution, Replay]] = []

    def decision(self, solution: Solution | None, replay: Replay) -> Decision:
        return Decision(solution, replay, self.default, self.seconds, self.trials)

    def run(self) -> Decision:
        """Torch's own choice if it fits, else what the search finds. Raises Infeasible."""
        if self.program.modelled(self.own).peak * UNDER <= self.budget:
            self.default = self.attempt(None, self.own)
            if self.default.peak <= self.budget:
                return self.decision(None, self.default)
        self.search()
        return self.best()

    def search(self) -> None:
        """Solve under a correction of the model, and correct it by what comes of the plan.

        The correction that a plan teaches may be too much for one that keeps less, or too little for one that keeps
        more: between one whose plan was over the budget and one whose plan left too much of it, or that had none, the
        next is halfway.
        """
        over: Peaks | None = None
        under: Peaks | None = None
        for _ in range(TURNS):
            used, before = self.bias, self.trials
            solution = self.solved(self.budget)
            peak = 0 if solution is None else self.attempt(solution, solution).peak
            if ENOUGH * self.budget <= peak <= self.budget or self.trials >= MOST_TRIALS:
                return
            over, under = (used, under) if peak > self.budget else (over, used)
            if over is not None and under is not None:
                self.bias = over.toward(under, 0.5)
            elif self.trials == before:  # nothing was learnt
                return

    def solved(self, budget: float | None) -> Solution | None:
        begin = time.perf_counter()
        solution = solve(self.program, budget, self.bias)
        self.seconds += time.perf_counter() - begin
        return solution

    def attempt(self, solution: Solution | None, held: Solution) -> Replay:
        """Lower `solution`, whose nodes are those of `held`, and learn by how much the model is wrong."""
        replay = None if solution is None else self.known(solution)
        if replay is None:
            self.trials += 1
            replay = self.trial(solution)
            if solution is not None:
                self.tried.append((solution, replay))
        self.bias = Peaks(*map(float, replay.peaks)) - self.program.modelled(held)
        return replay

    def known(self, solution: Solution) -> Replay | None:
        """What came of `solution`, if it was tried."""
        for one, replay in self.tried:
            if np.array_equal(solution.kept, one.kept) and np.array_equal(solution.offloaded, one.offloaded):
                return replay
        return None

    def best(self) -> Decision:
        """The cheapest that fits. Raises Infeasible."""
        if any(replay.peak <= self.budget for _, replay in self.tried):
            return self.cheapest()
        solution, replay = self.lowest()
        if replay.peak > self.budget:
            raise Infeasible(self.decision(solution, replay))
        return self.cheapest() if solution is not None else self.decision(None, replay)

    def cheapest(self) -> Decision:
        """Of the plans tried that fit."""
        fitting = [item for item in self.tried if item[1].peak <= self.budget]
        return self.decision(*min(fitting, key=lambda item: recompute_seconds(self.joint, item[0].saved)))

    def lowest(self) -> tuple[Solution | None, Replay]:
        """The plan with the lowest peak, found in the same way whatever the budget: what an error names must do.

        None: torch's own, which is lower where the order of the code matters more than what is kept.
        """
        self.bias = NO_BIAS
        found: list[tuple[Solution | None, Replay]] = []
        for _ in range(DESCENTS):
            solution = self.solved(None)
            if solution is None:
                raise ValueError("the constraints of the user's checkpoints contradict one another")
            if any(one is not None and np.array_equal(solution.saved, one.saved) for one, _ in found):
                break
            found.append((solution, self.attempt(solution, solution)))
        least = min(replay.peak for _, replay in found)
        if self.program.modelled(self.own).peak * UNDER <= least:
            self.default = self.default or self.attempt(None, self.own)
            found.append((None, self.default))
        return min(found, key=lambda item: item[1].peak)


def decide(joint: Joint, stock: Array, budget: float, trial: Trial, link: float = 0.0) -> Decision:
    """The cheapest plan whose code stays within `budget` bytes, parameters and what else is resident not counted.

    stock: which of `joint.forward` torch's own partitioner keeps; if that fits, it is what is done. trial: lowers a
    plan and replays its code. link: bytes a second for offloading, 0 for none. Raises Infeasible.
    """
    return _Loop(joint, stock, budget, trial, link).run()
