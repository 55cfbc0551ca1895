"""Plans without Inductor: a graph is cut by the plan and both halves run as they are, in seconds instead of minutes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from fxopt import compat
from fxopt.fake import value_of
from fxopt.memory.joint import Joint, read
from fxopt.memory.plan import Plan
from fxopt.memory.rates import CPU
from fxopt.memory.replay import GRADIENTS, KEPT, OUTPUTS, Ledger, Replay
from fxopt.memory.request import Budget, Request, parse_budget
from fxopt.passes import memory_plan

WIDTH, TOKENS = 32, 64


class Block(nn.Module):
    """Attention and an MLP with residuals, as a transformer's layer has them."""

    def __init__(self, dropout: float, shared: nn.Linear | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up = shared if shared is not None else nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        weights = F.dropout((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1), self.dropout, self.training)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        hidden = F.gelu(self.up(x))
        return x + F.dropout(self.down(hidden), self.dropout, self.training)


class Model(nn.Module):
    """Some blocks; tied: their `up` is one weight. frozen: the first block is not trained."""

    def __init__(self, layers: int, dropout: float = 0.0, tied: bool = False, frozen: bool = False):
        super().__init__()
        shared = nn.Linear(WIDTH, 4 * WIDTH) if tied else None
        self.layers = nn.ModuleList(Block(dropout, shared) for _ in range(layers))
        if frozen:
            self.layers[0].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


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
        names = [getattr(item, "name", "") for item in forward.graph.output_node().args[0]]
        ledger.label(results[:outputs], OUTPUTS, names[:outputs])
        ledger.label(results, KEPT, names)
        turn = len(ledger.events)
        values |= dict(zip(names[outputs:], results[outputs:], strict=True))
        given = [
            values[node.name] if node.name in values else _fresh(value_of(node))
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


def _fresh(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return compat.size_hint(value)
    sizes, strides = ([compat.size_hint(one) for one in many] for many in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)


def joint_of(function: Callable[..., Any], *inputs: Any) -> tuple[Joint, Any]:
    """The joint graph of `function`, read for a CPU, and which of its forward nodes torch keeps."""
    found: list[tuple[Joint, Any]] = []

    def look(graph: fx.Graph, info: Any, stock: Callable[[], Any], outputs: int) -> Any:
        chosen = stock()
        joint = read(graph, info.is_required_fw, outputs, CPU)
        found.append((joint, joint.mask(chosen)))
        return chosen

    def partition(joint: fx.GraphModule, given: Any, **how: Any) -> Any:
        outputs = how["num_fwd_outputs"]
        return compat.partition(joint, given, lambda *of: look(*of, outputs), **how)

    torch.compiler.reset()
    torch.compile(function, backend=compat.aot_backend_by(partition))(*inputs)
    return found[0]


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
        monkeypatch.setattr(memory_plan.Cut, "replayed", _replayed)
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
