"""Canonical graphs as Dynamo gives them, for tests of rules and passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.capture import Capture, capture


def captured(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> Capture:
    """The capture of the one graph that `fn` compiles to, run once on `args`.

    ``captured(...).module.meta["inputs"]`` has what Dynamo calls it with: tensors, and symbolic sizes if `dynamic`.
    Raises torch's error where `fn` breaks into several graphs.
    """
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
