"""Graphs in mixed precision, for tests: the stages without Inductor, and what they made."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import original
from torch import Tensor, fx

from fxopt import Options
from fxopt import backend as pipeline
from fxopt.capture import capture, trace
from fxopt.fake import value_of
from fxopt.passes import precision
from fxopt.precision.casts import Cast
from fxopt.precision.policy import Policy
from fxopt.report import GraphReport, Report
from fxopt.rewrite import submodules

aten = torch.ops.aten
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LOW = (BF16, FP16)


class Stages:
    """A backend: fxopt's stages, then AOTAutograd without Inductor. Keeps reports and the graphs that are compiled."""

    def __init__(self, given: Any = "bf16", **more: Any) -> None:
        self.options = Options.parse({"precision": given, **more})
        self.reports: list[GraphReport] = []
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def compiler(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            self.graphs.append(graph)
            return original(graph, inputs)

        report, call = pipeline.run(gm, inputs, self.options, compiler)
        self.reports.append(report)
        return call

    @property
    def report(self) -> Report:
        return Report(self.reports)

    def nodes(self, *targets: Any) -> list[fx.Node]:
        """The nodes of all graphs, bodies included, that call one of `targets`."""
        graphs = [one.graph for graph in self.graphs for one in submodules(graph)]
        return [node for graph in graphs for node in graph.nodes if node.target in targets]


def autocast() -> Any:
    return torch.autocast("cpu", BF16)


def run(function: Any, *inputs: Any, given: Any = "bf16", **named: Any) -> tuple[Any, Stages]:
    """What `function`, compiled by `Stages`, returns, and the stages."""
    stages = Stages(given)
    return torch.compile(function, backend=stages)(*inputs, **named), stages


def dtypes_in(node: fx.Node) -> list[torch.dtype]:
    return [value_of(one).dtype for one in node.all_input_nodes if isinstance(value_of(one), Tensor)]


def apply(function: Callable[..., Any], given: Any = "bf16", **inputs: Any) -> precision.Precision:
    policy = Policy.parse(given)
    assert policy is not None
    return precision.apply(trace(function, inputs), policy)


def casts_to_bf16(found: precision.Precision) -> list[Cast]:
    return [cast for cast in precision.casts_in(found.module) if cast.after == "bfloat16"]


def calls(found: precision.Precision) -> list[str]:
    return [str(node.target) for node in found.module.graph.nodes if node.op == "call_function"]


def dtypes_of(function: Callable[..., Any], target: Any, *inputs: Tensor) -> list[torch.dtype]:
    """Of what `target` gives, in all bodies of `function` with a residual stream of 16 bits."""
    found: list[torch.dtype] = []

    def look(gm: fx.GraphModule, _: Any) -> Any:
        policy = Policy.parse({"compute": "bf16", "residual": "bf16"})
        assert policy is not None
        made = precision.apply(capture(gm).module, policy).module
        nodes = [node for module in submodules(made) for node in module.graph.nodes]
        found.extend(value_of(node).dtype for node in nodes if node.target is target)
        return gm.forward

    torch.compile(function, backend=look)(*inputs)
    return found


def relative(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())
