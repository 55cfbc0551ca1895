"""The report of one compilation: every decision, every refusal, as text and as JSON."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fxopt.choice import Choice, Measured
from fxopt.errors import ReportError
from fxopt.memory.plan import Plan
from fxopt.outline import Outline
from fxopt.pace import usual
from fxopt.precision.casts import Cast
from fxopt.report_format import FORMAT, readable
from fxopt.rule import Place, Refusal, Rewrite
from fxopt.version import versions


@dataclasses.dataclass(frozen=True)
class SiteKernel:
    """A generated kernel that a rewritten site launches, forward or backward.

    site: `Rewrite.node` of the site. kernel: the kernel's name. path: its source, for reading, in the dump directory.
    resources: by card, of those named by ``options={"cards": ...}`` that it is launched on, `offline.Resources`.
    """

    site: str
    kernel: str
    path: Path
    resources: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that was verified: of which part, what, and in a word or two what was wrong; "" where nothing was."""

    part: str
    what: str
    failure: str = ""


@dataclasses.dataclass
class GraphReport:
    """What fxopt did to one graph.

    name:     "graph 0" in order of compilation.
    rewrites, refusals: the sites, in graph order a rule.
    casts:    those that ``options={"precision": ...}`` put there.
    deferred: the outputs that left the graph, by name.
    notes:    what a reader should know besides: nodes not lowered, stages that fell back.
    timings:  stage -> seconds; "compile" is Inductor's part.
    nodes:    stage -> number of nodes after it.
    files:    what `options={"dump": dir}` wrote.
    kernels:  of those files the sources of kernels, once for each site that launches one.
    plan:     the memory plan; None without a budget.
    inputs:   how many inputs of the Dynamo graph are of each kind ("float32[64, 64]"): what tells models apart.
    checks:   what was verified, in order.
    steps:    seconds from one call of the compiled graph to the next, the newest 32: a training step, with the
              optimizer and whatever else the script does.
    outline:  the graphs after each stage, where they are recorded (`fxopt.explain`, a dump); else None.
    """

    name: str
    rewrites: list[Rewrite] = dataclasses.field(default_factory=list)
    refusals: list[Refusal] = dataclasses.field(default_factory=list)
    casts: list[Cast] = dataclasses.field(default_factory=list)
    deferred: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    timings: dict[str, float] = dataclasses.field(default_factory=dict)
    steps: list[float] = dataclasses.field(default_factory=list)
    nodes: dict[str, int] = dataclasses.field(default_factory=dict)
    files: list[Path] = dataclasses.field(default_factory=list)
    kernels: list[SiteKernel] = dataclasses.field(default_factory=list)
    plan: Plan | None = None
    inputs: dict[str, int] = dataclasses.field(default_factory=dict)
    checks: list[Check] = dataclasses.field(default_factory=list)
    outline: Outline | None = None

    def by_kernel(self) -> dict[tuple[str, Path], list[SiteKernel]]:
        """`kernels` by name and path: each kernel once, with the sites that launch it."""
        found: dict[tuple[str, Path], list[SiteKernel]] = collections.defaultdict(list)
        for item in self.kernels:
            found[item.kernel, item.path].append(item)
        return found


@dataclasses.dataclass
class Report:
    """What fxopt did to a model: one `GraphReport` a graph, and their sums.

    `print(report)` leads with the verdict; `report.to_json()` holds everything.

    model:    what was explained, in words; "" for what was compiled in the course of training.
    versions: of fxopt and of what it stands on.
    """

    graphs: list[GraphReport] = dataclasses.field(default_factory=list)
    model: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=lambda: dict(versions()))

    @property
    def rewrites(self) -> list[Rewrite]:
        """Every site that was rewritten."""
        return [item for graph in self.graphs for item in graph.rewrites]

    @property
    def refusals(self) -> list[Refusal]:
        """Every site that was left alone, with the reasons."""
        return [item for graph in self.graphs for item in graph.refusals]

    @property
    def casts(self) -> list[Cast]:
        """Every cast that ``options={"precision": ...}`` put there."""
        return [item for graph in self.graphs for item in graph.casts]

    @property
    def deferred(self) -> list[str]:
        """The outputs computed only when somebody looks."""
        return [item for graph in self.graphs for item in graph.deferred]

    @property
    def notes(self) -> list[str]:
        """What a reader should know besides."""
        return [item for graph in self.graphs for item in graph.notes]

    @property
    def kernels(self) -> list[SiteKernel]:
        """The generated kernels of every site, where a dump directory was given."""
        return [item for graph in self.graphs for item in graph.kernels]

    @property
    def plans(self) -> list[Plan]:
        """The memory plans, one for each graph that a budget was given for."""
        return [graph.plan for graph in self.graphs if graph.plan is not None]

    @property
    def timings(self) -> dict[str, float]:
        """Seconds a stage, over all graphs."""
        total: dict[str, float] = collections.defaultdict(float)
        for graph in self.graphs:
            for stage, seconds in graph.timings.items():
                total[stage] += seconds
        return dict(total)

    @property
    def step_seconds(self) -> float | None:
        """Median seconds of a step, once some have run; of a step of several graphs each has the same pace."""
        return max((found for graph in self.graphs if (found := usual(graph.steps)) is not None), default=None)

    @property
    def verdict(self) -> str:
        """One line: what was rewritten, what was refused, what is deferred."""
        done = _counted(item.rule for item in self.rewrites)
        left = _counted(item.rule for item in self.refusals)
        parts = [f"rewrote {done}" if done else "rewrote nothing", f"left alone {left}" if left else ""]
        parts.append(f"{len(self.deferred)} output{'s' * (len(self.deferred) != 1)} deferred" if self.deferred else "")
        graphs = f"{len(self.graphs)} graph{'s' * (len(self.graphs) != 1)}"
        return f"fxopt: {graphs}, " + "; ".join(part for part in parts if part)

    def to_json(self) -> str:
        """Everything in the report, as JSON."""
        head = {"format": FORMAT, "verdict": self.verdict}
        return json.dumps(head | dataclasses.asdict(self), default=str, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote. Raises `ReportError` for anything else, and for another format."""
        data = readable(text)
        try:
            return cls([_graph_from(item) for item in data["graphs"]], data["model"], data["versions"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ReportError(f"this report is damaged ({type(error).__name__}: {error}): write it again") from error

    def to_html(self, path: str | os.PathLike[str], *, redact: bool = False) -> Path:
        """Write the report as one HTML file, which needs no server and no network. Returns its path.

        redact: leave out the source, and the names of modules, files, parameters and nodes.
        """
        from fxopt.html import page

        return page.write(self, Path(path), redact)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=150, color_system=None, force_terminal=False)
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield Text(self.verdict, style="bold")
        for graph in self.graphs:
            yield Text("")
            if len(self.graphs) > 1:
                yield Text(
                    f"{graph.name}: {len(graph.rewrites)} rewritten, {len(graph.refusals)} left alone", style="bold"
                )
            yield from _tables(graph)


def _tables(graph: GraphReport) -> Any:
    if graph.rewrites:
        table = Table("rule", "where", "what", title="rewritten", title_justify="left", box=None, pad_edge=False)
        for done in graph.rewrites:
            choice = f"\n{done.choice}" if done.choice is not None else ""
            table.add_row(
                done.rule, str(done.place), f"{done.nodes} node{'s' * (done.nodes != 1)}: {done.detail}{choice}"
            )
        yield table
    if graph.refusals:
        table = Table("rule", "where", "why", title="left alone", title_justify="left", box=None, pad_edge=False)
        for reasons, group in _grouped(graph.refusals).items():
            for refusal in group:
                table.add_row(refusal.rule, str(refusal.place), reasons if refusal is group[0] else "as above")
        yield table
    if graph.casts:
        yield _table_of_casts(graph.casts)
    if any(item.resources for item in graph.kernels):
        yield _table_of_kernels(graph)
    if graph.plan is not None:
        yield Text(f"memory: {graph.plan.summary}")
        yield _table_of_memory(graph.plan)
        for note in graph.plan.notes:
            yield Text(f"note: {note}")
    for name in graph.deferred:
        yield Text(f"deferred: {name} is computed when it is first read")
    for note in graph.notes:
        yield Text(f"note: {note}")
    if (step := usual(graph.steps)) is not None:
        yield Text(f"a step took {step:.3g} s, the median of {len(graph.steps)}")
    if graph.timings:
        yield Text("time: " + ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in graph.timings.items()))
    for file in graph.files:
        sites = [item.site for item in graph.kernels if item.path == file]
        yield Text(f"wrote {file}" + (f", launched by {', '.join(sites)}" if sites else ""))


def _table_of_casts(casts: list[Cast]) -> Table:
    groups: dict[tuple[str, str, str], list[Cast]] = collections.defaultdict(list)
    for cast in casts:
        groups[cast.before, cast.after, cast.reason].append(cast)
    table = Table("from", "to", "casts", "MiB", "why", title="casts", title_justify="left", box=None, pad_edge=False)
    for (before, after, reason), group in groups.items():
        table.add_row(before, after, str(len(group)), f"{sum(cast.bytes for cast in group) / 2**20:.1f}", reason)
    return table


def _table_of_kernels(graph: GraphReport) -> Table:
    head = ("kernel", "card", "registers", "spills, B", "shared, B", "fits", "sites")
    table = Table(*head, title="kernels", title_justify="left", box=None, pad_edge=False)
    for (name, _), group in graph.by_kernel().items():
        for card, used in group[0].resources.items():
            numbers = [str(used[key]) for key in ("registers", "spill_bytes", "shared_bytes")]
            table.add_row(name, card, *numbers, "yes" if used["fits"] else "no", str(len(group)))
    return table


SHOWN_ROWS = 12
"""Tensors of a plan that are printed; `Report.plans` has them all."""


def _table_of_memory(plan: Plan) -> Table:
    table = Table("tensor", "MiB", "", "where", "why", title="memory", title_justify="left", box=None, pad_edge=False)
    for row in plan.rows[:SHOWN_ROWS]:
        table.add_row(row.name, f"{row.bytes / 2**20:.1f}", row.decision, str(row.place), row.reason)
    if (more := len(plan.rows) - SHOWN_ROWS) > 0:
        table.add_row(f"and {more} more")
    return table


def _grouped(refusals: list[Refusal]) -> dict[str, list[Refusal]]:
    groups: dict[str, list[Refusal]] = collections.defaultdict(list)
    for refusal in refusals:
        unmeasured = [str(refusal.choice)] if refusal.choice is not None and not refusal.choice.winner else []
        groups["; ".join([*refusal.reasons, *unmeasured])].append(refusal)
    return groups


def _counted(names: Any) -> str:
    counts = collections.Counter(names)
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _graph_from(data: dict[str, Any]) -> GraphReport:
    rewrites = [Rewrite(**item | _decided(item) | {"made": tuple(item["made"])}) for item in data["rewrites"]]
    refusals = [Refusal(**item | _decided(item) | {"reasons": tuple(item["reasons"])}) for item in data["refusals"]]
    casts = [Cast(**item | {"place": Place(**item["place"])}) for item in data["casts"]]
    files = [Path(item) for item in data["files"]]
    kernels = [SiteKernel(**item | {"path": Path(item["path"])}) for item in data["kernels"]]
    plan = None if data.get("plan") is None else Plan.from_json(data["plan"])
    checks = [Check(**item) for item in data["checks"]]
    outline = None if data["outline"] is None else Outline.from_dict(data["outline"])
    read = {"rewrites": rewrites, "refusals": refusals, "casts": casts, "files": files, "kernels": kernels}
    read |= {"checks": checks, "outline": outline, "plan": plan}
    return GraphReport(**data | read)


def _decided(data: dict[str, Any]) -> dict[str, Any]:
    """What rewrites and refusals share, as objects."""
    choice = data.get("choice")
    if choice is not None:
        choice = Choice(**choice | {"measured": tuple(map(Measured.read, choice["measured"]))})
    return {"place": Place(**data["place"]), "choice": choice}


_REPORTS: list[Report] = []
"""Reports of this process: torch.compile gives a backend no handle through which to return one."""


def reports() -> list[Report]:
    """The reports of every graph compiled in this process, oldest first."""
    return list(_REPORTS)


def clear_reports() -> None:
    """Forget the reports of this process."""
    _REPORTS.clear()


def record(report: Report) -> None:
    """Add `report` to those of this process, keeping the newest 1,000."""
    _REPORTS.append(report)
    del _REPORTS[:-1000]
