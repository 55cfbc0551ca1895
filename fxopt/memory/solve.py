"""The plan as a mixed-integer linear program over the whole joint graph, solved by HiGHS (through scipy).

For each forward node v: x kept, r made again, o offloaded.

    minimise    sum seconds_v r_v + saving_v x_v + small o_v
    needed      x_v + r_v + o_v >= 1                 the backward reads v
    inputs      r_v <= x_u + r_u + o_u               u is read by v, in the same block
                r_v <= x_u + o_u                     u lies in an earlier block
    peaks       at chosen positions of the forward and the backward: kept so far, or not yet let go, + made again and
                alive + in flight on the link + transient + gradients so far + held by the caller <= budget

The rule of blocks keeps chains of recomputations short, and makes the peak of a block one of its own variables and one
sum over earlier blocks. After Checkmate (Jain et al., MLSys 2020), of which it needs O(n) binaries for O(n^2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from fxopt.memory.joint import NEVER, Array, Joint
from fxopt.memory.offload import movable

__all__ = [
    "NO_BIAS",
    "Lives",
    "Peaks",
    "Program",
    "Solution",
    "closure",
    "forward_transient",
    "modelled",
    "offloadable",
    "read_from",
    "recompute_seconds",
    "solve",
]

MIB = 2**20
POSITIONS = 20
"""Backward positions a block, those with the most transient bytes; and half as many of the forward."""
LEAST_ACROSS = 64 * 1024
"""Smaller values may be made again for other blocks."""
LEAST_OFFLOAD = 2 * MIB
"""Smaller tensors are not worth a copy of their own."""
GAP, SECONDS = 5e-3, 20.0
"""Of the optimum, at which the solver may stop; seconds after which it must."""


@dataclass(frozen=True)
class Peaks:
    """Bytes in a step, without parameters and inputs: the most in the forward and in the backward."""

    forward: float
    backward: float

    @property
    def peak(self) -> float:
        """The most."""
        return max(self.forward, self.backward)

    def __sub__(self, other: Peaks) -> Peaks:
        return Peaks(self.forward - other.forward, self.backward - other.backward)

    def toward(self, other: Peaks, share: float) -> Peaks:
        """Between this, at 0, and `other`, at 1."""
        way = other - self
        return Peaks(self.forward + share * way.forward, self.backward + share * way.backward)


NO_BIAS = Peaks(0.0, 0.0)


@dataclass(frozen=True)
class Solution:
    """kept, offloaded: of each forward node, whether. optimal: False where the solver ran out of time."""

    kept: Array
    offloaded: Array
    optimal: bool

    @property
    def saved(self) -> Array:
        """Whether it is not made again: kept or offloaded."""
        return self.kept | self.offloaded


def closure(joint: Joint, kept: Array) -> Array:
    """Which nodes are made again if exactly `kept` are held: what the backward needs, and what that needs."""
    again = joint.needed & ~kept
    for at in reversed(range(len(kept))):
        if again[at]:
            for one in joint.inputs[at]:
                again[one] |= not kept[one]
    return again


def recompute_seconds(joint: Joint, kept: Array) -> float:
    """Modelled seconds that a step with `kept` spends on making values again."""
    return float(joint.seconds[closure(joint, kept)].sum())


def repaired(joint: Joint, kept: Array) -> Array:
    """`kept`, and what may not be made again although the backward would need that."""
    kept = kept.copy()
    while len(wrong := np.flatnonzero(closure(joint, kept) & joint.banned)):
        kept[joint.owner[wrong]] = True
    return kept


def offloadable(joint: Joint) -> Array:
    """Which values may be copied to the host: of some size, in one piece, and with memory of their own."""
    large = (joint.size >= LEAST_OFFLOAD) & ~joint.view
    return large & np.array([movable(node) for node in joint.forward], dtype=bool)


def read_from(joint: Joint) -> Array:
    """The block whose backward reads each value first: its own, or a later one that reads it in the forward too.

    That is where it may be wanted for making others again, whatever is decided.
    """
    by_forward = joint.block[joint.last_forward]
    if not len(joint.backward):
        return by_forward
    by_backward = joint.backward_block[np.minimum(joint.first, len(joint.backward) - 1)]
    return np.where(joint.first < NEVER, np.maximum(by_forward, by_backward), by_forward)


class Lives:
    """When values that are made again begin and end to live, whatever is decided: just before their first reader."""

    def __init__(self, joint: Joint):
        start = np.where(joint.needed, joint.first, NEVER)
        end = joint.last.copy()
        for at in reversed(range(len(start))):
            for one in joint.inputs[at]:
                if joint.block[one] == joint.block[at]:
                    start[one] = min(start[one], start[at])
                if start[at] < NEVER:
                    end[one] = max(end[one], start[at])
        for at in reversed(range(len(start))):  # a view's base lives as long
            base = joint.owner[at]
            start[base], end[base] = min(start[base], start[at]), max(end[base], end[at])
        self.start, self.end = start, end


class Program:
    """Rows of the program. Columns: kept, again and offloaded of each node, sums of kept by block, the peak.

    link: bytes a second for offloading, each way; 0 for none. Only bounds depend on what is asked, so one does for a
    graph.
    """

    def __init__(self, joint: Joint, link: float = 0.0):
        self.joint, self.link = joint, link
        self.times = Lives(joint)
        count = len(joint.forward)
        self.again, self.offload, self.sums = count, 2 * count, 3 * count
        self.peak = 3 * count + joint.blocks
        self.columns = self.peak + 1
        self.rows, self.cols, self.values = list[int](), list[int](), list[float]()
        self.low, self.high = list[float](), list[float]()
        self.size, self.made = joint.size / MIB, joint.made / MIB
        self.members = [np.flatnonzero(joint.block == block) for block in range(joint.blocks)]
        self.may_offload = offloadable(joint) if link else np.zeros(count, dtype=bool)
        self.stage = read_from(joint)
        self.forward_rows, self.backward_rows = list[int](), list[int]()
        self._needs()
        self._sums()
        self._backward_peaks()
        self._forward_peaks()
        if link:
            self._link_windows()
        shape = (len(self.low), self.columns)
        self.matrix = coo_matrix((self.values, (self.rows, self.cols)), shape=shape).tocsr()

    def solve(self, budget: float | None, bias: Peaks = NO_BIAS, seconds: float = SECONDS) -> Solution | None:
        """The cheapest plan whose peak is at most `budget` bytes; None: there is none.

        budget: None asks for the lowest peak. bias: bytes by which the measured peaks exceed the modelled ones.
        """
        costs = _lowest_peak(self) if budget is None else _costs(self)
        found = _run(self, costs, budget, bias, seconds, whole=True)
        if found.x is None and found.status == 2:  # infeasible
            return None
        optimal = found.x is not None
        if not optimal and (found := _run(self, costs, budget, bias, seconds, whole=False)).x is None:
            return None
        kept, offloaded = found.x[: self.again] > 0.5, found.x[self.offload : self.sums] > 0.5
        return Solution(repaired(self.joint, kept | offloaded) & ~offloaded, offloaded, optimal)

    def modelled(self, solution: Solution) -> Peaks:
        """The peaks of `solution` as the program has them."""
        columns = np.zeros(self.columns)
        columns[: self.again], columns[self.offload : self.sums] = solution.kept, solution.offloaded
        columns[self.again : self.offload] = closure(self.joint, solution.saved)
        kept = np.bincount(self.joint.block, self.size * solution.kept, minlength=self.joint.blocks)
        columns[self.sums : self.peak] = np.cumsum(kept)
        sums = self.matrix @ columns - np.array(self.high)
        forward, backward = (sums[rows].max(initial=0.0) for rows in (self.forward_rows, self.backward_rows))
        return Peaks(MIB * float(forward), MIB * float(backward))

    def high_with(self, bias: Peaks) -> Array:
        """The upper bounds of the rows, where measured peaks exceed the modelled ones by `bias`."""
        high = np.array(self.high)
        high[self.forward_rows] -= bias.forward / MIB
        high[self.backward_rows] -= bias.backward / MIB
        return high

    def row(self, columns: Any, values: Any, low: float, high: float) -> None:
        self.rows.extend([len(self.low)] * len(columns))
        self.cols.extend(columns)
        self.values.extend(values)
        self.low.append(low)
        self.high.append(high)

    def peak_row(self, rows: list[int], columns: Any, values: Any, fixed: float) -> None:
        """The sum and `fixed` bytes are at most the peak."""
        rows.append(len(self.low))
        self.row([*columns, self.peak], [*values, -1], -np.inf, -fixed / MIB)

    def _needs(self) -> None:
        joint = self.joint
        for at, inputs in enumerate(joint.inputs):
            if joint.needed[at]:
                self.row([at, self.again + at, self.offload + at], [1, 1, 1], 1, np.inf)
            for one in inputs:
                if joint.block[one] < joint.block[at] and joint.size[joint.owner[one]] > 0 and not joint.forced[at]:
                    base = joint.owner[one]
                    self.row([self.again + at, base, self.offload + base], [-1, 1, 1], 0, np.inf)
                self.row([self.again + at, one, self.again + one, self.offload + one], [-1, 1, 1, 1], 0, np.inf)

    def _sums(self) -> None:
        for block, members in enumerate(self.members):
            earlier = [self.sums + block - 1] if block else []
            self.row([self.sums + block, *members, *earlier], [1, *-self.size[members], *[-1] * len(earlier)], 0, 0)

    def _backward_peaks(self) -> None:
        joint, start, end = self.joint, self.times.start, self.times.end
        fixed = joint.transient + joint.gradients
        for block, members in enumerate(self.members):
            inside = np.flatnonzero(joint.backward_block == block)
            if not len(inside):
                continue
            heavy = sorted((at for at in joint.heavy if joint.backward_block[at] == block), key=lambda at: -fixed[at])
            for at in sorted({*heavy[:POSITIONS], int(inside[0])}):
                alive = members[(end[members] >= at) & (self.size[members] > 0)]
                made = members[(self.made[members] > 0) & (start[members] <= at) & (at <= end[members])]
                columns, values = [*alive, *(self.again + made)], [*self.size[alive], *self.made[made]]
                loaded = np.flatnonzero(self.may_offload & (self.stage >= block - 1) & (end >= at))
                if block:
                    columns.append(self.sums + block - 1)
                    values.append(1)
                columns.extend(self.offload + loaded)
                values.extend(self.size[loaded])
                self.peak_row(self.backward_rows, columns, values, fixed[at] + joint.held)

    def _forward_peaks(self) -> None:
        """What is still read is alive however it is decided; what is not is if it is kept."""
        joint = self.joint
        until = joint.last_forward
        fixed = forward_transient(joint)
        for block, members in enumerate(self.members):
            if not len(members):
                continue
            tops = sorted(members, key=lambda at: -fixed[at])[: POSITIONS // 2]
            for at in sorted({*map(int, tops), int(members[-1])}):
                done = members[(members <= at) & (self.size[members] > 0)]
                extra = np.where(until[done] < at, self.size[done], self.size[done] - joint.made[done] / MIB)
                columns, values = [*done], [*extra]
                if block:
                    columns.append(self.sums + block - 1)
                    values.append(1)
                flying = self.members[block - 1][self.may_offload[self.members[block - 1]]] if block else []
                columns.extend(self.offload + np.asarray(flying, dtype=int))
                values.extend(self.size[np.asarray(flying, dtype=int)])
                own = done[self.may_offload[done]]
                columns.extend(self.offload + own)
                values.extend(self.size[own])
                self.peak_row(self.forward_rows, columns, values, fixed[at])

    def _link_windows(self) -> None:
        """What a block sends must be gone, and what it gets back be there, in the time of the block that runs beside.

        That is the next one, both ways: two blocks' copies are under way at most (`fxopt.memory.offload`). The last
        block has none, and sends nothing.
        """
        joint = self.joint
        forward = [joint.seconds[members].sum() for members in self.members]
        backward = [joint.backward_seconds[joint.backward_block == block].sum() for block in range(joint.blocks)]
        for of, times in ((joint.block, forward), (self.stage, backward)):
            for block, seconds in enumerate([*times[1:], 0.0]):
                chosen = np.flatnonzero(self.may_offload & (of == block))
                self.row(self.offload + chosen, self.size[chosen], -np.inf, self.link * seconds / MIB)


def forward_transient(joint: Joint) -> Array:
    """Bytes at each forward position that are alive for the forward itself, with what the caller will hold so far."""
    change = np.zeros(len(joint.forward) + 1)
    for at, until in enumerate(joint.last_forward):
        change[at] += joint.made[at]
        change[until + 1] -= joint.made[at]
    return np.cumsum(change)[:-1] + joint.held_so_far + joint.running


def solve(
    joint: Joint, budget: float | None, bias: Peaks = NO_BIAS, link: float = 0.0, seconds: float = SECONDS
) -> Solution | None:
    """The cheapest plan whose peak is at most `budget` bytes; None: there is none.

    budget: None asks for the lowest peak. bias: bytes by which the measured peaks exceed the modelled ones.
    link: bytes a second for offloading, each way; 0 for none.
    """
    return Program(joint, link).solve(budget, bias, seconds)


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


def modelled(joint: Joint, solution: Solution, link: float = 0.0) -> Peaks:
    """The peaks of `solution` as the program has them."""
    return Program(joint, link).modelled(solution)
