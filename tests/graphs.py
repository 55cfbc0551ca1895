"""Small functions and the canonical graphs Dynamo gives for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.capture import Capture, capture
from fxopt.draw import SeededDraw


def captured(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> Capture:
    """The capture of the one graph that `fn` compiles to, run once on `args`."""
    found: list[Capture] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        found.append(capture(gm))
        found[-1].module.meta["inputs"] = list(inputs)
        return gm.forward

    torch.compiler.reset()
    torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    (only,) = found
    return only


def targets(gm: fx.GraphModule) -> list[str]:
    """The operators of `gm`, in order, by name."""
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


class LargestDraw(SeededDraw):
    """Sizes at their largest, so that no window is wider than the sequence."""

    def size(self, low: int, high: int) -> int:
        return high
