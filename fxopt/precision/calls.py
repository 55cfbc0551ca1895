"""Operators whose class depends on their arguments: sums that 16 bits must not take, and products that are none."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import fx

from fxopt.fake import bound_arguments
from fxopt.precision.policy import Class, Policy, operator_name

__all__ = ["class_of_call", "class_of_einsum", "has_products"]

aten = torch.ops.aten

_ADDS = frozenset({aten.scatter.reduce, aten.scatter.value_reduce})

_CELLS = frozenset(
    f"aten::{name}{suffix}" for name in ("gru", "lstm", "rnn_tanh", "rnn_relu") for suffix in ("", "_cell")
)


def has_products(node: fx.Node) -> bool:
    """Whether the operator of `node` multiplies matrices among other things, so that it is no product as a whole."""
    return operator_name(node.target) in _CELLS


def class_of_call(policy: Policy, node: fx.Node) -> Class | None:
    """The class of the operator of `node` under `policy`, with a look at its arguments where the table is meant."""
    target: Any = node.target
    if operator_name(target) in dict(policy.ops):
        return policy.class_of(target)
    if target in _ADDS:
        return "fp32"
    if target is aten.index_put.default and bound_arguments(node)["accumulate"]:
        return "fp32"
    if target is aten.einsum.default:
        return class_of_einsum(bound_arguments(node)["equation"])
    return policy.class_of(target)


def class_of_einsum(equation: str) -> Class:
    """ "low" for a contraction, in which two operands share an index that is summed; "fp32" for other sums; "follow"
    for what sums nothing: outer products, transposes, diagonals.
    """
    written, arrow, result = re.sub(r"\s", "", equation).replace("...", ".").partition("->")
    operands = [set(one) for one in written.split(",")]
    count = Counter(written.replace(",", ""))
    kept = set(result) if arrow else {index for index in count if count[index] == 1 or index == "."}
    summed = set[str]().union(*operands) - kept
    if any(sum(index in one for one in operands) > 1 for index in summed):
        return "low"
    return "fp32" if summed else "follow"
