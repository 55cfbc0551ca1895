"""The callback between stages: timing, dumping, and the fallback when a stage fails."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from torch import fx

from fxopt import compat, dump, dump_kernels, repro, tracing
from fxopt.errors import brief
from fxopt.fallback import warn_once
from fxopt.limits import Limit
from fxopt.memory import snapshot
from fxopt.memory.plan import Plan
from fxopt.options import Options
from fxopt.outline import Recorder, kinds_of_inputs
from fxopt.precision.policy import Policy
from fxopt.report import Check, GraphReport, Report

T = TypeVar("T")


class Stages:
    """One graph's way through the pipeline: runs stages, and holds the report they fill in.

    outlined: record the graph after each stage in the report; a dump does in any case.
    limit:    how many steps may be taken, None for all.
    """

    def __init__(
        self, gm: fx.GraphModule, options: Options, name: str, outlined: bool = False, limit: Limit | None = None
    ):
        self.gm, self.options, self.limit = gm, options, limit
        self.report = GraphReport(name, inputs=kinds_of_inputs(gm))
        self.recorder = Recorder() if outlined or options.dump is not None else None
        self.keep("dynamo", gm)

    def run(self, name: str, work: Callable[[], T], otherwise: T) -> T:
        """Run stage `name`; if it fails, warn once and go on with `otherwise`."""
        with self.timed(name):
            result = self.guarded(f"stage {name}", work, otherwise)
        graph = result[0] if isinstance(result, tuple) else result
        if isinstance(graph, fx.GraphModule):
            self.report.nodes[name] = len(graph.graph.nodes)
            self.keep(name, graph)
        return result

    def allows(self, stage: str, write: Callable[[Path], object] | None = None, **about: str) -> bool:
        """Whether the limit lets `stage` take one more step: see `Limit.allows`."""
        return self.limit is None or self.limit.allows(write, graph=self.report.name, stage=stage, **about)

    @contextlib.contextmanager
    def checking(self, part: str, what: str) -> Iterator[None]:
        """Time what is verified within, and note how it went."""
        try:
            with self.timed("verify"):
                yield
        except Exception as error:
            self.checked(part, what, error)
            raise
        self.checked(part, what)

    def checked(self, part: str, what: str, error: Exception | None = None) -> None:
        """Note that something was verified, or found to be wrong."""
        self.report.checks.append(Check(part, what, "" if error is None else brief(error)))

    def guarded(self, part: str, work: Callable[[], T], otherwise: T) -> T:
        """`work()`, or `otherwise` with a warning if it raises. Dynamo's own control flow passes through."""
        try:
            return work()
        except compat.DYNAMO_CONTROL:
            raise
        except Exception as error:
            if self.limit is not None:
                raise  # a failure is what is being looked for
            note = warn_once(part, "it was left out for this graph", error, self.gm, self.given_options())
            self.report.notes.append(note)
            return otherwise

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to stage `name`; a stage inside another counts once, as itself."""
        before, inner = time.perf_counter(), sum(self.report.timings.values())
        try:
            yield
        finally:
            nested = sum(self.report.timings.values()) - inner
            self.report.timings[name] = self.report.timings.get(name, 0.0) + time.perf_counter() - before - nested

    def keep(self, name: str, graph: fx.GraphModule) -> None:
        """Record `graph` as it is after stage `name`, and write it, if the user asked for that."""
        recorder = self.recorder
        if recorder is not None:
            self.guarded("outline", lambda: recorder.add(name, graph), None)
        if self.options.dump is None:
            return
        stem = self.report.name.replace(" ", "_")
        path = self.options.dump / f"{stem}_{len(self.report.files)}_{name}.py"
        title = f"{self.report.name} after stage {name}"
        self.guarded("dump", lambda: self.report.files.append(dump.write(graph, path, title)), None)

    def dump_kernels(self, graph: fx.GraphModule) -> None:
        """Write the kernels that the sites of `graph` launch, if the user asked for a dump."""
        if self.options.dump is None:
            return
        directory = self.options.dump / f"{self.report.name.replace(' ', '_')}_kernels"

        def write() -> None:
            kernels, faults = dump_kernels.write(graph, directory, self.options.cards)
            self.report.kernels += kernels
            self.report.notes += [f"no code of a kernel: {fault}" for fault in faults]
            self.report.files += dict.fromkeys(item.path for item in self.report.kernels)

        self.guarded("dump of kernels", write, None)

    def planned(self, plan: Plan | None) -> None:
        """Report the memory plan, and write it for PyTorch's memory_viz, if the user asked for a dump."""
        self.report.plan = plan
        if plan is None or self.options.dump is None:
            return
        path = self.options.dump / f"{self.report.name.replace(' ', '_')}_memory.pickle"
        self.guarded("dump of the memory plan", lambda: self.report.files.append(snapshot.write(plan, path)), None)

    def write_repro(self, directory: Path) -> None:
        """Write a script that compiles this graph and compares it with PyTorch, if its rules have names."""
        if all(isinstance(item, str) for item in self.options.rules):
            repro.write_graph(self.gm, self.given_options(), directory)

    def finish(self) -> GraphReport:
        """Close the report: torch's structured trace gets it, and the dump directory, if there is one."""
        self.report.outline = None if self.recorder is None else self.recorder.outline
        self.guarded("structured trace", lambda: tracing.emit(self.report), None)
        if self.options.dump is not None:
            path = self.options.dump / f"{self.report.name.replace(' ', '_')}_report.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(Report([self.report]).to_json())
            self.report.files.append(path)
        return self.report

    def given_options(self) -> dict[str, object]:
        """The options that differ from the defaults, as a user would write them; rule objects by name."""
        found: dict[str, object] = {}
        for field in dataclasses.fields(Options):
            value = getattr(self.options, field.name)
            if value != field.default and field.name not in ("dump", "cards"):
                found[field.name] = _written(value)
        if self.options.rules:
            found["rules"] = [item if isinstance(item, str) else item.name for item in self.options.rules]
        return found


def _written(value: Any) -> Any:
    """An option's value as a user would write it."""
    if isinstance(value, Policy):
        return value.as_option()
    return dict(value) if isinstance(value, tuple) and value and isinstance(value[0], tuple) else value
