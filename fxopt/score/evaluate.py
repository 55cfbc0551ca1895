"""Score programs on tensors: terms compiled once to a list of steps, which PyTorch executes.

Every step is one operator on the broadcast shapes of what it reads, so that what depends on the head alone is computed
once a head. A value is let go of after the step that reads it last, and where nobody differentiates, that step writes
over it: of blocks of 2 MiB, a softcap in fresh memory took 1.1 to 1.5 times as long and ALiBi 3.4 to 4.5 times (the
kernel hands out pages).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.score.access import Access
from fxopt.score.place import Place
from fxopt.score.term import COMPARISONS, VARIABLES, Kind, Term


def _floordiv(x: Tensor, y: Any, out: Tensor | None = None) -> Tensor:
    return torch.div(x, y, rounding_mode="floor", out=out)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in "neg abs exp log tanh sqrt rsqrt sigmoid floor".split()},  # noqa: SIM905
    **{name: getattr(torch, name) for name in "add sub mul div pow lt le gt ge eq ne where".split()},  # noqa: SIM905
    "floordiv": _floordiv,
    "mod": torch.remainder,
    "min": torch.minimum,
    "max": torch.maximum,
    "and": torch.bitwise_and,  # of bools, like the two below
    "or": torch.bitwise_or,
    "not": torch.bitwise_not,
}
"""Operator -> the same of tensors of one dtype (fp, int64 or bool), with `out`."""

_NUMBER_SECOND = COMPARISONS | frozenset("add sub mul div floordiv mod pow".split())  # noqa: SIM905
"""Operators whose second operand may be a Python number. (``pow(x, 2.0)`` is a product, a power of a tensor is not.)"""


class _Step(NamedTuple):
    """Values are numbered: `output` becomes `function` of `inputs`, then `dead` are let go of. Value 0 is the `Place`.

    reused: those of `dead` that the output, given as `out`, may be written over: nobody else's, and of its dtype.
    """

    function: Callable[..., Any]
    inputs: tuple[int, ...]
    output: int
    dead: tuple[int, ...] = ()
    reused: tuple[int, ...] = ()


class Evaluator:
    """Terms, compiled.

    given:  terms whose values the caller passes.
    blocks: the places have `ranges`, so that loads may be slices.
    owned:  s may be written over.
    """

    def __init__(
        self, results: Sequence[Term], given: Sequence[Term] = (), *, blocks: bool = False, owned: bool = False
    ):
        self._numbers: dict[Any, int] = {term: number for number, term in enumerate(given, 1)}
        self._values: list[Any] = []
        self._steps: list[_Step] = []
        self._given = len(given)
        self._fresh: dict[int, Kind] = {}
        for term in _needed(results, frozenset(given), blocks):
            if term not in self._numbers and term.op != "const":
                self._numbers[term] = self._step(term, blocks)
                if term.op in OPERATORS or term.op == "cast" or (term.op == "s" and owned):
                    self._fresh[self._numbers[term]] = term.kind
        self._results = [self._operand(result, as_number=False) for result in results]
        self._let_go()

    def __call__(self, place: Place, given: Sequence[Tensor] = (), *, reuse: bool = False) -> list[Tensor]:
        """The terms' values at `place`, broadcast only as far as they depend on axes. They may alias what is read.

        reuse: write over values that are no longer needed; not where autograd records.
        """
        values = [place, *given, *self._values]
        for function, inputs, output, dead, reused in self._steps:
            out = _room(values, inputs, reused) if reuse and reused else None
            if out is None:
                values[output] = function(*[values[number] for number in inputs])
            else:
                values[output] = function(*[values[number] for number in inputs], out=out)
                out = None
            for number in dead:
                values[number] = None
        return [values[number] for number in self._results]

    def _new(self, value: Any = None) -> int:
        self._values.append(value)
        return self._given + len(self._values)

    def _add(self, function: Callable[..., Any], *inputs: int) -> int:
        output = self._new()
        self._steps.append(_Step(function, inputs, output))
        return output

    def _operand(self, term: Term, as_number: bool) -> int:
        """The number of the value of `term`; a constant's is a Python number if that will do, else a tensor."""
        if term.op != "const":
            return self._numbers[term]
        key = (term, as_number)
        if key not in self._numbers:
            value = term.value
            if not as_number:
                self._numbers[key] = self._add(lambda place: place.filled(value), 0)
            elif type(value) is float and abs(value) > torch.finfo(torch.float16).max:
                self._numbers[key] = self._add(lambda place: place.number(value), 0)
            else:
                self._numbers[key] = self._new(value)
        return self._numbers[key]

    def _step(self, term: Term, blocks: bool) -> int:
        op, kind = term.op, term.kind
        if op in VARIABLES:
            return self._add(lambda place: place.variable(op), 0)
        if op == "cast":
            return self._add(lambda place, value: place.of_kind(value, kind), 0, self._operand(term.args[0], False))
        if op != "load":
            inputs = [self._operand(item, at == 1 and op in _NUMBER_SECOND) for at, item in enumerate(term.args)]
            return self._add(OPERATORS[op], *inputs)
        access = Access.of(term)
        if blocks and access.is_block:
            return self._add(lambda place: place.of_kind(access.block(place.captures, place.ranges), kind), 0)
        index = [self._operand(item, True) for item in term.terms]
        return self._add(lambda place, *at: place.of_kind(access.elements(place.captures, at), kind), 0, *index)

    def _let_go(self) -> None:
        """Say of every step what it reads last, and what of that may become its output."""
        seen, operators = {0, *self._results}, frozenset(OPERATORS.values())
        for position in reversed(range(len(self._steps))):
            step = self._steps[position]
            dead = tuple(set(step.inputs) - seen)
            kind = self._fresh.get(step.output) if step.function in operators else None
            reused = tuple(number for number in dead if kind is not None and self._fresh.get(number) == kind)
            self._steps[position] = step._replace(dead=dead, reused=reused)
            seen.update(step.inputs)


def _room(values: Sequence[Any], inputs: Sequence[int], reused: Sequence[int]) -> Tensor | None:
    """The first of `reused` that has the shape of the result of `inputs`."""
    for number in reused:
        shape = values[number].shape
        if all(_fits(values[other], shape) for other in inputs):
            return values[number]
    return None


def _fits(value: Any, shape: torch.Size) -> bool:
    """Whether `value`, a tensor or a number, broadcasts to `shape`."""
    if not isinstance(value, Tensor) or value.shape == shape:
        return True
    own = value.shape
    return len(own) <= len(shape) and all(
        size in (1, wide) for size, wide in zip(reversed(own), reversed(shape), strict=False)
    )


def _needed(results: Sequence[Term], given: frozenset[Term], blocks: bool) -> list[Term]:
    """What must be computed for `results`, in order: no index of a load that is a slice, nothing below `given`."""
    order = list(dict.fromkeys(term for result in results for term in result.walk()))
    needed = set(results)
    for term in reversed(order):
        if term in needed and term not in given and not (blocks and term.op == "load" and Access.of(term).is_block):
            needed.update(term.terms)
    return [term for term in order if term in needed]
