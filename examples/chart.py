"""The demo's picture: loss by step, and what each backend needed in memory and time."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart also by the colour-blind. Wide under narrow, so that equal curves all show.
STYLES = [("#999999", 7.0, "-"), ("#E69F00", 4.0, "-"), ("#0072B2", 1.6, "-"), ("#CC79A7", 1.0, "--")]


def style(number: int) -> tuple[str, float, str]:
    """Return colour, line width and line style of a backend by its place."""
    return STYLES[number % len(STYLES)]


def draw_losses(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Draw a loss curve a backend; the title says how far they are apart at most."""
    for number, row in enumerate(rows):
        colour, width, line = style(number)
        steps = range(1, len(row["losses"]) + 1)
        axes.plot(steps, row["losses"], color=colour, linewidth=width, linestyle=line, label=row["backend"])
    apart = max(max(values) - min(values) for values in zip(*(row["losses"] for row in rows), strict=True))
    axes.set(xlabel="step", ylabel="loss", title=f"loss: curves at most {apart:.1e} apart")
    axes.legend(frameon=False)


def draw_bars(axes: Axes, rows: list[dict[str, Any]], name: str, title: str) -> None:
    """Draw a bar a backend with its number above it."""
    backends = [row["backend"] for row in rows]
    colours = [style(number)[0] for number in range(len(rows))]
    bars = axes.bar(backends, [row[name] for row in rows], color=colours, width=0.65)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.set(title=title)
    axes.margins(y=0.15)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the chart as PNG; a row holds `backend`, `losses`, `peak_mib` and `step_ms`."""
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), width_ratios=(2.2, 1, 1), layout="constrained")
    draw_losses(axes[0], rows)
    draw_bars(axes[1], rows, "peak_mib", "peak memory over rest, MiB")
    draw_bars(axes[2], rows, "step_ms", "a training step, ms")
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
