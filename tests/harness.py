"""What the end-to-end tests share: the backend under test, its reports, and replay of the canonical graph."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

import fxopt
from fxopt import backend as pipeline
from fxopt.capture import capture
from fxopt.testing import Comparison, compare, step, truth

# FXOPT_TEST_BACKEND=inductor runs the same matrix on Inductor alone, which tells whose fault a failure is.
BACKEND = os.environ.get("FXOPT_TEST_BACKEND", "fxopt")
LOSS = "linear_cross_entropy"


def compiled(model: nn.Module, **how: Any) -> Any:
    """`model` under the backend that is tested."""
    return torch.compile(model, backend=BACKEND, **how)


def check(model: nn.Module, call: Callable[..., Any], inputs: Mapping[str, Any], **how: Any) -> Comparison:
    """One step of `call`, which runs `model` compiled, must be as near to fp64 as one of `model` itself."""
    ours = step(call, inputs, parameters=model, **how)
    eager = step(model, inputs, **how)
    how.pop("context", None)
    return compare(ours, eager, truth(model, inputs, **how)).check()


def assert_loss_rewritten(count: int = 1) -> None:
    """The graphs compiled since the reports were cleared hold `count` rewritten losses and no refused one."""
    if BACKEND == "fxopt":
        assert not refused(), [refusal.reasons for refusal in refused()]
        assert len(rewritten()) == count, str(fxopt.reports()[-1])


def rewritten() -> list[fxopt.Rewrite]:
    """The losses rewritten in this process."""
    return [item for report in fxopt.reports() for item in report.rewrites if item.rule == LOSS]


def refused() -> list[fxopt.Refusal]:
    """The losses left alone in this process."""
    return [item for report in fxopt.reports() for item in report.refusals if item.rule == LOSS]


def without_inductor(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """fxopt's stages with AOTAutograd's eager compiler at the end: the same rewrites, no C++ to compile."""
    return by_aot_eager(gm, inputs, fxopt.Options())


def by_aot_eager(gm: fx.GraphModule, inputs: Sequence[Any], options: fxopt.Options) -> Callable[..., Any]:
    """The same under `options`."""
    report, call = pipeline.run(gm, inputs, options, _aot_eager)
    pipeline.record(fxopt.Report([report]))
    return call


def original(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The Dynamo graph as it is, through AOTAutograd."""
    return _aot_eager(gm, inputs)


class Replay:
    """A backend that runs the canonical graph through AOTAutograd, and keeps the graphs it saw."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(capture(gm).module)
        return _aot_eager(self.graphs[-1], inputs)

    def calls_of(self, *targets: Any) -> int:
        """How many nodes of all graphs, bodies of higher-order operators included, call one of `targets`."""
        modules = [m for graph in self.graphs for m in graph.modules() if isinstance(m, fx.GraphModule)]
        return sum(node.target in targets for module in modules for node in module.graph.nodes)


def _aot_eager(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    return torch._dynamo.lookup_backend("aot_eager")(gm, list(inputs))
