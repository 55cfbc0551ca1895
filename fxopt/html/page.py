"""A report as one HTML file, which opens without a server and without a network."""

from __future__ import annotations

import functools
import json
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fxopt.errors import ReportError
from fxopt.html import code, memory, redact, views
from fxopt.report import GraphReport, Report

__all__ = ["render", "write"]


def write(report: Report, path: Path, redacted: bool = False) -> Path:
    """Write `render` to `path`, its directory too. Returns `path`. Raises OSError and `ReportError`."""
    text = render(report, redacted)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def render(report: Report, redacted: bool = False) -> str:
    """The page. redacted: without source, and with other names. Raises `ReportError` for a report without graphs."""
    if not report.graphs:
        raise ReportError("there is nothing to show: no graph was compiled, and this report is empty")
    kernels = [] if redacted else [one for graph in report.graphs for one in code.kernels(graph)]
    report = redact.redacted(report) if redacted else report
    memories = [memory.chart(graph) for graph in report.graphs]
    return _environment().get_template("report.html.jinja").render(
        report=report,
        redacted=redacted,
        tiles=views.tiles(report, memories),
        timelines=[views.timeline(graph) for graph in report.graphs],
        sites=[row for graph in report.graphs for row in views.sites(graph)],
        rules=views.rules(report),
        casts=views.casts(report),
        checks=[(graph.name, check) for graph in report.graphs for check in graph.checks],
        notes=[(graph.name, note) for graph in report.graphs for note in graph.notes],
        kernels=kernels,
        planned=any(memories),
        style=Markup(_text("style.css") + code.style()),
        script=Markup(_text("report.js")),
        data=_embedded({"graphs": [_graph(graph) for graph in report.graphs], "memory": memories}),
    )  # fmt: skip


def _graph(graph: GraphReport) -> dict[str, Any]:
    """What the script needs of a graph: its stages, and what took the place of what."""
    outline = graph.outline
    stages = [] if outline is None else [{"name": one.name, "nodes": one.nodes} for one in outline.stages]
    return {
        "name": graph.name,
        "texts": [] if outline is None else outline.texts,
        "lines": [] if outline is None else outline.lines,
        "stages": stages,
        "rewrites": [{"rule": one.rule, "node": one.node, "made": one.made} for one in graph.rewrites],
    }


def _embedded(data: Any) -> Markup:
    """JSON that no text in it can end the script element of."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _text(name: str) -> str:
    return (resources.files("fxopt.html") / "templates" / name).read_text(encoding="utf-8")


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("fxopt.html"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
