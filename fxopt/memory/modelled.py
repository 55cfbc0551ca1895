"""A step's memory as the model has it, node by node, where no code is lowered to replay.

Against replays of what Inductor compiles for a CPU it was from 20% too low to 25% too high in small models.
"""

from __future__ import annotations

import numpy as np

from fxopt.memory.joint import Array, Joint
from fxopt.memory.replay import GRADIENTS, KEPT, OUTPUTS, WORKING, Replay
from fxopt.memory.solution import Lives, Solution, closure, forward_transient

__all__ = ["SAFETY", "modelled_step"]

SAFETY = 1.25
"""Times the modelled bytes are enough where code cannot be replayed: the model was at most 20% too low."""

EARLY = "made again early"
EARLY_SHARE = 1.0
"""Of what the next block makes again: Inductor fuses loops of the two, and so begins with it before its time."""


def modelled_step(joint: Joint, solution: Solution) -> Replay:
    """Bytes at each node of the forward and of the backward if `solution` is done, and by what holds them."""
    parts = _forward(joint, solution), _backward(joint, solution)
    forward, backward = (np.sum([*one.values()], axis=0) for one in parts)
    top, held = max(((forward, parts[0]), (backward, parts[1])), key=lambda item: item[0].max(initial=0.0))
    at = int(top.argmax()) if len(top) else 0
    sizes = {name: int(part[at]) for name, part in held.items() if len(part) and part[at] >= 1}
    return Replay(list(map(int, forward)), list(map(int, backward)), sizes)


def _held(count: int, begin: Array, end: Array, size: Array) -> Array:
    """Bytes at each of `count` positions of values that live from `begin` to `end`, both included."""
    change = np.zeros(count + 1)
    alive = (begin <= end) & (begin < count)
    np.add.at(change, begin[alive], size[alive])
    np.subtract.at(change, np.minimum(end[alive], count - 1) + 1, size[alive])
    return np.cumsum(change)[:-1]


def _forward(joint: Joint, solution: Solution) -> dict[str, Array]:
    """What is kept from where it is made; of all else what is still read; on the link to the end of the next block."""
    count = len(joint.forward)
    here = np.arange(count)
    kept = _held(count, here, np.full(count, count), joint.size * solution.kept)
    gone = np.searchsorted(joint.block, joint.block + 1, side="right") - 1
    sent = _held(count, here, np.maximum(gone, joint.last_forward), joint.size * solution.offloaded)
    written = joint.made * solution.saved
    working = forward_transient(joint) - joint.held_so_far - _held(count, here, joint.last_forward, written)
    return {KEPT: kept, OUTPUTS: joint.held_so_far, WORKING: working + sent}


def _backward(joint: Joint, solution: Solution) -> dict[str, Array]:
    """What is kept to its last reader; what is made again around its readers; what is fetched from a block before."""
    count, lives = len(joint.backward), Lives(joint)
    begins = np.searchsorted(-joint.backward_block, -np.arange(joint.blocks), side="left")[joint.block]
    before = np.searchsorted(-joint.backward_block, -np.arange(1, joint.blocks + 1), side="left")[joint.block]
    last = np.maximum(lives.end, begins - 1)
    kept = _held(count, np.zeros(len(last), dtype=int), last, joint.size * solution.kept)
    fetched = _held(count, before, last, joint.size * solution.offloaded)
    again = closure(joint, solution.saved)
    remade = joint.made * again
    made = _held(count, lives.start, lives.end, remade)
    by_block = np.bincount(joint.block, remade, minlength=joint.blocks)
    early = np.concatenate([[0.0], by_block])[joint.backward_block]
    return {
        KEPT: kept,
        OUTPUTS: np.full(count, float(joint.held)),
        GRADIENTS: joint.gradients,
        WORKING: joint.transient + made + fetched,
        EARLY: EARLY_SHARE * early,
    }
