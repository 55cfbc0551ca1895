"""The memory plan: which forward values the backward finds kept, and which it makes again.

Torch calls `MemoryPlan` with each joint graph that it is about to cut in two. Without a budget its own min-cut choice
stands; with one, it stands if it fits. Objections to making a value again: random numbers, effects, what the user's
checkpoint keeps, and what another block's backward reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from fxopt import compat
from fxopt.errors import BudgetError
from fxopt.fake import value_of
from fxopt.kernels.source import cache_directory, write_whole
from fxopt.memory import describe
from fxopt.memory.joint import Joint, read
from fxopt.memory.modelled import SAFETY, modelled_step
from fxopt.memory.offload import Places, offload
from fxopt.memory.plan import Plan
from fxopt.memory.planner import Decision, Infeasible, decide
from fxopt.memory.rates import device_of
from fxopt.memory.replay import Replay, replay
from fxopt.memory.request import Request
from fxopt.memory.resident import found_optimizer, inputs_of, optimizer_bytes, resident_bytes
from fxopt.memory.solution import Solution
from fxopt.memory.steps import ALONE, EARLIER, Step, family_of, note_piece, piece_of, step_of
from fxopt.memory.timing import MeasuredTimes, ModelledTimes
from fxopt.memory.units import show_bytes
from fxopt.version import VERSION

__all__ = ["RELEASING", "Cut", "MemoryPlan", "Planning", "planned", "planning"]

ASSUMED_OPTIMIZER = "adamw"
RELEASING = {"allow_buffer_reuse": False}
"""Inductor's configuration for code that is planned: what is read for the last time is let go at once.

Otherwise Inductor holds it for a later buffer of the same size wherever the peak that it estimates allows. It knows
nothing of what operators hold while they run, so the true peak rises, by a fifth for a Llama's least.
"""


class MemoryPlan(compat.partitioner_class()):  # type: ignore[misc]
    """The partitioner of one compilation. It is pickled into cache keys, so all it holds is a name of its own."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **how: Any) -> Any:
        """(forward, backward) graph modules."""
        return _OPEN[self.name].partition(gm, joint_inputs, how)

    def uuid(self) -> str:
        """What it adds to the keys of torch's caches."""
        return f"fxopt memory plan {self.name}"


_OPEN: dict[str, Planning] = {}
"""Those under way, by the name of the plan."""


class Planning:
    """The planning of one graph, for which torch asks, or not where it remembers the compiled graph.

    plan: what was planned, now or when the graph was compiled that torch remembers; None before, and for a graph
    without a backward.
    """

    def __init__(self, key: str, request: Request, budget: int, device: torch.device, step: Step):
        self.key, self.request, self.budget, self.device, self.step = key, request, budget, device, step
        self.remembered = _recall(key)
        self.plan = self.remembered.plan if self.remembered is not None else None
        self.error: Exception | None = None
        # A plan that is lost must be made again, so torch may not remember what was compiled by it.
        made = self.remembered.made if self.remembered is not None else uuid.uuid4().hex
        self.made, self.partitioner = made, MemoryPlan(f"{key} {made}")

    def partition(self, gm: fx.GraphModule, inputs: Any, how: dict[str, Any]) -> Any:
        """Cut `gm` by the plan. What is raised is in `error` too: torch would dress it as its own."""
        try:
            return self._partition(gm, inputs, how)
        except Exception as error:
            self.error = error
            raise

    def _partition(self, gm: fx.GraphModule, inputs: Any, how: dict[str, Any]) -> Any:
        known = device_of(self.device)
        if self.remembered is not None:  # nothing is weighed, so nothing need be timed
            cut = Cut(gm, inputs, how, self.device, ModelledTimes(known), self.step.calls)
            if self.remembered.fits(cut.joint):
                return cut.by(self.remembered.saved)
        times = MeasuredTimes(self.device, known) if self.request.measure else ModelledTimes(known)
        cut = Cut(gm, inputs, how, self.device, times, self.step.calls)
        self.plan, saved = planned(cut, self.request, self.budget, self.step)
        _remember(self.key, _Remembered(self.made, self.plan, saved))
        return cut.by(saved)


def planned(cut: Cut, request: Request, budget: int, step: Step = ALONE) -> tuple[Plan, _Saved | None]:
    """The plan of `cut` within `budget` bytes, and the names of what it saves; None for torch's own choice.

    step: the other graphs of the same step. Raises BudgetError, unless ``infeasible="minimum"``.
    """
    known, notes = cut.known, list[str]()
    optimizer = request.optimizer if request.optimizer is not None else found_optimizer(cut.trained_shapes)
    if optimizer is None:
        optimizer = ASSUMED_OPTIMIZER
        notes.append(f"no optimizer was found and none was named: {optimizer} is counted (option optimizer)")
    state = optimizer_bytes(optimizer, cut.inputs)
    resident = step.resident(resident_bytes(cut.inputs, state, request.accumulation, known))
    fixed = sum(resident.values()) + int(known.margin * budget)
    notes += step.told()
    decision = _decided(cut, request, budget, fixed, step.share, resident, notes)
    notes += cut.notes
    saved = None if decision.solution is None else cut.names(decision.solution)
    return describe.plan_of(cut.joint, decision, cut.stock, budget, resident, notes), saved


def _decided(
    cut: Cut, request: Request, budget: int, fixed: int, share: float, resident: dict[str, int], notes: list[str]
) -> Decision:
    """fixed: bytes that no plan changes. share: of the rest, what this graph may take."""
    try:
        link, reason = request.link_on(cut.known, compat.records_cuda_graphs())
        notes += [reason] if reason else []
        return decide(cut.joint, cut.stock, (budget - fixed) * share, cut.replayed, link)
    except Infeasible as none:
        lowest = none.lowest
        minimum = fixed + int(lowest.replay.peak / share)
        if request.infeasible == "minimum":
            notes.append(f"no plan fits {show_bytes(budget)}: this is the one with the lowest peak there is")
            return lowest
        raise BudgetError(describe.infeasible(budget, minimum, resident, lowest, share), minimum) from None


def _stock(_: fx.Graph, __: Any, stock: Callable[[], Any]) -> Any:
    return stock()


class Cut:
    """A joint graph, and what comes of cutting it one way or another.

    device: of its tensors. times: what nodes take on that, or on another that the plan is for. calls: how often a step
    calls it.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Any,
        how: dict[str, Any],
        device: torch.device,
        times: ModelledTimes,
        calls: int = 1,
    ):
        self.gm, self.joint_inputs, self.how, self.device = gm, inputs, how, device
        self.times, self.known, self.calls = times, times.device, calls
        self.notes: list[str] = []
        self.outputs: int = how["num_fwd_outputs"]
        compat.partition(gm, inputs, self._read, **how)

    def _read(self, graph: fx.Graph, info: Any, stock: Callable[[], Any]) -> Any:
        chosen = stock()
        self.joint: Joint = read(graph, info.is_required_fw, self.outputs, self.times, self.calls)
        self.stock = self.joint.mask(chosen)
        inputs, self.trained_shapes = inputs_of(graph, info.static_lifetime_input_nodes, self.outputs)
        self.inputs = inputs.times(self.calls)
        return chosen

    def names(self, solution: Solution) -> _Saved:
        """Of the nodes that `solution` keeps, and of those that it offloads."""
        forward = self.joint.forward
        return _Saved(*([forward[at].name for at in part.nonzero()[0]] for part in (solution.kept, solution.offloaded)))

    def by(self, saved: _Saved | None) -> Any:
        """(forward, backward) with exactly `saved` saved; None: torch's own choice."""
        if saved is None:
            return compat.partition(self.gm, self.joint_inputs, _stock, **self.how)
        wanted = {*saved.kept, *saved.offloaded}

        def choose(graph: fx.Graph, info: Any, _: Callable[[], Any]) -> list[fx.Node]:
            """And every input and symbolic number: torch leaves out what the backward turns out not to read."""
            chosen = [
                node
                for node in graph.nodes
                if node.name in wanted
                or (info.is_required_fw(node) and (compat.is_symbolic(node) or compat.is_opaque(node)))
            ]
            return list(dict.fromkeys([*info.inputs, *chosen]))

        forward, backward = compat.partition(self.gm, self.joint_inputs, choose, **self.how)
        if saved.offloaded:
            offload(forward, backward, saved.offloaded, Places.of(self.joint), self.outputs)
        return forward, backward

    def replayed(self, solution: Solution | None) -> Replay:
        """The memory of the code that `solution` comes to."""
        forward, backward = self.by(None if solution is None else self.names(solution))
        static = list(self.how.get("static_lifetime_input_indices") or ())
        lowered = compat.lower(forward, False, static), compat.lower(backward, True)
        try:
            found = replay(*lowered, self.outputs, self.known.granularity, self.device.type)
        except Exception as error:  # sizes and branches that only the data decides
            why = type(error).__name__
            self._told(f"its code cannot be replayed ({why}): peaks are those of the model, and a quarter more")
            found = self.modelled(solution).times(SAFETY)
        return found.repeated(self.calls)

    def modelled(self, solution: Solution | None) -> Replay:
        """The memory of `solution`, None for torch's own choice, as the model has it."""
        return modelled_step(self.joint, Solution.keeping(self.stock) if solution is None else solution)

    def _told(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


# --- remembering: on a hit in torch's caches nobody asks for a plan, and the report must not be lost ----------------


def _path(key: str) -> Any:
    return cache_directory() / "plans" / f"{key}.json"


@dataclasses.dataclass(frozen=True)
class _Saved:
    """Names of forward nodes whose values wait for the backward, on the device and on the host."""

    kept: list[str]
    offloaded: list[str]


@dataclasses.dataclass(frozen=True)
class _Remembered:
    """made: a name for this plan, of which no two are alike. saved: see `Cut.by`."""

    made: str
    plan: Plan
    saved: _Saved | None

    def fits(self, joint: Joint) -> bool:
        """Whether the nodes that it saves are there."""
        names = {*self.saved.kept, *self.saved.offloaded} if self.saved is not None else set()
        return {node.name for node in joint.forward} >= names


def _remember(key: str, found: _Remembered) -> None:
    with contextlib.suppress(OSError):
        write_whole(_path(key), json.dumps(dataclasses.asdict(found)))


def _recall(key: str) -> _Remembered | None:
    try:
        data = json.loads(_path(key).read_text())
        saved = None if data["saved"] is None else _Saved(**data["saved"])
        return _Remembered(str(data["made"]), Plan.from_json(data["plan"]), saved)
    except (OSError, ValueError, TypeError, KeyError):  # none, or a file that somebody broke
        return None


def _key(gm: fx.GraphModule, request: Request, budget: int, device: torch.device, step: Step, options: str) -> str:
    """budget: in bytes, since what "auto" comes to is another amount every time."""
    parts = [VERSION, torch.__version__, repr(request), repr(budget), repr(device_of(device)), repr(step), options]
    parts.append(f"CUDA graphs {compat.records_cuda_graphs()}")
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            parts.append(module.code)
            values = [value_of(node) for node in module.graph.find_nodes(op="placeholder")]
            parts += [_described(value) for value in values]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return str(value)
    shape, stride = tuple(value.shape), value.stride()
    return f"{shape} {stride} {value.dtype} {value.device} {value.requires_grad}"


@contextlib.contextmanager
def planning(gm: fx.GraphModule, request: Request, options: str, name: str = "graph 0") -> Iterator[Planning]:
    """Within, `Planning.partitioner` plans the compilation of `gm`, which the report calls `name`.

    options: all else that the code depends on. Raises OptionError for a budget that the device cannot have; what
    planning raises is raised as it is, BudgetError among it.
    """
    device = _device_of(gm)
    budget = request.budget.on(device, device_of(device))  # a mistake is an error before anything is traced
    family = family_of(compat.frame_being_compiled())
    step = step_of(family, compat.ends_in_break(gm))
    found = Planning(_key(gm, request, budget, device, step, options), request, budget, device, step)
    _OPEN[found.partitioner.name] = found
    try:
        yield found
    except Exception:
        if found.error is not None:
            raise found.error from None
        raise
    finally:
        del _OPEN[found.partitioner.name]
    piece = None
    if found.plan is not None:
        own = sum(size for what, size in found.plan.resident.items() if what != EARLIER)
        piece = piece_of(name, family, own, found.plan.retained)
    note_piece(piece, family, step.more)


def _device_of(gm: fx.GraphModule) -> torch.device:
    """Of the input with the most dimensions: single numbers may lie on a CPU."""
    tensors = [value_of(node) for node in gm.graph.find_nodes(op="placeholder")]
    known = [one for one in tensors if isinstance(one, torch.Tensor)]
    return max(known, key=lambda one: one.dim()).device if known else torch.device("cpu")
