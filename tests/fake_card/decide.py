"""What fxopt decides on a CUDA device that is not there, for cases in JSON, and the answers in JSON.

Cases by name: `build`, the arguments of `models.build` but dtype, by name; `dtype`; `options`, fxopt's; `winner`, the
candidate that every site is said to be fastest by; `autocast`, a dtype.
"""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Iterator
from typing import Any

import torch
import triton
from choosers import Always
from models import build
from torch import Tensor, fx
from triton.backends.compiler import GPUTarget

import fxopt
from fxopt.backend import run
from fxopt.compat import FakeTensorMode, aot_backend


class _Driver:
    """An H100, for those who ask Triton what a kernel would be compiled for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def decisions(case: dict[str, Any]) -> dict[str, Any]:
    """The report of a case's one graph, and what is in the joint graph that AOTAutograd makes of what is left."""
    found: dict[str, Any] = {"reports": [], "joint": []}
    chooser = Always(case["winner"]) if "winner" in case else None

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        options = fxopt.Options.parse(case.get("options"))
        report, call = run(gm, inputs, options, lambda graph, given: joint_of(graph, given, found), chooser=chooser)
        found["reports"].append(json.loads(fxopt.Report([report]).to_json()))
        return call

    torch.compiler.reset()
    model, inputs = build(**case["build"], dtype=getattr(torch, case.get("dtype", "bfloat16")))
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = {name: on_card(value) for name, value in inputs.items()}
        move(model)
        with autocast(case.get("autocast")):
            torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    return found


def on_card(value: Tensor) -> Tensor:
    """A fake tensor like `value` on the device; within a FakeTensorMode."""
    return torch.empty_like(value, device="cuda")


def move(model: torch.nn.Module) -> None:
    """Put fake tensors on the device in the place of parameters and buffers, tied ones still tied."""
    moved: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None and value not in moved:
                moved[value] = torch.nn.Parameter(on_card(value), value.requires_grad)
            module._parameters[name] = None if value is None else moved[value]
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else on_card(value)


def autocast(dtype: str | None) -> Any:
    return torch.autocast("cuda", getattr(torch, dtype)) if dtype else contextlib.nullcontext()


def joint_of(graph: fx.GraphModule, inputs: Any, found: dict[str, Any]) -> Any:
    """Through AOTAutograd to its joint graph, of which is noted what a test may ask."""

    def look(joint: fx.GraphModule) -> None:
        found["joint"] += [described(node) for node in joint.graph.nodes if node.op == "call_function"]

    return aot_backend(look)(graph, inputs)


def described(node: fx.Node) -> dict[str, Any]:
    """Operator, what a launch writes to, and the shapes of the results with their devices."""
    results = [value for value in values(node.meta.get("val")) if isinstance(value, Tensor)]
    return {
        "target": str(node.target),
        "writes": sorted(node.kwargs.get("tensors_to_clone", ())) if "triton" in str(node.target) else [],
        "shapes": [list(map(int, value.shape)) for value in results],
        "devices": sorted({value.device.type for value in results}),
    }


def values(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from values(item)
    else:
        yield value


def main(cases: str) -> None:
    """Print the answers to `cases`, or for one that failed the traceback."""
    triton.runtime.driver._active = _Driver()
    answers = {}
    for name, case in json.loads(cases).items():
        try:
            answers[name] = decisions(case)
        except Exception:  # the test of that case fails, and no other
            answers[name] = {"error": traceback.format_exc()}
    print(json.dumps(answers))
