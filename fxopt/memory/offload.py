"""The graphs of a plan that offloads: when copies begin, and what waits for them.

In the forward a copy begins as soon as its source is computed, and block b + 1 ends by waiting for those of block b, so
that at most two blocks' are under way. In the backward the copies that stage b reads begin when stage b + 1 begins, and
are waited for just before the first reader.

Inductor keeps no order but that of reading, and moves operators next to their readers. So every copy is tied on both
sides: it reads what must be computed before, and a product that must come after is read through `hold`
(fxopt/ops/offload_operator.py). Products, because their results are in memory in any case: a pointwise value that is
tied is no longer fused into its readers.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxopt import compat
from fxopt.fake import value_of
from fxopt.memory.joint import Joint
from fxopt.ops.offload_operator import FETCH, HOLD, SEND

__all__ = ["Places", "movable", "offload"]


def movable(node: fx.Node) -> bool:
    """Whether the value of `node` can be copied as one piece: a contiguous tensor whose sizes are known.

    Whether one with symbolic sizes is contiguous cannot be asked without installing a guard.
    """
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return False
    return all(isinstance(size, int) for size in (*value.shape, *value.stride())) and value.is_contiguous()


@dataclass(frozen=True)
class Places:
    """Where things are in a step, by the names of nodes: forward nodes' blocks, backward nodes' stages, products."""

    block: Mapping[str, int]
    stage: Mapping[str, int]
    products: frozenset[str]

    @classmethod
    def of(cls, joint: Joint) -> Places:
        """Those of a joint graph, from which forward and backward are cut."""
        both = [*zip(joint.forward, joint.flops, strict=True), *zip(joint.backward, joint.backward_flops, strict=True)]
        return cls(
            {node.name: int(block) for node, block in zip(joint.forward, joint.block, strict=True)},
            {node.name: int(stage) for node, stage in zip(joint.backward, joint.backward_block, strict=True)},
            frozenset(node.name for node, flops in both if flops > 0),
        )


def offload(
    forward: fx.GraphModule, backward: fx.GraphModule, names: Iterable[str], places: Places, outputs: int
) -> None:
    """Let what `names` name be saved on the host, in both graphs, in place.

    outputs: how many of the forward's results are the caller's. Names that the forward does not save are ignored.
    """
    compat.returns_aligned(FETCH)
    wanted = set(names)
    hosts = _send(forward.graph, wanted, places, outputs)
    _fetch(backward.graph, hosts, places)
    for module in (forward, backward):
        module.graph.lint()
        module.recompile()


# --- forward -----------------------------------------------------------------------------------------------------


def _send(graph: fx.Graph, wanted: set[str], places: Places, outputs: int) -> dict[str, fx.Node]:
    """The nodes that are saved in place of those `wanted`, by their names."""
    results = list(compat.pytree.arg_tree_leaves(*graph.output_node().args))
    saved = {node for node in results[outputs:] if isinstance(node, fx.Node) and node.name in wanted}
    nodes = list(graph.nodes)
    products = [(at, node) for at, node in enumerate(nodes) if _is_product(node, places)]
    holds = _Holds()
    hosts: dict[str, fx.Node] = {}
    for at, source in enumerate(nodes):
        if source not in saved:
            continue
        with graph.inserting_after(source):
            host = _call(graph, SEND, (source,), f"sent_{source.name}")
        hosts[source.name] = host
        later = [node for position, node in products if position > at]
        if later:
            holds.at(later[0]).alive.append(host)
        enough = _end_of_next_block(later, places.block, places.block[source.name])
        if enough is not None:
            holds.at(enough).landed.append(host)
            holds.at(enough).alive.append(source)
        else:
            hosts[source.name] = _waited(graph, host, [source, *later[-1:]])
    holds.insert(graph)
    new = [hosts[one.name] if at >= outputs and one in saved else one for at, one in enumerate(results)]
    graph.output_node().args = (tuple(new),)
    return hosts


def _end_of_next_block(later: Sequence[fx.Node], block: Mapping[str, int], own: int) -> fx.Node | None:
    """The last product of the block after `own`, or of the first after it that has one; None: the forward ends."""
    blocks = sorted({block[node.name] for node in later if block[node.name] > own})
    if not blocks:
        return None
    return [node for node in later if block[node.name] == blocks[0]][-1]


def _waited(graph: fx.Graph, host: fx.Node, alive: list[fx.Node]) -> fx.Node:
    """`host`, which nothing is computed after, waited for as the forward ends."""
    with graph.inserting_before(graph.output_node()):
        return _call(graph, HOLD, (host, [host], alive), f"landed_{host.name}")


# --- backward ----------------------------------------------------------------------------------------------------


def _fetch(graph: fx.Graph, hosts: Mapping[str, fx.Node], places: Places) -> None:
    """Read what was saved as `hosts` through copies on the device, which begin in the order in which they are read."""
    holds = _Holds()
    saved = [node for node in graph.find_nodes(op="placeholder") if node.name in hosts]
    readers = {node: _first_reader(graph, node) for node in saved}
    position = {node: at for at, node in enumerate(graph.nodes)}
    stages = dict(zip(position, _stages(list(position), places), strict=True))
    products = [node for node in position if _is_product(node, places)]
    for given in sorted(saved, key=lambda node: position[readers[node]]):
        first = readers[given]
        before = [node for node in products if position[node] < position[first]]
        start = _start(before, stages, stages[first])
        begun = [start, *holds.at(start).alive][-1] if start is not None else None
        found = _read_through_copy(graph, given, hosts[given.name], first, (start, begun), before[-1:])
        if start is not None:
            holds.at(start).alive.append(found)
    holds.insert(graph)


def _stages(nodes: Sequence[fx.Node], places: Places) -> list[int]:
    """The stage at each node of the backward; what is made again there belongs to the stage of what follows it."""
    known = list(itertools.accumulate((places.stage.get(node.name, NO_STAGE) for node in nodes), min))
    following = NO_STAGE
    stages = []
    for node, stage in zip(reversed(nodes), reversed(known), strict=True):
        following = stage if node.name in places.stage or following == NO_STAGE else following
        stages.append(following)
    return stages[::-1]


NO_STAGE = 1 << 30
"""Before the first node of the backward: only inputs."""


def _start(products: Sequence[fx.Node], stage: Mapping[fx.Node, int], own: int) -> fx.Node | None:
    """The first product of the stage before `own`, beside which the copy is to run; else of the backward; None: none."""
    earlier = [stage[node] for node in products if stage[node] > own]
    wanted = min(earlier, default=None)
    return next((node for node in products if wanted is None or stage[node] == wanted), None)


def _first_reader(graph: fx.Graph, given: fx.Node) -> fx.Node:
    """The first node that reads the memory of `given`; views of it that stand before are moved there."""
    is_view = compat.fusible().is_view
    views, family = list[fx.Node](), {given}
    for node in graph.nodes:
        if not family.intersection(node.all_input_nodes):
            continue
        if not is_view(node):
            for view in views:
                node.prepend(view)
            return views[0] if views else node
        views.append(node)
        family.add(node)
    raise AssertionError(f"{given.name} is saved and nothing reads it")


def _read_through_copy(
    graph: fx.Graph,
    given: fx.Node,
    host: fx.Node,
    first: fx.Node,
    start: tuple[fx.Node | None, fx.Node | None],
    last: Sequence[fx.Node],
) -> fx.Node:
    """The copy of `given` to the device, which is waited for before `first` and after `last`.

    `given` is an input; in its place comes one with the name and the value of `host`. start: what the copy begins
    after, and after which node it stands.
    """
    product, begun = start
    with graph.inserting_before(given):
        waiting = graph.placeholder(host.name)
    waiting.meta = {key: value for key, value in given.meta.items() if key != "tensor_meta"} | {"val": value_of(host)}
    after = product if product is not None else _any_tensor(graph, value_of(given).device, given)
    with graph.inserting_after(begun) if begun is not None else graph.inserting_before(first):
        found = _call(graph, FETCH, (waiting, after), f"fetched_{given.name}")
    with graph.inserting_before(first):
        ready = _call(graph, HOLD, (found, [found], list(last)), f"landed_{given.name}")
    given.replace_all_uses_with(ready)
    graph.erase_node(given)
    return found


def _any_tensor(graph: fx.Graph, device: torch.device, besides: fx.Node) -> fx.Node:
    """An input on `device`: the gradients that a backward begins with, say."""
    inputs = graph.find_nodes(op="placeholder")
    return next(node for node in reversed(list(inputs)) if node is not besides and _device(node) == device)


def _device(node: fx.Node) -> Any:
    return getattr(value_of(node), "device", None)


# --- both --------------------------------------------------------------------------------------------------------


@dataclass
class _Hold:
    """What is to be waited for, and what must have begun, before anybody reads a value."""

    landed: list[fx.Node] = field(default_factory=list)
    alive: list[fx.Node] = field(default_factory=list)


class _Holds:
    """One `hold` for each product that something is tied to."""

    def __init__(self) -> None:
        self._by_product = collections.defaultdict[fx.Node, _Hold](_Hold)

    def at(self, product: fx.Node) -> _Hold:
        return self._by_product[product]

    def insert(self, graph: fx.Graph) -> None:
        """Right after each product and the copies that begin there; all who read it later read it through `hold`."""
        for product, hold in self._by_product.items():
            position = {node: at for at, node in enumerate(graph.nodes)}
            last = max([product, *hold.alive, *hold.landed], key=position.__getitem__)
            with graph.inserting_after(last):
                held = _call(graph, HOLD, (product, hold.landed, hold.alive), f"held_{product.name}")
            for reader in list(product.users):
                if reader.op != "output" and position.get(reader, -1) > position[last]:
                    reader.replace_input_with(product, held)


def _is_product(node: fx.Node, places: Places) -> bool:
    return node.op == "call_function" and node.name in places.products and isinstance(value_of(node), torch.Tensor)


def _call(graph: fx.Graph, target: Any, arguments: tuple[Any, ...], name: str) -> fx.Node:
    """A new node of `graph`, with the value that the operator's fake makes."""
    node = graph.create_node("call_function", target, arguments, name=name)
    values = compat.pytree.tree_map(lambda one: value_of(one) if isinstance(one, fx.Node) else one, arguments)
    with compat.fake_mode_of(values) or compat.FakeTensorMode():
        node.meta["val"] = target(*values)
    return node
