"""Rules: what users write, what we put in its place, every reason not to, and how to draw inputs for it.

There are two ways to find sites and one result type. A `Pattern` is a few plain PyTorch functions, for what has few
spellings (norms). A `Region` grows from an anchor node, for what has many (losses, attention).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import fx

from fxopt.choice import OURS, Choice
from fxopt.fake import value_of
from fxopt.score.term import Term


class Draw(Protocol):
    """Where a rule's test inputs come from: hypothesis in tests, a seeded generator in benchmarks."""

    def size(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        ...

    def choice(self, *options: Any) -> Any:
        """One of `options`."""
        ...

    def tensor(self, *shape: int, dtype: torch.dtype, requires_grad: bool = True) -> torch.Tensor:
        """A tensor of normal values; its layout may be non-contiguous."""
        ...

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """An int64 tensor of values in [low, high)."""
        ...


class Cost(str):
    """An objection of cost, not of correctness: ``options={"force": [rule]}`` overrides it."""


@dataclasses.dataclass
class Site:
    """A place in a canonical graph where a rule applies.

    rule:     the rule's name.
    outputs:  the nodes whose values the replacement gives, in the order it returns them.
    nodes:    every node the replacement does away with, outputs included, in graph order.
    inputs:   what the replacement is called with: nodes, or constants of the graph.
    deferrable: interior nodes that only graph outputs read, which may be computed when somebody looks.
    detail:   a few words for the report: what was found. How it is computed, the rule's `computed` says.
    origins:  where in the user's code the terms of score programs come from, for the dump of kernels.
    draws:    random nodes among `nodes` that the replacement draws anew. Their numbers come out different, their
              distribution must not; the random nodes outside the site keep their order.
    lowering: ``options={"kernels": ...}``, which the engine notes before it asks for objections.
    """

    rule: str
    outputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    inputs: dict[str, Any]
    deferrable: tuple[fx.Node, ...] = ()
    detail: str = ""
    draws: tuple[fx.Node, ...] = ()
    origins: Mapping[Term, Place] = dataclasses.field(default_factory=dict)
    lowering: str = "auto"

    @property
    def anchor(self) -> fx.Node:
        """The node by which the report names the site."""
        return self.outputs[0]

    @property
    def input_nodes(self) -> list[fx.Node]:
        """The inputs that are nodes."""
        return [item for item in self.inputs.values() if isinstance(item, fx.Node)]

    def renamed(self, moved: dict[fx.Node, fx.Node]) -> Site:
        """This site after earlier replacements: inputs among `moved` are read from the node in their place."""
        inputs = {
            name: moved.get(item, item) if isinstance(item, fx.Node) else item for name, item in self.inputs.items()
        }
        return dataclasses.replace(self, inputs=inputs)

    def value(self, name: str) -> Any:
        """The fake value of input `name`, or the constant itself."""
        return value_of(self.inputs[name])


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in the user's code a node comes from: source line, code and module path; empty when unknown."""

    source: str = ""
    code: str = ""
    module: str = ""

    @classmethod
    def of(cls, node: fx.Node) -> Place:
        """The innermost frame and module recorded for `node`."""
        return cls(*_innermost(node.meta.get("stack_trace") or ""), module_path(node))

    @property
    def name(self) -> str:
        """File and line, without the directory."""
        return self.source.rsplit("/", 1)[-1]

    @property
    def any_layer(self) -> str:
        """The module path with its layers left open: "model.layers.*.mlp"."""
        return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", self.module)

    def __str__(self) -> str:
        return (
            " ".join(part for part in (self.name, f"({self.module})" if self.module else "") if part)
            or "unknown source"
        )


@functools.lru_cache(4096)
def _innermost(trace: str) -> tuple[str, str]:
    """File and line, and the code, of the last frame of `trace`: nodes of repeated layers share it."""
    frames = re.findall(r'File "([^"]+)", line (\d+)[^\n]*\n\s*([^\n]*)', trace)
    path, line, code = frames[-1] if frames else ("", "", "")
    return f"{path}:{line}" if path else "", code.strip()


def module_path(node: fx.Node, key: str = "nn_module_stack") -> str:
    """``model.layers.0.input_layernorm`` from what Dynamo records of the module stack.

    key: "fwd_nn_module_stack" for a node of a backward: the module that it is the derivative of.
    """
    stack = node.meta.get(key) or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path).replace("_modules.", "")
    return re.sub(r"^([LG]\.)?(self|fn)?\.?", "", path).replace("._orig_mod", "")


def provenance_of(node: fx.Node) -> dict[str, Any]:
    """What the meta of a node made in place of `node` says of the user's code and of the grad mode."""
    return {key: node.meta[key] for key in ("stack_trace", "nn_module_stack", "grad") if key in node.meta}


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """A site that was rewritten. `nodes` is how many nodes it replaced; `made` names those it put there.

    choice: what was measured there, None where nothing was to be.
    """

    rule: str
    node: str
    place: Place
    nodes: int
    detail: str = ""
    made: tuple[str, ...] = ()
    choice: Choice | None = None


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A site that was left alone: the sentences why, and how many nodes had agreed by then.

    cost:   True when nothing but cost speaks against it, so that ``options={"force": [rule]}`` rewrites it.
    choice: what was measured there, None where nothing was to be.
    """

    rule: str
    node: str
    place: Place
    reasons: tuple[str, ...]
    agreed: int = 0
    cost: bool = False
    choice: Choice | None = None


class NoSite(Exception):
    """Raised while growing a region: the sentence why this anchor is no site, and how many nodes had agreed."""

    def __init__(self, reason: str, agreed: int = 0):
        super().__init__(reason)
        self.agreed = agreed


def no_objections(site: Site) -> Iterator[str]:
    """The objections of a rule that has none."""
    return iter(())


def untold(site: Site) -> str:
    """What a rule says of how a site is computed if it says nothing."""
    return ""


def nothing_else(site: Site) -> dict[str, Any]:
    """The other candidates, and the integers, of a rule that knows of none."""
    return {}


def saves_none(site: Site) -> bool:
    """Whether a rule saves memory that does not."""
    return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What every rule has. Use `Pattern` or `Region`.

    name:        how options, reports and errors call it.
    spellings:   plain PyTorch functions of the arguments that `inputs` draws: what users write. The laws of
                 `fxopt.testing` run over each of them.
    replacement: called with a site's inputs by name, traced, and put in the graph. One that has a parameter `lowering`
                 gets the site's.
    objections:  yields every reason to leave a site alone; `Cost` for reasons that are no matter of correctness.
                 No objections means rewrite.
    computed:    a few words for the report: how a site without objections is computed, which its `lowering` decides.
    inputs:      draws arguments, by name, that the rule must accept.
    candidates:  by name, other functions of a site's inputs that could stand there, on a device where sites are
                 measured (`fxopt.choosing`): called as the replacement is.
    saves_memory: whether a site is rewritten to hold less, not only to be faster (`fxopt.choice.decide`).
    integers:    by name, for inputs of a site that are integers or booleans, [low, high) of values with which it can be
                 measured. A site with such an input that is not named cannot.
    version:     part of cache keys; raise it when the rule changes.
    """

    name: str
    replacement: Callable[..., Any]
    spellings: tuple[Callable[..., Any], ...]
    inputs: Callable[[Draw], dict[str, Any]]
    objections: Callable[[Site], Iterable[str]] = no_objections
    computed: Callable[[Site], str] = untold
    candidates: Callable[[Site], Mapping[str, Callable[..., Any]]] = nothing_else
    saves_memory: Callable[[Site], bool] = saves_none
    integers: Callable[[Site], Mapping[str, tuple[int, int]]] = nothing_else
    version: int = 1

    def replacements(self, site: Site) -> dict[str, Callable[..., Any]]:
        """All that could stand at `site`, ours first."""
        return {OURS: self.replacement, **self.candidates(site)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pattern(Rule):
    """A rule found by matching its spellings, which are canonicalised by the same function as the graph.

    Arguments of a spelling are holes: a tensor argument binds a node, any other argument binds the constant (or
    scalar node) found in its place.

    given:  for each spelling, constants that the replacement gets besides the holes, so that one serves all.
    extend: may widen a match (a norm takes in the residual add before it).
    """

    given: Mapping[Callable[..., Any], Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    extend: Callable[[Site], Site] = dataclasses.field(default=lambda site: site)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region(Rule):
    """A rule found by growing from each node whose target is in `anchors`.

    grow: from an anchor to a site; raises `NoSite` with the sentence why not, or returns None where the anchor is
          plainly something else, which no report need mention.
    """

    anchors: frozenset[Any]
    grow: Callable[[fx.Node], Site | None]
