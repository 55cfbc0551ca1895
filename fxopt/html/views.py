"""What the page's tables show, as plain rows: layers repeat, so equal rows are one, with what they are of."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fxopt.memory.units import mib
from fxopt.report import GraphReport, Report
from fxopt.rule import Refusal, Rewrite

__all__ = ["SiteRow", "Tile", "casts", "rules", "sites", "tiles", "timeline"]


@dataclasses.dataclass(frozen=True)
class Tile:
    """One number of the verdict, and what it says; state: "good", "bad" or ""."""

    value: str
    label: str
    state: str = ""


@dataclasses.dataclass(frozen=True)
class SiteRow:
    """Sites that are alike. `nodes` are the (name, module) of each, which the graphs have too."""

    graph: str
    status: str
    rule: str
    pattern: str
    source: str
    code: str
    says: tuple[str, ...]
    way_out: str
    nodes: tuple[tuple[str, str], ...]


def tiles(report: Report, memories: Sequence[Mapping[str, Any] | None]) -> list[Tile]:
    """The verdict in numbers; what was not measured or planned is left out."""
    done, left = len(report.rewrites), len(report.refusals)
    found = [
        Tile(str(done), _plural("site", done) + " rewritten", "good" if done else ""),
        Tile(str(left), _plural("site", left) + " left alone"),
    ]
    if report.step_seconds is not None:
        found.append(Tile(f"{report.step_seconds:.3g} s", "a step, median"))
    found += [tile for chart in memories if chart is not None for tile in _peaks(chart)]
    if report.casts:
        found.append(Tile(str(len(report.casts)), f"casts, {mib(sum(one.bytes for one in report.casts))}"))
    if report.deferred:
        found.append(Tile(str(len(report.deferred)), _plural("output", len(report.deferred)) + " deferred", "good"))
    failed = sum(bool(check.failure) for graph in report.graphs for check in graph.checks)
    checked = sum(len(graph.checks) for graph in report.graphs)
    found.append(Tile(str(checked - failed) + f"/{checked}", "checks passed", "bad" if failed else ""))
    found.append(Tile(f"{sum(report.timings.values()):.1f} s", "in fxopt's stages" + _compiled(report)))
    return found


def _compiled(report: Report) -> str:
    return " and the compiler" if "compile" in report.timings else "; nothing was compiled"


def _peaks(chart: Mapping[str, Any]) -> list[Tile]:
    budget = chart["budget"]
    found = []
    for name in ("predicted", "measured"):
        peak = chart[name]
        if peak is not None:
            found.append(Tile(mib(peak), f"{name} peak of {mib(budget)}", "bad" if peak > budget else "good"))
    return found


def timeline(graph: GraphReport) -> dict[str, Any]:
    """The stages of a graph: seconds, share of the whole, and nodes after it."""
    total = sum(graph.timings.values()) or 1.0
    rows = [
        {"stage": stage, "seconds": seconds, "share": 100 * seconds / total, "nodes": graph.nodes.get(stage)}
        for stage, seconds in graph.timings.items()
    ]
    return {"graph": graph.name, "rows": rows}


def sites(graph: GraphReport) -> list[SiteRow]:
    """The sites of a graph, those left alone last; those that differ in nothing but their layer are one row."""
    rows = [_rewritten(graph.name, one) for one in graph.rewrites]
    rows += [_refused(graph.name, one) for one in graph.refusals]
    groups: dict[SiteRow, list[tuple[str, str]]] = collections.defaultdict(list)
    for row in rows:
        groups[dataclasses.replace(row, nodes=())] += row.nodes
    return [dataclasses.replace(row, nodes=tuple(nodes)) for row, nodes in groups.items()]


def _rewritten(graph: str, one: Rewrite) -> SiteRow:
    says = [f"{one.nodes} {_plural('node', one.nodes)}: {one.detail}"]
    says += [str(one.choice)] if one.choice is not None else []
    return SiteRow(graph, "rewritten", one.rule, *_where(one), tuple(says), "", ((one.node, one.place.module),))


def _refused(graph: str, one: Refusal) -> SiteRow:
    says = list(one.reasons) + ([str(one.choice)] if one.choice is not None else [])
    status = "left alone: cost" if one.cost else "left alone"
    return SiteRow(graph, status, one.rule, *_where(one), tuple(says), _way_out(one), ((one.node, one.place.module),))


def _where(one: Rewrite | Refusal) -> tuple[str, str, str]:
    """Module path with its layer left open, source and code."""
    return one.place.any_layer, one.place.source, one.place.code


def _way_out(one: Refusal) -> str:
    """What would make the site match."""
    if one.cost:
        return f'options={{"force": ["{one.rule}"]}} rewrites it nevertheless'
    far = f"{one.agreed} {_plural('node', one.agreed)} had agreed; " if one.agreed else ""
    return f"{far}it matches once this is otherwise: {one.reasons[-1]}" if one.reasons else ""


def rules(report: Report) -> list[dict[str, Any]]:
    """How often each rule rewrote, how often it did not, and its most frequent reason."""
    done, left = (collections.Counter(one.rule for one in items) for items in (report.rewrites, report.refusals))
    why = collections.Counter((one.rule, reason) for one in report.refusals for reason in one.reasons)
    most = {rule: reason for (rule, reason), _ in reversed(why.most_common())}
    return [
        {"rule": rule, "done": done[rule], "left": left[rule], "why": most.get(rule, "")}
        for rule in dict.fromkeys([*done, *left])
    ]


def casts(report: Report) -> list[dict[str, Any]]:
    """Casts by what is cast to what, and why."""
    groups: dict[tuple[str, str, str], list[int]] = collections.defaultdict(list)
    for one in report.casts:
        groups[one.before, one.after, one.reason].append(one.bytes)
    return [
        {"before": before, "after": after, "why": why, "count": len(sizes), "size": mib(sum(sizes))}
        for (before, after, why), sizes in groups.items()
    ]


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
