"""Small models, and what the tests of plans ask of them without Inductor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fxopt import compat
from fxopt.memory.joint import Joint, read
from fxopt.memory.plan import Plan
from fxopt.memory.rates import CPU
from fxopt.memory.request import Budget, Request, parse_budget
from fxopt.memory.timing import ModelledTimes
from fxopt.testing.planned import compile_by, compile_planned

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


def reading(found: list[tuple[Joint, Any]]) -> Callable[..., Any]:
    """A backend that puts the joint graph, read for a CPU, and which of its forward nodes torch keeps into `found`."""

    def partition(joint: fx.GraphModule, given: Any, **how: Any) -> Any:
        def look(graph: fx.Graph, info: Any, stock: Callable[[], Any]) -> Any:
            chosen = stock()
            joint = read(graph, info.is_required_fw, how["num_fwd_outputs"], ModelledTimes(CPU))
            found.append((joint, joint.mask(chosen)))
            return chosen

        return compat.partition(joint, given, look, **how)

    return compat.aot_backend_by(partition)


def joint_of(function: Callable[..., Any], *inputs: Any) -> tuple[Joint, Any]:
    """The joint graph of `function`, and which of its forward nodes torch keeps."""
    found: list[tuple[Joint, Any]] = []
    torch.compiler.reset()
    torch.compile(function, backend=reading(found))(*inputs)
    return found[0]


def request(budget: Any, **options: Any) -> Request:
    """The options as `fxopt.Options` would have them, without an optimizer."""
    found = Budget(budget) if isinstance(budget, int) else parse_budget(budget)
    assert found is not None
    return Request(found, **{"optimizer": 0.0, **options})


class Planned:
    """`function` compiled under `wanted`, or as torch does; the plan is there after the first call that trains."""

    def __init__(self, function: Callable[..., Any], wanted: Request | None):
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
            return compile_by(_stock, gm, inputs, self.cuts.append)
        done, plan = compile_planned(gm, inputs, self.wanted, self.cuts.append)
        self.plans.append(plan)
        return done

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run."""
        return self.run(*args, **kwargs)


def _stock(joint: fx.GraphModule, given: Any, how: dict[str, Any]) -> Any:
    return compat.partition(joint, given, lambda graph, info, stock: stock(), **how)
