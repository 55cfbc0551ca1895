"""Matching patterns: plain PyTorch functions found in a canonical graph.

First loosely, with casts looked through and constants ignored, which tells what the holes would bind. Then the
spelling is traced again on exactly those values, so that dtype and rank decide its casts and constants as they do
in the user's code, and must agree node for node.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, fx

from fxopt.fake import value_of
from fxopt.rule import Pattern, Place, Refusal, Site
from fxopt.spelling import COMMUTES, Expr, read, skip_casts
from fxopt.spellings import Traced, skeletons_for, traced_together

_NEAR = 4
"""A refusal worth telling agreed in this many nodes at least, and in half of the spelling."""


@dataclasses.dataclass
class Binding:
    """What a match has bound so far: holes to the nodes met in their place, and the graph nodes that agreed."""

    holes: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    nodes: dict[fx.Node, None] = dataclasses.field(default_factory=dict)

    def copy(self) -> Binding:
        """An independent copy, to back out of."""
        return Binding({name: list(bound) for name, bound in self.holes.items()}, dict(self.nodes))


class Mismatch(Exception):
    """The graph and a spelling differ: where, and the nodes that had agreed."""

    def __init__(self, reason: str, nodes: Iterable[fx.Node] = ()):
        super().__init__(reason)
        self.nodes = frozenset(nodes)

    @property
    def agreed(self) -> int:
        """How far the match got."""
        return len(self.nodes)


def find_pattern(rule: Pattern, gm: fx.GraphModule) -> Iterator[Site | Refusal]:
    """The largest matches of `rule` that do not overlap, in graph order, and the near misses outside them."""
    skeletons = skeletons_for(rule, gm)
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    memo: dict[Any, Traced] = {}
    roots = {node: _operator(skip_casts(node)) for node in gm.graph.nodes}
    sites: list[Site] = []
    misses: dict[fx.Node, Mismatch] = {}
    for node in gm.graph.nodes:
        for spelling, skeleton in skeletons:
            if roots[node] is None or roots[node] != _operator(skip_casts(skeleton.root)):
                continue
            try:
                site = _match(rule, spelling, skeleton, node, order, memo)
            except Mismatch as miss:
                if miss.agreed >= max(_NEAR, skeleton.size // 2) and (
                    node not in misses or miss.agreed > misses[node].agreed
                ):
                    misses[node] = miss
            else:
                sites.append(site)
    kept = _largest_disjoint(sites, order)
    inside = {node for site in kept for node in site.nodes}
    refusals = [(node, miss) for node, miss in misses.items() if inside.isdisjoint({node, *miss.nodes})]
    found: list[tuple[int, Site | Refusal]] = [(order[site.anchor], rule.extend(site)) for site in kept]
    found += [
        (order[node], Refusal(rule.name, node.name, Place.of(node), (str(miss),), miss.agreed))
        for node, miss in refusals
    ]
    yield from (item for _, item in sorted(found, key=lambda pair: pair[0]))


def _largest_disjoint(sites: list[Site], order: dict[fx.Node, int]) -> list[Site]:
    taken: set[fx.Node] = set()
    kept = []
    for site in sorted(sites, key=lambda site: (-len(site.nodes), order[site.anchor])):
        if taken.isdisjoint(site.nodes):
            taken.update(site.nodes)
            kept.append(site)
    return kept


def _match(
    rule: Pattern,
    spelling: Callable[..., Any],
    skeleton: Traced,
    node: fx.Node,
    order: dict[fx.Node, int],
    memo: dict[Any, Traced],
) -> Site:
    """The site of `spelling` that ends in `node`. Raises `Mismatch`."""
    loose = Binding()
    _compare(skeleton.root, node, skeleton, loose, exact=False)
    failure: Mismatch | None = None
    for choice in _candidates(loose, skeleton):
        exact = Binding()
        try:
            traced = _retraced(spelling, choice, memo)
            _compare(traced.root, node, traced, exact, exact=True)
        except Mismatch as miss:
            failure = miss if failure is None or miss.agreed > failure.agreed else failure
            continue
        inputs = {
            name: exact.holes[name][0]
            for name in (*traced.holes.values(), *traced.scalars.values())
            if name in exact.holes
        }
        nodes = tuple(sorted(exact.nodes, key=order.__getitem__))
        return Site(
            rule.name,
            (node,),
            nodes,
            inputs | dict(rule.given.get(spelling, {})),
            detail=spelling.__name__.replace("_", " "),
        )
    raise failure or Mismatch(f"{node.name} binds no tensor", loose.nodes)


def _candidates(loose: Binding, skeleton: Traced) -> Iterator[dict[str, Any]]:
    """What each tensor hole may bind: the value behind the casts met in its place, or the cast itself."""
    names = [name for name in skeleton.holes.values() if name in loose.holes]
    options = []
    for name in names:
        met = list(dict.fromkeys(loose.holes[name]))
        options.append(list(dict.fromkeys([skip_casts(met[0]), *met])))
    scalars = {name: value_of(loose.holes[name][0]) for name in skeleton.scalars.values() if name in loose.holes}
    for choice in itertools.product(*options):
        yield dict(zip(names, choice, strict=True)) | scalars


def _compare(pattern: Any, node: Any, traced: Traced, binding: Binding, exact: bool) -> None:
    """Extend `binding` so that `pattern` reads as `node`, or raise `Mismatch`."""
    if isinstance(pattern, fx.Node) and pattern in traced.holes:
        _bind(traced.holes[pattern], node, binding, exact)
        return
    if type(pattern) is float and pattern in traced.scalars:
        _bind(traced.scalars[pattern], node, binding, exact)
        return
    if not exact:
        pattern, node = skip_casts(pattern), skip_casts(node)
        if isinstance(pattern, fx.Node) and pattern in traced.holes:
            _bind(traced.holes[pattern], node, binding, exact)
            return
    wanted, found = read(pattern), read(node)
    if wanted is None:
        _compare_constant(pattern, node, traced, binding, exact)
        return
    if found is None or not _same_op(wanted, found):
        raise Mismatch(f"expected {_name(wanted.op)}, found {_described(node)}", binding.nodes)
    _compare_arguments(wanted, found, traced, binding, exact)


def _compare_arguments(wanted: Expr, found: Expr, traced: Traced, binding: Binding, exact: bool) -> None:
    binding.nodes.update(dict.fromkeys(found.covers))
    if len(wanted.args) != len(found.args) and exact:
        raise Mismatch(
            f"{found.covers[0].name} has other arguments than {_name(wanted.op)} in the pattern", binding.nodes
        )
    orders = [found.args, found.args[::-1]] if wanted.op in COMMUTES and len(found.args) == 2 else [found.args]
    furthest: Mismatch | None = None
    for args in orders:
        attempt = binding.copy()
        try:
            for one, other in zip(wanted.args, args, strict=False):
                _compare(one, other, traced, attempt, exact)
        except Mismatch as miss:
            furthest = miss if furthest is None or miss.agreed > furthest.agreed else furthest
        else:
            binding.holes, binding.nodes = attempt.holes, attempt.nodes
            return
    assert furthest is not None
    raise furthest


def _compare_constant(pattern: Any, node: Any, traced: Traced, binding: Binding, exact: bool) -> None:
    if isinstance(pattern, list | tuple):
        if not isinstance(node, list | tuple) or len(pattern) != len(node):
            raise Mismatch(f"expected {pattern}, found {_described(node)}", binding.nodes)
        for one, other in zip(pattern, node, strict=True):
            _compare(one, other, traced, binding, exact)
    elif exact and (isinstance(node, fx.Node) or pattern != node):
        raise Mismatch(f"expected the constant {pattern}, found {_described(node)}", binding.nodes)
    elif isinstance(node, fx.Node) and isinstance(value_of(node), Tensor):
        raise Mismatch(f"expected a constant, found {node.name}", binding.nodes)


def _bind(name: str, node: Any, binding: Binding, exact: bool) -> None:
    bound = binding.holes.setdefault(name, [])
    same = (
        (lambda one, other: one is other or one == other)
        if exact
        else (lambda one, other: skip_casts(one) is skip_casts(other) or one == other)
    )
    if bound and not same(bound[0], node):
        raise Mismatch(f"`{name}` would be both {_described(bound[0])} and {_described(node)}", binding.nodes)
    bound.append(node)


def _operator(node: Any) -> Any:
    """What `node` reads as, arguments aside; None for what is no call."""
    expression = read(node)
    return None if expression is None else expression.op


def _same_op(one: Expr | None, other: Expr | None) -> bool:
    return one is not None and other is not None and one.op == other.op


def _name(op: Any) -> str:
    return op if isinstance(op, str) else str(op)


def _described(node: Any) -> str:
    if not isinstance(node, fx.Node):
        return f"{_name(node.op)}" if isinstance(node, Expr) else f"the constant {node}"
    value = value_of(node)
    shape = f" {str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, Tensor) else ""
    return f"{node.name}{'' if node.op == 'placeholder' else f' ({node.target})'}{shape}"


def _retraced(spelling: Callable[..., Any], choice: dict[str, Any], memo: dict[Any, Traced]) -> Traced:
    """`spelling` traced on exactly the values that a loose match bound. Raises `Mismatch` where it cannot run."""
    values = {name: value_of(item) for name, item in choice.items()}
    tensors = [(name, value) for name, value in values.items() if isinstance(value, Tensor)]
    key = (spelling, *((name, str(value.shape), value.dtype) for name, value in tensors))
    if key not in memo:
        try:
            (memo[key],) = traced_together([spelling], values)
        except Exception as error:
            raise Mismatch(f"{spelling.__name__} cannot run on these values: {error}") from error
    return memo[key]
