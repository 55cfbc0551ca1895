"""The memory plan of large models by the model alone: how long planning takes, and what it makes again.

    python bench/memory_model.py --json bench/results/cpu/memory_model.json

Nothing is compiled and nothing but planning is timed (CPU seconds of this process), so the shares have no noise: at the
modelled peak of full checkpointing, flops that the plan makes again as a share of a step's forward and backward.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import begin, write_json
from rich.console import Console

from fxopt.commands import models
from fxopt.memory.joint import Array, Joint, read
from fxopt.memory.plan import Plan
from fxopt.memory.program import Program
from fxopt.memory.rates import device_named
from fxopt.memory.solution import Solution, closure, repaired
from fxopt.memory.solve import solve
from fxopt.options import Options
from fxopt.outlook import Cut, Modelled, outlook

SHAPE = (
    "--config llama --hidden 4096 --layers {layers} --heads 32 --kv-heads 8 --intermediate 14336 --vocab 128256 "
    "--batch 2 --seq 4096 --dtype bf16"
)
"""Llama-3.1-8B."""
MIB = 2**20


class Timed(Modelled):
    """A cut that notes what reading the joint graph took."""

    seconds = 0.0

    def _read(self, graph: Any, info: Any, stock: Any) -> Any:
        chosen = super()._read(graph, info, stock)
        begin = time.process_time()
        read(graph, info.is_required_fw, self.outputs, self.times)
        self.seconds = time.process_time() - begin
        return chosen


def checkpointed(joint: Joint) -> Array:
    """What full checkpointing keeps: values that a later block of the forward reads."""
    kept = np.zeros(len(joint.forward), dtype=bool)
    for at, inputs in enumerate(joint.inputs):
        for one in inputs:
            if joint.block[one] < joint.block[at]:
                kept[joint.owner[one]] = True
    return repaired(joint, kept & ~joint.view)


def share(joint: Joint, kept: Array) -> float:
    """Flops made again as a share of those of forward and backward."""
    again = joint.flops[closure(joint, kept)].sum()
    return float(again / (joint.flops.sum() + joint.backward_flops.sum()))


def measured(cut: Timed) -> dict[str, Any]:
    """Of one joint graph, MiB, CPU seconds and shares."""
    joint = cut.joint
    nothing = np.zeros_like(cut.stock)
    full = checkpointed(joint)
    before = time.process_time()
    program = Program(joint)
    peak = program.modelled(Solution(full, nothing, optimal=True)).peak
    plan = solve(program, peak)
    solving = time.process_time() - before
    assert plan is not None, "full checkpointing is itself a plan"
    lowest = solve(program, None)
    assert lowest is not None
    peaks = {
        "default": program.modelled(Solution(cut.stock, nothing, optimal=True)).peak,
        "full checkpointing": peak,
        "plan": program.modelled(plan).peak,
        "lowest": program.modelled(lowest).peak,
    }
    return {
        "nodes": {"forward": len(joint.forward), "backward": len(joint.backward)},
        "seconds": {"read": cut.seconds, "solve": solving, "both": cut.seconds + solving},
        "peak_mib": {name: round(size / MIB, 1) for name, size in peaks.items()},
        "recomputed_flops_share": {"full checkpointing": share(joint, full), "plan": share(joint, plan.kept)},
    }


def run(shape: str) -> dict[str, Any]:
    """Trace a model of `shape`, flags of `fxopt explain`, and measure its one joint graph."""
    parser = argparse.ArgumentParser()
    models.add_flags(parser)
    subject = models.subject(parser.parse_args(shape.split()))
    found: list[dict[str, Any]] = []

    def planner(cut: Cut) -> Plan | None:
        assert isinstance(cut, Timed)
        found.append(measured(cut))
        return None

    args, kwargs = subject.arguments
    outlook(subject.model, args, kwargs, Options.parse({}), device_named("h100"), planner, Timed)
    (only,) = found
    return {"shape": shape, **only}


def main() -> None:
    """Measure, print, and write JSON where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    machine = begin(Console())
    found = run(SHAPE.format(layers=arguments.layers))
    print(json.dumps(found, indent=1))
    if arguments.json is not None:
        write_json(arguments.json, machine, found)


if __name__ == "__main__":
    main()
