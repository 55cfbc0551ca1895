"""The memory plan of a graph as a chart: bytes over the step, peaks, budget, and every tensor's decision."""

from __future__ import annotations

import itertools
from typing import Any

from fxopt.report import GraphReport

__all__ = ["chart"]


def chart(graph: GraphReport) -> dict[str, Any] | None:
    """What the script draws; None where nothing was planned.

    budget, predicted, measured: bytes, `measured` None where nobody measured. notes: sentences.
    parts:   {"name", "bytes"} at the peak, largest first.
    points:  {"bytes", "label"} over the step.
    tensors: {"name", "bytes", "decision", "reason", "source"}, largest first.
    """
    plan = graph.plan
    if plan is None:
        return None
    sizes = [*plan.timeline.forward, *plan.timeline.backward]
    named = itertools.zip_longest(sizes, plan.timeline.names, fillvalue="")
    parts = sorted(plan.parts.items(), key=lambda item: -item[1])
    return {
        "graph": graph.name,
        "summary": plan.summary,
        "budget": plan.budget,
        "predicted": plan.predicted,
        "measured": plan.measured,
        "notes": plan.notes,
        "parts": [{"name": name, "bytes": size} for name, size in parts],
        "points": [{"bytes": size, "label": name or f"event {at}"} for at, (size, name) in enumerate(named)],
        "tensors": [
            {
                "name": row.name, "bytes": row.bytes, "decision": row.decision, "reason": row.reason,
                "source": row.place.source,
            }
            for row in plan.rows
        ],
    }  # fmt: skip
