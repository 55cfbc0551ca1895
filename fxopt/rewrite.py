"""The rewrite engine: for each rule, sites -> objections -> replacement, verified, or undone.

A rule works on a copy of the graph. If anything goes wrong the copy is dropped, so that a rule can fail without
harm to the graph or to the rules after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxopt import compat, verify
from fxopt.fake import ambient_state, arguments, propagate, value_of
from fxopt.match import find_pattern
from fxopt.rule import Cost, NoSite, Pattern, Place, Refusal, Region, Rewrite, Rule, Site
from fxopt.simplify import is_random, mutated_arguments, storage_of

__all__ = ["Outcome", "apply_rule", "candidates", "copy_module", "submodules"]

_BODIES = (compat.tag_activation_checkpoint,)
"""Higher-order operators whose bodies are ordinary training code; AOTAutograd retraces them."""


@dataclasses.dataclass
class Outcome:
    """What one rule did: the graph it left and its decisions. `deferrable` names nodes only graph outputs read."""

    module: fx.GraphModule
    rewrites: list[Rewrite] = dataclasses.field(default_factory=list)
    refusals: list[Refusal] = dataclasses.field(default_factory=list)
    deferrable: list[str] = dataclasses.field(default_factory=list)


def apply_rule(rule: Rule, gm: fx.GraphModule, *, force: bool = False, may_defer: bool = True) -> Outcome:
    """Rewrite every site of `rule` in a copy of the canonical graph `gm`, bodies included, and verify the copy.

    force:     ignore objections of cost.
    may_defer: whether an interior value that only graph outputs read may be left for the caller to compute.

    Raises whatever the rule raises and `verify.VerificationError`; `gm` is untouched either way.
    """
    outcome = Outcome(copy_module(gm))
    for module in submodules(outcome.module):
        # A body's outputs are not the caller's: nothing in it can be deferred.
        _apply_in(rule, module, outcome, force, may_defer and module is outcome.module)
    if not outcome.rewrites:
        return dataclasses.replace(outcome, module=gm)
    for module in submodules(outcome.module):
        module.graph.eliminate_dead_code(_matters)
        module.recompile()
        propagate(module)
    verify.same_interface(gm, outcome.module)
    return outcome


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
                yield from submodules(body)
    yield gm


def _matters(node: fx.Node) -> bool:
    return node.is_impure() or not verify.is_removable(node)


def _apply_in(rule: Rule, gm: fx.GraphModule, outcome: Outcome, force: bool, may_defer: bool) -> None:
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    gone: set[fx.Node] = set()
    moved: dict[fx.Node, fx.Node] = {}
    for found in list(candidates(rule, gm)):
        if isinstance(found, Refusal):
            outcome.refusals.append(found)
            continue
        if not gone.isdisjoint(found.nodes):
            continue  # an earlier site of this rule already covers it
        found = found.renamed(moved)
        reasons = [*illegal(found, order, may_defer), *rule.objections(found)]
        if force:
            reasons = [reason for reason in reasons if not isinstance(reason, Cost)]
        place = Place.of(found.anchor)
        if reasons:
            only_cost = all(isinstance(reason, Cost) for reason in reasons)
            outcome.refusals.append(
                Refusal(rule.name, found.anchor.name, place, tuple(map(str, reasons)), len(found.nodes), only_cost)
            )
            continue
        made = replace(found, rule.replacement, gm.graph, order, moved)
        gone.update(found.nodes)
        outcome.deferrable += [node.name for node in found.deferrable]
        outcome.rewrites.append(Rewrite(rule.name, found.anchor.name, place, len(found.nodes), found.detail, made))


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


def illegal(site: Site, order: dict[fx.Node, int], may_defer: bool) -> Iterator[str]:
    """The reasons, common to all rules, why `site` may not be rewritten as one computation.

    order: the position of every node in the graph.
    """
    yield from _escapes(site, may_defer)
    for node in site.nodes:
        if is_random(node):
            yield f"{node.name} ({node.target}) draws random numbers"
    first_output = min(order[node] for node in site.outputs)
    for item in site.input_nodes:
        if order[item] > first_output:
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
    for node in list(order)[min(positions) : max(positions) + 1]:
        if node.target in compat.STATE_SWITCHES:
            yield f"{node.name} switches grad mode or autocast inside the region"
        if any(storage_of(value_of(written)) in memory for written in mutated_arguments(node)):
            yield f"{node.name} ({node.target}) writes in place to memory of the region"


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
    anchor = min(site.outputs, key=order.__getitem__)

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
    provenance = {key: anchor.meta[key] for key in ("stack_trace", "nn_module_stack", "grad") if key in anchor.meta}
    for node in made:
        node.meta.update(provenance, rule=site.rule)
        order[node] = order[anchor]
    _hand_over(site, _values_of_results(new), results, moved)
    return tuple(node.name for node in made)


def _values_of_results(new: fx.Graph) -> list[Any]:
    output = next(iter(reversed(new.nodes)))
    return [value_of(item) for item in arguments(output)[0]]


def _hand_over(site: Site, values: Sequence[Any], results: Sequence[fx.Node], moved: dict[fx.Node, fx.Node]) -> None:
    if len(results) != len(site.outputs):
        raise verify.VerificationError(f"replacement returns {len(results)} values for {len(site.outputs)} outputs")
    for old, value, new in zip(site.outputs, values, results, strict=True):
        verify.same_value(f"{site.rule} at {old.name}", value_of(old), value, grad=False)
        old.replace_all_uses_with(new)
        moved[old] = new
