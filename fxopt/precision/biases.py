"""Biases of products that are added in fp32, behind the product, because what reads it is a sum in fp32.

``residual + linear(x, w, b)`` is ``residual + (linear(x, w) + b)``: the bias needs no copy in 16 bits, and its
gradient, the sum of the residual's over rows, is not rounded on the way. The sum costs nothing where Inductor fuses it
with the one that reads it: on a CPU. On a card fxopt's norm reads what the product writes, in 16 bits, bias and all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.fake import bound_arguments, value_of
from fxopt.precision.casts import VIEWS

__all__ = ["Apart", "apart"]

aten = torch.ops.aten

_PARTS: Mapping[Any, tuple[str, tuple[str, str], Any]] = {
    aten.linear.default: ("bias", ("input", "weight"), aten.linear.default),
    aten.addmm.default: ("self", ("mat1", "mat2"), aten.mm.default),
}
"""By operator: its bias, its factors, and the operator that multiplies them and adds nothing."""
_PASSES = VIEWS | {aten.dropout.default}
"""What hands numbers on one by one, whatever their dtype."""


@dataclass(frozen=True)
class Apart:
    """A product and its bias: ``product(*factors) + bias``, bias [N]."""

    product: Any
    factors: tuple[fx.Node, fx.Node]
    bias: fx.Node


def apart(node: fx.Node, new: Mapping[fx.Node, fx.Node]) -> Apart | None:
    """The product `node` with its bias apart, to be added in fp32; None if it has none or is not only read by sums.

    new: what stands for the nodes before `node`, in the dtypes that they will have. All that reads the product, by way
    of movements, must be a sum with an fp32 tensor of its size.
    """
    if node.target not in _PARTS or value_of(node).device.type != "cpu":
        return None
    given = bound_arguments(node)
    name, factors, product = _PARTS[node.target]
    bias = given[name]
    if not isinstance(bias, fx.Node) or value_of(bias).dim() != 1 or value_of(new[bias]).dtype != torch.float32:
        return None
    if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
        return None
    readers = list(_readers(node))
    if not readers or not all(_is_wide_sum(*pair, new) for pair in readers):
        return None
    return Apart(product, (given[factors[0]], given[factors[1]]), bias)


def _readers(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What reads `node` or a movement of it, each with what it reads."""
    for user in node.users:
        if user.target in _PASSES:
            yield from _readers(user)
        else:
            yield user, node


def _is_wide_sum(reader: fx.Node, read: fx.Node, new: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether `reader` adds `read` to an fp32 tensor of its size that is there already."""
    if reader.target is not aten.add.Tensor:
        return False
    others = [new[one] for one in reader.args if one is not read and isinstance(one, fx.Node) and one in new]
    return len(others) == 1 and all(
        value_of(one).dtype == torch.float32 and str(value_of(one).shape) == str(value_of(read).shape)
        for one in others  # sizes as text: to compare symbols would guard on them
    )
