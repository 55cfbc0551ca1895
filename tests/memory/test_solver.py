"""The program finds what enumerating all plans finds; the closed loop ends within the budget or says that none fits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planned import TOKENS, WIDTH, Model, joint_of

from fxopt.memory import solve as solving
from fxopt.memory.joint import Joint
from fxopt.memory.planner import Infeasible, decide
from fxopt.memory.program import Program
from fxopt.memory.replay import Replay
from fxopt.memory.solution import Solution, closure, recompute_seconds
from fxopt.memory.solve import solve

OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "product": lambda x, w: x @ w,
    "gelu": lambda x, w: torch.nn.functional.gelu(x),
    "softmax": lambda x, w: x.softmax(-1),
    "narrow": lambda x, w: x * w[0],
    "dropout": lambda x, w: torch.dropout(x, 0.5, True),
}


def chained(names: list[str]) -> Callable[..., torch.Tensor]:
    def function(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        for name, weight in zip(names, weights, strict=True):
            x = OPERATIONS[name](x, weight)
        return x.square().sum()

    return function


def joint(names: list[str], size: int = 48) -> tuple[Joint, Any]:
    weights = [torch.randn(size, size, requires_grad=True) for _ in names]
    return joint_of(chained(names), torch.randn(4 * size, size, requires_grad=True), *weights)


def every_plan(of: Joint) -> list[Solution]:
    """All choices of what is kept among values that have memory, which compute nothing that may not be."""
    free = [at for at in range(len(of.forward)) if of.size[at] > 0]
    plans = []
    for chosen in itertools.product((False, True), repeat=len(free)):
        kept = np.zeros(len(of.forward), dtype=bool)
        kept[free] = chosen
        if not (closure(of, kept) & of.banned).any():
            plans.append(Solution(kept, np.zeros_like(kept), True))
    return plans


def cost(of: Joint, plan: Solution) -> float:
    return recompute_seconds(of, plan.kept) + float(of.saving[plan.kept].sum())


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=2, max_size=4), share=st.floats(0, 1))
def test_the_solver_finds_the_cheapest_of_all_plans(names: list[str], share: float) -> None:
    of, _ = joint(names)
    assert of.blocks == 1
    plans = [(Program(of).modelled(plan).peak, cost(of, plan)) for plan in every_plan(of)]
    peaks = [peak for peak, _ in plans]
    lowest = solve(Program(of), None)
    assert lowest is not None
    assert Program(of).modelled(lowest).peak == pytest.approx(min(peaks), rel=1e-4)
    budget = min(peaks) + share * (max(peaks) - min(peaks)) + 1
    found = solve(Program(of), budget)
    assert found is not None
    assert Program(of).modelled(found).peak <= budget * (1 + 1e-6)
    best = min(seconds for peak, seconds in plans if peak <= budget)
    assert cost(of, found) <= best * (1 + 2 * solving.GAP) + 1e-9
    assert solve(Program(of), 0.99 * min(peaks)) is None


def test_out_of_time_a_plan_is_rounded_and_still_computes_nothing_twice_that_it_must_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of, _ = joint(["product", "dropout", "gelu", "product"])
    real = solving._run

    def slow(*given: Any, whole: bool) -> Any:
        result = real(*given, whole=False)
        if whole:
            result.x, result.status = None, 1
        return result

    monkeypatch.setattr(solving, "_run", slow)
    whole = np.ones(len(of.forward), dtype=bool)
    found = solve(Program(of), 1.2 * Program(of).modelled(Solution(whole, ~whole, True)).peak)
    assert found is not None
    assert not found.optimal
    assert not (closure(of, found.kept) & of.banned).any()


class Code:
    """Made-up code, whose peak is the modelled one times `factor` and `more`, and `by_kept` of what is kept."""

    def __init__(self, of: Joint, stock: Any, factor: float, more: int, by_kept: float = 0.0):
        self.of, self.factor, self.more, self.by_kept = of, factor, more, by_kept
        self.own = Solution(stock, np.zeros_like(stock), True)
        self.tried = 0

    def __call__(self, solution: Solution | None) -> Replay:
        self.tried += 1
        plan = solution or self.own
        peaks, extra = Program(self.of).modelled(plan), self.more + self.by_kept * float(self.of.size[plan.kept].sum())
        forward, backward = (int(self.factor * one + extra) for one in (peaks.forward, peaks.backward))
        return Replay([forward], [backward], {})


@pytest.mark.parametrize(("factor", "more"), [(1.0, 0), (1.18, 0), (0.9, 10_000), (1.0, 200_000)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_loop_corrects_a_model_that_is_wrong(factor: float, more: int, share: float) -> None:
    of, stock = joint_of(Model(3), torch.randn(2, TOKENS, WIDTH))
    code = Code(of, stock, factor, more)
    most = code(None).peak
    with pytest.raises(Infeasible) as none:
        decide(of, stock, 1.0, code)
    least = none.value.lowest.replay.peak
    assert least < most
    found = decide(of, stock, least + share * (most - least), code)
    assert found.replay.peak <= least + share * (most - least)
    assert decide(of, stock, least, code).replay.peak <= least
    before = code.tried
    assert decide(of, stock, most, code).solution is None
    assert code.tried == before + 1


def test_torchs_own_choice_is_the_lowest_plan_where_it_is() -> None:
    """What an error names must do, and what does may be what torch keeps anyway."""
    of, stock = joint_of(Model(2), torch.randn(2, TOKENS, WIDTH))
    own = Program(of).modelled(Solution(stock, np.zeros_like(stock), True)).peak
    code = Code(of, stock, 1.0, int(own))  # whatever is planned is worse

    def trial(solution: Solution | None) -> Replay:
        return Replay([int(own)], [0], {}) if solution is None else code(solution)

    with pytest.raises(Infeasible) as none:
        decide(of, stock, 1.0, trial)
    assert none.value.lowest.solution is None
    assert none.value.lowest.replay.peak == int(own)
    assert decide(of, stock, own, trial).solution is None


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_model_that_is_wrong_by_what_is_kept_still_uses_most_of_the_budget(share: float) -> None:
    of, stock = joint_of(Model(3), torch.randn(2, TOKENS, WIDTH))
    code = Code(of, stock, 1.0, 0, by_kept=0.7)
    most = code(None).peak
    with pytest.raises(Infeasible) as none:
        decide(of, stock, 1.0, code)
    least = none.value.lowest.replay.peak
    budget = least + share * (most - least)
    found = decide(of, stock, budget, code)
    assert 0.9 * budget <= found.replay.peak <= budget
