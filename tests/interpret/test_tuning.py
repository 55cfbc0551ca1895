"""A site's kernels are tuned on the site itself, interpreted here, with times that the test makes up."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from choosers import ScriptedMeter, as_it_is
from graphs import captured

from fxopt import remembering
from fxopt.choice import INDUCTOR, OURS
from fxopt.choosing import TUNING, Chooser
from fxopt.kernels import configs
from fxopt.kernels.cards import CARDS, as_if_on
from fxopt.metering import Run
from fxopt.passes import RULES
from fxopt.rewrite import Outcome, apply_rule

CARD = dataclasses.replace(CARDS[1], model="Scripted 1")
(NORM,) = (rule for rule in RULES if rule.name == "norm")


class Quickening(ScriptedMeter):
    """Whatever is tuned takes 5 % less every time that it is measured."""

    def __call__(self, name: str, run: Run) -> tuple[float, int]:
        if name == TUNING:
            before = self.script.get(TUNING, (1.0, 1.0))[0]
            self.script = dict(self.script) | {TUNING: (0.95 * before, 1.0)}
        return super().__call__(name, run)


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_CACHE", str(tmp_path))
    new_process(monkeypatch)


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_KNOWN", {})
    remembering.forget()


def of_norm(chooser: Chooser) -> Outcome:
    x, weight = torch.randn(3, 32, requires_grad=True), torch.ones(32, requires_grad=True)
    graph = captured(lambda x, weight: F.rms_norm(x, (32,), weight, 1e-6), x, weight).module
    with as_if_on(CARD):
        return apply_rule(NORM, graph, chooser=chooser, lowering="interpret")


def test_the_fastest_configuration_of_each_kernel_is_kept_and_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: dict[str, set[configs.Config]] = {}
    config_for = configs.config_for

    def noted(kernel: object, candidates: object, card: object) -> configs.Config:
        found = config_for(kernel, candidates, card)  # type: ignore[arg-type]
        launched.setdefault(kernel.name, set()).add(found)  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr("fxopt.ops.norm_launch.config_for", noted)
    meter = Quickening({OURS: (1.0, 1.0), INDUCTOR: (2.0, 1.0)})
    (done,) = of_norm(Chooser(as_it_is, meter=meter, tunes=True)).rewrites
    tried = {name: len(found) for name, found in launched.items()}
    assert max(tried.values()) > 1, tried
    assert meter.ran == [TUNING] * sum(count for count in tried.values() if count > 1) + [OURS, INDUCTOR]
    assert done.choice is not None
    assert len(done.choice.measured[0].tuned) == sum(count > 1 for count in tried.values())

    new_process(monkeypatch)
    launched.clear()
    meter.ran.clear()
    (again,) = of_norm(Chooser(as_it_is, meter=meter)).rewrites
    assert again.choice == done.choice
    assert meter.ran == []
    with as_if_on(CARD):
        x, weight = torch.randn(3, 32, requires_grad=True), torch.ones(32)
        again_run = apply_rule(
            NORM, captured(lambda x, w: F.rms_norm(x, (32,), w, 1e-6), x, weight).module, lowering="interpret"
        )
        again_run.module(x, weight)[0].sum().backward()
    (forward,) = launched["norm_forward"]
    assert str(forward) in done.choice.measured[0].tuned[0], "what was fastest is what runs"
