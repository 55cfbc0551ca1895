"""The callback between stages: timing, dumping, and the fallback when a stage fails."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import fx

from fxopt import compat, dump, dump_kernels
from fxopt.fallback import warn_once
from fxopt.options import Options
from fxopt.precision.policy import Policy
from fxopt.report import GraphReport, Report

T = TypeVar("T")


class Stages:
    """One graph's way through the pipeline: runs stages, and holds the report they fill in."""

    def __init__(self, gm: fx.GraphModule, options: Options, name: str):
        self.gm, self.options = gm, options
        self.report = GraphReport(name)
        self.dump("dynamo", gm)

    def run(self, name: str, work: Callable[[], T], otherwise: T) -> T:
        """Run stage `name`; if it fails, warn once and go on with `otherwise`."""
        with self.timed(name):
            result = self.guarded(f"stage {name}", work, otherwise)
        graph = result[0] if isinstance(result, tuple) else result
        if isinstance(graph, fx.GraphModule):
            self.report.nodes[name] = len(graph.graph.nodes)
            self.dump(name, graph)
        return result

    def guarded(self, part: str, work: Callable[[], T], otherwise: T) -> T:
        """`work()`, or `otherwise` with a warning if it raises. Dynamo's own control flow passes through."""
        try:
            return work()
        except compat.DYNAMO_CONTROL:
            raise
        except Exception as error:
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

    def dump(self, name: str, graph: fx.GraphModule) -> None:
        """Write `graph` as it is after stage `name`, if the user asked for it."""
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
            self.report.kernels += dump_kernels.write(graph, directory)
            self.report.files += dict.fromkeys(item.path for item in self.report.kernels)

        self.guarded("dump of kernels", write, None)

    def finish(self) -> GraphReport:
        """Close the report; with a dump directory it is written there too."""
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
            if value != field.default and field.name != "dump":
                found[field.name] = _written(value)
        if self.options.rules:
            found["rules"] = [item if isinstance(item, str) else item.name for item in self.options.rules]
        return found


def _written(value: Any) -> Any:
    """An option's value as a user would write it."""
    if isinstance(value, Policy):
        return value.as_option()
    return dict(value) if isinstance(value, tuple) and value and isinstance(value[0], tuple) else value
