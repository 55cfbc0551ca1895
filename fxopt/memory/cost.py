"""What a node of a graph costs: flops, bytes and the seconds that follow from them on a device.

Sizes are taken by their hints: arithmetic on symbolic sizes in a planner would install guards.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from fxopt import compat
from fxopt.fake import value_of
from fxopt.memory.rates import Device

__all__ = ["bytes_of", "described", "flops_of", "hint", "seconds_of"]

UNKNOWN = 4096
"""What a size without a hint (data-dependent) is taken for."""


def hint(size: Any) -> int:
    """A size as the integer it was traced with."""
    found = compat.size_hint(size)
    return UNKNOWN if found is None else int(found)


def bytes_of(value: Any) -> int:
    """Bytes that a new tensor like `value` takes; of a tuple, the sum."""
    if isinstance(value, torch.Tensor):
        return math.prod(map(hint, value.shape)) * value.dtype.itemsize
    return sum(map(bytes_of, value)) if isinstance(value, tuple | list) else 0


def flops_of(node: fx.Node) -> int:
    """Flops by torch's registry, where fxopt's operators are too; 0 for operators that have no formula."""
    formula = flop_registry.get(getattr(node.target, "_overloadpacket", None))
    if formula is None:
        return _flash_on_cpu(node)
    return _flops(formula, described(node.args), described(tuple(node.kwargs.items())), described(value_of(node)))


@functools.lru_cache(maxsize=4096)
def _flops(formula: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Remembered, since layers repeat: counting the pairs of a band takes milliseconds."""
    named = {name: _concrete(value) for name, value in kwargs}
    return int(formula(*_concrete(args), **named, out_val=_concrete(result)))


def _flash_on_cpu(node: fx.Node) -> int:
    """Attention on a CPU, of which torch's registry knows neither direction."""
    name = str(node.target)
    if "_scaled_dot_product_flash_attention_for_cpu" not in name:
        return 0
    backward = "backward" in name
    q, k, v = (value_of(item) for item in node.args[backward : 3 + backward])
    batch, heads, queries, width = map(hint, q.shape)
    products = 3 * width + 2 * hint(v.shape[-1]) if backward else width + hint(v.shape[-1])
    return 2 * batch * heads * queries * hint(k.shape[2]) * products


@dataclass(frozen=True)
class _Like:
    """What flops depend on of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def described(value: Any) -> Any:
    """Nodes and their values as something that can be hashed: tensors by shape and dtype, sizes as numbers."""
    if isinstance(value, fx.Node):
        return described(value_of(value))
    if isinstance(value, torch.Tensor):
        return _Like(tuple(map(hint, value.shape)), value.dtype)
    if isinstance(value, tuple | list):
        return tuple(map(described, value))
    return compat.size_hint(value)


def _concrete(value: Any) -> Any:
    """What was described, with tensors without data."""
    if isinstance(value, _Like):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return tuple(map(_concrete, value)) if isinstance(value, tuple) else value


def seconds_of(node: fx.Node, flops: int, device: Device) -> float:
    """By the slower of arithmetic and memory (roofline; Williams et al., 2009)."""
    read = sum(bytes_of(value_of(item)) for item in node.all_input_nodes)
    moved = (read + bytes_of(value_of(node))) / device.bandwidth
    value = next((one for one in [value_of(node), *map(value_of, node.args)] if isinstance(one, torch.Tensor)), None)
    return max(moved, flops / device.flops_of(value.dtype if value is not None else torch.float32))
