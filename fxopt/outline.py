"""The graphs of a compilation in a form small enough to keep: a line a node, and every text once.

What `options={"dump": dir}` and `fxopt.explain` record, so that graphs before and after a stage can be laid side by
side. A 32-layer Llama has 12,000 nodes over its stages, of which most stages share most.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from fxopt.fake import value_of
from fxopt.rule import Place

__all__ = ["HOLE", "Node", "Outline", "Recorder", "StageGraph", "kind_of", "kinds_of_inputs"]

HOLE = "·"
"""Stands for a node among the arguments of a call, in the order of `Node.inputs`."""


@dataclasses.dataclass(frozen=True)
class Node:
    """One node of a graph, as a reader sees it.

    call:   "aten.view(·, [2, 27, 64])", or "placeholder". inputs: the nodes that stand at each `HOLE`.
    module: the module path it comes from. kind: "float32[2, 27, 64]". source: "file.py:12", code: that line.
    rule:   the rule that made it, "" where none did; "cast" where the precision stage did.
    A node in the body of a higher-order operator is named "body.node".
    """

    name: str
    call: str
    inputs: tuple[str, ...]
    module: str
    kind: str
    source: str
    code: str
    rule: str


@dataclasses.dataclass
class StageGraph:
    """The graph after stage `name`: the numbers of its lines in `Outline.lines`, in order, separated by spaces."""

    name: str
    nodes: str


@dataclasses.dataclass
class Outline:
    """The graphs after each stage. Each line is eight numbers in `texts`, its inputs separated by commas.

    name call inputs module kind source code rule
    """

    texts: list[str] = dataclasses.field(default_factory=list)
    lines: list[str] = dataclasses.field(default_factory=list)
    stages: list[StageGraph] = dataclasses.field(default_factory=list)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Outline:
        """What `dataclasses.asdict` made of an outline."""
        return cls(data["texts"], data["lines"], [StageGraph(**one) for one in data["stages"]])

    def nodes(self, stage: StageGraph) -> Iterator[Node]:
        """The nodes of `stage` in order."""
        for at in map(int, stage.nodes.split()):
            name, call, inputs, *rest = self.lines[at].split(" ")
            given = tuple(self.texts[int(one)] for one in inputs.split(",") if one)
            yield Node(self.texts[int(name)], self.texts[int(call)], given, *(self.texts[int(one)] for one in rest))


class Recorder:
    """Fills an `Outline`, a stage at a time."""

    def __init__(self) -> None:
        self.outline = Outline()
        self._texts: dict[str, int] = {}
        self._lines: dict[str, int] = {}

    def add(self, name: str, gm: fx.GraphModule) -> None:
        """Record `gm` as it is after stage `name`."""
        self.add_nodes(name, _nodes(gm))

    def add_nodes(self, name: str, nodes: Iterable[Node]) -> None:
        """Record `nodes` as the graph after stage `name`."""
        numbers = [self._line(node) for node in nodes]
        self.outline.stages.append(StageGraph(name, " ".join(map(str, numbers))))

    def _line(self, node: Node) -> int:
        inputs = ",".join(str(self._text(one)) for one in node.inputs)
        texts = (node.name, node.call, node.module, node.kind, node.source, node.code, node.rule)
        name, call, *rest = (str(self._text(one)) for one in texts)
        line = " ".join([name, call, inputs, *rest])
        return _number(line, self._lines, self.outline.lines)

    def _text(self, text: str) -> int:
        return _number(text, self._texts, self.outline.texts)


def _number(item: str, known: dict[str, int], listed: list[str]) -> int:
    """The place of `item` in `listed`, where it is put if it is new."""
    if item not in known:
        known[item] = len(listed)
        listed.append(item)
    return known[item]


def _nodes(gm: fx.GraphModule, prefix: str = "") -> Iterator[Node]:
    """The nodes of `gm`; those of a body follow the attribute that holds it."""
    for node in gm.graph.nodes:
        yield _node(node, prefix)
        body = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            yield from _nodes(body, f"{prefix}{node.target}.")


def _node(node: fx.Node, prefix: str) -> Node:
    place = Place.of(node)
    rule = str(node.meta.get("rule", "cast" if "cast" in node.meta else ""))
    inputs: list[str] = []
    call = _call(node, prefix, inputs)
    return Node(
        prefix + node.name, call, tuple(inputs), place.module, kind_of(value_of(node)), place.source, place.code, rule
    )


def _call(node: fx.Node, prefix: str, inputs: list[str]) -> str:
    """What `node` does, with a `HOLE` for each node that it reads, which is added to `inputs`."""
    if node.op == "placeholder":
        return "placeholder"
    if node.op == "get_attr":
        return f"attribute {node.target}"

    def text(item: Any) -> str:
        if isinstance(item, fx.Node):
            inputs.append(prefix + item.name)
            return HOLE
        if isinstance(item, list | tuple):
            return f"[{', '.join(map(text, item))}]"
        if isinstance(item, dict):
            return f"{{{', '.join(f'{key}: {text(one)}' for key, one in item.items())}}}"
        return str(item).removeprefix("torch.")[:200]

    given = [text(one) for one in node.args] + [f"{key}={text(one)}" for key, one in node.kwargs.items()]
    return f"{_target(node)}({', '.join(given)})"


def _target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target if node.op != "output" else "output"
    name = str(target) if hasattr(target, "_schema") else getattr(target, "__name__", str(target))
    return name.removesuffix(".default")


def kinds_of_inputs(gm: fx.GraphModule) -> dict[str, int]:
    """How many inputs of `gm` are of each kind, by name."""
    counts = collections.Counter(kind_of(value_of(node)) for node in gm.graph.find_nodes(op="placeholder"))
    return dict(sorted(counts.items()))


def kind_of(value: Any) -> str:
    """ "float32[2, 27]", each of a tuple's, or the name of any other type."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(kind_of, value))})"
    return "" if value is None else type(value).__name__
