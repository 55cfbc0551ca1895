"""Plans without Inductor: a graph is cut by the plan and both halves run as they are, in seconds instead of minutes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from fxopt import compat
from fxopt.fake import value_of
from fxopt.memory.plan import Plan
from fxopt.memory.replay import GRADIENTS, KEPT, OUTPUTS, Ledger, Replay
from fxopt.memory.request import Budget, Request, parse_budget
from fxopt.passes import memory_plan


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
    ledger, values = Ledger(), {}
    with compat.FakeTensorMode(allow_non_fake_inputs=True):
        for node in forward.graph.find_nodes(op="placeholder"):
            values[node.name] = _fresh(value_of(node))
        resident = list(values.values())
        ledger.ignore(resident)
        results = _Counted(forward, ledger).run(*resident)
        ledger.label(results[:outputs], OUTPUTS)
        ledger.label(results, KEPT)
        turn = len(ledger.events)
        names = [getattr(item, "name", "") for item in forward.graph.output_node().args[0]]
        values |= dict(zip(names[outputs:], results[outputs:], strict=True))
        given = [
            values[node.name] if node.name in values else _fresh(value_of(node))
            for node in backward.graph.find_nodes(op="placeholder")
        ]
        held = results[:outputs]
        del results, values
        ledger.add(given)
        gradients = _boxed(backward, given, ledger)
        ledger.label(gradients, GRADIENTS)
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


def _fresh(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return compat.size_hint(value)
    sizes, strides = ([compat.size_hint(one) for one in many] for many in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)


def request(budget: Any, **options: Any) -> Request:
    """The options as `fxopt.Options` would have them, without an optimizer."""
    found = Budget(budget) if isinstance(budget, int) else parse_budget(budget)
    assert found is not None
    return Request(found, **{"optimizer": 0.0, **options})


class Planned:
    """`function` compiled under `wanted`; the plan is there after the first call that trains."""

    def __init__(self, function: Callable[..., Any], wanted: Request | None, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(memory_plan, "_recall", lambda key: None)
        monkeypatch.setattr(memory_plan, "_remember", lambda key, found: None)
        monkeypatch.setattr(memory_plan._Cut, "replayed", _replayed)
        self.wanted = wanted
        self.plans: list[Plan | None] = []
        self.cuts: list[tuple[fx.GraphModule, fx.GraphModule]] = []
        torch.compiler.reset()
        self.run = torch.compile(function, backend=self.backend)

    @property
    def plan(self) -> Plan:
        """Of the first graph."""
        found = self.plans[0]
        assert found is not None
        return found

    def backend(self, gm: fx.GraphModule, inputs: Any) -> Any:
        """For torch.compile."""
        if self.wanted is None:
            return self.cut(gm, inputs, lambda joint, given, how: compat.partition(joint, given, _stock, **how))
        with memory_plan.planning(gm, self.wanted, "") as found:
            done = self.cut(gm, inputs, found.partition)
        self.plans.append(found.plan)
        return done

    def cut(self, gm: fx.GraphModule, inputs: Any, how_to: Callable[..., Any]) -> Any:
        """Compile `gm` to its two halves, uncompiled."""

        def partition(joint: fx.GraphModule, given: Any, **how: Any) -> Any:
            self.cuts.append(how_to(joint, given, how))
            return self.cuts[-1]

        return compat.aot_backend_by(partition)(gm, inputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run."""
        return self.run(*args, **kwargs)


def _stock(_: Any, __: Any, stock: Callable[[], Any]) -> Any:
    return stock()


def _replayed(cut: Any, solution: Any) -> Replay:
    halves = cut.by(None if solution is None else cut.names(solution))
    return replay(*halves, cut.outputs)
