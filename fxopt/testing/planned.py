"""Plans without Inductor: a graph is cut by the plan and both halves run as they are, in seconds instead of minutes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fxopt import compat
from fxopt.fake import stand_in, value_of
from fxopt.memory.plan import Plan
from fxopt.memory.replay import GRADIENTS, KEPT, OUTPUTS, Ledger, Replay
from fxopt.memory.request import Request
from fxopt.passes import memory_plan

__all__ = ["compile_by", "compile_planned", "replay"]


def compile_planned(
    gm: fx.GraphModule, inputs: Any, wanted: Request, seen: Callable[[Any], None] = lambda halves: None
) -> tuple[Callable[..., Any], Plan | None]:
    """`gm` cut by a plan within `wanted`, uncompiled; and the plan, None where there is no backward.

    seen: given the two halves. Nothing is remembered. Raises what planning raises.
    """
    unknown = compat.patched(memory_plan, "_recall", lambda key: None)
    forgotten = compat.patched(memory_plan, "_remember", lambda key, found: None)
    interpreted = compat.patched(memory_plan.Cut, "replayed", _replayed)
    with unknown, forgotten, interpreted, memory_plan.planning(gm, wanted, "") as found:
        return compile_by(found.partition, gm, inputs, seen), found.plan


def compile_by(
    partition: Callable[..., Any], gm: fx.GraphModule, inputs: Any, seen: Callable[[Any], None] = lambda halves: None
) -> Callable[..., Any]:
    """`gm` cut by ``partition(joint, inputs, options)``, uncompiled. seen: given the two halves."""

    def cut(joint: fx.GraphModule, given: Any, **how: Any) -> Any:
        halves = partition(joint, given, how)
        seen(halves)
        return halves

    return compat.aot_backend_by(cut)(gm, inputs)


def _replayed(cut: Any, solution: Any) -> Replay:
    forward, backward = cut.by(None if solution is None else cut.names(solution))
    return replay(forward, backward, cut.outputs)


class _Counted(fx.Interpreter):
    """Runs a graph on fake tensors, letting go of each after its last use, and counts."""

    def __init__(self, gm: fx.GraphModule, ledger: Ledger):
        super().__init__(gm, garbage_collect_values=True)
        self.ledger = ledger

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.ledger.add(result)
        return result


def replay(forward: fx.GraphModule, backward: fx.GraphModule, outputs: int) -> Replay:
    """What `fxopt.memory.replay` does for wrappers, for graphs that are interpreted node by node."""
    ledger, values = Ledger(), dict[str, Any]()
    with compat.FakeTensorMode(allow_non_fake_inputs=True):
        for node in forward.graph.find_nodes(op="placeholder"):
            values[node.name] = stand_in(value_of(node))
        resident = list(values.values())
        ledger.ignore(resident)
        results = _Counted(forward, ledger).run(*resident)
        names = [getattr(item, "name", "") for item in compat.pytree.arg_tree_leaves(*forward.graph.output_node().args)]
        ledger.label(results[:outputs], OUTPUTS, names[:outputs])
        ledger.label(results, KEPT, names)
        turn = len(ledger.events)
        values |= dict(zip(names[outputs:], results[outputs:], strict=True))
        given = [
            values[node.name] if node.name in values else stand_in(value_of(node))
            for node in backward.graph.find_nodes(op="placeholder")
        ]
        held = results[:outputs]
        del results, values
        ledger.add(given)
        gradients = _boxed(backward, given, ledger)
        ledger.label(gradients, GRADIENTS, ["" for _ in gradients])
        found = Replay.of(ledger, turn)
        del held, gradients
    return found


def _boxed(gm: fx.GraphModule, given: list[Any], ledger: Ledger) -> Any:
    run = _Counted(gm, ledger)
    arguments = iter(given)
    for node in gm.graph.find_nodes(op="placeholder"):
        run.env[node] = next(arguments)
    given.clear()
    del arguments
    return run.run(initial_env=dict(run.env))
