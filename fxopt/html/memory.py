"""The memory plan of a graph as a chart: predicted bytes over the step, peaks, budget, and every tensor's decision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxopt.report import GraphReport
from fxopt.report_format import plan_of

__all__ = ["chart", "point"]


def chart(graph: GraphReport) -> dict[str, Any] | None:
    """What the script draws; None where nothing was planned.

    points:  {"bytes", "label"} over the step.
    tensors: {"name", "bytes", "decision", "reason", "source"}, largest first.
    """
    plan = plan_of(graph)
    if plan is None:
        return None
    tensors = sorted((_tensor(row) for row in plan.get("tensors", [])), key=lambda row: -row["bytes"])
    return {
        "graph": graph.name,
        "budget": plan.get("budget"),
        "predicted_peak": plan.get("predicted_peak"),
        "measured_peak": plan.get("measured_peak"),
        "points": [point(one, at) for at, one in enumerate(plan.get("timeline", []))],
        "tensors": tensors,
    }


def point(given: Any, at: int = 0) -> dict[str, Any]:
    """A point of the timeline: bytes alone, (label, bytes), or an object with more."""
    if isinstance(given, Mapping):
        return {"bytes": given["bytes"], "label": str(given.get("label", given.get("node", at)))}
    if isinstance(given, list | tuple):
        return {"bytes": given[1], "label": str(given[0])}
    return {"bytes": given, "label": f"step {at}"}


def _tensor(row: Mapping[str, Any]) -> dict[str, Any]:
    place = row.get("place") or ""
    source = place.get("source", "") if isinstance(place, Mapping) else str(place)
    keys = ("name", "bytes", "decision", "reason")
    return {key: row.get(key, "") for key in keys} | {"source": source}
