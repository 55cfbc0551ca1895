"""The derivative of a score program, by PyTorch's autograd: traced on one score to ATen, and read back into terms.

Only floats are traced. Ints, bools and casts from them carry no gradient, so each of them is an input of the trace,
which comes back as the term it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxopt import compat
from fxopt.score import calls
from fxopt.score.algebra import bottom_up, simplified
from fxopt.score.evaluate import Evaluator
from fxopt.score.place import Place
from fxopt.score.term import COMPARISONS, Kind, Term, apply, cast_to, constant
from fxopt.score.text import ProgramError

_DTYPES: dict[Kind, torch.dtype] = {"float": torch.float64, "int": torch.int64, "bool": torch.bool}


def gradients(result: Term) -> dict[Term, Term]:
    """The derivative of a float by s and by each float load, for those it depends on, simplified.

    Where PyTorch chooses a subgradient (abs at 0, a tie of min or max), so does this.
    Raises `ProgramError` for a result that is no float, and for an operator of ATen that has no term.
    """
    if result.kind != "float":
        raise ProgramError(f"the result is {result.kind}, and only a float has a derivative")
    leaves = _leaves(result)
    wanted = [leaf for leaf in leaves if _has_gradient(leaf)]
    if not wanted:
        return {}
    found = zip(wanted, _read(_traced(result, leaves), leaves), strict=True)
    by_leaf = {leaf: _simpler(term, frozenset(result.walk())) for leaf, term in found if term is not None}
    return {leaf: term for leaf, term in by_leaf.items() if term.value != 0}


def _simpler(term: Term, kept: frozenset[Term]) -> Term:
    """`term` simplified, but for what it has in common with the function: who asks for both computes that once."""
    merged = bottom_up(simplified(term, kept), lambda item: item if item in kept else _merged(item))
    return simplified(merged, kept)


def _has_gradient(leaf: Term) -> bool:
    return leaf.kind == "float" and leaf.op != "cast"


def _leaves(result: Term) -> list[Term]:
    """The first terms below `result` that are not computed from floats alone."""
    reached = {result}
    leaves: list[Term] = []
    for term in reversed(list(result.walk())):
        if term in reached and term.op != "const":
            if term.kind != "float" or term.op in ("s", "load", "cast"):
                leaves.append(term)
            else:
                reached.update(term.terms)
    return leaves[::-1]


def _traced(result: Term, leaves: Sequence[Term]) -> fx.Graph:
    """The graph of the gradients by those of `leaves` that have one, one input a leaf."""
    evaluate = Evaluator([result], leaves)

    def differentiated(*values: Tensor) -> list[Tensor | None]:
        inputs = [value.detach() for value in values]
        wanted = [value.requires_grad_() for value, leaf in zip(inputs, leaves, strict=True) if _has_gradient(leaf)]
        (output,) = evaluate(Place(None, (), torch.float64, torch.device("cpu")), inputs)
        return list(torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True))

    # A backward that AOTAutograd traces through may be the first to ask: its modes would see these operators too.
    with compat.outside_dispatch_modes(), torch.inference_mode(False), torch.enable_grad():
        samples = [torch.ones((), dtype=_DTYPES[leaf.kind], device="cpu") for leaf in leaves]
        return compat.make_fx(differentiated)(*samples).graph


def _read(graph: fx.Graph, leaves: Sequence[Term]) -> list[Term | None]:
    """The results of `graph` as terms of its inputs."""
    terms: dict[Any, Term] = {}
    inputs = iter(leaves)
    for node in graph.nodes:
        if node.op == "placeholder":
            terms[node] = next(inputs)
        elif node.op == "output":
            return [None if item is None else terms[item] for item in node.args[0]]
        else:
            terms[node] = _term(node, terms)
    raise AssertionError("a graph ends with its output")


def _term(node: fx.Node, terms: dict[Any, Term]) -> Term:
    name = calls.name_of(node)
    args: list[Any] = [terms[item] if isinstance(item, fx.Node) else item for item in node.args]
    if name == "masked_fill_":
        terms[node.args[0]] = _masked_fill(*args)  # whoever reads its first argument later sees what it wrote
        return terms[node.args[0]]
    if name == "div" and node.kwargs == {"rounding_mode": "floor"}:
        return _apply("floordiv", *args)
    if name in _OPERATORS and not node.kwargs:
        return _apply(_OPERATORS[name], *args)
    if name in _FORMULAS:
        return _FORMULAS[name](*args)
    raise ProgramError(f"the derivative needs {node.format_node()}, which is no operator of a score program")


def _apply(op: str, *args: Any) -> Term:
    """`op` of terms and numbers; what is 0 because PyTorch says so (of `floor`, say) stays 0 by any factor."""
    operands = [_float(item) for item in args]
    if op in ("mul", "div", "neg") and operands[0].value == 0:
        return constant(0.0)
    if op == "mul" and operands[1].value == 0:
        return constant(0.0)
    if op == "add" and any(item.value == 0 for item in operands):
        return operands[1] if operands[0].value == 0 else operands[0]
    return apply(op, *operands)


def _merged(term: Term) -> Term:
    """Two constant factors as one, which rounds once less: the 50 and the 1 / 50 of a softcap are none."""
    if term.op not in ("mul", "div") or term.kind != "float" or term.args[1].op != "const":
        return term
    x, y = term.args
    if x.op not in ("mul", "div") or x.args[1].op != "const" or 0 in (x.args[1].value, y.value):
        return term
    by_both = [item.args[1].value if item.op == "mul" else 1 / item.args[1].value for item in (x, term)]
    exact = x.args[1].value / y.value if (x.op, term.op) == ("mul", "div") else by_both[0] * by_both[1]
    return apply("mul", x.args[0], constant(exact)) if 1e-30 < abs(exact) < 1e30 else term


def _float(item: Any) -> Term:
    return item if isinstance(item, Term) else constant(float(item))


def _same(x: Term, *_: Any) -> Term:
    return x


def _masked_fill(x: Term, mask: Term, value: Any) -> Term:
    return apply("where", mask, _float(value), x)


def _sgn(x: Term, *_: Any) -> Term:
    """1, 0 or -1; 0 for NaN, as ATen has it."""
    zero = constant(0.0)
    return apply("sub", cast_to("float", apply("gt", x, zero)), cast_to("float", apply("lt", x, zero)))


def _tanh_backward(gradient: Term, y: Term) -> Term:
    return _apply("mul", gradient, apply("sub", constant(1.0), apply("mul", y, y)))


def _sigmoid_backward(gradient: Term, y: Term) -> Term:
    return _apply("mul", _apply("mul", gradient, apply("sub", constant(1.0), y)), y)


_OPERATORS = {
    **{name: name for name in "add sub mul div neg abs exp log tanh sqrt rsqrt sigmoid floor pow where".split()},  # noqa: SIM905
    **{name: name for name in COMPARISONS},
    "minimum": "min",
    "maximum": "max",
    "remainder": "mod",
    "logical_and": "and",
}
"""Operators of ATen that are one of a program's."""

_FORMULAS: dict[str, Callable[..., Term]] = {
    **dict.fromkeys(("ones_like", "new_ones", "ones"), lambda *_: constant(1.0)),
    **dict.fromkeys(("zeros_like", "new_zeros", "zeros"), lambda *_: constant(0.0)),
    **dict.fromkeys(("full", "full_like"), lambda _, value: _float(value)),
    "scalar_tensor": _float,
    **dict.fromkeys(("detach", "alias", "clone"), _same),
    "masked_fill": _masked_fill,
    "sgn": _sgn,
    "tanh_backward": _tanh_backward,
    "sigmoid_backward": _sigmoid_backward,
}
