"""A plan's memory over one step as a picture: for a terminal by blocks of text, or as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from fxopt.memory.plan import Plan, spans
from fxopt.memory.units import show_bytes

__all__ = ["draw", "in_text"]

WIDTH, HEIGHT = 72, 10
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def in_text(plan: Plan) -> Text:
    """`HEIGHT` lines of columns: what is held in any case, the step's memory above it, and a line at the budget."""
    sizes = [*plan.timeline.forward, *plan.timeline.backward]
    columns = [max(sizes[at]) for at in spans(len(sizes), WIDTH)]
    if not columns:
        return Text("nothing is held: the step has no operators")
    scale = 1.02 * max(plan.budget, *columns) / HEIGHT
    resident = sum(plan.resident.values())
    found = Text()
    for row in reversed(range(HEIGHT)):
        line = row <= plan.budget / scale < row + 1
        for size in columns:
            found.append(*_cell(size / scale - row, resident / scale - row, line))
        found.append(f" budget {show_bytes(plan.budget)}\n" if line else "\n")
    turn = len(plan.timeline.forward) * len(columns) // len(sizes)
    found.append(f"{'forward'[:turn]:<{turn}}backward")
    return found


def _cell(above: float, resident: float, line: bool) -> tuple[str, str]:
    """One cell and its style. above, resident: how far column and resident part rise over its lower edge, in cells."""
    eighths = min(max(round(8 * above), 0), 8)
    if not eighths and line:
        return "─", "red"
    return _EIGHTHS[eighths], "bright_black" if resident >= 0.5 else "cyan"


def draw(plans: Sequence[Plan], path: Path, title: str) -> Path:
    """Write a PNG, a row a plan. Returns `path`. Raises ImportError without matplotlib, and OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6 * len(plans)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, plan in zip(figure.subplots(len(plans), squeeze=False)[:, 0], plans, strict=True):
        sizes = [size / 2**30 for size in (*plan.timeline.forward, *plan.timeline.backward)]
        turn, resident = len(plan.timeline.forward), sum(plan.resident.values()) / 2**30
        axes.fill_between(range(len(sizes)), sizes, step="mid", color="#4c8bf5", alpha=0.75, label="the step")
        axes.fill_between([0, len(sizes)], [resident] * 2, color="#9aa0a6", label=", ".join(plan.resident))
        axes.axhline(plan.budget / 2**30, color="#d93025", label=f"budget {show_bytes(plan.budget)}")
        axes.axvline(turn, color="black", linewidth=0.8, linestyle=":", label="the backward begins")
        axes.set(title=title, xlabel="operators, in order", ylabel="GiB", xlim=(0, len(sizes)), ylim=(0, None))
        axes.legend(loc="lower center", fontsize="small", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(str(path))
    return path
