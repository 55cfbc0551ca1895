"""The text of a score program: one statement a line, each with the type of its value.

    (s, b, h, q, k):
      %0: float = mul s, 0.125
      %1: float = load 0[h]
      %2: float = add %0, %1
      return %2

A statement reads variables, earlier statements and literals: Python's for int, float and bool, and ``inf``, ``-inf``
and ``nan``. ``load 0[h, %3]`` is an element of the captured tensor in slot 0; ``cast`` is to the type of the statement;
every other operator is one of `fxopt.score.term`. The text of equal terms is equal.
"""

from __future__ import annotations

import ast
import math
import re
from typing import Any, cast

from fxopt.score.term import BINARY, UNARY, VARIABLES, Kind, Term, apply, cast_to, constant, load, variable

HEADER = f"({', '.join(VARIABLES)}):"

_STATEMENT = re.compile(r"%(\d+): (float|int|bool) = (\w+) ?(.*)")
_LOAD = re.compile(r"(\d+)\[(.*)\]")
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class ProgramError(ValueError):
    """A text that is no score program, or a program that cannot do what is asked of it."""


def printed(result: Term) -> str:
    """The text of a term whose loads have slot numbers."""
    names: dict[Term, str] = {}
    lines = [HEADER]
    for term in result.walk():
        if term.op in VARIABLES or term.op == "const":
            names[term] = repr(term)
            continue
        names[term] = f"%{len(lines) - 1}"
        operands = ", ".join(names[item] for item in term.terms)
        call = f"load {term.args[0]}[{operands}]" if term.op == "load" else f"{term.op} {operands}"
        lines.append(f"  {names[term]}: {term.kind} = {call}")
    return "\n".join([*lines, f"  return {names[result]}"])


def parsed(text: str) -> Term:
    """The term that `text` says. Raises `ProgramError` naming the line.

    Operands of another type than the operator wants are brought to it, as `term.apply` does; what it folds is folded.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines or lines[0][1] != HEADER:
        raise ProgramError(f"line {lines[0][0] if lines else 1}: a score program begins with {HEADER!r}")
    names = {name: variable(name) for name in VARIABLES}
    for position, (number, line) in enumerate(lines[1:], 1):
        try:
            if not line.startswith("return "):
                name, term = _statement(line, names)
                names[name] = term
            elif position < len(lines) - 1:
                raise ProgramError("nothing may follow the return")
            else:
                return _operand(line.removeprefix("return ").strip(), names)
        except ValueError as error:
            raise ProgramError(f"line {number}: {error}: {line!r}") from None
    raise ProgramError(f"line {lines[-1][0]}: the program ends without a return: {lines[-1][1]!r}")


def _statement(line: str, names: dict[str, Term]) -> tuple[str, Term]:
    found = _STATEMENT.fullmatch(line)
    if found is None:
        raise ProgramError("not of the form '%n: type = operator operands'")
    number, kind, op, rest = found.groups()
    expected = len(names) - len(VARIABLES)
    if int(number) != expected:
        raise ProgramError(f"statement %{number} stands where %{expected} is due")
    term = _load(rest, cast(Kind, kind), names) if op == "load" else _call(op, rest, cast(Kind, kind), names)
    if term.kind != kind:
        raise ProgramError(f"{op} gives {term.kind} here, not {kind}")
    return f"%{number}", term


def _load(rest: str, kind: Kind, names: dict[str, Term]) -> Term:
    found = _LOAD.fullmatch(rest)
    if found is None:
        raise ProgramError("a load is of the form 'load slot[index, index]'")
    index = _operands(found[2], names)
    if any(item.kind != "int" for item in index):
        raise ProgramError("an index must be an int")
    return load(int(found[1]), index, kind)


def _call(op: str, rest: str, kind: Kind, names: dict[str, Term]) -> Term:
    operands = _operands(rest, names)
    if op != "cast":
        if op not in UNARY and op not in BINARY and op != "where":
            raise ProgramError(f"there is no operator {op!r}")
        return apply(op, *operands)
    if len(operands) != 1:
        raise ProgramError(f"cast takes one operand, not {len(operands)}")
    return cast_to(kind, operands[0])


def _operands(text: str, names: dict[str, Term]) -> tuple[Term, ...]:
    return tuple(_operand(item.strip(), names) for item in text.split(",")) if text.strip() else ()


def _operand(text: str, names: dict[str, Term]) -> Term:
    if text in names:
        return names[text]
    value: Any = _NOT_FINITE.get(text)
    if value is None:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise ProgramError(f"{text!r} is no variable, no earlier statement and no literal") from None
    if type(value) not in (bool, int, float):
        raise ProgramError(f"{text!r} is no bool, int or float")
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ProgramError(f"{text} does not fit an int64")
    return constant(value)
