"""Deferred outputs, the graph's half: outputs that only the caller may read leave the graph.

In their place the graph returns the rows of `hidden` they are computed from; `fxopt.deferred` gives the caller a
tensor that computes them when somebody looks.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt import compat
from fxopt.deferred import Projection, deferred
from fxopt.fake import arguments, propagate, value_of
from fxopt.precision.casts import is_made
from fxopt.projection import check_moves, moved_rows, projection_of
from fxopt.rule import Place
from fxopt.verify import is_removable


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a run-time tensor is found: the graph's `input` or `output` of that index."""

    kind: str
    index: int

    def of(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """The tensor."""
        return (inputs if self.kind == "input" else outputs)[self.index]


@dataclasses.dataclass(frozen=True)
class DeferredOutput:
    """Outputs `indices` of the graph are one tensor, computed from three others when somebody looks."""

    indices: tuple[int, ...]
    hidden: Source
    weight: Source
    bias: Source | None
    transposed: bool
    projection: Projection

    def tensor(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> torch.Tensor:
        """The tensor to hand to the caller."""
        weight = self.weight.of(inputs, outputs)
        bias = None if self.bias is None else self.bias.of(inputs, outputs)
        return deferred(
            self.hidden.of(inputs, outputs), weight.t() if self.transposed else weight, bias, self.projection
        )


@dataclasses.dataclass(frozen=True)
class OutputPlan:
    """The outputs that were deferred, and how many the caller expects. Empty when nothing was."""

    deferred: tuple[DeferredOutput, ...] = ()
    count: int = 0

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, returning what the original graph returns."""
        if not self.deferred:
            return compiled

        def run(*inputs: Any) -> tuple[Any, ...]:
            outputs = list(compiled(*inputs))
            for item in self.deferred:
                tensor = item.tensor(inputs, outputs)
                for index in item.indices:
                    outputs[index] = tensor
            return tuple(outputs[: self.count])

        return run


def defer_outputs(gm: fx.GraphModule, names: Sequence[str]) -> OutputPlan:
    """Take the outputs of `gm` among the nodes `names` out of the graph, in place, where they are projections.

    The caller recompiles nothing: `gm` is recompiled and propagated here.
    """
    output = next(iter(reversed(gm.graph.nodes)))
    results: list[Any] = list(arguments(output)[0])
    count = len(results)
    found: list[DeferredOutput] = []
    for node in [node for node in gm.graph.nodes if node.name in set(names)]:
        indices = tuple(index for index, result in enumerate(results) if result is node)
        if indices:
            found.append(_defer(gm.graph, node, indices, results))
    output.args = (tuple(results),)
    gm.graph.eliminate_dead_code(lambda node: not is_removable(node))
    gm.graph.lint()
    gm.recompile()
    propagate(gm)
    return OutputPlan(tuple(found), count)


def _before_cast(node: fx.Node) -> fx.Node:
    """What a cast of fxopt's casts: at run time autocast does that again, and no copy is kept until then."""
    return arguments(node)[0] if is_made(node) else node


def _defer(graph: fx.Graph, node: fx.Node, indices: tuple[int, ...], results: list[Any]) -> DeferredOutput:
    source = projection_of(node)
    moves = source.moves()
    check_moves(moves, value_of(source.linear).dim(), -1)
    with graph.inserting_before(next(iter(reversed(graph.nodes)))):
        rows = compat.trace_atens(lambda hidden: moved_rows(hidden, moves), [value_of(source.hidden)]).graph
        hidden = graph.graph_copy(rows, {next(iter(rows.nodes)): source.hidden})
    for index in indices:
        results[index] = hidden
    weight, bias, autocast = source.weight, source.bias, source.linear.meta.get("autocast")
    if is_made(weight):
        weight, autocast = _before_cast(weight), value_of(weight).dtype
        bias = None if bias is None else _before_cast(bias)
    projection = Projection(_tail(source.pointwise), value_of(node).dtype, autocast, _name(node))
    return DeferredOutput(
        indices,
        Source("output", indices[0]),
        _source(weight, results),
        None if bias is None else _source(bias, results),
        source.transposed,
        projection,
    )


def _source(node: fx.Node, results: list[Any]) -> Source:
    """Where `node` is found at run time; a value computed in the graph becomes one more output."""
    if node.op == "placeholder":
        placeholders = [other for other in node.graph.nodes if other.op == "placeholder"]
        return Source("input", placeholders.index(node))
    results.append(node)
    return Source("output", len(results) - 1)


def _tail(steps: Sequence[fx.Node]) -> fx.GraphModule | None:
    """The pointwise steps as a function of the logits."""
    if not steps:
        return None
    graph = fx.Graph()
    logits = graph.placeholder("logits")
    for step in steps:
        logits = graph.node_copy(step, lambda _, logits=logits: logits)  # type: ignore[misc]
        logits.meta = {}
    graph.output(logits)
    return fx.GraphModule({}, graph)


def _name(node: fx.Node) -> str:
    """What the user's code calls the value, where it says so: ``logits (modeling_llama.py:468)``."""
    place = Place.of(node)
    assigned = re.match(r"(\w+)\s*=[^=]", place.code)
    return f"{assigned.group(1) if assigned else node.name} ({place.name})" if place.source else node.name
