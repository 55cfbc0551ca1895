"""The measured peak of a plan, by a counter that is made up."""

from __future__ import annotations

import pytest
import torch

from fxopt.memory.measured import watched
from fxopt.memory.plan import Plan, Timeline


def test_the_peak_of_a_step_is_noted_when_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(100, {}, [], 90, 50, 0, {}, Timeline(), 0.0, 1.0, 0.0, 1)
    peaks = iter([40, 88, 88])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    run = watched(lambda x: x + 1, plan, torch.device("cuda"))
    assert run(1) == 2
    assert plan.measured is None
    run(1)
    assert plan.measured == 88
    assert "measured 88 B" in plan.summary
    run(1)
    assert plan.measured == 88


def test_a_peak_that_was_higher_before_is_not_a_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(100, {}, [], 90, 50, 0, {}, Timeline(), 0.0, 1.0, 0.0, 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 400)
    run = watched(lambda: None, plan, torch.device("cuda"))
    run()
    run()
    assert plan.measured is None
    same = watched(print, plan, torch.device("cpu"))
    assert same is print
