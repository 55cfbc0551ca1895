"""A plan as what is kept and what is offloaded, and what follows from that: what is made again, and when it lives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxopt.memory.joint import NEVER, Array, Joint
from fxopt.memory.offload import movable
from fxopt.memory.units import MIB

__all__ = [
    "NO_BIAS",
    "Lives",
    "Peaks",
    "Solution",
    "closure",
    "forward_transient",
    "offloadable",
    "read_from",
    "recompute_seconds",
    "repaired",
]

LEAST_OFFLOAD = 2 * MIB
"""Smaller tensors are not worth a copy of their own."""


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

    @classmethod
    def keeping(cls, kept: Array) -> Solution:
        """`kept` on the device, and nothing on the host."""
        return cls(kept, np.zeros_like(kept), optimal=True)

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


def forward_transient(joint: Joint) -> Array:
    """Bytes at each forward position that are alive for the forward itself, with what the caller will hold so far."""
    change = np.zeros(len(joint.forward) + 1)
    for at, until in enumerate(joint.last_forward):
        change[at] += joint.made[at]
        change[until + 1] -= joint.made[at]
    return np.cumsum(change)[:-1] + joint.held_so_far + joint.running
