"""The rewrite engine: for each rule, sites -> objections -> replacement, verified, or undone.

A rule works on a copy of the graph. If anything goes wrong the copy is dropped, so that a rule can fail without
harm to the graph or to the rules after it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import fx

from fxopt import compat, verify
from fxopt.choice import INDUCTOR, OURS, Choice
from fxopt.fake import ambient_state, arguments, propagate, value_of
from fxopt.legality import illegal, place_of
from fxopt.match import find_pattern
from fxopt.rule import (
    Cost,
    NoSite,
    Pattern,
    Place,
    Refusal,
    Region,
    Rewrite,
    Rule,
    Site,
    provenance_of,
)
from fxopt.score.reader import OUTSIDE
from fxopt.sharing import share

__all__ = ["Outcome", "apply_rule", "candidates", "copy_module", "illegal", "submodules"]

_BODIES = (compat.tag_activation_checkpoint,)
"""Higher-order operators whose bodies are ordinary training code; AOTAutograd retraces them."""


BEYOND_LIMIT = "`fxopt bisect` lets no more sites be rewritten in this process"


class Chooses(Protocol):
    """Says what a site takes: `fxopt.choosing.Chooser`."""

    def choose(self, rule: Rule, site: Site) -> Choice | None:
        """The choice at `site`, None where there is none to be made."""
        ...


Permits = Callable[[Rule, Site, Callable[..., Any]], bool]
"""Says whether a site of a rule may be rewritten to a replacement: `fxopt bisect` counts."""


@dataclasses.dataclass(frozen=True)
class _How:
    """How a graph is to be rewritten: the keyword arguments of `apply_rule`."""

    force: bool
    may_defer: bool
    lowering: str
    chooser: Chooses | None
    permits: Permits | None
    banned: Mapping[str, str]


@dataclasses.dataclass
class _Change:
    """What a rule did to one graph: its rewrites, and the random nodes that it replaced by draws of its own."""

    rewrites: list[Rewrite] = dataclasses.field(default_factory=list)
    redrawn: set[fx.Node] = dataclasses.field(default_factory=set)

    @property
    def made(self) -> set[str]:
        """The names of the nodes it put there."""
        return {name for item in self.rewrites for name in item.made}


@dataclasses.dataclass
class Outcome:
    """What one rule did: the graph it left and its decisions. `deferrable` names nodes only graph outputs read."""

    module: fx.GraphModule
    rewrites: list[Rewrite] = dataclasses.field(default_factory=list)
    refusals: list[Refusal] = dataclasses.field(default_factory=list)
    deferrable: list[str] = dataclasses.field(default_factory=list)


def apply_rule(
    rule: Rule,
    gm: fx.GraphModule,
    *,
    force: bool = False,
    may_defer: bool = True,
    lowering: str = "auto",
    chooser: Chooses | None = None,
    permits: Permits | None = None,
    banned: Mapping[str, str] = MappingProxyType({}),
) -> Outcome:
    """Rewrite every site of `rule` in a copy of the canonical graph `gm`, bodies included, and verify the copy.

    force:     ignore objections of cost, and measure nothing.
    may_defer: whether an interior value that only graph outputs read may be left for the caller to compute.
    lowering:  how operators of fxopt's are computed (`fxopt.ops.launch.Lowering`).
    chooser:   asked at each site to which nothing but cost is objected, and what it measured settles that. None: every
               site takes the replacement unless something is objected.
    permits:   asked last, at each site that is to be rewritten.
    banned:    sites that are to be left alone, by their anchor's name, with the reason.

    Raises whatever the rule raises and `verify.VerificationError`; `gm` is untouched either way.
    """
    outcome = Outcome(copy_module(gm))
    modules = list(submodules(outcome.module))
    how = _How(force, may_defer, lowering, chooser, permits, banned)
    inner = dataclasses.replace(how, may_defer=False)  # a body's outputs are not the caller's
    changes = [_apply_in(rule, one, outcome, how if one is outcome.module else inner) for one in modules]
    if not any(change.rewrites for change in changes):
        return dataclasses.replace(outcome, module=gm)
    for module, change in zip(modules, changes, strict=True):
        _clean(module, change, rule.name)
        outcome.rewrites += change.rewrites
    for before, after, change in zip(submodules(gm), modules, changes, strict=True):
        verify.same_interface(before, after, {node.name for node in change.redrawn}, change.made)
    return outcome


def _clean(gm: fx.GraphModule, change: _Change, rule: str) -> None:
    """Drop what the rewrites left without readers, compute equal nodes that they made once, and give fresh values."""
    gm.graph.eliminate_dead_code(lambda node: node not in change.redrawn and not verify.is_removable(node))
    propagate(gm)
    shared = share(gm, rule) if change.rewrites else {}
    if shared:
        propagate(gm)
    change.rewrites = [
        dataclasses.replace(item, made=tuple(dict.fromkeys(shared.get(name, name) for name in item.made)))
        for item in change.rewrites
    ]
    gm.recompile()


def copy_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of `gm` with a graph and bodies of its own; parameters and constants are shared."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, env)
    source_output = next(iter(reversed(gm.graph.nodes)))
    graph.output(result).meta = dict(source_output.meta)
    copy = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    copy.meta = dict(gm.meta)
    for name, body in gm.named_children():
        if isinstance(body, fx.GraphModule):
            setattr(copy, name, copy_module(body))
    return copy


def submodules(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """`gm`'s checkpointed bodies, innermost first, and then `gm`."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in _BODIES:
            body = getattr(gm, str(node.args[0].target), None)
            if isinstance(body, fx.GraphModule):
                _note_arguments(body, node)
                yield from submodules(body)
    yield gm


def _note_arguments(body: fx.GraphModule, call: fx.Node) -> None:
    """Note in the placeholders of `body` what `call` passes, for rules that look outside; nothing if calls differ."""
    for placeholder, argument in zip(body.graph.find_nodes(op="placeholder"), call.args[1:], strict=False):
        known = placeholder.meta.setdefault(OUTSIDE, argument)
        if known is not argument and getattr(known, "graph", None) is call.graph:
            placeholder.meta[OUTSIDE] = None
        elif known is not argument:
            placeholder.meta[OUTSIDE] = argument  # noted for the graph that this one is a copy of


def _apply_in(rule: Rule, gm: fx.GraphModule, outcome: Outcome, how: _How) -> _Change:
    change = _Change()
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    gone: set[fx.Node] = set()
    moved: dict[fx.Node, fx.Node] = {}
    for found in list(candidates(rule, gm)):
        if isinstance(found, Refusal):
            outcome.refusals.append(found)
            continue
        if not gone.isdisjoint(found.nodes):
            continue  # an earlier site of this rule already covers it
        found = dataclasses.replace(found.renamed(moved), lowering=how.lowering)
        objections = [*illegal(found, order, how.may_defer), *rule.objections(found)]
        objections += [how.banned[found.anchor.name]] if found.anchor.name in how.banned else []
        reasons, choice = _settled(rule, found, objections, how)
        node, place = found.anchor.name, Place.of(found.anchor)
        if reasons:
            only_cost = all(isinstance(reason, Cost) for reason in reasons)
            outcome.refusals.append(
                Refusal(rule.name, node, place, tuple(map(str, reasons)), len(found.nodes), only_cost, choice)
            )
            continue
        winner = choice.winner if choice is not None and choice.winner else OURS
        replacement = rule.replacements(found)[winner]
        if how.permits is not None and not how.permits(rule, found, replacement):
            outcome.refusals.append(Refusal(rule.name, node, place, (BEYOND_LIMIT,), len(found.nodes)))
            continue
        made = replace(found, replacement, gm.graph, order, moved)
        gone.update(found.nodes)
        outcome.deferrable += [node.name for node in found.deferrable]
        change.redrawn.update(found.draws)
        computed = rule.computed(found) if winner == OURS else winner
        detail = "; ".join(part for part in (found.detail, computed) if part)
        change.rewrites.append(Rewrite(rule.name, node, place, len(found.nodes), detail, made, choice))
    return change


def _settled(rule: Rule, site: Site, reasons: list[str], how: _How) -> tuple[list[str], Choice | None]:
    """What speaks against `site` in the end. Objections of cost are foresight, and yield to what is measured."""
    if how.force:
        return [reason for reason in reasons if not isinstance(reason, Cost)], None
    if how.chooser is None or not all(isinstance(reason, Cost) for reason in reasons):
        return reasons, None
    choice = how.chooser.choose(rule, site)
    if choice is None or not choice.winner:
        return reasons, choice
    return [Cost(choice.against)] if choice.winner == INDUCTOR else [], choice


def candidates(rule: Rule, gm: fx.GraphModule) -> Iterator[Site | Refusal]:
    """Every site of `rule` in `gm`, and every anchor or near miss that is none, in graph order.

    Raises TypeError for a rule that is neither a `Pattern` nor a `Region`.
    """
    if isinstance(rule, Pattern):
        return find_pattern(rule, gm)
    if isinstance(rule, Region):
        return _grown(rule, gm)
    raise TypeError(f"rule {rule.name!r} is neither a Pattern nor a Region")


def _grown(rule: Region, gm: fx.GraphModule) -> Iterator[Site | Refusal]:
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in rule.anchors:
            try:
                site = rule.grow(node)
                if site is not None:
                    yield site
            except NoSite as no:
                yield Refusal(rule.name, node.name, Place.of(node), (str(no),), no.agreed)


def replace(
    site: Site,
    replacement: Callable[..., Any],
    graph: fx.Graph,
    order: dict[fx.Node, int],
    moved: dict[fx.Node, fx.Node],
) -> tuple[str, ...]:
    """Put `replacement`, traced on the site's fake values, in the place of the site. Returns the new nodes' names."""
    names = [name for name, item in site.inputs.items() if isinstance(item, fx.Node)]
    constants = {name: item for name, item in site.inputs.items() if name not in names}
    if "lowering" in inspect.signature(replacement).parameters:
        constants["lowering"] = site.lowering
    anchor = place_of(site, order)

    def traced(*values: Any) -> Any:
        out = replacement(**dict(zip(names, values, strict=True)), **constants)
        return out if isinstance(out, tuple) else (out,)

    with ambient_state():
        torch.set_grad_enabled(anchor.meta.get("grad", torch.is_grad_enabled()))
        new = compat.trace_atens(traced, [site.value(name) for name in names]).graph
    env: dict[fx.Node, Any] = dict(
        zip((n for n in new.nodes if n.op == "placeholder"), (site.inputs[n] for n in names), strict=True)
    )
    given = set(env)
    with graph.inserting_before(anchor):
        results: Any = graph.graph_copy(new, env)
    made = [node for inner, node in env.items() if inner not in given]
    provenance = provenance_of(anchor)
    for node in made:
        node.meta.update(provenance, rule=site.rule, sites=((site.anchor.name, Place.of(site.anchor)),))
        if site.origins:
            node.meta["origins"] = site.origins
        order[node] = order[anchor]
    _hand_over(site, _values_of_results(new), results, moved)
    return tuple(node.name for node in made)


def _values_of_results(new: fx.Graph) -> list[Any]:
    output = next(iter(reversed(new.nodes)))
    return [value_of(item) for item in arguments(output)[0]]


def _hand_over(site: Site, values: Sequence[Any], results: Sequence[fx.Node], moved: dict[fx.Node, fx.Node]) -> None:
    if len(results) != len(site.outputs):
        raise verify.VerificationError(f"replacement returns {len(results)} values for {len(site.outputs)} outputs")
    inside = set(site.nodes)  # they stand before the replacement, and are dropped
    for old, value, new in zip(site.outputs, values, results, strict=True):
        verify.same_value(f"{site.rule} at {old.name}", value_of(old), value, grad=False)
        new.meta["val"] = value_of(old)  # a later site of this rule may read it, and tracing records no requires_grad
        old.replace_all_uses_with(new, lambda user: user not in inside)
        moved[old] = new
