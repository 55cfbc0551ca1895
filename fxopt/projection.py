"""What lies between a linear layer and a value computed from its rows: the way from `hidden` to logits to loss.

Logits are projected, then scaled, capped and cast (pointwise steps), sliced, reshaped and transposed (moves). Both
kinds commute with choosing rows, so a loss, or somebody who looks at three rows, needs no other row's logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.fake import arguments, value_of
from fxopt.rule import NoSite

aten = torch.ops.aten

LINEARS = frozenset({aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default})
POINTWISE = frozenset(
    {
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.tanh.default,
        aten.to.dtype,
        aten.neg.default,
    }
)
_RESHAPES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
    }
)
_PERMUTATIONS = frozenset(
    {aten.transpose.int, aten.permute.default, aten.t.default, aten.numpy_T.default, aten.mT.default}
)
_CHOICES = frozenset({aten.slice.Tensor, aten.select.int})
_COPIES = frozenset({aten.contiguous.default, aten.clone.default, aten.alias.default})
MOVES = _RESHAPES | _PERMUTATIONS | _CHOICES | _COPIES


@dataclasses.dataclass(frozen=True)
class Projection:
    """How a node is computed from a linear layer.

    linear:  the linear node.
    hidden:  [..., H], the layer's input.
    weight:  [V, H], or [H, V] when `transposed`.
    bias:    [V], or None; `added` is the node that adds it, where that is not the linear node itself.
    steps:   the pointwise and moving nodes from the linear node (excluded) to the value (included), in order.
    """

    linear: fx.Node
    hidden: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    steps: tuple[fx.Node, ...]
    added: fx.Node | None = None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The linear node, the addition of its bias and every step."""
        return (self.linear, *([] if self.added is None else [self.added]), *self.steps)

    @property
    def pointwise(self) -> list[fx.Node]:
        """The steps that change values, not places."""
        return [step for step in self.steps if step.target in POINTWISE]

    @property
    def vocabulary(self) -> Any:
        """V, the number of logits a row; may be symbolic."""
        return value_of(self.weight).shape[1 if self.transposed else 0]

    def moves(self) -> tuple[Move, ...]:
        """The steps that only choose or rearrange rows, to be replayed on `hidden`.

        Raises `NoSite` where a step touches the vocabulary axis or has sizes known only at run time.
        """
        return moves_of(self.steps)


def projection_of(node: fx.Node, besides: Collection[Any] = ()) -> Projection:
    """Walk back from `node` to the linear layer it is computed from. Raises `NoSite`, naming what stands in the way.

    besides: targets of steps that are neither pointwise nor moves and do nothing.
    """
    steps: list[fx.Node] = []
    bias, added = None, None
    while node.target not in LINEARS or node.op != "call_function":
        if bias is not None:
            raise NoSite(f"{node.name} ({node.target}) stands between the projection and its bias", len(steps))
        addition = _bias_addition(node)
        if addition is not None:
            added, (node, bias) = node, addition
            continue
        if node.op != "call_function" or (node.target not in POINTWISE | MOVES and node.target not in besides):
            broken = node.op == "placeholder"
            what = "a graph input (a graph break parts them)" if broken else f"{node.name} ({node.target})"
            raise NoSite(f"the logits come from {what}, not from a linear layer", len(steps))
        if not isinstance(node.args[0], fx.Node) or not reads_only(node, node.args[0]):
            raise NoSite(f"{node.name} ({node.target}) combines the logits with another value", len(steps))
        steps.append(node)
        node = node.args[0]
    return dataclasses.replace(_at_linear(node, bias, tuple(reversed(steps))), added=added)


def reads_only(step: fx.Node, source: fx.Node) -> bool:
    """Whether `source` is the only input of `step`, symbolic sizes of a move aside."""
    others = [item for item in step.all_input_nodes if item is not source]
    return not others or (step.target in MOVES and not any(isinstance(value_of(item), Tensor) for item in others))


def _bias_addition(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``x @ W + b`` with b of shape [V]: the node of the matmul and b."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
        return None
    one, other = node.args
    if value_of(one).dim() < value_of(other).dim():
        one, other = other, one
    fits = value_of(other).dim() == 1 and str(value_of(other).shape[0]) == str(value_of(one).shape[-1])
    return (one, other) if fits and isinstance(one, fx.Node) and isinstance(other, fx.Node) else None


def _at_linear(linear: fx.Node, bias: fx.Node | None, steps: tuple[fx.Node, ...]) -> Projection:
    args: list[Any] = list(linear.args)
    transposed = linear.target is not aten.linear.default
    if linear.target is aten.addmm.default:
        if linear.kwargs or value_of(args[0]).dim() != 1:
            raise NoSite(f"{linear.name} is an addmm that is not a linear layer", len(steps))
        own, hidden, weight = args
    else:
        hidden, weight = args[:2]
        own = args[2] if len(args) > 2 else linear.kwargs.get("bias")
    if own is not None and bias is not None:
        raise NoSite(f"{linear.name} has a bias and another is added to it", len(steps))
    if value_of(weight).dim() != 2 or value_of(hidden).dim() < 2:
        raise NoSite(
            f"{linear.name} ({linear.target}) multiplies {_shape(hidden)} by {_shape(weight)}, no linear layer",
            len(steps),
        )
    if transposed:
        weight, transposed = _untransposed(weight)
    return Projection(linear, hidden, weight, own if own is not None else bias, transposed, steps)


def _untransposed(weight: fx.Node) -> tuple[fx.Node, bool]:
    """The [V, H] weight behind ``W.t()``, or the [H, V] operand itself."""
    args = arguments(weight)
    is_transpose = weight.target in _PERMUTATIONS and _order(weight) == [1, 0]
    if is_transpose and isinstance(args[0], fx.Node):
        return args[0], False
    return weight, True


def _shape(node: Any) -> str:
    return str(list(value_of(node).shape))


@dataclasses.dataclass(frozen=True)
class Move:
    """A step that rearranges rows: applied to [..., V] in the graph, and by us to [..., H].

    kind: "slice", "select", "permute" (of all axes, the vocabulary's last) or "reshape".
    args: what the kind needs; a reshape has its leading sizes, or None where only the order of rows is known.
    """

    kind: str
    args: tuple[Any, ...]

    @classmethod
    def of(cls, step: fx.Node) -> Move:
        """The move that `step` makes. Raises `NoSite`."""
        source, result = value_of(step.args[0]), value_of(step)
        rank, args = source.dim(), arguments(step)
        if step.target in _RESHAPES:
            if str(source.shape[-1]) != str(result.shape[-1]) or result.dim() == 0:
                shapes = f"{_shape(step.args[0])} to {_shape(step)}"
                raise NoSite(f"{step.name} ({step.target}) reshapes the vocabulary axis: {shapes}")
            sizes = tuple(result.shape[:-1])
            return cls("reshape", sizes if all(type(size) is int for size in sizes) else (None,))
        if step.target in _CHOICES:
            dim, rest = args[1], args[2:]
            if dim % rank == rank - 1:
                raise NoSite(f"{step.name} ({step.target}) slices the vocabulary axis")
            if any(isinstance(item, fx.Node) for item in rest):
                raise NoSite(f"{step.name} ({step.target}) has bounds known only at run time")
            return cls("slice" if step.target is aten.slice.Tensor else "select", (dim, *rest))
        return cls("permute", tuple(_order(step)))


def _order(permutation: fx.Node) -> list[int]:
    """The axes of the source in the order they have in `permutation`, counted from the front."""
    args, rank = arguments(permutation), value_of(permutation).dim()
    if permutation.target is aten.permute.default:
        return [dim % rank for dim in args[1]]
    if permutation.target is aten.numpy_T.default:
        return list(range(rank))[::-1]
    order = list(range(rank))
    if rank > 1:
        one, other = (args[1], args[2]) if permutation.target is aten.transpose.int else (-1, -2)
        order[one % rank], order[other % rank] = order[other % rank], order[one % rank]
    return order


def moves_of(steps: Iterable[fx.Node]) -> tuple[Move, ...]:
    """The moves among `steps`, in order. Raises `NoSite`."""
    return tuple(Move.of(step) for step in steps if step.target in MOVES and step.target not in _COPIES)


def keeps_shape(moves: Iterable[Move], value: Tensor) -> bool:
    """Whether `moved_rows` gives rows of the shape of `value` [..., V], not only in their order."""
    return value.dim() == 2 or all(move.args != (None,) for move in moves)


def moved_rows(hidden: Tensor, moves: tuple[Move, ...]) -> Tensor:
    """Apply `moves`, which `check_moves` accepted, to `hidden` [..., H]: the rows in the order of the moved logits.

    H stays the last axis, also where a permutation takes the vocabulary elsewhere.
    """
    for move in moves:
        last = hidden.dim() - 1
        if move.kind == "reshape":
            sizes = (-1,) if move.args == (None,) else move.args
            hidden = hidden.reshape(*sizes, hidden.shape[-1])
        elif move.kind == "permute":
            hidden = hidden.permute(*(dim for dim in move.args if dim != last), last)
        else:
            apply = aten.slice.Tensor if move.kind == "slice" else aten.select.int
            hidden = apply(hidden, *move.args)
    return hidden


def check_moves(moves: tuple[Move, ...], rank: int, classes_at: int, reader: str = "the loss") -> None:
    """Check that every move after which others follow keeps the vocabulary last, and that it ends at `classes_at`.

    rank: of the linear layer's result; reader: what the moves lead to. Raises `NoSite`.
    """
    vocabulary = rank - 1
    for index, move in enumerate(moves):
        if move.kind == "permute":
            if vocabulary != rank - 1:
                raise NoSite(f"the logits are transposed twice on the way to {reader}")
            vocabulary = move.args.index(vocabulary)
            continue
        if vocabulary != rank - 1:
            raise NoSite("the logits are moved again after the vocabulary axis was transposed away from the end")
        if move.kind == "reshape":
            if move.args == (None,) and any(later.kind != "reshape" for later in moves[index + 1 :]):
                raise NoSite("the logits are sliced after a reshape whose sizes are known only at run time")
            rank = 2 if move.args == (None,) else len(move.args) + 1
            vocabulary = rank - 1
        elif move.kind == "select":
            rank, vocabulary = rank - 1, vocabulary - 1
    if vocabulary != classes_at % rank:
        raise NoSite(f"{reader} takes its classes along axis {classes_at}, the vocabulary is axis {vocabulary}")
