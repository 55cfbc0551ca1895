"""A site by itself: its own nodes as a graph with static sizes, and tensors to run that on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxopt import compat
from fxopt.compat import pytree
from fxopt.fake import propagate, value_of
from fxopt.rewrite import replace
from fxopt.rule import Rule, Site

__all__ = ["Excerpt", "Unmeasurable", "ambient", "draw", "excerpt"]


class Unmeasurable(Exception):
    """A site cannot be run by itself; the message says why."""


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """A graph of a site's own nodes, and the site in it.

    The graph's inputs are all tensors that the nodes or the replacement read, the site's inputs first; it returns the
    site's outputs. Sizes are the hints of symbolic ones. Names do not depend on where in a model the site lay, so that
    equal sites have equal texts.
    """

    module: fx.GraphModule
    site: Site

    def rewritten(self, replacement: Callable[..., Any]) -> fx.GraphModule:
        """The same with `replacement` in the place of the site: this excerpt is used up. Raises what that raises."""
        graph = self.module.graph
        replace(self.site, replacement, graph, {node: index for index, node in enumerate(graph.nodes)}, {})
        for node in reversed(self.site.nodes):
            graph.erase_node(node)
        self.module.recompile()
        return self.module

    def text(self) -> str:
        """All that the time of the site depends on, the card and versions aside."""
        inputs = [value_of(node) for node in self.module.graph.find_nodes(op="placeholder")]
        metadata = [(tuple(x.shape), x.stride(), x.dtype, x.device.type, x.requires_grad) for x in inputs]
        state = {key: self.site.anchor.meta.get(key) for key in ("grad", "autocast")}
        return "\n".join(map(repr, (self.site.inputs, self.site.lowering, metadata, state, str(self.module.graph))))


def excerpt(site: Site) -> Excerpt:
    """Copy `site` out of its graph, which is left alone. Raises `Unmeasurable`."""
    inside = {node for node in site.nodes if node.op == "call_function"}
    reads = [*site.input_nodes, *(item for node in site.nodes if node in inside for item in node.all_input_nodes)]
    graph, env = fx.Graph(), dict[fx.Node, Any]()
    mode = compat.FakeTensorMode(allow_non_fake_inputs=True)
    for node in dict.fromkeys(reads):
        if node not in inside:
            env[node] = _input(graph, node, mode)
    nodes = []
    for node in site.nodes:
        if node in inside:
            args, kwargs = (_mapped(item, env) for item in (node.args, node.kwargs))
            env[node] = graph.create_node(node.op, node.target, args, kwargs)
            nodes.append(env[node])
    outputs = tuple(env[node] for node in site.outputs)
    graph.output(outputs)
    module = fx.GraphModule(torch.nn.Module(), graph)
    with ambient(site.anchor):
        propagate(module)
    found = dataclasses.replace(
        site, outputs=outputs, nodes=tuple(nodes), inputs=_mapped(site.inputs, env), deferrable=(),
        draws=tuple(env[node] for node in site.draws),
    )  # fmt: skip
    return Excerpt(module, found)


def _input(graph: fx.Graph, node: fx.Node, mode: Any) -> Any:
    """A placeholder for the tensor that `node` is, or the number."""
    value = value_of(node)
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, torch.nn.Parameter, compat.FakeTensor):
            raise Unmeasurable(f"{node.name} is a {type(value).__name__}, not a plain tensor")
        made = graph.placeholder(f"input_{len(graph.nodes)}")
        sizes, strides = ([_hint(item, node) for item in given] for given in (value.shape, value.stride()))
        if 0 in sizes:
            raise Unmeasurable(f"{node.name} is empty")
        with mode:
            like = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        made.meta["val"] = like.requires_grad_(value.requires_grad)
        return made
    if not isinstance(value, int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
        raise Unmeasurable(f"{node.name} ({node.target}) is neither a tensor nor a number")
    return _hint(value, node)


def _hint(size: Any, node: fx.Node) -> Any:
    found = compat.size_hint(size)
    if found is None:
        raise Unmeasurable(f"the size {size} of {node.name} is known only at run time")
    return found


def _mapped(value: Any, env: Mapping[fx.Node, Any]) -> Any:
    """`value` with nodes as in `env` and symbolic numbers as their hints, within dataclasses too."""

    def leaf(item: Any) -> Any:
        if isinstance(item, fx.Node):
            return env.get(item, item)
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            fields = {one.name: getattr(item, one.name) for one in dataclasses.fields(item)}
            return dataclasses.replace(item, **{name: _mapped(one, env) for name, one in fields.items()})
        return compat.size_hint(item)

    return pytree.tree_map(leaf, _plain(value))


def _plain(value: Any) -> Any:
    """fx's immutable containers as Python's own: trees of both are told apart."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        made = [_plain(item) for item in value]
        return tuple(made) if isinstance(value, tuple) else made
    return value


@contextlib.contextmanager
def ambient(anchor: fx.Node) -> Iterator[None]:
    """Grad mode and autocast as they are where `anchor` is computed."""
    value, dtype = value_of(anchor), anchor.meta.get("autocast")
    cast = torch.autocast(value.device.type, dtype=dtype) if dtype else contextlib.nullcontext()
    with torch.set_grad_enabled(anchor.meta.get("grad", True)), cast:
        yield


def draw(found: Excerpt, rule: Rule) -> list[Tensor]:
    """Real tensors for the inputs of an excerpt, of their shapes, dtypes, strides and requires_grad.

    Floats are normal. Integers, and booleans that the replacement reads, are what the rule says they may be; other
    booleans are masks that only the site's own nodes read, and allow everything: no kernel's time depends on it.
    Raises `Unmeasurable` for integers of which the rule says nothing.
    """
    named = {item: name for name, item in found.site.inputs.items() if isinstance(item, fx.Node)}
    ranges = rule.integers(found.site)
    drawn = []
    for node in found.module.graph.find_nodes(op="placeholder"):
        value, name = value_of(node), named.get(node, "")
        allowed = ranges.get(name) or ((1, 2) if value.dtype == torch.bool and not name else None)
        if allowed is None and not (value.dtype.is_floating_point or value.dtype.is_complex):
            raise Unmeasurable(f"{name or node.name} holds {value.dtype} whose values decide what is computed")
        drawn.append(_tensor(value, allowed))
    return drawn


def _tensor(like: Tensor, allowed: tuple[int, int] | None) -> Tensor:
    """Random values in memory laid out as that of `like`."""
    length = 1 + sum((size - 1) * step for size, step in zip(like.shape, like.stride(), strict=True))
    if allowed is None:
        memory = torch.randn(length, device=like.device).to(like.dtype)
    else:
        memory = torch.randint(*allowed, (length,), device=like.device).to(like.dtype)
    return memory.as_strided(like.shape, like.stride()).detach().requires_grad_(like.requires_grad)
