"""A report without what it tells of the user's code: no source, no paths, and other names, the same throughout."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from fxopt.memory.plan import Plan, Trace
from fxopt.outline import HOLE, Outline, Recorder
from fxopt.precision.casts import Cast
from fxopt.report import GraphReport, Report
from fxopt.rule import Place, Refusal, Rewrite

__all__ = ["redacted"]

_WORD = re.compile(r"[\w.]*[^\W\d][\w.]*")
_FILE = re.compile(r"[\w./<>-]*\.py(:\d+)?")
_PUBLIC = ("aten.", "fxopt.", "prims.", "placeholder", "output", "getitem")
"""Calls by these names tell nothing of a user's code."""


class _Names:
    """Stand-ins for names, in the order in which they are met."""

    def __init__(self, report: Report) -> None:
        self.known: dict[str, str] = {}
        self.parts: dict[str, str] = {}
        self.paths = set(_paths_in(report))
        for name in _names_in(report):
            if name and name not in self.known:
                self.known[name] = f"n{len(self.known)}"

    def of(self, name: str) -> str:
        return self.known.get(name, "")

    def module(self, path: str) -> str:
        """A module path keeps its depth and its layers: "model.layers.3" is "m0.m1.3"."""
        return ".".join(one if one.isdigit() else self._part(one) for one in path.split(".") if one)

    def _part(self, name: str) -> str:
        return self.parts.setdefault(name, f"m{len(self.parts)}")

    def text(self, text: str) -> str:
        """A sentence with files, and names and module paths that are known, replaced."""
        return _WORD.sub(self._word, _FILE.sub("file", text))

    def _word(self, found: re.Match[str]) -> str:
        if found[0] in self.paths:
            return self.module(found[0])
        return self.known.get(found[0], found[0])


def _names_in(report: Report) -> Iterator[str]:
    for graph in report.graphs:
        sites: list[Rewrite | Refusal] = [*graph.rewrites, *graph.refusals]
        yield from (site.node for site in sites)
        yield from (name for site in graph.rewrites for name in site.made)
        yield from (name for cast in graph.casts for name in (cast.node, cast.source))
        yield from (name.split(" ")[0] for name in graph.deferred)
        if graph.plan is not None:
            yield from (row.name for row in graph.plan.rows)
            yield from graph.plan.timeline.names
        if graph.outline is not None:
            yield from (node.name for stage in graph.outline.stages for node in graph.outline.nodes(stage))


def _paths_in(report: Report) -> Iterator[str]:
    for graph in report.graphs:
        items: list[Rewrite | Refusal | Cast] = [*graph.rewrites, *graph.refusals, *graph.casts]
        yield from (item.place.module for item in items)


def redacted(report: Report) -> Report:
    """`report` without source and names. Rules, operators, shapes, times and bytes stay."""
    names = _Names(report)
    model = ", ".join(["a model", *report.model.split(", ")[1:]])
    return Report([_graph(graph, names) for graph in report.graphs], model, report.versions)


def _graph(graph: GraphReport, names: _Names) -> GraphReport:
    def place(given: Place) -> Place:
        return Place("", "", names.module(given.module))

    def site(given: Any) -> Any:
        if isinstance(given, Rewrite):
            texts = {"detail": names.text(given.detail), "made": tuple(map(names.of, given.made))}
        else:
            texts = {"reasons": tuple(map(names.text, given.reasons))}
        return dataclasses.replace(given, node=names.of(given.node), place=place(given.place), **texts)

    checks = [dataclasses.replace(one, failure="failed" if one.failure else "") for one in graph.checks]
    casts = [
        dataclasses.replace(one, node=names.of(one.node), source=names.of(one.source), place=place(one.place))
        for one in graph.casts
    ]
    return dataclasses.replace(
        graph, rewrites=list(map(site, graph.rewrites)), refusals=list(map(site, graph.refusals)), casts=casts,
        deferred=[names.of(name.split(" ")[0]) for name in graph.deferred], notes=[], checks=checks, files=[],
        kernels=[], outline=None if graph.outline is None else _outline(graph.outline, names),
        plan=None if graph.plan is None else _plan(graph.plan, names),
    )  # fmt: skip


def _plan(plan: Plan, names: _Names) -> Plan:
    """Bytes and decisions; reasons are sentences of fxopt's own."""
    rows = [
        dataclasses.replace(
            row,
            name=names.of(row.name),
            reason=names.text(row.reason),
            place=Place("", "", names.module(row.place.module)),
        )
        for row in plan.rows
    ]
    timeline = dataclasses.replace(plan.timeline, names=tuple(map(names.of, plan.timeline.names)))
    return dataclasses.replace(
        plan, rows=rows, timeline=timeline, trace=Trace(), notes=list(map(names.text, plan.notes))
    )


def _outline(outline: Outline, names: _Names) -> Outline:
    recorder = Recorder()
    for stage in outline.stages:
        nodes = [
            dataclasses.replace(
                node, name=names.of(node.name), call=_call(node.call), inputs=tuple(map(names.of, node.inputs)),
                module=names.module(node.module), source="", code="",
            )
            for node in outline.nodes(stage)
        ]  # fmt: skip
        recorder.add_nodes(stage.name, nodes)
    return recorder.outline


def _call(call: str) -> str:
    """A call of a public operator as it is; of anything else, that there is one."""
    if call.startswith(_PUBLIC):
        return re.sub(r"'[^']*'", "'...'", call)
    return f"call({', '.join([HOLE] * call.count(HOLE))})"
