"""What every rule's sites must satisfy to be rewritten as one computation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from fxopt import compat
from fxopt.effects import is_random, mutated_arguments, storage_of
from fxopt.fake import value_of
from fxopt.rule import Place, Site


def place_of(site: Site, order: dict[fx.Node, int]) -> fx.Node:
    """The output of `site` that the replacement stands before: the anchor, or the first if that is read before."""
    first, inside = min(site.outputs, key=order.__getitem__), set(site.nodes)
    readers = [user for node in site.outputs for user in node.users if user not in inside]
    late = all(order[user] > order[site.anchor] for user in readers)
    return site.anchor if late else first


def illegal(site: Site, order: dict[fx.Node, int], may_defer: bool) -> Iterator[str]:
    """The reasons, common to all rules, why `site` may not be rewritten as one computation.

    order: the position of every node in the graph.
    """
    yield from _escapes(site, may_defer)
    for node in site.nodes:
        if is_random(node) and node not in site.draws:
            yield f"{node.name} ({node.target}) draws random numbers"
    place = place_of(site, order)
    for item in site.input_nodes:
        if order[item] > order[place]:
            yield f"input {item.name} is computed after {site.anchor.name}, where the replacement must stand"
    yield from _disturbances(site, order)


def _escapes(site: Site, may_defer: bool) -> Iterator[str]:
    inside = set(site.nodes)
    for node in site.nodes:
        if node in site.outputs:
            continue
        for user in node.users:
            if user in inside or (may_defer and node in site.deferrable and user.op == "output"):
                continue
            way_out = (
                '; options={"logits": "deferred"} would compute it only when read' if node in site.deferrable else ""
            )
            reader = "a graph output" if user.op == "output" else f"used by {user.name} ({Place.of(user)})"
            yield f"{node.name} ({node.target}) is also {reader}{way_out}"


def _disturbances(site: Site, order: dict[fx.Node, int]) -> Iterator[str]:
    """What between the first and the last node of `site` makes moving its computation unsafe."""
    memory = {storage_of(value_of(node)) for node in (*site.input_nodes, *site.nodes)} - {None}
    positions = [order[node] for node in site.nodes]
    between = [node for node, position in order.items() if min(positions) <= position <= max(positions)]
    place, recorded = place_of(site, order), _differentiable(site)
    outside = next((node for node in site.nodes if _in_another_state(node, place, node in recorded)), None)
    for node in between:
        if outside is not None and node.target in compat.STATE_SWITCHES:
            yield f"{node.name} switches grad mode or autocast inside the region, for {outside.name}"
        if any(storage_of(value_of(written)) in memory for written in mutated_arguments(node)):
            yield f"{node.name} ({node.target}) writes in place to memory of the region"


def _differentiable(site: Site) -> set[fx.Node]:
    """The nodes of `site` that lead to a value which may have a gradient: not those of an argmax alone."""
    found: set[fx.Node] = set()
    for node in reversed(site.nodes):
        value = value_of(node)
        leaves = node in site.outputs or node in site.deferrable
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        if (leaves and floats) or not found.isdisjoint(node.users):
            found.add(node)
    return found


def _in_another_state(node: fx.Node, place: fx.Node, differentiable: bool) -> bool:
    """Whether `node` would compute something else in the grad mode and autocast of `place`.

    differentiable: whether its value leads to one that may have a gradient. Masks have none: they are often built under
    `no_grad` far above, and no switch between there and here concerns them.
    """
    values = [value_of(item) for item in (node, *node.all_input_nodes)]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    recorded = differentiable and any(value.requires_grad for value in tensors)
    recorded = recorded and node.meta.get("grad") != place.meta.get("grad")
    floats = any(value.is_floating_point() for value in tensors)
    return recorded or (floats and node.meta.get("autocast") != place.meta.get("autocast"))
