"""The plan as an allocator's snapshot: what torch's own memory_viz reads of it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from inspected import Gated
from torch.cuda import _memory_viz

import fxopt
from fxopt.memory.plan import Plan, Row, Timeline, Trace
from fxopt.memory.snapshot import snapshot_of
from fxopt.report import Report
from fxopt.rule import Place


def test_a_dump_has_the_plan_as_a_snapshot_and_in_the_report(tmp_path: Path) -> None:
    fxopt.clear_reports()
    model = torch.compile(Gated(2), backend="fxopt", options={"memory_budget": "64MiB", "dump": tmp_path})
    model(torch.randn(64, 16), torch.arange(64) % 50).backward()
    (plan,) = fxopt.reports()[-1].plans
    (path,) = tmp_path.glob("*_memory.pickle")
    data = pickle.loads(path.read_bytes())
    assert highest(data) == plan.predicted
    assert "MemoryViz" in _memory_viz.trace_plot(data)
    assert "Device 0" in _memory_viz.trace(data)
    assert "segments: 1" in _memory_viz.segsum(data)
    assert "gradients" in _memory_viz.memory(data, format_flamegraph=str)
    frames = [frame["name"] for event in data["device_traces"][0] for frame in event["frames"]]
    assert any("inspected" in frame["filename"] for event in data["device_traces"][0] for frame in event["frames"])
    assert {"parameters"} <= set(frames)
    written = next(file for file in fxopt.reports()[-1].graphs[0].files if file.name.endswith("report.json"))
    assert Report.from_json(written.read_text()).plans == [plan]


def highest(data: dict[str, Any]) -> int:
    """The most bytes held at a time, by the snapshot's events."""
    held, most = 0, 0
    for event in data["device_traces"][0]:
        held += {"alloc": 1, "free_completed": -1}.get(event["action"], 0) * event["size"]
        most = max(most, held)
    return most


def test_blocks_never_overlap_and_freed_room_is_used_again() -> None:
    trace = Trace(("a", "b", "", "d"), ("kept",) * 4, (1000, 300, 0, 800), (1, 2, 3, -3, -1, 4, -2), 3)
    plan = Plan(2**30, {"parameters": 512}, [Row("a", 1000, "kept", "dear", Place("m.py:3"))], 0, 0, 0, {}, Timeline(),
                0.0, 1.0, 0.0, 1, trace=trace)  # fmt: skip
    data = snapshot_of(plan)
    (segment,) = data["segments"]
    assert [(block["size"], block["state"]) for block in segment["blocks"]] == [
        (512, "active_allocated"), (800, "active_allocated"), (736, "inactive"),
    ]  # fmt: skip
    assert sum(block["size"] for block in segment["blocks"]) == segment["total_size"] == 2048
    assert {"name": "a, kept: dear", "filename": "m.py", "line": 3} in data["device_traces"][0][2]["frames"]
