"""A fuzz case through the whole backend, against eager in fp64."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxopt import backend as pipeline
from fxopt import capture as capturing
from fxopt import compat
from fxopt.memory.request import Budget, Request
from fxopt.options import Options
from fxopt.report import GraphReport
from fxopt.testing.exact import Widen
from fxopt.testing.near import FLOOR, too_far, widened
from fxopt.testing.planned import compile_planned
from fxopt.testing.trial import Trial

__all__ = ["Run", "Verdict", "run", "run_together"]

Named = dict[str, Tensor | None]
_LOWEST = Request(Budget(1), infeasible="minimum", optimizer=0.0)
"""A budget that nothing fits, so that all is made again that can be."""

NEARBY = 30
"""Steps of eager, a rounding away, that ours may be as far off as. Of 1,400 cases one was beyond the worst of 6."""

_CURVED = 1e-3
"""Step of central differences, in fp64 with casts to fp32 inside: 1e-7 / 1e-3 of noise, 1e-6 of curvature."""


@dataclasses.dataclass
class Verdict:
    """What became of a case.

    kind:    "wrong", "metadata", "exception" or "fallback", with the sentence in `failure`; "" without a failure, and
             "invalid" for a module that eager refuses too.
    reports: of every graph.
    """

    kind: str = ""
    failure: str | None = None
    reports: list[GraphReport] = dataclasses.field(default_factory=list)

    def fail(self, kind: str, failure: str | None) -> None:
        """Note the first failure; None is none."""
        if failure is not None and self.failure is None:
            self.kind, self.failure = kind, failure

    def features(self) -> set[str]:
        """What the rules said, without names and numbers: what makes one case unlike another."""
        sites = [item for report in self.reports for item in report.rewrites]
        left = [item for report in self.reports for item in report.refusals]
        texts = [f"{item.rule}: {item.detail}" for item in sites]
        texts += [f"{item.rule} not: {reason}" for item in left for reason in item.reasons]
        return {re.sub(r"\b[a-z_]+_\d+\b|\d+", "#", text) for text in texts}


def run(trial: Trial) -> Verdict:
    """Compile, train a step, and judge. Never raises for what fxopt does; the process's generators are left alone."""
    return run_together([trial])[0]


def run_together(trials: Sequence[Trial]) -> list[Verdict]:
    """`run` of each of `trials`, which Dynamo sees alike (`together`): one trace and one capture serve them all."""
    verdicts = [Verdict() for _ in trials]
    torch.compiler.reset()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Run(list(zip(trials, verdicts, strict=True))).judge()
        except Exception as error:
            for verdict in verdicts:
                verdict.fail(*_told(error))
    torch.compiler.reset()
    return verdicts


def _told(error: Exception) -> tuple[str, str]:
    """The kind of failure that an exception is, and the sentence."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{last.filename.rsplit('/', 1)[-1]}:{last.lineno}"
    return "exception", f"{type(error).__name__} at {place}: {error}"


class Run:
    """The steps of cases of one module: ours, eager's and the truth."""

    def __init__(self, cases: list[tuple[Trial, Verdict]]):
        self.cases, self.current = cases, 0
        self.spec, self.how = cases[0][0].spec, cases[0][0].how
        self.model = self.spec.build()
        self.ours = copy.deepcopy(self.model)
        self.compiled = torch.compile(self.ours, backend=self.backend, dynamic=self.how["dynamic"])

    def backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """fxopt for each case, with that case's compiler at the end; the current one's is called."""
        once = functools.cache(capturing.capture)
        with compat.patched(capturing, "capture", once):
            calls = [self.compile(trial, verdict, gm, inputs) for trial, verdict in self.cases]

        def current(*args: Any) -> Any:
            return calls[self.current](*args)

        return current

    def compile(self, trial: Trial, verdict: Verdict, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            parsed = Options.parse({**trial.options, "choose": "never"})
            report, call = pipeline.run(gm, inputs, parsed, _COMPILERS[trial.how["compiler"]])
        except compat.DYNAMO_CONTROL:
            raise
        except Exception as error:
            verdict.fail(*_told(error))
            return gm.forward
        verdict.reports.append(report)
        for note in report.notes:  # a warning is given once a process, a note every time
            if " failed (" in note:
                verdict.fail("fallback", note)
        return call

    def judge(self) -> None:
        if self.spec.draws:
            self.each(self.judge_draws)
            return
        batch, length = self.spec.setting["batch"], self.spec.setting["length"]
        for sizes in [(batch, length), (batch + 1, length + 2)][: 1 + self.how["resized"]]:
            inputs = self.spec.inputs(*sizes)
            try:
                shown = self.step(copy.deepcopy(self.model), inputs)[1]
            except Exception:  # written over, or too small: what eager cannot do is no case
                for _, verdict in self.cases:
                    verdict.kind = verdict.kind or "invalid"
                return
            self.each(functools.partial(self.judge_step, inputs=inputs, shown=shown))

    def each(self, judge: Callable[[Verdict], None]) -> None:
        """`judge` of each case's verdict that has not failed yet."""
        for at, (trial, verdict) in enumerate(self.cases):
            self.current, self.how = at, trial.how
            self.ours.load_state_dict(self.model.state_dict())
            if verdict.kind:
                continue
            try:
                judge(verdict)
            except Exception as error:
                verdict.fail(*_told(error))

    def judge_step(self, verdict: Verdict, inputs: Mapping[str, Tensor], shown: list[Tensor]) -> None:
        ours, also = self.step(self.ours, inputs, self.compiled)
        for at, (one, other) in enumerate(zip(also, shown, strict=True)):
            difference = _difference(one, other)
            if difference:
                verdict.fail("metadata", f"output {at}: {difference}")
        with Widen():
            wide = {name: widened(value) for name, value in inputs.items()}
            exact, _ = self.step(copy.deepcopy(self.model).double(), wide, context=False)
        eager, eps = [self.step(copy.deepcopy(self.model), inputs)[0]], self.eps()
        floor = max(FLOOR * eps, 1e-9)
        for seed in range(NEARBY):
            if not too_far(exact, eager, ours, floor):
                return
            nearby = _nudged(self.model, eps, seed), _nudged_inputs(inputs, eps, seed)
            eager.append(self.step(*nearby)[0])
        verdict.fail("wrong", too_far(exact, eager, ours, floor))

    def step(
        self, module: nn.Module, inputs: Mapping[str, Tensor], call: Any = None, context: bool = True
    ) -> tuple[Named, list[Tensor]]:
        """Loss, other outputs, gradients and buffers by name; and the outputs as they were returned."""
        module.zero_grad(set_to_none=True)
        given = {n: v.detach().requires_grad_(v.requires_grad) for n, v in inputs.items()}
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=self.how["autocast"] and context)
        with autocast, torch.set_grad_enabled(self.how["grad"]):
            loss, *others = (module if call is None else call)(**given)
        floats = [one for one in others if one.is_floating_point()]
        total = self.total(loss, floats)
        if total.requires_grad:
            total.backward()
        found: Named = {"loss": loss.detach()}
        if self.how["read"]:
            found |= {f"output {at}": one.detach().clone() for at, one in enumerate(floats)}
        found |= {f"buffer {name}": value.clone() for name, value in module.named_buffers()}
        gradients = {**dict(module.named_parameters()), "x": given["x"]}
        return found | {f"grad {name}": value.grad for name, value in gradients.items()}, [loss, *others]

    def total(self, loss: Tensor, others: Sequence[Tensor]) -> Tensor:
        """What is differentiated: the loss, and a term that reads the other outputs if the case reads them."""
        terms = [0.1 * one.square().mean() for one in others if self.how["read"] and one.is_floating_point()]
        return loss + sum(terms) if terms else loss

    def judge_draws(self, verdict: Verdict) -> None:
        """Random numbers are the compiler's own; a seed must repeat, and the gradient be that of what was computed."""
        inputs = self.spec.inputs()
        torch.manual_seed(3)
        found, _ = self.step(self.ours, inputs, self.compiled)
        torch.manual_seed(3)
        again, _ = self.step(self.ours, inputs, self.compiled)
        for name, value in found.items():
            other = again[name]
            if value is not None and other is not None and not torch.equal(value.nan_to_num(), other.nan_to_num()):
                verdict.fail("wrong", f"{name} does not repeat under a seed")
        if bool(found["loss"].isfinite()):  # type: ignore[union-attr]
            verdict.fail("wrong", self.wrong_slope(found, inputs))

    def wrong_slope(self, found: Named, inputs: Mapping[str, Tensor]) -> str | None:
        """What central differences along a random direction say against the gradients of `found`."""
        draw = torch.Generator().manual_seed(4)
        wanted = {n: p for n, p in self.ours.named_parameters() if p.requires_grad}
        along = {name: torch.randn(p.shape, generator=draw).to(p) for name, p in wanted.items()}
        losses = []
        for step in (_CURVED, -2 * _CURVED):
            with torch.no_grad():
                for name, p in wanted.items():
                    p.add_(along[name], alpha=step)
            torch.manual_seed(3)
            loss, *others = self.compiled(**inputs)
            losses.append(float(self.total(loss, others)))
        numeric = (losses[0] - losses[1]) / (2 * _CURVED)
        gradients = {name: found[f"grad {name}"] for name in wanted}
        analytic = sum(float((g * along[n]).sum()) for n, g in gradients.items() if g is not None)
        size = sum(float(g.square().sum()) for g in gradients.values() if g is not None) ** 0.5
        if abs(numeric - analytic) <= 0.02 * max(abs(analytic), size) + 1e-3:
            return None
        return f"gradients: the loss changes by {numeric:.4e} along a direction, the gradient says {analytic:.4e}"

    def eps(self) -> float:
        """Of the coarsest dtype at work, such as that of a softmax in fp32 in a module of fp64."""
        if self.how["autocast"] or self.cases[self.current][0].options["precision"]:
            return torch.finfo(torch.bfloat16).eps
        dtype = getattr(torch, self.spec.setting["dtype"])
        if dtype == torch.float64 and any(cast in self.spec.source() for cast in (".float()", "float32")):
            dtype = torch.float32
        return torch.finfo(dtype).eps


def _by_plan(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compiled as a budget has it compiled."""
    options = Options(memory_budget=_LOWEST.budget, optimizer=_LOWEST.optimizer, infeasible=_LOWEST.infeasible)
    return pipeline.compile_planned(graph, inputs, {}, "fuzz", options, "graph 0", [])[0]


def _difference(one: Tensor, other: Tensor) -> str | None:
    for what in ("shape", "dtype", "device", "requires_grad"):
        if getattr(one, what) != getattr(other, what):
            return f"{what} is {getattr(one, what)}, eager's {getattr(other, what)}"
    strides = [[s for n, s in zip(t.shape, t.stride(), strict=True) if n != 1] for t in (one, other)]
    if one.numel() and strides[0] != strides[1]:
        return f"strides are {one.stride()}, eager's {other.stride()}"
    return None


def _nudged(model: nn.Module, eps: float, seed: int) -> nn.Module:
    """A copy whose parameters are a rounding away: how far eager may be from the truth if it has no luck."""
    copied, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1 + eps * (2 * torch.rand(parameter.shape, generator=draw) - 1).to(parameter))
    return copied


def _nudged_inputs(inputs: Mapping[str, Tensor], eps: float, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def nudged(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        by = 1 + eps * (2 * torch.rand(value.shape, generator=draw) - 1)
        return (value.detach().double() * by).to(value.dtype).requires_grad_(value.requires_grad)

    return {name: nudged(value) for name, value in inputs.items()}


_COMPILERS: dict[str, Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]] = {
    "graph": lambda graph, _: graph.forward,
    "aot": lambda graph, inputs: compat.aot_backend(lambda _: None)(graph, list(inputs)),
    "planned": lambda graph, inputs: compile_planned(graph, inputs, _LOWEST)[0],
    "inductor": lambda graph, inputs: compat.compile_graph(graph, inputs, {}, "fuzz"),
    "inductor planned": _by_plan,
}
