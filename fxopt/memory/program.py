"""The plan as a mixed-integer linear program over the whole joint graph: its rows.

For each forward node v: x kept, r made again, o offloaded.

    minimise    sum seconds_v r_v + saving_v x_v + small o_v
    needed      x_v + r_v + o_v >= 1                 the backward reads v
    inputs      r_v <= x_u + r_u + o_u               u is read by v, in the same block
                r_v <= x_u + o_u                     u lies in an earlier block
    peaks       at chosen positions of the forward and the backward: kept so far, or not yet let go, + made again and
                alive + in flight on the link + transient + gradients so far + held by the caller + what other calls of
                the same graph hold <= budget

The rule of blocks keeps chains of recomputations short, and makes the peak of a block one of its own variables and one
sum over earlier blocks. After Checkmate (Jain et al., MLSys 2020), of which it needs O(n) binaries for O(n^2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import coo_matrix

from fxopt.memory.joint import Array, Joint
from fxopt.memory.solution import Lives, Peaks, Solution, closure, forward_transient, offloadable, read_from
from fxopt.memory.units import MIB

__all__ = ["Program"]

POSITIONS = 20
"""Backward positions a block, those with the most transient bytes; and half as many of the forward."""


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
        """The sum, `fixed` bytes, and what the calls before this one hold are at most the peak."""
        others = self.joint.calls - 1
        before = [self.peak - 1] if others else []  # the last sum: all that is kept
        rows.append(len(self.low))
        full = -fixed / MIB - others * self.joint.held / MIB
        self.row([*columns, *before, self.peak], [*values, *[others] * len(before), -1], -np.inf, full)

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
