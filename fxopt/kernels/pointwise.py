"""Score programs as Triton: terms (`fxopt.score.term`) to lines of a kernel, one a value.

Floats are fp32, integers int32 unless what is loaded is wider, and each value has the shape that what it reads has:
blocks broadcast as in PyTorch, so a value of the head alone is a scalar. What an operator means is said once, here;
where Triton differs from PyTorch (division of negative integers, NaN in minimum) PyTorch's is what is emitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from fxopt.score.term import Term

__all__ = ["CannotEmit", "Emitter", "why_not"]

Load = Callable[[Term, list[str]], str]
"""(a load, its index as expressions) -> the expression that loads it."""

MOST_FACTORS = 16
"""The largest power that is multiplied out."""


class CannotEmit(Exception):
    """A term that Triton has no exact operator for; the message is a sentence."""


@dataclass
class Emitter:
    """Lines that compute terms, each term once; what `names` holds is computed already.

    names: term -> the variable (or literal) that holds it. load: writes a load. prefix: of the variables' names.
    assigned: the variables of `lines`, and the term that each holds.
    """

    names: dict[Term, str]
    load: Load
    prefix: str = "t"
    lines: list[str] = field(default_factory=list)
    assigned: dict[str, Term] = field(default_factory=dict)

    def name_of(self, term: Term) -> str:
        """The variable of `term`, which has been emitted, or the literal of a constant."""
        return _literal(term) if term.op == "const" else self.names[term]

    def emit(self, terms: Iterable[Term], only: Callable[[Term], bool] = lambda term: True) -> list[str]:
        """Lines that compute those of `terms` and of what they need for which `only` holds, and were not yet.

        Raises `CannotEmit`.
        """
        added: list[str] = []
        for term in dict.fromkeys(part for result in terms for part in _below(result, self.names)):
            if term not in self.names and term.op != "const" and only(term):
                name = f"{self.prefix}{len(self.names)}"
                added.append(f"{name} = {self._expression(term)}")
                self.names[term], self.assigned[name] = name, term
        self.lines += added
        return added

    def _expression(self, term: Term) -> str:
        if term.op == "load":
            return self.load(term, [self.name_of(item) for item in term.terms])
        operands = [self.name_of(item) for item in term.terms]
        if term.op == "cast":
            return _cast(term, operands[0])
        if term.op == "pow":
            return _power(term, operands)
        written = _OPERATORS.get((term.op, term.args[-1].kind == "float")) or _OPERATORS.get((term.op, None))
        if written is None:
            raise CannotEmit(f"Triton has no {term.op} of {term.args[-1].kind}s")
        return written.format(*operands)


def why_not(terms: Iterable[Term]) -> str:
    """Why these cannot be emitted, or "" where they can."""
    names: dict[Term, str] = {}
    for term in terms:
        names |= {leaf: leaf.op for leaf in term.walk() if not leaf.args}
    try:
        Emitter(names, lambda term, index: "").emit(terms)
    except CannotEmit as reason:
        return str(reason)
    return ""


def _below(term: Term, known: Mapping[Term, str]) -> list[Term]:
    """`term` and what it needs, arguments first; nothing below what is known."""
    needed, order = {term}, list(term.walk())
    for item in reversed(order):
        if item in needed and item not in known:
            needed.update(item.terms)
    return [item for item in order if item in needed]


def _literal(term: Term) -> str:
    value = term.value
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return f"({value!r})" if not isinstance(value, bool) and value < 0 else repr(value)


def _cast(term: Term, operand: str) -> str:
    source = term.args[0].kind
    if term.kind == "bool":
        return f"{operand} != 0"
    if term.kind == "float":
        return f"({operand}).to(tl.float32)"
    return f"({operand}).to(tl.int32)" if source == "bool" else f"({operand}).to(tl.int64)"


def _power(term: Term, operands: list[str]) -> str:
    base, exponent = operands[0], term.args[1].value
    if exponent == 0.5:
        return f"tl.sqrt_rn({base})"
    if exponent == -0.5:
        return f"1.0 / tl.sqrt_rn({base})"
    whole = exponent is not None and float(exponent).is_integer() and 1 <= abs(exponent) <= MOST_FACTORS
    if not whole or (term.kind == "int" and exponent < 0):
        raise CannotEmit(f"Triton has no exact pow of {term.kind}s by {'a tensor' if exponent is None else exponent}")
    product = " * ".join([base] * int(abs(exponent)))
    return product if exponent > 0 else f"1.0 / ({product})"


# {0} and {1} are names or literals. The key says whether operands are floats; None: either.
_OPERATORS: dict[tuple[str, bool | None], str] = {
    ("neg", None): "-{0}",
    ("abs", None): "tl.abs({0})",
    ("exp", True): "tl.exp({0})",
    ("log", True): "tl.log({0})",
    ("tanh", True): "tanh({0})",
    ("sqrt", True): "tl.sqrt_rn({0})",
    ("rsqrt", True): "1.0 / tl.sqrt_rn({0})",
    ("sigmoid", True): "1.0 / (1.0 + tl.exp(-{0}))",
    ("floor", True): "tl.floor({0})",
    ("not", None): "~{0}",
    ("add", None): "{0} + {1}",
    ("sub", None): "{0} - {1}",
    ("mul", None): "{0} * {1}",
    ("div", True): "{0} / {1}",
    ("floordiv", True): "tl.floor({0} / {1})",
    ("floordiv", False): "floor_divide({0}, {1})",
    ("mod", True): "{0} - tl.floor({0} / {1}) * {1}",
    ("mod", False): "{0} - floor_divide({0}, {1}) * {1}",
    ("min", True): "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    ("max", True): "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    ("min", False): "tl.minimum({0}, {1})",
    ("max", False): "tl.maximum({0}, {1})",
    ("and", None): "{0} & {1}",
    ("or", None): "{0} | {1}",
    ("lt", None): "{0} < {1}",
    ("le", None): "{0} <= {1}",
    ("gt", None): "{0} > {1}",
    ("ge", None): "{0} >= {1}",
    ("eq", None): "{0} == {1}",
    ("ne", None): "{0} != {1}",
    ("where", None): "tl.where({0}, {1}, {2})",
}

HELPERS = {
    "tanh": '''\
@triton.jit
def tanh(x):
    """To 2 ulp of fp32: Cephes' polynomial (tanhf) near 0, where 1 - 2 / (exp(2x) + 1) would cancel."""
    z = x * x
    near = ((((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
            - 3.33332819422e-1) * z * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))
''',
    "floor_divide": '''\
@triton.jit
def floor_divide(x, y):
    """Of integers, rounded down as in Python; Triton's // rounds towards zero."""
    quotient = x // y
    rest = x - quotient * y
    return quotient - ((rest != 0) & ((rest < 0) != (y < 0))).to(tl.int32)
''',
}
"""Functions that expressions may call, by name: what a module needs of them stands before its kernels."""


def helpers_of(text: str) -> list[str]:
    """The definitions of those helpers that `text` calls."""
    return [source for name, source in HELPERS.items() if f"{name}(" in text]
