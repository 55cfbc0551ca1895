"""The pipeline: capture, precision, rewrite, outputs, compile. What ``torch.compile(model, backend="fxopt")`` calls."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxopt import capture as capturing
from fxopt import compat, repro, verify
from fxopt.choice import Choice
from fxopt.choosing import Chooser
from fxopt.differential import same_function
from fxopt.fake import without_autocast
from fxopt.fallback import warn_once
from fxopt.kernels.refused import warn_of
from fxopt.limits import Limit, limit
from fxopt.memory.measured import watched
from fxopt.memory.plan import Plan
from fxopt.options import Options
from fxopt.outputs import OutputPlan, defer_outputs
from fxopt.pace import paced
from fxopt.passes import precision
from fxopt.precision.paths import Paths, check_patterns
from fxopt.precision.policy import Policy
from fxopt.report import GraphReport, Report, record, reports
from fxopt.rewrite import Chooses, apply_rule, copy_module
from fxopt.rule import Place, Rule, Site
from fxopt.site_kernels import refused_sites
from fxopt.stages import Stages
from fxopt.version import VERSION

INTERFACE = "same outputs, aliasing, in-place writes and random operators as before"

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
Banned = dict[tuple[str, str], str]
"""By rule and site: what may not be rewritten, and why."""


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

    limited = limit()
    plans: list[Plan | None] = [None]
    notes: list[str] = []

    def compiler(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if limited is not None and limited.compiler != "inductor":
            return uncompiled(graph, inputs, limited.compiler)
        compiled, plans[0] = compile_planned(graph, inputs, patches, key, parsed, name, notes)
        return compiled

    chooser = chooser_for(parsed, patches)
    found, compiled = run(gm, example_inputs, parsed, compiler, name, chooser, limited=limited, plan=lambda: plans[0])
    found.notes += notes
    record(Report([found]))
    return paced(compiled, found.steps)


def compile_planned(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    patches: Mapping[str, Any],
    key: str,
    options: Options,
    name: str,
    notes: list[str],
) -> tuple[Callable[..., Any], Plan | None]:
    """Compile `graph` by Inductor, within the memory budget if there is one; and the plan, None without.

    notes: gets what the report should say besides. Raises OptionError and BudgetError.
    """
    if options.memory is None:
        return compat.compile_graph(graph, inputs, patches, key), None

    from fxopt.passes.memory_plan import RELEASING, planning  # it loads Inductor, which an explanation does without

    planned = RELEASING | dict(patches)
    try:
        with planning(graph, options.memory, f"{key} {sorted(planned.items())}", name) as found:
            partitioner = {"custom_partitioner_fn": found.partitioner}
            compiled = compat.compile_graph(graph, inputs, planned | partitioner, key)
        if found.plan is not None:
            compiled = watched(compiled, found.plan, found.device)
        return compiled, found.plan
    except compat.DYNAMO_CONTROL:
        raise
    except Exception as error:
        given: dict[str, object] = {"memory_budget": options.memory.budget.bytes}
        part = f"the memory plan of {name}"  # a warning for each: every one of them breaks a promise
        notes.append(warn_once(part, "there is none, and no budget is kept", error, graph, given))
        return compat.compile_graph(graph, inputs, patches, key), None


def uncompiled(graph: fx.GraphModule, inputs: Sequence[Any], how: str) -> Callable[..., Any]:
    """`graph` run by PyTorch: "aot_eager" as AOTAutograd makes it, "eager" as it is."""
    return graph.forward if how == "eager" else compat.aot_backend(lambda joint: None)(graph, list(inputs))


def chooser_for(options: Options, patches: Mapping[str, Any] | None) -> Chooser | None:
    """What measures sites under these options, with Inductor configured by `patches`; None: it only recalls.

    Sites are measured without CUDA graphs, which record no work that is timed part by part.
    """
    if options.choose == "never":
        return None
    tunes = options.choose == "tune"
    if patches is None:
        return Chooser(None, f"{sorted(dict(options.inductor).items())}", tunes=tunes)
    alone = {key: value for key, value in patches.items() if key != "triton.cudagraphs"}
    settings = f"{sorted(alone.items())}"

    def compiler(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return compat.compile_graph(graph, inputs, alone, f"fxopt {VERSION} alone")

    return Chooser(compiler, settings, tunes=tunes)


def run(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    compiler: Compiler,
    name: str = "graph 0",
    chooser: Chooses | None = None,
    *,
    outlined: bool = False,
    limited: Limit | None = None,
    plan: Callable[[], Plan | None] = lambda: None,
) -> tuple[GraphReport, Callable[..., Any]]:
    """Take one Dynamo graph through the stages. Returns what was decided and the callable for Dynamo.

    chooser: what each site is measured by; None: nothing is. outlined, limited: see `Stages`. plan: what came of the
    memory plan, asked for once the compiler is done.
    """
    banned: Banned = {}
    while True:
        stages = Stages(gm, options, name, outlined, limited)
        if not stages.allows("capture", stages.write_repro):
            return stages.finish(), compiler(gm, inputs)
        with compat.hidden_from_hooks():
            graph, outputs, mixed = prepare(gm, inputs, stages, chooser, banned)
        with autocast_after(mixed):
            compat.inherit_from_dynamo(graph, gm)
            compiling = functools.partial(compile_wrapped, compiler, graph, inputs, outputs)
            work = functools.partial(compiled_or_refused, graph, compiling, limited, banned)
            compiled = stages.run("compile", work, otherwise=None)
            if isinstance(compiled, dict):
                banned |= compiled
                continue
            stages.planned(plan())
        return stages.finish(), compiled or compiler(gm, inputs)


def compile_wrapped(
    compiler: Compiler, graph: fx.GraphModule, inputs: Sequence[Any], outputs: OutputPlan
) -> Callable[..., Any]:
    """`graph` compiled, with what was deferred put back among its outputs."""
    return outputs.wrap(compiler(graph, inputs))


def compiled_or_refused(
    graph: fx.GraphModule, compiling: Callable[[], Callable[..., Any]], limit: Limit | None, banned: Banned
) -> Callable[..., Any] | Banned:
    """What `compiling` gives; or, where it fails for kernels that the card does not take, the sites that need them.

    Of each such kernel the user is warned. banned: sites that were found before; where there are no others, the graph
    has failed for good. Raises what `compiling` raises for any other reason.
    """
    try:
        return compiling()
    except compat.DYNAMO_CONTROL:
        raise
    except Exception:
        if limit is not None:
            raise  # a failure is what is being looked for
        refused = {site: error for site, error in refused_sites(graph).items() if site not in banned}
        if not refused:
            raise
        for error in refused.values():
            warn_of(error, "Sites that need it are left as the model wrote them")
        return {site: str(error) for site, error in refused.items()}


def autocast_after(mixed: precision.Precision | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast off once casts are explicit: they are all there are."""
    return contextlib.nullcontext() if mixed is None else without_autocast()


def prepare(
    gm: fx.GraphModule, inputs: Sequence[Any], stages: Stages, chooser: Chooses | None, banned: Banned
) -> tuple[fx.GraphModule, OutputPlan, precision.Precision | None]:
    """All stages before the compiler: the graph for that, what becomes of its outputs, and which casts were made."""
    options, nothing = stages.options, list[str]()
    graph = stages.run("capture", lambda: capture(gm, stages), otherwise=gm)
    mixed: precision.Precision | None = None
    if options.precision is not None and stages.allows("precision", stages.write_repro):
        policy = options.precision
        graph, mixed = stages.run("precision", lambda: cast(graph, policy, stages), otherwise=(graph, mixed))
    with autocast_after(mixed):
        graph, deferrable = stages.run(
            "rewrite", lambda: rewrite(graph, inputs, stages, chooser, banned), otherwise=(graph, nothing)
        )
        graph, outputs = stages.run(
            "outputs", lambda: defer(graph, deferrable, stages), otherwise=(graph, OutputPlan())
        )
        if mixed is not None:
            stages.report.casts = precision.casts_in(graph)
            stages.report.notes.append(mixed.note(stages.report.casts))
        stages.dump_kernels(graph)
    return graph, outputs, mixed


def capture(gm: fx.GraphModule, stages: Stages) -> fx.GraphModule:
    """Stage 1: the canonical graph."""
    captured = capturing.capture(gm)
    with stages.checking("capture", "the graph is canonical: ATen, with fake values that are fresh"):
        verify.canonical(captured.module)
    stages.report.notes += [f"kept as it is, so no rule sees through it: {reason}" for reason in captured.kept]
    return captured.module


def cast(gm: fx.GraphModule, policy: Policy, stages: Stages) -> tuple[fx.GraphModule, precision.Precision | None]:
    """Stage 2: explicit casts. What follows is done without ambient autocast."""
    paths = Paths.of(compat.frame_being_compiled()) if policy.keep_fp32 else Paths()
    found = precision.apply(gm, policy, paths)
    check_patterns(policy, paths, found.paths, compat.ends_in_break(stages.gm))
    stages.report.notes += [f"{name} {why}" for name, why in found.kept]
    return found.module, found


def rewrite(
    gm: fx.GraphModule, inputs: Sequence[Any], stages: Stages, chooser: Chooses | None, banned: Banned
) -> tuple[fx.GraphModule, list[str]]:
    """Stage 3: each rule in turn, on the graph the last one left. A rule that fails is left out of this graph."""
    deferrable: list[str] = []
    measuring = None if chooser is None else _Timed(chooser, stages)
    permits = None if stages.limit is None else functools.partial(_permits, stages)
    for rule in stages.options.active_rules():
        forced = rule.name in stages.options.force

        def apply(rule: Any = rule, forced: bool = forced, gm: fx.GraphModule = gm) -> Any:
            try:
                outcome = apply_rule(
                    rule,
                    gm,
                    force=forced,
                    may_defer=stages.options.logits == "deferred",
                    lowering=stages.options.kernels,
                    chooser=measuring,
                    permits=permits,
                    banned={site: why for (name, site), why in banned.items() if name == rule.name},
                )
            except verify.VerificationError as error:
                stages.checked(f"rule {rule.name}", INTERFACE, error)
                raise
            if outcome.rewrites:
                stages.checked(f"rule {rule.name}", INTERFACE)
                if stages.options.verify:
                    with stages.checking(f"rule {rule.name}", "outputs and gradients agree in fp64"):
                        same_function(gm, outcome.module, inputs)
            return outcome

        if not stages.allows("rewrite", stages.write_repro, rule=rule.name):
            break  # it may fail as it looks for sites
        outcome = stages.guarded(f"rule {rule.name}", apply, otherwise=None)
        if outcome is not None:
            gm = outcome.module
            stages.report.rewrites += outcome.rewrites
            stages.report.refusals += outcome.refusals
            deferrable += outcome.deferrable
    return gm, deferrable


def _permits(stages: Stages, rule: Rule, site: Site, replacement: Callable[..., Any]) -> bool:
    """Whether the limit lets `site` be rewritten; if it is the last that may be, it is kept for a repro."""
    place = Place.of(site.anchor)

    def write(directory: Path) -> None:
        repro.write_site(site, replacement, directory)
        stages.write_repro(directory)

    return stages.allows(
        "rewrite", write, rule=rule.name,
        node=site.anchor.name, source=place.source, code=place.code, module=place.module,
    )  # fmt: skip


class _Timed:
    """A chooser whose time is a stage of its own in the report."""

    def __init__(self, chooser: Chooses, stages: Stages):
        self.chooser, self.stages = chooser, stages

    def choose(self, rule: Rule, site: Site) -> Choice | None:
        with self.stages.timed("choose"):
            return self.chooser.choose(rule, site)


def defer(gm: fx.GraphModule, names: Sequence[str], stages: Stages) -> tuple[fx.GraphModule, OutputPlan]:
    """Stage 4: outputs that only the caller may read leave the graph."""
    if not names or not stages.allows("outputs", stages.write_repro):
        return gm, OutputPlan()
    graph = copy_module(gm)
    plan = defer_outputs(graph, names)
    stages.report.deferred += [item.projection.name for item in plan.deferred]
    return graph, plan


def name_of(model: torch.nn.Module | Callable[..., Any]) -> str:
    """What a report calls `model`: its class with its parameters counted, or a function's name."""
    if not isinstance(model, torch.nn.Module):
        return getattr(model, "__name__", type(model).__name__)
    return f"{type(model).__name__}, {sum(one.numel() for one in model.parameters()):,} parameters"


def explain(
    model: torch.nn.Module | Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Say what fxopt would do to `model` called with `args` and `kwargs`, without compiling anything.

    The model runs once, forward only, as Dynamo sees it; its parameters and gradients are untouched. What was measured
    at sites before, on this machine, is part of what would be done; nothing is measured here. Returns one
    `Report` over all graphs. Raises `OptionError` for a bad option, and whatever the model raises.
    """
    parsed = Options.parse(options)
    found = Report(model=name_of(model))

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        name = f"graph {len(found.graphs)}"
        graph, _ = run(
            gm, inputs, parsed, lambda graph, _: graph.forward, name, chooser_for(parsed, None), outlined=True
        )
        graph.timings.pop("compile", None)
        found.graphs.append(graph)
        return gm.forward

    call_once(model, args, kwargs, backend)
    return found


def call_once(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], backend: Callable[..., Any]
) -> None:
    """Call `model` under `backend`, and leave nothing compiled behind."""
    torch.compiler.reset()
    try:
        torch.compile(model, backend=backend)(*args, **kwargs)
    finally:
        torch.compiler.reset()
