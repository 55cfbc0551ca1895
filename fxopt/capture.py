"""Dynamo graph -> canonical graph: pre-autograd ATen, lowered node by node.

Each node is traced alone under its own fake mode and spliced in, memoised by target and argument metadata, so that
a layer met again costs nothing. Tracing the whole graph at once would drop gradients of `autograd.Function` bodies
and cannot enter `tag_activation_checkpoint`; node by node both stay as they are, and their bodies are lowered alike.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxopt import compat
from fxopt.compat import pytree
from fxopt.fake import TRANSFORMED, ambient_state, autocast_state, propagate, value_of
from fxopt.simplify import simplify

_ATTRIBUTES = ("get_attr", "call_module")
_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom", "from_node")


@dataclasses.dataclass
class Capture:
    """A canonical graph, and what lowering it met.

    module:  the canonical graph; the Dynamo graph it came from is untouched.
    kept:    nodes that could not be lowered and were copied as they are, each with the reason.
    nodes:   how many nodes the Dynamo graph had; `traced` of them were traced, the others met the memo.
    """

    module: fx.GraphModule
    kept: list[str]
    nodes: int = 0
    traced: int = 0


def capture(gm: fx.GraphModule) -> Capture:
    """Lower a Dynamo graph (nodes carrying ``example_value``) to the canonical graph.

    Replaying the result gives bit-equal outputs and gradients. Nothing of `gm` is changed.
    """
    result = Capture(gm, [])
    result.module = _Lowering(gm, result, {}).run()
    return result


def trace(fn: Callable[..., Any], inputs: Mapping[str, Any]) -> fx.GraphModule:
    """The canonical graph of a function of named tensors; other arguments are constants of the graph.

    What patterns and tests are made of: the same lowering and clean-up as a model's graph. Real tensors are traced
    through fake ones of their shape, dtype, strides and requires_grad.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    constants = {name: value for name, value in inputs.items() if name not in tensors}
    mode = compat.fake_mode_of(list(tensors.values())) or compat.FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [value if isinstance(value, compat.FakeTensor) else mode.from_tensor(value) for value in tensors.values()]
    gm = compat.trace_atens(lambda *given: fn(**dict(zip(tensors, given, strict=True)), **constants), fakes)
    for node, fake in zip(gm.graph.find_nodes(op="placeholder"), fakes, strict=True):
        node.meta["val"] = fake  # tracing records a detached one
    propagate(gm)
    simplify(gm)
    gm.recompile()
    return gm


class _Lowering:
    """One graph's lowering; bodies of higher-order operators share its memo."""

    def __init__(self, gm: fx.GraphModule, result: Capture, memo: dict[Any, fx.GraphModule]):
        self.gm, self.result, self.memo = gm, result, memo
        self.graph = fx.Graph()
        self.depth = 0
        self.autocasts: dict[fx.Node, Any] = {}
        self.env: dict[fx.Node, Any] = {}
        self.attributes: dict[str, Any] = {}

    def run(self) -> fx.GraphModule:
        with ambient_state():
            for node in self.gm.graph.nodes:
                self.result.nodes += 1
                self.env[node] = self.lower(node)
                self.switch_autocast(node)
        kept = {
            str(node.target): operator.attrgetter(str(node.target))(self.gm)
            for node in self.gm.graph.nodes
            if node.op in _ATTRIBUTES
        }
        module = fx.GraphModule(kept | self.attributes, self.graph, class_name="Canonical")
        module.meta = dict(self.gm.meta)
        propagate(module)
        simplify(module)
        module.recompile()
        return module

    def switch_autocast(self, node: fx.Node) -> None:
        """Enter or leave autocast with the graph: under it ``bf16 @ fp32`` is legal, and tracing records it uncast."""
        target: Any = node.target
        if target is compat.ENTER_AUTOCAST:
            self.autocasts[node] = target(*node.args)
        elif target is compat.EXIT_AUTOCAST:
            target(self.autocasts.pop(node.all_input_nodes[0]))

    def lower(self, node: fx.Node) -> Any:
        if node.op == "output":
            return self.graph.output(self.mapped(node.args[0]))
        if node.op == "get_attr":
            self.lower_body(node)
        if self.inside_transform(node):
            new = self.copy(node)
            new.meta["kept"] = TRANSFORMED
            return new
        if _stays(node):
            return self.copy(node)
        inputs = node.all_input_nodes
        values = [value_of(argument) for argument in inputs]
        if any(value is None for value in values):
            return self.keep(node, "an input has no example value")
        try:
            traced = self.traced(node, inputs, values)
        except Exception as error:  # any node that cannot be traced is still right as it is
            return self.keep(node, f"{type(error).__name__}: {str(error)[:120]}")
        return self.splice(traced, node, inputs)

    def inside_transform(self, node: fx.Node) -> bool:
        """Whether `node` opens, lies in or closes a functorch transform (vmap, jvp), of which a graph holds the steps.

        Its values are batched tensors, which exist only while the transform runs: such nodes are copied and never run.
        """
        name = getattr(node.target, "__name__", "")
        self.depth += name.endswith("increment_nesting")
        inside = self.depth > 0 and node.op != "placeholder"
        self.depth -= name.endswith("decrement_nesting")
        return inside

    def keep(self, node: fx.Node, reason: str) -> fx.Node:
        self.result.kept.append(f"{node.name} ({node.target}): {reason}")
        new = self.copy(node)
        new.meta["kept"] = reason
        return new

    def constant(self, value: Any) -> fx.Node:
        """A tensor that tracing a node made (``x[:, 0] = 3.0``, ``torch.tensor(2.5)``) becomes an attribute."""
        name = f"constant_{len(self.attributes)}"
        self.attributes[name] = value
        return self.graph.get_attr(name)

    def lower_body(self, node: fx.Node) -> None:
        body = operator.attrgetter(str(node.target))(self.gm)
        if isinstance(body, fx.GraphModule) and str(node.target) not in self.attributes:
            self.attributes[str(node.target)] = _Lowering(body, self.result, self.memo).run()

    def mapped(self, args: Any) -> Any:
        return fx.node.map_arg(args, lambda argument: self.env[argument])

    def copy(self, node: fx.Node) -> fx.Node:
        name = node.name if node.op == "placeholder" else None
        new = self.graph.create_node(node.op, node.target, self.mapped(node.args), self.mapped(node.kwargs), name=name)
        new.meta = dict(node.meta)
        new.type = node.type
        return new

    def traced(self, node: fx.Node, inputs: list[fx.Node], values: list[Any]) -> fx.GraphModule:
        position = {argument: index for index, argument in enumerate(inputs)}
        written = repr(fx.node.map_arg((node.args, node.kwargs), lambda argument: _Hole(position[argument])))
        state = (torch.is_grad_enabled(), str(autocast_state()))
        key = (node.op, str(node.target), written, state, *map(_signature, values))
        if key not in self.memo:
            leaves, spec = pytree.tree_flatten(values)
            call = _call(node, position)
            self.memo[key] = compat.trace_atens(lambda *flat: call(*pytree.tree_unflatten(flat, spec)), leaves)
            self.result.traced += 1
        return self.memo[key]

    def splice(self, traced: fx.GraphModule, node: fx.Node, inputs: list[fx.Node]) -> Any:
        holes = [inner for inner in traced.graph.nodes if inner.op == "placeholder"]
        given_by = [item for argument in inputs for item in self.items(argument)]
        env: dict[fx.Node, Any] = dict(zip(holes, given_by, strict=True))
        env |= {
            inner: self.constant(getattr(traced, inner.target))
            for inner in traced.graph.nodes
            if inner.op == "get_attr"
        }
        given = set(env)
        out = self.graph.graph_copy(traced.graph, env)
        provenance = {key: node.meta[key] for key in _PROVENANCE if key in node.meta}
        for inner, new in env.items():
            if inner not in given:
                new.meta = {"val": inner.meta.get("val")} | provenance
        return out

    def items(self, argument: fx.Node) -> list[fx.Node]:
        """What stands for `argument` in a trace: itself, or each item of a tuple that is passed whole (`x.size()`)."""
        new, value = self.env[argument], value_of(argument)
        if not isinstance(value, tuple | list) or not all(map(_is_leaf, value)):
            return [new]
        return [self.graph.call_function(operator.getitem, (new, index)) for index in range(len(value))]


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, tuple | list | dict)


class _Hole(int):
    def __repr__(self) -> str:
        return f"@{int(self)}"


def _stays(node: fx.Node) -> bool:
    """Nodes that are canonical already, or that only make sense whole."""
    if node.op in ("placeholder", "get_attr", "call_module"):
        return True
    if isinstance(node.target, compat.HigherOrderOperator) or node.target in compat.STATE_SWITCHES:
        return True
    if node.target is operator.getitem:
        return not isinstance(value_of(node.args[0]), torch.Tensor)
    return False


def _call(node: fx.Node, position: dict[fx.Node, int]) -> Callable[..., Any]:
    def call(*values: Any) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda argument: values[position[argument]])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    return call


def _signature(value: Any) -> Any:
    """What tracing may depend on: two values with one signature trace alike within one graph."""
    leaves, spec = pytree.tree_flatten(value)
    return (str(spec), *map(_leaf_signature, leaves))


def _leaf_signature(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        layout = str(leaf.stride()) if leaf.layout is torch.strided else ""
        return (str(tuple(leaf.shape)), layout, leaf.dtype, str(leaf.device), leaf.requires_grad, str(leaf.layout))
    return (type(leaf).__name__, str(leaf))
