"""The pipeline: capture, rewrite, compile, finish. ``torch.compile(model, backend="fxopt", options={...})``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxopt import capture as capturing
from fxopt import compat, verify
from fxopt.differential import same_function
from fxopt.options import Options
from fxopt.outputs import OutputPlan, defer_outputs
from fxopt.report import GraphReport, Report, record, reports
from fxopt.rewrite import apply_rule, copy_module
from fxopt.stages import Stages
from fxopt.version import VERSION

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def fxopt(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend that Dynamo calls with each graph.

    options: see `fxopt.Options`. mode: as torch.compile's, handed to Inductor.
    Raises `OptionError` for an option that cannot be honoured; no failure of fxopt's own leaves this function.
    """
    parsed = Options.parse(options)
    patches = compat.mode_options(mode) | dict(parsed.inductor)
    key = f"fxopt {VERSION} {parsed.cache_key()}"
    name = f"graph {len(reports())}"
    found, compiled = run(
        gm, example_inputs, parsed, lambda graph, inputs: compat.compile_graph(graph, inputs, patches, key), name
    )
    record(Report([found]))
    return compiled


def run(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, compiler: Compiler, name: str = "graph 0"
) -> tuple[GraphReport, Callable[..., Any]]:
    """Take one Dynamo graph through the stages. Returns what was decided and the callable for Dynamo."""
    stages, nothing = Stages(gm, options, name), list[str]()
    graph = stages.run("capture", lambda: capture(gm, stages), otherwise=gm)
    graph, deferrable = stages.run("rewrite", lambda: rewrite(graph, inputs, stages), otherwise=(graph, nothing))
    graph, plan = stages.run("outputs", lambda: defer(graph, deferrable, stages), otherwise=(graph, OutputPlan()))
    stages.dump_kernels(graph)
    compiled = stages.run("compile", lambda: plan.wrap(compiler(graph, inputs)), otherwise=None)
    return stages.finish(), compiled or compiler(gm, inputs)


def capture(gm: fx.GraphModule, stages: Stages) -> fx.GraphModule:
    """Stage 1: the canonical graph."""
    captured = capturing.capture(gm)
    with stages.timed("verify"):
        verify.canonical(captured.module)
    stages.report.notes += [f"kept as it is, so no rule sees through it: {reason}" for reason in captured.kept]
    return captured.module


def rewrite(gm: fx.GraphModule, inputs: Sequence[Any], stages: Stages) -> tuple[fx.GraphModule, list[str]]:
    """Stage 2: each rule in turn, on the graph the last one left. A rule that fails is left out of this graph."""
    deferrable: list[str] = []
    for rule in stages.options.active_rules():
        forced = rule.name in stages.options.force

        def apply(rule: Any = rule, forced: bool = forced, gm: fx.GraphModule = gm) -> Any:
            outcome = apply_rule(
                rule,
                gm,
                force=forced,
                may_defer=stages.options.logits == "deferred",
                lowering=stages.options.kernels,
            )
            if stages.options.verify and outcome.rewrites:
                with stages.timed("verify"):
                    same_function(gm, outcome.module, inputs)
            return outcome

        outcome = stages.guarded(f"rule {rule.name}", apply, otherwise=None)
        if outcome is not None:
            gm = outcome.module
            stages.report.rewrites += outcome.rewrites
            stages.report.refusals += outcome.refusals
            deferrable += outcome.deferrable
    return gm, deferrable


def defer(gm: fx.GraphModule, names: Sequence[str], stages: Stages) -> tuple[fx.GraphModule, OutputPlan]:
    """Stage 3: outputs that only the caller may read leave the graph."""
    if not names:
        return gm, OutputPlan()
    graph = copy_module(gm)
    plan = defer_outputs(graph, names)
    stages.report.deferred += [item.projection.name for item in plan.deferred]
    return graph, plan


def explain(
    model: torch.nn.Module | Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Say what fxopt would do to `model` called with `args` and `kwargs`, without compiling anything.

    The model runs once, forward only, as Dynamo sees it; its parameters and gradients are untouched. Returns one
    `Report` over all graphs. Raises `OptionError` for a bad option, and whatever the model raises.
    """
    parsed = Options.parse(options)
    found = Report()

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graph, _ = run(gm, inputs, parsed, lambda graph, _: graph.forward, f"graph {len(found.graphs)}")
        graph.timings.pop("compile", None)
        found.graphs.append(graph)
        return gm.forward

    torch.compiler.reset()
    try:
        torch.compile(model, backend=backend)(*args, **kwargs)
    finally:
        torch.compiler.reset()
    return found
