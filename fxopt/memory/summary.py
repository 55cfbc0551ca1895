"""A plan as tables for a terminal: what the peak is made of, and what is decided where, layers folded."""

from __future__ import annotations

import collections
import dataclasses

from rich.table import Table

from fxopt.memory.plan import Plan
from fxopt.memory.units import show_bytes

__all__ = ["Group", "groups", "table_of_groups", "table_of_parts"]


@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors of which the same was decided in modules that differ in their layer only. bytes: of all of them."""

    where: str
    decision: str
    count: int
    bytes: int


def groups(plan: Plan) -> list[Group]:
    """Largest first."""
    sizes: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for row in plan.rows:
        sizes[row.place.any_layer or "outside of modules", row.decision].append(row.bytes)
    found = [Group(*key, len(many), sum(many)) for key, many in sizes.items()]
    return sorted(found, key=lambda group: -group.bytes)


def table_of_parts(plan: Plan) -> Table:
    """What the bytes at the peak are held by."""
    table = _table("at the peak", ("", "left"), ("bytes", "right"), ("of the budget", "right"))
    for name, size in [*sorted(plan.parts.items(), key=lambda item: -item[1]), ("in all", plan.predicted)]:
        table.add_row(name, show_bytes(size), f"{100 * size / plan.budget:.1f}%")
    return table


SHOWN_GROUPS = 24
"""Of a plan that are printed; JSON has every tensor."""


def table_of_groups(plan: Plan) -> Table:
    """What is kept, made again or offloaded, by module."""
    columns = [("", "left"), ("", "left"), ("tensors", "right"), ("bytes", "right")]
    table, found = _table("decided", *columns), groups(plan)
    for group in found[:SHOWN_GROUPS]:
        table.add_row(group.where, group.decision, f"{group.count:,}", show_bytes(group.bytes))
    if rest := found[SHOWN_GROUPS:]:
        sums = f"{sum(group.count for group in rest):,}", show_bytes(sum(group.bytes for group in rest))
        table.add_row(f"and {len(rest)} more", "", *sums)
    return table


def _table(title: str, *columns: tuple[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, side in columns:
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    return table
