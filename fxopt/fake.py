"""Fake values of a graph's nodes: shapes, dtypes, strides, aliasing and requires_grad without data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxopt import compat

_AUTOCASTING = ("cpu", "cuda", "xpu", "mps")

TRANSFORMED = "inside a functorch transform"
"""What ``meta["kept"]`` says of nodes that may not be run alone: doing so would leave a vmap level open."""


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """`node.args`; fx types them as a union too wide to index."""
    return node.args


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator's node by its schema's names, in its order, with defaults filled in."""
    target: Any = node.target
    declared = target._schema.arguments
    given = dict(zip([argument.name for argument in declared], node.args, strict=False)) | dict(node.kwargs)
    return {argument.name: given.get(argument.name, argument.default_value) for argument in declared}


def value_of(node: Any) -> Any:
    """The fake value of `node` (its own in a canonical graph, Dynamo's in a Dynamo graph); constants are themselves."""
    if not isinstance(node, fx.Node):
        return node
    value = node.meta.get("val")
    return node.meta.get("example_value") if value is None else value


def stand_in(value: Any) -> Any:
    """A new fake tensor like `value`, with the sizes it was traced with for symbolic ones; sizes as such numbers.

    To be called within a `FakeTensorMode`. No guard is installed. Strides and the alignment of the first element stay.
    """
    if not isinstance(value, torch.Tensor):
        return compat.size_hint(value)
    shape, strides = (tuple(map(compat.size_hint, sizes)) for sizes in (value.shape, value.stride()))
    made = torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
    offset = compat.size_hint(value.storage_offset())
    if not offset:
        return made
    storage = made.untyped_storage().nbytes() // made.element_size()
    return made.new_empty(offset + storage).as_strided(shape, strides, offset)


@contextlib.contextmanager
def ambient_state() -> Iterator[None]:
    """Restore grad mode and autocast on leaving, whatever switches the graph holds."""
    grad = torch.is_grad_enabled()
    try:
        with torch.autocast("cpu", dtype=torch.get_autocast_dtype("cpu"), enabled=torch.is_autocast_enabled("cpu")):
            yield
    finally:
        torch.set_grad_enabled(grad)


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Within, autocast is off on every device, and what is compiled is shielded from it while it runs."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(compat.shielded_from_autocast())
        for name in autocast_state():
            stack.enter_context(torch.autocast(name, enabled=False))
        yield


def autocast_state() -> dict[str, torch.dtype]:
    """Devices for which autocast is on, and the dtype it casts to."""
    return {name: torch.get_autocast_dtype(name) for name in _AUTOCASTING if torch.is_autocast_enabled(name)}


def propagate(gm: fx.GraphModule) -> None:
    """Give every node of `gm` a fresh ``meta["val"]``, with true aliasing, and what is ambient there.

    ``meta["grad"]`` is the grad mode, ``meta["autocast"]`` the autocast dtype of the value's device or None.


    Values copied from a memo share storages with the nodes they were traced for; only running the graph says which
    nodes alias. Higher-order operators are not entered: their recorded value stands.
    """
    inputs = [value_of(node) for node in gm.graph.nodes if node.op == "placeholder"]
    mode = compat.fake_mode_of([*inputs, *(value_of(node) for node in gm.graph.nodes)])
    with ambient_state(), mode or contextlib.nullcontext(), compat.running_symbolic(mode):
        _Propagator(gm, garbage_collect_values=False).run(*inputs)


class _Propagator(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = value_of(n) if self.is_opaque(n) else super().run_node(n)
        if n.op != "output":
            n.meta["val"], n.meta["grad"], n.meta["autocast"] = value, torch.is_grad_enabled(), _autocast_dtype(value)
        return value

    def is_opaque(self, node: fx.Node) -> bool:
        """Nodes whose recorded value is used: running them would enter a body, or invent fresh symbols."""
        if node.meta.get("kept") == TRANSFORMED:
            return True
        if node.op == "get_attr":
            return isinstance(value_of(node), torch.Tensor)
        recorded = value_of(node)
        return node.op == "call_module" or (
            isinstance(node.target, compat.HigherOrderOperator) and recorded is not None
        )


def _autocast_dtype(value: Any) -> torch.dtype | None:
    return autocast_state().get(value.device.type if isinstance(value, torch.Tensor) else "cpu")
