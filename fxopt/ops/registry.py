"""What fxopt's operators cost in memory: one formula an operator, found by the operator (flops are torch's registry).

A formula takes the operator's arguments and says how many bytes it returns and how many it holds on the way. Only
shapes and dtypes are read, so meta tensors do; sizes must be plain integers (a planner has size hints: arithmetic on
symbolic sizes would install guards).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["OpMemory", "memory_of"]


@dataclass(frozen=True)
class OpMemory:
    """Bytes of one call of an operator.

    outputs:   what it returns, and so what a backward that needs it keeps.
    workspace: what it needs on top of that: the most that it holds at any time, without its inputs, minus `outputs`.
    """

    outputs: int
    workspace: int


Formula = Callable[..., OpMemory]

_MODULES = (
    "fxopt.ops.attention_operator",
    "fxopt.ops.key_intervals",
    "fxopt.ops.loss_operator",
    "fxopt.ops.norm_operator",
    "fxopt.ops.offload_operator",
    "fxopt.ops.query_tiles",
)
"""Modules with a ``MEMORY: dict[OpOverload, Formula]``; imported at the first look-up, since they import this one."""


def memory_of(op: Any, *args: Any, **kwargs: Any) -> OpMemory | None:
    """Bytes of ``op(*args, **kwargs)``, or None where `op` is none of fxopt's operators."""
    for name in _MODULES:
        formulas: dict[Any, Formula] = importlib.import_module(name).MEMORY
        if op in formulas:
            return formulas[op](*args, **kwargs)
    return None
