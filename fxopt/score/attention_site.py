"""Find attention around a softmax: from the softmax down to its product with values, and up to that of q and k.

Every step reads elements (`fxopt.score.reader`), so that it does not matter how the axes are spelled on the way: flat
or grouped heads, `einsum`, transposes. A step that cannot be made raises `NoSite` with the sentence why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from fxopt.fake import arguments, bound_arguments, value_of
from fxopt.rule import NoSite
from fxopt.score import calls
from fxopt.score.index import Index, Indexer, Unknown, is_one, size_term
from fxopt.score.operands import (
    DEPTH,
    PRODUCTS,
    WIDTH,
    B,
    H,
    K,
    Operand,
    Product,
    Q,
    heads_of_flat,
    operand,
    product_at,
)
from fxopt.score.reader import VIEWS, Reader, written_in
from fxopt.score.scores import Scores, separate
from fxopt.score.term import Term, apply, constant, substitute, variable

S = variable("s")


@dataclasses.dataclass(frozen=True)
class Found:
    """Attention as it stands in a graph.

    output:  the node that holds the result; `index` says where in it (b, h, q, width) is.
    nodes:   all nodes from the first product to `output`, in graph order.
    scores:  program of the score, and conditions; `scale` multiplies q @ k.T before it.
    sink:    a term of h, one more logit a row; None without.
    dropout: the probability of dropping; `draws` are the nodes that draw.
    sizes:   b, h, q, k -> size, symbolic or not.
    """

    output: fx.Node
    index: Index
    nodes: tuple[fx.Node, ...]
    query: Operand
    key: Operand
    value: Operand
    scores: Scores
    reader: Reader
    sizes: Mapping[str, Any]
    scale: float = 1.0
    sink: Term | None = None
    dropout: float = 0.0
    draws: tuple[fx.Node, ...] = ()


# --- F.scaled_dot_product_attention ------------------------------------------------------------------------------


def of_sdpa(node: fx.Node) -> Found:
    """Attention that is one call. Raises `NoSite`."""
    given = bound_arguments(node)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    rank = value_of(query).dim()
    if rank not in (3, 4) or {value_of(key).dim(), value_of(value).dim()} != {rank}:
        ranks = f"{rank}, {value_of(key).dim()} and {value_of(value).dim()}"
        raise NoSite(f"{node.name} has queries, keys and values of rank {ranks}: only 3 and 4 are read", 1)
    lead: Index = (B, H)[: rank - 2]
    shape, keys = value_of(query).shape, value_of(key).shape
    sizes = {"b": shape[0], "h": shape[1] if rank == 4 else 1, "q": shape[-2], "k": keys[-2]}
    reader = Reader(sizes, written_in(node.graph))
    group = _group(node, sizes["h"], keys[1]) if rank == 4 else 1
    shared = (B, apply("floordiv", H, constant(group)) if group > 1 else H)[: rank - 2]
    operands = _operands(
        reader,
        (query, (*lead, Q, DEPTH), Q, DEPTH),
        (key, (*_broadcast(shared, key), K, DEPTH), K, DEPTH),
        (value, (*_broadcast(shared, value), K, WIDTH), K, WIDTH),
    )
    scale = given["scale"] if given["scale"] is not None else _inverse_root(node, shape[-1])
    dropout = _probability(node, given["dropout_p"])
    return Found(
        output=node,
        index=(*lead, Q, WIDTH),
        nodes=(node,),
        scores=_sdpa_scores(node, given, reader),
        reader=reader,
        sizes=sizes,
        scale=scale,
        dropout=dropout,
        draws=(node,) if dropout else (),
        **operands,  # type: ignore[arg-type]
    )


def _broadcast(index: Index, node: fx.Node) -> Index:
    return tuple(constant(0) if is_one(size) else term for term, size in zip(index, value_of(node).shape, strict=False))


def _group(node: fx.Node, heads: Any, shared: Any) -> int:
    if not bound_arguments(node)["enable_gqa"] or str(heads) == str(shared):
        return 1
    if type(heads) is not int or type(shared) is not int:
        raise NoSite(f"{node.name} has {heads} query heads and {shared} key heads, known only at run time", 1)
    return heads // shared


def _inverse_root(node: fx.Node, depth: Any) -> float:
    if type(depth) is not int:
        raise NoSite(f"{node.name} has a head dimension known only at run time", 1)
    return float(depth**-0.5)


def _sdpa_scores(node: fx.Node, given: Mapping[str, Any], reader: Reader) -> Scores:
    """The mask argument and `is_causal`, whose corner is at the top left."""
    term, conditions, fills = S, [], set[str]()
    if given["is_causal"]:
        conditions.append(apply("le", K, Q))
        fills.add("zero")
    if given["attn_mask"] is not None:
        read = _read(reader.broadcast, given["attn_mask"], (B, H, Q, K))
        if read.kind == "bool":
            conditions.append(read)
            fills.add("zero")
        else:
            total = apply("add", S, read)
            reader.origins.note(total, node)
            found = separate(total, reader.origins.inherit)
            term = found.program
            conditions += found.conditions
            # SDPA's softmax gives zeros where everything is -inf
            fills |= {"zero" if fill == "nan" else fill for fill in found.fills}
    return Scores(term, tuple(conditions), frozenset(fills or {"zero"}))


# --- products around a softmax -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Softmax:
    """A softmax over axis `dim` of `source`: `result` holds the probabilities."""

    source: fx.Node
    result: fx.Node
    dim: int


def softmax_at(node: Any) -> Softmax | None:
    """`node` as a softmax, or as ``exp(x) / exp(x).sum(dim, keepdim=True)``."""
    name = calls.name_of(node)
    if name in ("softmax", "_softmax", "special_softmax"):
        given = bound_arguments(node)
        return Softmax(given["self"], node, given["dim"] % value_of(node).dim())
    if name != "div" or len(node.args) != 2 or node.kwargs:
        return None
    top, bottom = node.args
    if calls.name_of(top) != "exp" or calls.name_of(bottom) != "sum" or bottom.args[0] is not top:
        return None
    given = bound_arguments(bottom)
    if len(given.get("dim") or ()) != 1 or not given["keepdim"]:
        return None
    return Softmax(top.args[0], node, given["dim"][0] % value_of(top).dim())


def of_softmax(found: Softmax) -> Found | None:
    """Attention around `found`; None where no product reads its result and none goes into it. Raises `NoSite`."""
    last = _product_below(found.result)
    if last is None:
        _refuse_if_attention(found)
        return None
    return _Growth(found, last).result()


def _product_below(node: fx.Node) -> fx.Node | None:
    """The matrix product that reads `node`, casts, views and dropout in between."""
    waiting, seen = [node], {node}
    while waiting:
        item = waiting.pop(0)
        for user in item.users:
            name = calls.name_of(user)
            if name in PRODUCTS:
                return user
            if name in _ON_THE_WAY and user not in seen:
                seen.add(user)
                waiting.append(user)
    return None


_ON_THE_WAY = {*VIEWS, "to", "dropout"}


def _refuse_if_attention(found: Softmax) -> None:
    """Raise where a product of two activations is softmaxed, although no product follows; else it is no attention."""
    node: Any = found.source
    for _ in range(12):
        if calls.name_of(node) in PRODUCTS and value_of(node).dim() >= 3:
            raise NoSite(f"no matrix product reads the probabilities {found.result.name}", 2)
        if calls.name_of(node) not in {*VIEWS, *calls.ELEMENTWISE, "to", "masked_fill", "where"}:
            return
        tensors = [item for item in node.all_input_nodes if isinstance(value_of(item), Tensor)]
        node = max(tensors, key=lambda item: value_of(item).dim(), default=None)


class _Growth:
    """One site, step by step from its last product to its first."""

    def __init__(self, softmax: Softmax, last: fx.Node):
        self.softmax, self.last = softmax, last
        self.agreed = 2
        self.dropout, self.draws = 0.0, list[fx.Node]()

    def result(self) -> Found:
        index, self.sizes = self.output_index()
        self.reader = Reader(self.sizes, written_in(self.last.graph))
        last = _read(product_at, self.last, index, K)
        if self.probable(last.right[0]) and not self.probable(last.left[0]):
            raise NoSite(f"{self.last.name} has the probabilities on its right", self.agreed)
        self.sizes["k"] = self.length_of_keys(last)
        if is_one(self.sizes["q"]) or is_one(self.sizes["k"]):
            raise NoSite(f"{self.last.name} has a single query or key: there is nothing to win", self.agreed)
        self.reader = Reader(self.sizes, self.reader.mutated)
        place = self.probabilities(*last.left)
        source = _without_row_maximum(self.softmax.source, self.softmax.dim)
        term = _read(self.reader.at, source, place)
        first = self.first_product(term)
        scores = separate(self.in_terms_of_scores(term, first), self.reader.origins.inherit)
        left, right = (first.left, first.right) if Q in first.left[1] else (first.right, first.left)
        if Q not in left[1] or K not in right[1]:
            raise NoSite(f"{first.node.name} does not multiply queries by keys", self.agreed)
        operands = _operands(self.reader, (*left, Q, DEPTH), (*right, K, DEPTH), (*last.right, K, WIDTH))
        return Found(
            output=self.last,
            index=index,
            nodes=self.nodes_from(first.node),
            scores=scores,
            reader=self.reader,
            sizes=self.sizes,
            sink=self.sink(source, place),
            dropout=self.dropout,
            draws=tuple(self.draws),
            **operands,  # type: ignore[arg-type]
        )

    def output_index(self) -> tuple[Index, dict[str, Any]]:
        """The index of the last product's result in terms of b, h, q and width, and the sizes of b, h, q."""
        shape = value_of(self.last).shape
        if calls.name_of(self.last) == "einsum":
            return self.einsum_index()
        if len(shape) == 4:
            return (B, H, Q, WIDTH), {"b": shape[0], "h": shape[1], "q": shape[2]}
        if len(shape) == 5 and type(shape[1]) is int and type(shape[2]) is int:
            sizes = {"b": shape[0], "h": shape[1] * shape[2], "q": shape[3]}
            return (B, *Indexer(sizes).divmod(H, constant(shape[2])), Q, WIDTH), sizes
        if len(shape) == 3:
            batch, heads = heads_of_flat([*self.last.all_input_nodes, self.last], shape[0])
            flat = B if is_one(heads) else H
            if not is_one(heads) and not is_one(batch):
                flat = apply("add", apply("mul", B, size_term(heads)), H)
            return (flat, Q, WIDTH), {"b": batch, "h": heads, "q": shape[1]}
        if len(shape) == 2:
            return (Q, WIDTH), {"b": 1, "h": 1, "q": shape[0]}
        raise NoSite(f"{self.last.name} has {len(shape)} axes: only 2 to 5 are read", self.agreed)

    def einsum_index(self) -> tuple[Index, dict[str, Any]]:
        """The same for an einsum: shared axes are batch and heads, the probabilities' other is q, the values' width."""
        letters = str(arguments(self.last)[0]).replace(" ", "")
        if "->" not in letters or letters.count(",") != 1 or "." in letters:
            raise NoSite(f"{self.last.name} is an einsum of {letters!r}", self.agreed)
        sources, result = letters.split("->")
        left, right = sources.split(",")
        shared = [letter for letter in left if letter in right and letter in result]
        rows = [letter for letter in left if letter in result and letter not in right]
        columns = [letter for letter in right if letter in result and letter not in left]
        if len(shared) > 2 or len(rows) != 1 or len(columns) != 1 or len(result) != len(shared) + 2:
            raise NoSite(f"{self.last.name} is an einsum of {letters!r}, not of probabilities and values", self.agreed)
        names = dict(zip(shared, (B, H), strict=False)) | {rows[0]: Q, columns[0]: WIDTH}
        size = dict(zip(result, value_of(self.last).shape, strict=True))
        sizes = {"b": 1, "h": 1} | {name: size[letter] for name, letter in zip("bh", shared, strict=False)}
        return tuple(names[letter] for letter in result), sizes | {"q": size[rows[0]]}

    def length_of_keys(self, last: Product) -> Any:
        node, index = last.left
        return value_of(node).shape[index.index(K)]

    def probable(self, node: fx.Node) -> bool:
        """Whether `node` is the softmax's result, rearranged, cast or dropped from."""
        while node is not self.softmax.result:
            first = node.args[0] if calls.name_of(node) in _ON_THE_WAY else None
            if not isinstance(first, fx.Node):
                return False
            node = first
        return True

    def probabilities(self, node: fx.Node, index: Index) -> Index:
        """Back from the last product's operand to the softmax: where in it the probability is read."""
        while node is not self.softmax.result:
            self.agreed += 1
            name = calls.name_of(node)
            if name == "to" and value_of(node).dtype.is_floating_point:
                node = arguments(node)[0]
            elif name == "dropout" and not self.draws:
                self.draws.append(node)
                self.dropout = _probability(node, node.args[1]) if node.args[2] else 0.0
                node = arguments(node)[0]
            else:
                moved = self.reader.source(node, index)
                if moved is None:
                    raise NoSite(f"{node.name} ({node.target}) changes the probabilities", self.agreed)
                node, index = moved
        axis = index[self.softmax.dim]
        if axis is not K:
            raise NoSite(f"{node.name} is a softmax over another axis than that of the keys", self.agreed)
        if any("k" in term.reads for at, term in enumerate(index) if at != self.softmax.dim):
            raise NoSite(f"{node.name} is read at {list(index)}: not one row of probabilities a query", self.agreed)
        return index

    def first_product(self, term: Term) -> Product:
        """The product of queries and keys among what `term`, softmax's input, is computed from."""
        for item in term.walk():
            if item.op != "load" or calls.name_of(item.args[0]) not in PRODUCTS:
                continue
            index = item.args[1:]
            if any(place is Q for place in index) and any(place is K for place in index):
                return _read(product_at, item.args[0], index, DEPTH)
        raise NoSite(f"{self.softmax.source.name} is not computed from a product of queries and keys", self.agreed)

    def in_terms_of_scores(self, term: Term, first: Product) -> Term:
        loads = [item for item in term.walk() if item.op == "load" and item.args[0] is first.node]
        if len(loads) != 1:
            raise NoSite(f"{first.node.name} is read at {len(loads)} places for each probability", self.agreed)
        score = S if first.factor == 1.0 else apply("mul", S, constant(first.factor))
        if first.added is not None:
            node, factor = first.added
            bias = _read(self.reader.broadcast, node, loads[0].args[1:])
            score = apply("add", score, bias if factor == 1.0 else apply("mul", bias, constant(factor)))
        self.reader.origins.note(score, first.node)
        return substitute(term, {loads[0]: score}, self.reader.origins.inherit)

    def sink(self, source: fx.Node, place: Index) -> Term | None:
        """What softmax normalises over besides the keys: one more column, the same for every row of a head."""
        size, keys = value_of(source).shape[self.softmax.dim], self.sizes["k"]
        if str(size) == str(keys):
            return None
        column = (*place[: self.softmax.dim], size_term(keys), *place[self.softmax.dim + 1 :])
        term = _read(self.reader.at, source, column)
        if (
            str(size) != str(keys + 1)
            or not term.reads <= {"h"}
            or any(item.op == "load" and item.args[0] is source for item in term.walk())
        ):
            raise NoSite(
                f"{source.name} has {size} columns for {keys} keys, and they are no sink of a head", self.agreed
            )
        return term

    def nodes_from(self, first: fx.Node) -> tuple[fx.Node, ...]:
        """Every node that depends on `first` and that the last product depends on, both included."""
        depends: dict[fx.Node, bool] = {first: True}

        def visit(node: fx.Node) -> bool:
            if node not in depends:
                inputs = [visit(item) for item in node.all_input_nodes if not item < first]
                depends[node] = any(inputs)
            return depends[node]

        visit(self.last)
        return tuple(sorted(node for node, inside in depends.items() if inside))


def _without_row_maximum(node: fx.Node, dim: int) -> fx.Node:
    """`x` behind ``x - max(x)``: softmax does not see what is subtracted from a whole row."""
    if calls.name_of(node) == "to" and value_of(node).dtype.is_floating_point:
        inner = _without_row_maximum(arguments(node)[0], dim)
        return node if inner is arguments(node)[0] else inner
    if calls.name_of(node) != "sub" or len(node.args) != 2 or not isinstance(node.args[1], fx.Node):
        return node
    maximum = node.args[1]
    while calls.name_of(maximum) in ("detach", "getitem"):
        first, *which = maximum.args
        if which and which[0] != 0 and isinstance(first, fx.Node):
            return node
        maximum = first if isinstance(first, fx.Node) else first[which[0]]  # type: ignore[index, assignment]
    if calls.name_of(maximum) not in ("amax", "max") or arguments(maximum)[0] is not node.args[0]:
        return node
    given = bound_arguments(maximum)
    axes = given.get("dim")
    axes = axes if isinstance(axes, list | tuple) else [axes]
    rank = value_of(node).dim()
    same = given.get("keepdim") and [type(axis) is int and axis % rank for axis in axes] == [dim]
    return arguments(node)[0] if same else node


def _operands(reader: Reader, *wanted: tuple[fx.Node, Index, Term, Term]) -> dict[str, Operand]:
    return {name: _read(operand, reader, *one) for name, one in zip(("query", "key", "value"), wanted, strict=True)}


def _probability(node: fx.Node, given: Any) -> float:
    if type(given) not in (int, float):
        raise NoSite(f"{node.name} drops with a probability known only at run time", 3)
    return float(given)


def _read(read: Any, *args: Any) -> Any:
    """`read(*args)`, what cannot be known told as a reason."""
    try:
        return read(*args)
    except Unknown as unknown:
        raise NoSite(str(unknown), 3) from None
