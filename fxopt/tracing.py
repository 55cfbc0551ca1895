"""What fxopt did, inside torch's structured trace: with ``TORCH_TRACE=dir``, `tlparse` shows it beside the graphs."""

from __future__ import annotations

from fxopt import compat
from fxopt.report import GraphReport, Report

__all__ = ["emit"]


def emit(graph: GraphReport) -> None:
    """Put the report of `graph` into the trace as JSON, and its tables as text; where nobody traces, do nothing."""
    compat.trace_artifact("fxopt_report", "json", lambda: Report([graph]).to_json())
    compat.trace_artifact("fxopt_tables", "string", lambda: str(Report([graph])))
