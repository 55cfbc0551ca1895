"""A joint graph as a planner sees it: what each value takes, when it is needed, what making it again costs.

Liveness is that of the graph, corrected for what Inductor fuses: a pointwise value that only pointwise nodes read is
never in memory. What remains of the difference to compiled code is measured and corrected for (`planner`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt import compat
from fxopt.effects import storage_of
from fxopt.fake import bound_arguments, stand_in, value_of
from fxopt.memory.blocks import Blocks
from fxopt.memory.cost import bytes_of, described, flops_of
from fxopt.memory.timing import ModelledTimes
from fxopt.ops.registry import memory_of

__all__ = ["Joint", "read"]

NEVER = 1 << 30
"""A position that no node has."""

Array = Any
"""A numpy array; numpy's own types say nothing of shapes either."""


@dataclass(frozen=True)
class Joint:
    """All that a plan depends on. Arrays have an entry for each of `forward`, or for each of `backward`.

    size:      bytes of what the node makes; 0 for views, tuples (their parts have them) and what is held in any case.
    made:      bytes of it where it is not kept, in the forward or made again; 0 where what reads it is fused with it.
    owner:     the forward node whose memory it is a view of, itself for most.
    view:      whether it has no memory of its own.
    block, backward_block: see `blocks`.
    inputs:    the forward nodes that each forward node reads.
    needed:    whether the backward reads it.
    first, last: positions in `backward` of its first and last reader (through views); `NEVER` and -1 without.
    last_forward: position in `forward` of its last reader.
    seconds, saving: of making it again, and of keeping it (writing and reading).
    flops, backward_flops.
    forced, banned: whether it must be made again (the user's checkpoint), or must not be (random numbers, effects).
    running:   bytes at each position of `forward` that its node holds only while it runs.
    transient, gradients: bytes at each position of `backward` besides what was kept or made again.
    heavy:     positions of `backward` at which much is allocated.
    held:      bytes of the forward's outputs, which the caller holds. held_so_far: at each position of `forward`.
    calls:     how often a step calls the graph, each time with other parameters, before the backward begins.
    """

    forward: list[fx.Node]
    backward: list[fx.Node]
    size: Array
    made: Array
    owner: Array
    view: Array
    block: Array
    backward_block: Array
    blocks: int
    inputs: list[list[int]]
    needed: Array
    first: Array
    last: Array
    last_forward: Array
    seconds: Array
    saving: Array
    flops: Array
    backward_flops: Array
    backward_seconds: Array
    forced: Array
    banned: Array
    running: Array
    transient: Array
    gradients: Array
    heavy: list[int]
    held: int
    held_so_far: Array
    calls: int = 1

    def mask(self, nodes: Sequence[fx.Node]) -> Array:
        """Which of `forward` are among `nodes`, or lie in memory that one of them is a view of."""
        chosen = {node.name for node in nodes}
        memory = {storage_of(value_of(node)) for node in nodes} - {None}  # of views that the backward makes, too
        mask = np.zeros(len(self.forward), dtype=bool)
        for index, node in enumerate(self.forward):
            if node.name in chosen or (self.owner[index] == index and storage_of(value_of(node)) in memory):
                mask[index] = mask[self.owner[index]] = True
        return mask


def read(graph: fx.Graph, is_forward: Any, outputs: int, times: ModelledTimes, calls: int = 1) -> Joint:
    """Read the joint `graph`, of whose outputs the first `outputs` are the forward's.

    is_forward: of a node. times: seconds of nodes. calls: see `Joint`.
    """
    return _Reader(graph, is_forward, outputs, times).joint(calls)


class _Reader:
    def __init__(self, graph: fx.Graph, is_forward: Any, outputs: int, times: ModelledTimes):
        nodes = list(graph.nodes)
        calls = [node for node in nodes if node.op == "call_function"]
        forward = {node for node in calls if is_forward(node)}
        for node in calls:  # parts that only the backward reads of what the forward makes
            if node.target is operator.getitem and node.args[0] in forward:
                forward.add(node)
        self.forward = [node for node in calls if node in forward]
        self.backward = [node for node in calls if node not in forward]
        self.at = {node: index for index, node in enumerate(self.forward)}
        self.position = {node: index for index, node in enumerate(self.backward)}
        self.tangents = [node for node in nodes if node.op == "placeholder" and "tangents" in node.name]
        returned = compat.pytree.arg_tree_leaves(*nodes[-1].args)
        self.first_storage: dict[Any, fx.Node] = {}
        for node in nodes:
            if (storage := storage_of(value_of(node))) is not None:
                self.first_storage.setdefault(storage, node)
        self.held = {self.owner(node) for node in returned[:outputs] if isinstance(node, fx.Node)}
        self.gradients = {self.owner(node) for node in returned[outputs:] if isinstance(node, fx.Node)}
        self.fuses = compat.fusible()
        self.times = times
        self._fused: dict[fx.Node, bool] = {}
        self._running: dict[Any, int] = {}

    def owner(self, node: fx.Node) -> fx.Node:
        """The first node with the memory of `node`."""
        storage = storage_of(value_of(node))
        return self.first_storage.get(storage, node) if storage is not None else node

    def fused(self, node: fx.Node) -> bool:
        """Whether `node` is computed inside of whatever reads it, so that it is never in memory."""
        if node not in self._fused:
            readers = list(node.users)
            fits = self.fuses.is_fusible(node) and bool(readers)
            while fits and readers:
                reader = readers.pop()
                if reader.op == "output":
                    continue
                if self.fuses.is_view(reader):
                    readers.extend(reader.users)
                else:
                    fits = self.fuses.is_fusible(reader)
            self._fused[node] = fits
        return self._fused[node]

    def running(self, node: fx.Node) -> int:
        """Bytes that `node` holds while it runs; asked once of calls that are alike, since layers repeat."""
        if getattr(node.target, "namespace", "") != "fxopt":
            return 0
        key = (node.target, described(node.args), described(tuple(node.kwargs.items())))
        if key not in self._running:
            self._running[key] = _running(node)
        return self._running[key]

    def joint(self, calls: int) -> Joint:
        forward, at = self.forward, self.at
        owners = [self.owner(node) for node in forward]
        tensor = np.array([_is_tensor(node) for node in forward], dtype=bool)
        view = ~tensor | np.array([owner is not node for node, owner in zip(forward, owners, strict=True)], dtype=bool)
        whole = np.array([0 if one else bytes_of(value_of(node)) for node, one in zip(forward, view, strict=True)])
        held = np.array([owner in self.held for owner in owners], dtype=bool)
        size = np.where(held, 0, whole).astype(float)
        fused = np.array([self.fused(node) for node in forward], dtype=bool)
        flops = np.array([flops_of(node) for node in forward], dtype=float)
        backward_flops = np.array([flops_of(node) for node in self.backward], dtype=float)
        inputs = [[at[one] for one in node.all_input_nodes if one in at] for node in forward]
        owner = np.array([at.get(one, index) for index, one in enumerate(owners)])
        first, last, last_forward = self._readers(owner)
        blocks = Blocks.find(forward, list(flops > 0), self._crossing(whole, last_forward))
        backward_block = np.array(blocks.backward(self.backward), dtype=int)
        transient, gradients = self._transient()
        forced = np.array([compat.must_recompute(node) for node in forward], dtype=bool)
        banned = np.array([_never_again(node) for node in forward], dtype=bool)
        by_view = banned & view & tensor
        banned[owner[by_view]] = True  # what must be there is the memory, of which a view is made again for nothing
        banned &= ~by_view & ~forced
        moved = whole / self.times.device.bandwidth
        return Joint(
            forward=forward,
            backward=self.backward,
            size=size,
            made=np.where(fused, 0.0, size),
            owner=owner,
            view=view,
            block=np.array([blocks.of[node] for node in forward], dtype=int),
            backward_block=backward_block,
            blocks=blocks.count,
            inputs=inputs,
            needed=first < NEVER,
            first=first,
            last=last,
            last_forward=last_forward,
            seconds=np.array([self._seconds(*item) for item in zip(forward, flops, view, fused, strict=True)]),
            saving=np.where(fused, 2.0, 1.0) * moved,
            flops=flops,
            backward_flops=backward_flops,
            backward_seconds=np.array(
                [self.times(node, count) for node, count in zip(self.backward, backward_flops, strict=True)]
            ),
            forced=forced,
            banned=banned,
            running=np.array([self.running(node) for node in forward], dtype=float),
            transient=transient,
            gradients=gradients,
            heavy=self._heavy(backward_flops, whole.max(initial=1.0)),
            held=int(whole[held].sum()),
            held_so_far=np.cumsum(np.where(held, whole, 0)),
            calls=calls,
        )

    def _readers(self, owner: Array) -> tuple[Array, Array, Array]:
        """First and last position in the backward and last in the forward of who reads a node or a view of it."""
        count = len(self.forward)
        first, last, forward = np.full(count, NEVER), np.full(count, -1), np.arange(count)
        for node, index in self.at.items():
            for reader in node.users:
                if reader in self.position:
                    first[index] = min(first[index], self.position[reader])
                    last[index] = max(last[index], self.position[reader])
                elif reader in self.at:
                    forward[index] = max(forward[index], self.at[reader])
        needed = first.copy()
        for index in reversed(range(count)):
            if (base := owner[index]) != index:
                last[base], forward[base] = max(last[base], last[index]), max(forward[base], forward[index])
                first[base] = min(first[base], first[index])
        return np.where(needed < NEVER, first, NEVER), last, forward

    def _crossing(self, whole: Array, last_forward: Array) -> list[float]:
        """Bytes made up to each forward node that are read after it."""
        change = np.zeros(len(whole) + 1)
        for index, until in enumerate(last_forward):
            change[index] += whole[index]
            change[until] -= whole[index]
        return list(np.cumsum(change)[:-1])

    def _seconds(self, node: fx.Node, flops: float, view: bool, fused: bool) -> float:
        if node.target is operator.getitem or (view and _is_tensor(node)):
            return 0.0
        seconds = self.times(node, int(flops))
        return 0.1 * seconds if fused else seconds  # fused, it reads nothing that is not read there anyway

    def _transient(self) -> tuple[Array, Array]:
        """Bytes alive at each backward position, without what came from the forward, and of gradients among them."""
        count = len(self.backward)
        change, gradients = np.zeros(count + 1), np.zeros(count + 1)
        last: dict[fx.Node, int] = {}
        for node, position in self.position.items():
            for item in node.all_input_nodes:
                last[self.owner(item)] = position
        for node in self.tangents:
            change[0] += bytes_of(value_of(node))
            change[last.get(node, 0) + 1] -= bytes_of(value_of(node))
        for node, position in self.position.items():
            change[position] += (running := self.running(node))
            change[position + 1] -= running
            if self.owner(node) is not node or not _is_tensor(node):
                continue
            size = bytes_of(value_of(node))
            if node in self.gradients:
                gradients[position] += size
            elif not self.fused(node):
                change[position] += size
                change[last.get(node, position) + 1] -= size
        return np.cumsum(change)[:-1], np.cumsum(gradients)[:-1]

    def _heavy(self, flops: Array, largest: float) -> list[int]:
        return [
            at for at, node in enumerate(self.backward) if flops[at] > 0 or bytes_of(value_of(node)) >= 0.25 * largest
        ]


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(value_of(node), torch.Tensor)


def _running(node: fx.Node) -> int:
    """Bytes that one of fxopt's operators holds while it runs; of a tuple's parts, that are counted later, too."""
    if getattr(node.target, "namespace", "") != "fxopt":
        return 0
    with compat.FakeTensorMode():
        given = compat.pytree.tree_map(stand_in, fx.node.map_arg((node.args, node.kwargs), value_of))
        found = memory_of(node.target, *given[0], **given[1])
    if found is None:
        return 0
    return found.workspace + (0 if _is_tensor(node) else found.outputs)


_ATTENTION = "scaled_dot_product"


def _never_again(node: fx.Node) -> bool:
    """Whether computing `node` twice could give something else, or have an effect twice."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _never_again(node.args[0])
    if compat.must_save(node) or isinstance(node.target, compat.HigherOrderOperator):
        return True
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()) and "inductor_seeds" not in str(
        node.target
    ):
        return False
    if _ATTENTION not in str(node.target):
        return True
    return bool(bound_arguments(node).get("dropout_p", 0.0))
