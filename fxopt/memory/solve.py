"""The program of a plan, solved by HiGHS (through scipy)."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from fxopt.memory.joint import Array, Joint
from fxopt.memory.program import Program
from fxopt.memory.solution import NO_BIAS, Peaks, Solution, repaired
from fxopt.memory.units import MIB

__all__ = ["solve"]

LEAST_ACROSS = 64 * 1024
"""Smaller values may be made again for other blocks."""
GAP, SECONDS = 5e-3, 20.0
"""Of the optimum, at which the solver may stop; seconds after which it must."""


def solve(program: Program, budget: float | None, bias: Peaks = NO_BIAS, seconds: float = SECONDS) -> Solution | None:
    """The cheapest plan whose peak is at most `budget` bytes; None: there is none.

    budget: None asks for the lowest peak. bias: bytes by which the measured peaks exceed the modelled ones.
    """
    costs = _lowest_peak(program) if budget is None else _costs(program)
    found = _run(program, costs, budget, bias, seconds, whole=True)
    if found.x is None and found.status == 2:  # infeasible
        return None
    optimal = found.x is not None
    if not optimal and (found := _run(program, costs, budget, bias, seconds, whole=False)).x is None:
        return None
    kept, offloaded = found.x[: program.again] > 0.5, found.x[program.offload : program.sums] > 0.5
    return Solution(repaired(program.joint, kept | offloaded) & ~offloaded, offloaded, optimal)


def _costs(program: Program) -> Array:
    """Seconds, scaled: the solver's tolerances are absolute."""
    joint, costs = program.joint, np.zeros(program.columns)
    count = len(joint.forward)
    costs[:count] = joint.saving
    costs[program.again : program.again + count] = joint.seconds
    costs[program.offload : program.offload + count] = 1.5 * joint.saving
    return 1e3 * costs / max(joint.seconds.sum(), 1e-12)


def _lowest_peak(program: Program) -> Array:
    """The peak, and by very little the costs, so that of plans with the same peak it is the cheapest."""
    costs = 1e-6 * _costs(program)
    costs[program.peak] = 1.0
    return costs


def _run(program: Program, costs: Array, budget: float | None, bias: Peaks, seconds: float, whole: bool) -> Any:
    joint, count = program.joint, len(program.joint.forward)
    high = np.ones(program.columns)
    high[program.sums :] = np.inf
    if budget is not None:
        high[program.peak] = max(budget, 0) / MIB
    crosses = np.array([_reader_is_elsewhere(joint, at) for at in range(count)])
    high[:count][joint.view | joint.forced] = 0
    high[program.again : program.again + count][joint.banned | crosses] = 0
    high[program.offload : program.offload + count] = program.may_offload & ~joint.forced
    whole_numbers = np.zeros(program.columns)
    if whole:
        whole_numbers[:count] = ~joint.view
        whole_numbers[program.again : program.again + count] = joint.seconds > 0
        whole_numbers[program.offload : program.offload + count] = program.may_offload
    return milp(
        costs,
        constraints=LinearConstraint(program.matrix, program.low, program.high_with(bias)),
        bounds=Bounds(np.zeros(program.columns), high),
        integrality=whole_numbers,
        options={"mip_rel_gap": GAP, "time_limit": seconds},
    )


def _reader_is_elsewhere(joint: Joint, at: int) -> bool:
    """Whether the backward of another block reads a value, of some size, that would have to be made for it alone."""
    if not joint.needed[at] or joint.size[at] < LEAST_ACROSS or joint.forced[at]:
        return False
    return bool(joint.backward_block[joint.first[at]] != joint.block[at])
