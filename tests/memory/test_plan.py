"""Plans keep to their budget, and a step under a plan computes what it computes without one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from allocations import peak_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import TOKENS, WIDTH, Model, Planned, request
from torch import nn

from fxopt.errors import BudgetError, OptionError
from fxopt.memory.plan import KEPT, RECOMPUTED
from fxopt.memory.rates import CPU

INSIDE = 32 * 1024
"""Bytes that ATen's kernels of such sizes hold inside (sums by thread of a norm's backward), which nothing predicts."""


def model(**options: Any) -> Model:
    torch.manual_seed(0)
    return Model(**{"layers": 3, **options})


def batch() -> torch.Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def step(run: Any, of: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """A step's loss and gradients, always with the same random numbers."""
    of.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    loss = run(x)
    loss.backward()
    return [loss.detach(), *(one.grad for one in of.parameters() if one.grad is not None)]


def resident(of: nn.Module, x: torch.Tensor) -> int:
    """Bytes of parameters and batch."""
    return sum(one.nbytes for one in of.parameters()) + x.nbytes


def extremes(of: Model) -> tuple[int, int]:
    """The smallest budget that would do, and the peak without one."""
    loose = Planned(of, request("1GiB"))
    step(loose, of, batch())
    tight = Planned(of, request(1))
    with pytest.raises(BudgetError) as raised:
        step(tight, of, batch())
    return raised.value.minimum, loose.plan.predicted


# --- the law -----------------------------------------------------------------------------------------------------


@settings(max_examples=4)
@given(data=st.data())
def test_a_step_under_any_budget_keeps_to_it_and_computes_the_same(data: st.DataObject) -> None:
    options = {
        "layers": data.draw(st.integers(2, 3), "layers"),
        "dropout": data.draw(st.sampled_from([0.0, 0.3]), "dropout"),
        "tied": data.draw(st.booleans(), "tied"),
        "frozen": data.draw(st.booleans(), "frozen"),
    }
    of, x = model(**options), batch()
    wanted = step(Planned(of, None), of, x)
    least, most = extremes(of)
    budget = least + int((most - least) * data.draw(st.floats(0, 1), "share of the range"))
    planned = Planned(of, request(budget))
    found = step(planned, of, x)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert planned.plan.predicted <= budget
    of.zero_grad(set_to_none=True)
    measured = peak_bytes(lambda: planned(x).backward()) + resident(of, x)
    assert measured <= budget + INSIDE
    assert measured == pytest.approx(planned.plan.predicted - CPU.reserve, abs=INSIDE)


# --- what a plan is ----------------------------------------------------------------------------------------------


def test_a_budget_that_fits_leaves_torchs_own_choice() -> None:
    of = model()
    planned, plain = Planned(of, request("1GiB")), Planned(of, None)
    step(planned, of, batch())
    step(plain, of, batch())
    saved = [[node.name for node in one.cuts[0][1].graph.find_nodes(op="placeholder")] for one in (planned, plain)]
    assert saved[0] == saved[1]
    assert planned.plan.predicted == planned.plan.default


def test_a_smaller_budget_recomputes_more_and_uses_nearly_all_of_it() -> None:
    of = model()
    least, most = extremes(of)
    before, seconds = math.inf, []
    for share in (0.7, 0.3):
        budget = least + int(share * (most - least))
        planned = Planned(of, request(budget))
        step(planned, of, batch())
        plan = planned.plan
        assert 0.9 * budget <= plan.predicted <= budget
        assert plan.bytes_of(KEPT) < before
        assert plan.bytes_of(RECOMPUTED) > 0
        before = plan.bytes_of(KEPT)
        seconds.append(plan.recompute_seconds)
    assert seconds == sorted(seconds)


def test_the_parts_of_the_peak_add_up() -> None:
    of = model()
    planned = Planned(of, request("1GiB", optimizer="adamw", accumulation=True))
    step(planned, of, batch())
    plan, parameters = planned.plan, sum(one.nbytes for one in of.parameters())
    assert sum(plan.parts.values()) == plan.predicted
    assert plan.resident["parameters"] == plan.resident["accumulated gradients"] == parameters
    assert plan.resident["optimizer"] == 2 * parameters
    assert max((*plan.timeline.forward, *plan.timeline.backward)) == plan.predicted


def test_a_budget_below_the_least_says_which_would_do() -> None:
    of = model()
    least, _ = extremes(of)
    fits = Planned(of, request(least))
    step(fits, of, batch())
    assert fits.plan.predicted <= least
    short = Planned(of, request(int(0.98 * least)))
    with pytest.raises(BudgetError, match=r"smallest that would do is .*parameters"):
        step(short, of, batch())
    lowest = Planned(of, request(1, infeasible="minimum"))
    step(lowest, of, batch())
    assert lowest.plan.predicted == least
    assert any("lowest peak" in note for note in lowest.plan.notes)


def test_random_numbers_are_drawn_once() -> None:
    of = model(dropout=0.5)
    least, _ = extremes(of)
    planned = Planned(of, request(least))
    step(planned, of, batch())
    _, backward = planned.cuts[0]
    drawn = [
        node.name
        for node in backward.graph.nodes
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    ]
    assert drawn == []
    assert any("computed once" in row.reason for row in planned.plan.rows)


def test_a_users_checkpoint_is_obeyed() -> None:
    of = model()
    checkpoint = torch.utils.checkpoint.checkpoint

    def forward(x: torch.Tensor) -> torch.Tensor:
        for layer in of.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x.square().mean()

    wanted = step(Planned(of, None), of, batch())
    planned = Planned(forward, request("1GiB"))
    found = step(planned, of, batch())
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    checkpointed = planned.plan.predicted
    for budget in (checkpointed, checkpointed - 1):
        tight = Planned(forward, request(budget, infeasible="minimum"))
        found = step(tight, of, batch())
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        inside = [row for row in tight.plan.rows if row.decision == KEPT and "gelu" in row.name]
        assert inside == []


def test_a_view_that_checkpoints_share_stands_for_its_base() -> None:
    """Torch marks what two checkpoints read as saved, and it may be a view of an intermediate value."""
    of = model()
    checkpoint = torch.utils.checkpoint.checkpoint

    def forward(x: torch.Tensor) -> torch.Tensor:
        scale = x.detach().mean(0, keepdim=True).exp().unsqueeze(0)
        for layer in of.layers:
            x = checkpoint(lambda x, layer=layer: layer(x) * scale.squeeze(0), x, use_reentrant=False)
        return x.square().mean()

    wanted = step(forward, of, batch())
    planned = Planned(forward, request(2**20, infeasible="minimum"))
    assert all(torch.equal(one, other) for one, other in zip(step(planned, of, batch()), wanted, strict=True))
    assert planned.plan.predicted > 0


def test_constants_of_a_graph_do_not_hide_its_parameters() -> None:
    of = model()
    planned = Planned(lambda x: of(x * torch.tensor([1.0, 2.0]).repeat(WIDTH // 2)), request("1GiB"))
    step(planned, of, batch())
    assert planned.plan.resident["parameters"] >= sum(one.nbytes for one in of.parameters())


@pytest.mark.slow
def test_sizes_that_change_are_planned_by_their_hints_and_make_no_guards() -> None:
    of = model()
    least, most = extremes(of)
    planned = Planned(of, request((least + most) // 2))
    planned.run = torch.compile(of, backend=planned.backend, dynamic=True)
    step(planned, of, batch())
    longer = torch.randn(2, TOKENS + 17, WIDTH)
    found, wanted = step(planned, of, longer), step(of, of, longer)
    assert len(planned.plans) == 1
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(found, wanted, strict=True))


def test_a_graph_without_a_backward_is_not_planned() -> None:
    of, planned = model(), None
    planned = Planned(of, request("1GiB"))
    with torch.no_grad():
        planned(batch())
    assert planned.plans == [None]


def test_a_graph_that_is_retained_can_be_run_again() -> None:
    of = model()
    least, _ = extremes(of)
    loss = Planned(of, request(least))(batch())
    loss.backward(retain_graph=True)
    first = [one.grad.clone() for one in of.parameters() if one.grad is not None]
    of.zero_grad()
    loss.backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(first, of.parameters(), strict=True) if b.grad is not None)


def test_double_backward_is_refused_as_it_is_without_a_plan() -> None:
    of, x = model(), batch().requires_grad_()
    (gradient,) = torch.autograd.grad(Planned(of, request("1GiB"))(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_a_percentage_of_a_cpu_is_an_error() -> None:
    of = model()
    with pytest.raises(OptionError, match="12GiB"):
        Planned(of, request("80%"))(batch())
