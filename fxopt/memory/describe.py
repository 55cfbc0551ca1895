"""From a decision to the plan that people read, and to the error where there is none."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fxopt.memory.joint import Array, Joint
from fxopt.memory.plan import KEPT, OFFLOADED, RECOMPUTED, Plan, Row, Timeline
from fxopt.memory.planner import Decision
from fxopt.memory.solution import closure
from fxopt.memory.units import show_bytes
from fxopt.rule import Place

__all__ = ["infeasible", "plan_of"]


def plan_of(
    joint: Joint, decision: Decision, stock: Array, budget: int, resident: Mapping[str, int], notes: list[str]
) -> Plan:
    """stock: what torch's own choice keeps. resident: bytes by what holds them besides the step."""
    solution, rest = decision.solution, sum(resident.values())
    kept = stock if solution is None else solution.kept
    offloaded = np.zeros_like(kept) if solution is None else solution.offloaded
    again = closure(joint, kept | offloaded)
    rows = [
        _row(joint, at, kept[at], offloaded[at], solution is None)
        for at in range(len(kept))
        if joint.size[at] > 0 and (kept[at] or offloaded[at] or (again[at] and joint.made[at] > 0))
    ]
    replay, default = decision.replay, decision.default
    return Plan(
        budget=budget,
        resident=dict(resident),
        rows=sorted(rows, key=lambda row: -row.bytes),
        predicted=rest + replay.peak,
        retained=replay.forward[-1] if replay.forward else 0,
        default=rest + default.peak if default is not None else 0,
        parts={**resident, **replay.parts},
        timeline=Timeline.of(replay.forward, replay.backward, rest, replay.names),
        trace=replay.trace,
        recompute_seconds=float(joint.seconds[again].sum()),
        step_seconds=float(joint.seconds.sum() + joint.backward_seconds.sum()),
        solver_seconds=decision.solver_seconds,
        trials=decision.trials,
        notes=list(notes),
    )


def _row(joint: Joint, at: int, kept: bool, offloaded: bool, stock: bool) -> Row:
    node = joint.forward[at]
    decision = KEPT if kept else OFFLOADED if offloaded else RECOMPUTED
    reason = "torch's own choice, which fits" if stock else _reason(joint, at, decision)
    return Row(node.name, int(joint.size[at]), decision, reason, Place.of(node))


def _reason(joint: Joint, at: int, decision: str) -> str:
    microseconds = 1e6 * joint.seconds[at]
    if decision == RECOMPUTED:
        by_user = "the checkpoint says so; " if joint.forced[at] else ""
        return f"{by_user}made again in {microseconds:.0f} us"
    if joint.banned[at]:
        return "computed once: random numbers, effects, or the checkpoint's policy"
    if joint.needed[at] and joint.backward_block[joint.first[at]] != joint.block[at]:
        return "another block's backward begins with it"
    return f"making it again takes {microseconds:.0f} us"


def infeasible(budget: int, minimum: int, resident: Mapping[str, int], lowest: Decision, share: float) -> str:
    """The message of a `BudgetError`. share: of what is left, what this graph may take."""
    parts = sorted({**resident, **lowest.replay.parts}.items(), key=lambda item: -item[1])
    dominant = ", ".join(f"{name} {show_bytes(size)}" for name, size in parts[:4])
    megabytes = -(-minimum // 2**20)
    others = "" if share == 1 else f" That leaves {1 - share:.0%} of the rest to the graphs of the step that follow."
    return (
        f"memory_budget={show_bytes(budget)} is too small for a step of this model. The smallest that would do is "
        f'"{megabytes}MiB", of which: {dominant}.{others} Raise the budget, make the batch or the sequence shorter, '
        'choose a smaller optimizer state (option optimizer), or train with infeasible="minimum".'
    )
