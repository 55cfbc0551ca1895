"""What a training step would take on a device that need not be there: traced on tensors without data, and planned.

The model goes through fxopt's stages and through AOTAutograd with Inductor's decompositions, as if it were compiled;
the partitioner then plans each joint graph for the device asked for, and ends the compilation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxopt import compat
from fxopt.backend import call_once, chooser_for, name_of, run
from fxopt.fake import value_of
from fxopt.memory.plan import Plan
from fxopt.memory.program import Program
from fxopt.memory.rates import Device
from fxopt.memory.replay import Replay
from fxopt.memory.request import Request
from fxopt.memory.solution import Solution
from fxopt.memory.solve import solve
from fxopt.memory.timing import ModelledTimes
from fxopt.options import Options
from fxopt.passes.memory_plan import RELEASING, Cut, planned
from fxopt.report import Report

__all__ = ["Cut", "Modelled", "Planner", "outlook"]


@dataclasses.dataclass
class Planner:
    """Plans each joint graph that it is called with. minimum: bytes of the smallest budget that would do for all."""

    request: Request
    budget: int
    minimum: int = 0

    def __call__(self, cut: Cut) -> Plan:
        """Raises BudgetError."""
        plan, _ = planned(cut, self.request, self.budget)
        link, _ = self.request.link_on(cut.known, False)
        lowest = solve(Program(cut.joint, link), None)
        margin = int(cut.known.margin * self.budget)
        least = min(sum(plan.resident.values()) + cut.replayed(lowest).peak, plan.predicted)
        self.minimum = max(self.minimum, least + margin)
        return plan


class Modelled(Cut):
    """A cut whose plans are not lowered: their memory is the model's."""

    def replayed(self, solution: Solution | None) -> Replay:
        """The memory of `solution`, None for torch's own choice."""
        return self.modelled(solution)


def outlook(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Options,
    device: Device,
    planner: Callable[[Cut], Plan | None],
    kind: type[Cut] = Modelled,
) -> Report:
    """The report of `model` called with `args` and `kwargs`, with the plan of each graph that is trained.

    device: whose rates and memory count. kind: `Cut` lowers each plan with Inductor, and replays the code. Raises what
    `planner` and the model raise. Nothing is compiled to run; the model's forward runs once.
    """
    found = Report(model=name_of(model))

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seeing = _Seeing(device, planner, kind)
        name = f"graph {len(found.graphs)}"
        chooser = chooser_for(options, None)
        report, _ = run(gm, inputs, options, seeing.compile, name, chooser, plan=lambda: seeing.plan)
        found.graphs.append(report)
        if seeing.error is not None:
            raise seeing.error
        return gm.forward

    call_once(model, args, kwargs, backend)
    return found


class _Seen(Exception):
    """Ends a compilation whose joint graph was looked at."""


@dataclasses.dataclass
class _Seeing:
    """One graph on its way: plan and error are what its planner returned or raised."""

    device: Device
    planner: Callable[[Cut], Plan | None]
    kind: type[Cut]
    plan: Plan | None = None
    error: Exception | None = None
    seen: bool = False

    def compile(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """`graph` as it is, once the planner has seen its joint graph; without a backward there is none."""
        values = [value_of(node) for node in graph.graph.find_nodes(op="placeholder")]
        if not any(isinstance(one, torch.Tensor) and one.requires_grad for one in values):
            return graph.forward
        looking = RELEASING | {"custom_partitioner_fn": _looking(self.look), "force_disable_caches": True}
        try:
            compat.compile_graph(graph, inputs, looking)
        except Exception:
            if not self.seen:
                raise
        return graph.forward

    def look(self, gm: fx.GraphModule, inputs: Any, how: dict[str, Any]) -> None:
        """Plan the joint graph `gm`. Raises, whatever happens: torch would go on to compile it."""
        try:
            on = next(one.device for one in compat.pytree.tree_leaves(inputs) if isinstance(one, torch.Tensor))
            self.seen = True
            self.plan = self.planner(self.kind(gm, inputs, how, on, ModelledTimes(self.device)))
        except Exception as error:
            self.error = error
        raise _Seen


def _looking(look: Callable[..., None]) -> Any:
    """A partitioner that shows `look` each joint graph."""

    class Looking(compat.partitioner_class()):  # type: ignore[misc]
        def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **how: Any) -> Any:
            return look(gm, joint_inputs, how)

        def uuid(self) -> str:
            """Of no use, since caches are off."""
            return "fxopt outlook"

    return Looking()
