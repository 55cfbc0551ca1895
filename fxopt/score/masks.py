"""Masks, understood: which structure a condition on (b, h, q, k) has.

A condition is cut into its conjuncts and each is put in a class by what it says of q and k: a band (causal, windows),
equal ids at q and k (documents, chunks), a set of keys or of rows for each batch row (padding), a length, a prefix.
What has no class stays a condition to be evaluated element by element ("dense"): never a wrong class, dense when in
doubt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import sympy

from fxopt.fake import bound_arguments, value_of
from fxopt.score import calls
from fxopt.score.index import Unknown, size_term
from fxopt.score.reader import Reader
from fxopt.score.term import COMPARISONS, Note, Term, apply, cast_to, constant, substitute, unnoted, variable

Q, K = variable("q"), variable("k")
TRUE = constant(True)
_OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
_MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}


@dataclasses.dataclass(frozen=True)
class Mask:
    """The keys that a query may attend to: those that satisfy every part that is not None.

    lower, upper: lower <= k - q <= upper.
    prefix:    an integer of b: a key below it is allowed besides the band.
    documents: an integer of (b, q) that must be the same with k in q's place.
    keep:      a condition on (b, k): keys that are not padding.
    rows:      a condition on (b, q): queries that may attend to anything.
    lengths:   an integer of b that k must be less than.
    rest:      a condition on (b, h, q, k) of no class.
    """

    lower: int | None = None
    upper: int | None = None
    prefix: Term | None = None
    documents: Term | None = None
    keep: Term | None = None
    rows: Term | None = None
    lengths: Term | None = None
    rest: Term | None = None

    @property
    def name(self) -> str:
        """The class, in the words of the report: "all", "causal", "window(256) & documents", ..."""
        parts = [self._band] if self._band else []
        parts += [
            name
            for name, part in (("documents", self.documents), ("padding", self.keep), ("rows", self.rows),
                               ("lengths", self.lengths), ("dense", self.rest))
            if part is not None
        ]  # fmt: skip
        return " & ".join(parts) or "all"

    @property
    def _band(self) -> str:
        lower, upper = self.lower, self.upper
        if self.prefix is not None:
            return "prefix"
        if upper == 0:
            return "causal" if lower is None else f"window({1 - lower})"
        if lower is None and upper is None:
            return ""
        if lower is not None and upper is not None and upper == -lower:
            return f"bidirectional window({upper})"
        return f"band({'' if lower is None else lower}..{'' if upper is None else upper})"

    @property
    def needs_intervals(self) -> bool:
        """Whether which keys are allowed depends on tensors, or on more than the band."""
        return any(part is not None for part in (self.prefix, self.documents, self.keep, self.rows, self.lengths))

    @property
    def condition(self) -> Term:
        """Everything but the band and the rows as one condition; true where there is nothing else."""
        found = TRUE
        if self.documents is not None:
            found = apply("and", found, apply("eq", self.documents, substitute(self.documents, {Q: K})))
        if self.keep is not None:
            found = apply("and", found, self.keep)
        return found if self.rest is None else apply("and", found, self.rest)

    def never_empty(self, queries: Any, keys: Any) -> bool:
        """Whether every query has an allowed key, for certain. queries, keys: sizes of q's and k's axes."""
        if any(part is not None for part in (self.keep, self.rows, self.lengths, self.rest)):
            return False
        lower, upper = self.lower, self.upper
        diagonal = (lower is None or lower <= 0) and (upper is None or upper >= 0)
        if str(queries) == str(keys) and diagonal:
            return True
        if self.documents is not None or type(queries) is not int or type(keys) is not int:
            return False
        first = upper is None or upper >= 0
        last = lower is None or queries - 1 + lower < keys
        return keys > 0 and first and last and (lower is None or upper is None or lower <= upper)


def classify(condition: Term, reader: Reader, queries: Any, keys: Any) -> Mask:
    """The class of `condition`, a boolean term of (b, h, q, k).

    reader: of the graph that the term's loads come from. queries, keys: sizes of q's and k's axes; may be symbolic.
    """
    found = _Classifier(reader, queries, keys)
    for part in conjuncts(condition, reader.origins.inherit):
        found.add(part)
    return found.result()


def conjuncts(condition: Term, note: Note = unnoted) -> Iterator[Term]:
    """The conditions that `condition` is the conjunction of, in order, comparisons of constants decided.

    note: told of what is made on the way, and of which conjunct.
    """
    term = _simple(condition)
    note(term, condition)
    if term.op == "and":
        for part in term.args:
            yield from conjuncts(part, note)
    elif term.op == "le" and term.args[0].op == "abs":  # |x| <= w
        (inner,), bound = term.args[0].args, term.args[1]
        yield apply("le", inner, bound)
        yield apply("ge", inner, apply("neg", bound))
    elif term is not TRUE:
        yield term


def _simple(term: Term) -> Term:
    """`term` with negations pushed inwards and choices between constants turned into conditions."""
    if term.op == "not":
        return _negated(_simple(term.args[0]))
    if term.op == "cast" and term.kind == "bool":
        return _choice(term.args[0], lambda value: cast_to("bool", value)) or term
    if term.op == "where" and term.kind == "bool":
        condition, one, other = term.args
        if other.value is False:
            return apply("and", condition, one)
        return apply("or", condition, other) if one.value is True else term
    if term.op in COMPARISONS:
        return _simple_comparison(term)
    return term


def _simple_comparison(term: Term) -> Term:
    one, other = term.args
    if one.op == "const" and other.op != "const":
        return _simple_comparison(apply(_MIRRORED[term.op], other, one))
    if other.op == "const":
        if term.kind == "bool" and one.kind == "bool" and term.op in ("eq", "ne"):
            return _simple(one if (term.op == "eq") is other.value else apply("not", one))
        chosen = _choice(one, lambda value: _compared(term.op, value, other))
        if chosen is not None:
            return chosen
    if term.op == "lt" and one.op == "abs" and one.kind == "int":
        return apply("le", one, apply("sub", other, constant(1)))
    return term


def _choice(term: Term, decide: Any) -> Term | None:
    """The condition that `decide` of `term` is, for a choice between constants or such choices; else None."""
    if term.op == "cast" and term.args[0].kind == "bool":
        term = apply("where", term.args[0], constant(1.0), constant(0.0))
    if term.op == "const":
        return decide(term)
    if term.op != "where":
        return None
    condition, yes, no = term.args[0], *(_choice(item, decide) for item in term.args[1:])
    if yes is None or no is None:
        return None
    if yes is no:
        return yes
    if yes.op == "const":
        return _simple(apply("or", condition, no) if yes.value else apply("and", apply("not", condition), no))
    if no.op == "const":
        return _simple(apply("or", apply("not", condition), yes) if no.value else apply("and", condition, yes))
    return None


def _compared(op: str, one: Term, other: Term) -> Term:
    x, y = one.value, other.value
    return constant({"lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y, "eq": x == y, "ne": x != y}[op])


def _negated(term: Term) -> Term:
    if term.op in COMPARISONS and term.args[0].kind != "float":  # for floats a NaN would make both false
        return _simple(apply(_OPPOSITE[term.op], *term.args))
    if term.op in ("and", "or"):
        return apply("or" if term.op == "and" else "and", *(_negated(_simple(item)) for item in term.args))
    return apply("not", term)


@dataclasses.dataclass(frozen=True)
class _Line:
    """``k - q + offset`` (or the same of positions at k and at q) stands in relation `op` to 0."""

    op: str
    offset: int
    positions: Term | None = None


class _Classifier:
    """Collects the conjuncts of one mask by class."""

    def __init__(self, reader: Reader, queries: Any, keys: Any):
        self.reader, self.queries, self.keys = reader, queries, keys
        self.parts: dict[str, list[Term]] = {name: [] for name in ("keep", "rows", "lengths", "documents", "rest")}
        self.lower: int | None = None
        self.upper: int | None = None
        self.prefix: Term | None = None
        self.by_position: list[tuple[_Line, Term]] = []

    def add(self, part: Term) -> None:
        """Put one conjunct in its class."""
        line = self.line(part)
        if line is not None:
            if line.positions is None:
                self.bound(line)
            else:
                self.by_position.append((line, part))
            return
        if self.always(part):
            return
        if self.is_documents(part) or self.is_prefix(part) or self.is_length(part):
            return
        reads = part.reads
        name = "keep" if reads <= {"b", "k"} else "rows" if reads <= {"b", "q"} else "rest"
        self.parts[name].append(part)

    def result(self) -> Mask:
        """The mask of all conjuncts added."""
        documents = self.parts["documents"]
        for line, part in self.by_position:
            if any(positions_behind(item, self.reader) is line.positions for item in documents):
                self.bound(line)  # within a document positions grow by 1 a token
            else:
                self.parts["rest"].append(part)
        rest = self.parts["rest"] + [apply("eq", item, substitute(item, {Q: K})) for item in documents[1:]]
        if self.prefix is not None and self.lower is None and self.upper is None:
            self.upper = 0
        elif self.prefix is not None:
            rest.append(apply("or", apply("le", K, Q), apply("lt", K, self.prefix)))
            self.prefix = None
        lower, upper = self._bounds()
        return Mask(
            lower, upper, self.prefix, documents[0] if documents else None, _all(self.parts["keep"]),
            _all(self.parts["rows"]), _least(self.parts["lengths"]), _all(rest),
        )  # fmt: skip

    def _bounds(self) -> tuple[int | None, int | None]:
        """The band, without bounds that exclude nothing at these sizes."""
        lower, upper = self.lower, self.upper
        if lower is not None and type(self.queries) is int and lower <= 1 - self.queries:
            lower = None
        if upper is not None and type(self.keys) is int and upper >= self.keys - 1 and self.prefix is None:
            upper = None
        return lower, upper

    def bound(self, line: _Line) -> None:
        """Narrow the band by a line."""
        low, high = {
            "le": (None, -line.offset), "lt": (None, -line.offset - 1), "ge": (-line.offset, None),
            "gt": (-line.offset + 1, None), "eq": (-line.offset, -line.offset),
        }[line.op]  # fmt: skip
        if low is not None:
            self.lower = low if self.lower is None else max(self.lower, low)
        if high is not None:
            self.upper = high if self.upper is None else min(self.upper, high)

    def line(self, part: Term) -> _Line | None:
        """`part` as a comparison of k - q with a constant, or of a tensor's elements at k and at q."""
        if part.op not in ("lt", "le", "gt", "ge", "eq") or part.args[0].kind != "int":
            return None
        atoms: dict[sympy.Symbol, Term] = {}
        left = sympy.expand(calls.as_sympy(part.args[0], atoms) - calls.as_sympy(part.args[1], atoms))
        by_term = {term: left.coeff(symbol) for symbol, term in atoms.items() if symbol in left.free_symbols}
        offset = sympy.expand(left - sum(symbol * left.coeff(symbol) for symbol in atoms))
        if not offset.is_Integer or len(by_term) != 2 or {abs(item) for item in by_term.values()} != {1}:
            return None
        at_k = next((term for term, sign in by_term.items() if "k" in term.reads and "q" not in term.reads), None)
        at_q = next((term for term in by_term if term is not at_k), None)
        if at_k is None or at_q is None or by_term[at_k] + by_term[at_q] != 0:
            return None
        if at_k is not K and (substitute(at_q, {Q: K}) is not at_k or part.op == "eq"):
            return None
        if at_k is K and at_q is not Q:
            return None
        sign = int(by_term[at_k])
        op = part.op if sign == 1 else _MIRRORED[part.op]
        return _Line(op, sign * int(offset), None if at_k is K else at_q)

    def always(self, part: Term) -> bool:
        """Whether a comparison of an index with a constant holds for every index there is."""
        if part.op not in ("lt", "le", "gt", "ge") or part.args[0].op not in ("q", "k"):
            return False
        size = self.queries if part.args[0].op == "q" else self.keys
        if part.op == "lt" and part.args[1] is size_term(size):
            return True
        limit = part.args[1].value
        if type(limit) is not int:
            return False
        if part.op in ("ge", "gt"):
            return limit <= (0 if part.op == "ge" else -1)
        return type(size) is int and limit >= size - (part.op == "le")

    def is_documents(self, part: Term) -> bool:
        """``ids[b, q] == ids[b, k]``, whatever the ids are computed from."""
        if part.op != "eq":
            return False
        at_q, at_k = part.args if "q" in part.args[0].reads else part.args[::-1]
        if not at_q.reads <= {"b", "q"} or at_q.kind == "float" or substitute(at_q, {Q: K}) is not at_k:
            return False
        self.parts["documents"].append(cast_to("int", at_q))
        return True

    def is_prefix(self, part: Term) -> bool:
        """``k <= q or k < n``."""
        if part.op != "or" or self.prefix is not None:
            return False
        for causal, short in (part.args, part.args[::-1]):
            line, length = self.line(_simple(causal)), _below(_simple(short))
            if line == _Line("le", 0) and length is not None:
                self.prefix = length
                return True
        return False

    def is_length(self, part: Term) -> bool:
        """``k < n[b]``."""
        length = _below(part)
        if length is None:
            return False
        self.parts["lengths"].append(length)
        return True


def _below(part: Term) -> Term | None:
    """n, if `part` says that k is below the integer n of b."""
    if part.op in ("gt", "ge"):
        part = apply(_MIRRORED[part.op], *part.args[::-1])
    if part.op not in ("lt", "le") or part.args[0] is not K or part.args[1].kind != "int":
        return None
    if not part.args[1].reads <= {"b"}:
        return None
    return apply("add", part.args[1], constant(1)) if part.op == "le" else part.args[1]


def positions_behind(documents: Term, reader: Reader) -> Term | None:
    """If ids count the places where positions do not grow by 1, ``cumsum(diff(p) != 1)``: the term p of (b, q).

    Then equal ids mean one run of positions that grow by 1, whatever stands before the first.
    """
    node: Any = documents.args[0] if documents.op == "load" else None
    if calls.name_of(node) != "cumsum" or documents.args[-1] is not Q:
        return None
    breaks = node.args[0]
    if calls.name_of(breaks) != "ne" or breaks.args[1] != 1 or calls.name_of(breaks.args[0]) != "diff":
        return None
    diff = breaks.args[0]
    source, last = diff.args[0], value_of(diff).dim() - 1
    given = bound_arguments(diff)
    axes = [item % (last + 1) for item in (bound_arguments(node)["dim"], given["dim"])]
    if axes != [last, last] or given["n"] != 1 or given["append"] is not None:
        return None
    if str(value_of(source).shape) != str(value_of(diff).shape):
        return None
    try:
        return reader.at(source, documents.args[1:])
    except Unknown:
        return None


def _all(parts: list[Term]) -> Term | None:
    result = None
    for part in parts:
        result = part if result is None else apply("and", result, part)
    return result


def _least(parts: list[Term]) -> Term | None:
    result = None
    for part in parts:
        result = part if result is None else apply("min", result, part)
    return result
