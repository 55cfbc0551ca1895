"""In-place operators on fresh intermediates become their functional twins: ``scores += bias`` is ``scores + bias``.

A write is a barrier to every rewrite, and users write ``scores += bias``, ``scores.masked_fill_(...)``, ``attn *= c``
where nobody can tell. What makes the twin the same, bit for bit, forward and backward, is said at each check.
AOTAutograd makes the same twins, but below autograd, where no rule looks. (A program whose backward PyTorch refuses,
since a write hit what it had saved, runs with its twins, and its gradients are right.)
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxopt import compat
from fxopt.effects import is_random, same_layout, storages_of
from fxopt.fake import ambient_state, arguments, propagate, value_of

aten = torch.ops.aten

_OWN_DERIVATIVE = frozenset(
    {
        "acosh_", "arccosh_", "arcsinh_", "arctanh_", "asinh_", "atanh_", "celu_", "copy_", "elu_", "embedding_renorm_",
        "fill_", "leaky_relu_", "selu_", "threshold_", "zero_",
    }
)  # fmt: skip
"""Operators whose backward in place is another formula: elu_ computes it from its result, and the last bit differs."""


def functionalize(gm: fx.GraphModule) -> bool:
    """Replace the in-place operators of `gm`, whose nodes carry fresh values, where only the program's text could tell.

    Returns whether anything changed; the values are fresh again then. The caller recompiles.
    """
    twins = {node: twin for node in gm.graph.nodes if (twin := twin_of(node)) is not None}
    if not twins:
        return False
    memory, changed = _Memory(gm), False
    for node, twin in twins.items():
        if memory.is_private(node) and _is_equal(node, twin):
            written = arguments(node)[0]
            memory.part(node)
            memory.redirect(written, node)
            node.target = twin
            changed = True
    if changed:
        propagate(gm)
    return changed


def twin_of(node: fx.Node) -> Any:
    """The overload that computes what `node` writes: the name less the underscore, the same arguments. None if none."""
    if node.op != "call_function" or not isinstance(node.target, compat.OpOverload) or node.target.namespace != "aten":
        return None
    schema, name = node.target._schema, _name(node)
    functional = f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_")
    twin = getattr(getattr(aten, functional, None), node.target._overloadname, None)
    if functional == name or twin is None or is_random(node) or _changes_its_form(node):
        return None
    return twin if schema.is_mutable and _takes_the_same(schema, twin._schema) else None


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return str(target._schema.name).removeprefix("aten::")


def _takes_the_same(schema: Any, other: Any) -> bool:
    """Equal arguments of which the twin writes none and returns none."""
    named = [[(argument.name, str(argument.type)) for argument in one.arguments] for one in (schema, other)]
    aliases = any(item.alias_info is not None for item in (*other.arguments, *other.returns))
    return named[0] == named[1] and not aliases and len(other.returns) == 1


class _Memory:
    """Which nodes of a graph share memory, kept true while operators are replaced."""

    def __init__(self, gm: fx.GraphModule):
        self.order = {node: index for index, node in enumerate(gm.graph.nodes)}
        self.holders: dict[Any, list[fx.Node]] = {}
        self.storages: dict[fx.Node, set[Any]] = {}
        self.tensors: dict[fx.Node, Any] = {}
        for node in self.order:
            self.storages[node] = storages_of(value_of(node)) if node.op != "output" else set()
            self.tensors[node] = id(value_of(node))
            for storage in self.storages[node]:
                self.holders.setdefault(storage, []).append(node)

    def is_private(self, node: fx.Node) -> bool:
        """Whether nothing but the tensor that `node` writes, read by that name or `node`'s, can see the write."""
        written = arguments(node)[0]
        if not isinstance(written, fx.Node) or len(self.storages[written]) != 1:
            return False
        (storage,) = self.storages[written]
        held = self.holders[storage]
        if not _is_fresh(held[0]) or any(_changes_its_form(other) for other in held):
            return False
        before = [other for other in held if self.order[other] < self.order[node]]
        return all(self._stays_unseen(other, written, node) for other in before)

    def _stays_unseen(self, other: fx.Node, written: fx.Node, node: fx.Node) -> bool:
        for user in other.users:
            if self.order[user] <= self.order[node]:
                # What a higher-order operator returns may share its arguments' memory, and no fake value says so.
                if not isinstance(user.target, compat.OpOverload) and user.target is not operator.getitem:
                    return False
            elif user.op == "output" or self.tensors[other] != self.tensors[written]:
                return False
        return True

    def part(self, node: fx.Node) -> None:
        """`node` has memory of its own from now on, and what was made of it lies there."""
        (storage,) = self.storages[node]
        tensor, held = self.tensors[node], self.holders[storage]
        later = [other for other in held if self.order[other] >= self.order[node]]
        self.holders[storage] = [other for other in held if self.order[other] < self.order[node]]
        self.holders[node] = later
        for other in later:
            self.storages[other] = self.storages[other] - {storage} | {node}
            if self.tensors[other] == tensor:
                self.tensors[other] = node

    def redirect(self, written: fx.Node, node: fx.Node) -> None:
        """Later readers of the written tensor, under any of its names, read `node`."""
        for name in [other for other in self.order if self.tensors[other] == self.tensors[written]]:
            for user in list(name.users):
                if self.order[user] > self.order[node]:
                    user.replace_input_with(name, node)


def _is_fresh(birth: fx.Node) -> bool:
    """Whether `birth`, the first node to hold some memory, allocated it: it is no input, constant or opaque result."""
    if birth.op != "call_function" or not isinstance(birth.target, compat.OpOverload) or "kept" in birth.meta:
        return False
    if any(item.alias_info is not None for item in birth.target._schema.returns):
        return False
    # A constant is real; what is made of it is fake, and would look fresh although it may be a view.
    return all(isinstance(value, compat.FakeTensor) for value in _tensors(birth))


def _changes_its_form(node: fx.Node) -> bool:
    """``t_()``, ``resize_()``, ``detach_()``: the recorded value is not what earlier readers saw."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.inplace_view in tags or node.target is aten.detach_.default


def _is_equal(node: fx.Node, twin: Any) -> bool:
    """Whether `twin` gives a tensor that no reader can tell from the one `node` wrote to."""
    written = value_of(arguments(node)[0])
    if type(written) is not compat.FakeTensor or "kept" in node.meta or "grad" not in node.meta:
        return False
    if written.requires_grad and _name(node) in _OWN_DERIVATIVE:
        return False
    result = _evaluated(node, twin)
    return (
        isinstance(result, torch.Tensor)
        # Promotion, or autocast, which converts arguments of functional operators only: wider ones change nothing.
        and result.dtype == written.dtype
        and result.requires_grad == written.requires_grad
        and same_layout(result, written)
        # A view of part of its memory may be widened again by as_strided.
        and str(result.untyped_storage().nbytes()) == str(written.untyped_storage().nbytes())
    )


def _tensors(node: fx.Node) -> Iterator[torch.Tensor]:
    return (value for value in map(value_of, node.all_input_nodes) if isinstance(value, torch.Tensor))


def _evaluated(node: fx.Node, target: Any) -> Any:
    """`target` called on fake values as `node` is, in its grad mode and autocast; None where it cannot run."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    mode, autocast = compat.fake_mode_of([args, kwargs]), node.meta["autocast"]
    device = next(_tensors(node)).device.type
    region = torch.autocast(device, autocast, enabled=True) if autocast is not None else _no_autocast(device)
    with ambient_state(), mode or contextlib.nullcontext(), compat.running_symbolic(mode), region:
        torch.set_grad_enabled(node.meta["grad"])
        try:
            return target(*args, **kwargs)
        except RuntimeError:
            return None


def _no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()
