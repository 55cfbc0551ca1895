"""A step with a link that takes its time: both graphs node by node, copies on two queues beside the computation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxopt import compat
from fxopt.ops.offload_operator import FETCH, HOLD, SEND


@dataclass
class Step:
    """What came of a simulated step.

    seconds, computing, copying: of the forward and of the backward, from begin to end; those in which something was
    computed; those in which the link was busy. blocks: the most whose copies, in one direction, were in flight at once.
    faults: reads of what had not arrived, and memory let go while it was being copied.
    """

    seconds: list[float] = field(default_factory=list)
    computing: list[float] = field(default_factory=list)
    copying: list[float] = field(default_factory=list)
    blocks: int = 0
    faults: list[str] = field(default_factory=list)


class Simulation:
    """seconds: that a node computes, by its name. link: bytes a second, each way. blocks: of nodes, by name."""

    def __init__(self, seconds: Mapping[str, float], link: float, blocks: Mapping[str, int]):
        self.seconds, self.link, self.blocks = seconds, link, blocks
        self.now = self.computing = 0.0
        self.free = {SEND: 0.0, FETCH: 0.0}
        self.busy = {SEND: 0.0, FETCH: 0.0}
        self.arrival: dict[str, float] = {}
        self.flying: dict[Any, dict[str, int]] = {SEND: {}, FETCH: {}}
        self.step = Step()

    def run(self, forward: fx.GraphModule, backward: fx.GraphModule) -> Step:
        for module, direction in ((forward, SEND), (backward, FETCH)):
            begin, computed = self.now, self.computing
            self._run(module.graph)
            self.step.seconds.append(self.now - begin)
            self.step.computing.append(self.computing - computed)
            self.step.copying.append(self.busy[direction])
        return self.step

    def _run(self, graph: fx.Graph) -> None:
        last = _last_uses(graph)
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            if node.target in (SEND, FETCH):
                self._begin(node)
            elif node.target is HOLD:
                self._hold(node)
            else:
                self._compute(node)
            for gone in last.get(node, ()):
                self._let_go(gone)

    def _begin(self, node: fx.Node) -> None:
        """Copies wait for their turn, for what was computed so far, and those back for those there."""
        source = node.args[0]
        ready = self.arrival.get(source.name, 0.0) if node.target is FETCH else 0.0
        took = node.meta["val"].nbytes / self.link
        self.free[node.target] = max(self.now, self.free[node.target], ready) + took
        self.busy[node.target] += took
        self.arrival[node.name] = self.free[node.target]
        flying = self.flying[node.target]
        # What a copy back is for is known by who waits for it: the copy of the first reader's stage.
        flying[node.name] = self.blocks[source.name] if node.target is SEND else self._stage(node)
        self.step.blocks = max(self.step.blocks, len(set(flying.values())))

    def _hold(self, node: fx.Node) -> None:
        _, landed, _ = node.args
        for one in landed:
            self.now = max(self.now, self.arrival[one.name])
            self.arrival[node.name] = self.arrival[one.name]
            for flying in self.flying.values():
                flying.pop(one.name, None)

    def _compute(self, node: fx.Node) -> None:
        for item in node.all_input_nodes:
            if item.target in (FETCH, SEND):
                self.step.faults.append(f"{node.name} reads {item.name}, and nobody waited for it")
            elif self.arrival.get(item.name, 0.0) > self.now:
                self.step.faults.append(f"{node.name} reads {item.name} before it has arrived")
        self.now += self.seconds.get(node.name, 0.0)
        self.computing += self.seconds.get(node.name, 0.0)

    def _let_go(self, node: fx.Node) -> None:
        """A source must not be let go while it is being copied."""
        for reader in node.users:
            if reader.target is SEND and reader.name in self.flying[SEND]:
                self.step.faults.append(f"{node.name} is let go while {reader.name} copies it")

    def _stage(self, fetch: fx.Node) -> int:
        wait = next(user for user in fetch.users if user.target is HOLD and fetch in user.args[1])
        readers = [node for node in _after(wait) if node.name in self.blocks]
        return self.blocks[readers[0].name]


def _after(node: fx.Node) -> list[fx.Node]:
    nodes = list(node.graph.nodes)
    return nodes[nodes.index(node) + 1 :]


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """After which node the memory of which values is nobody's any more; views count as uses of what they view."""
    root: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, fx.Node] = {}
    is_view = compat.fusible().is_view
    for node in graph.nodes:
        viewed = node.op == "call_function" and (node.target is HOLD or is_view(node))
        first = node.all_input_nodes[:1] if viewed else []
        root[node] = root[first[0]] if first and isinstance(node.meta.get("val"), torch.Tensor) else node
        for item in [*node.all_input_nodes, node]:
            last[root[item]] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last.items():
        found.setdefault(node, []).append(value)
    return found
