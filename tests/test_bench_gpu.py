"""The GPU benchmark where there is no GPU: its store, its verdicts, and a dry run of every phase."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu.check import Check, items
from gpu.item import Settings
from gpu.norm_problem import NormProblem
from gpu.problem import Outputs, Tensors
from gpu.store import Store

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {"commit": "abc", "card": "a card"}
INTERPRETED = Settings(interpret=True, tiny=True)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bench/gpu/run.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )  # fmt: skip


def test_results_are_resumed_for_the_same_commit_and_card(tmp_path: Path) -> None:
    Store(tmp_path, MACHINE).add("check", "one", {"prepared": {"ok": True}})
    Store(tmp_path, MACHINE | {"commit": "def"}).add("check", "two", {"error": "no"})
    assert [*Store(tmp_path, MACHINE).phase("check")] == ["one"]
    assert [*Store(tmp_path, MACHINE | {"commit": "def"}).phase("check")] == ["two"]
    assert [*Store(tmp_path, MACHINE | {"card": "another"}).phase("check")] == []
    assert [path.name for path in tmp_path.iterdir()] == ["check.json"]


@pytest.mark.parametrize("wrong", [False, True])
def test_a_wrong_result_is_reported(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (item,) = [one for one in items(INTERPRETED, 0) if one.name == "norm-compiled"]
    item = dataclasses.replace(item, spec=item.spec | {"way": "direct"})

    def ours(self: NormProblem, tensors: Tensors) -> Outputs:
        first, *rest = self.eager(tensors)
        return first * (1.02 if wrong else 1.0), *rest

    monkeypatch.setattr(NormProblem, "ours", ours)
    answer = Check(item, INTERPRETED).prepare()
    assert answer["ok"] is not wrong
    assert bool(answer["problems"]) is wrong


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do() -> None:
    done = run()
    assert done.returncode == 2
    assert "--interpret --tiny" in done.stdout


@pytest.mark.slow
def test_numbers_of_a_dry_run_do_not_go_among_results() -> None:
    done = run("--interpret", "--tiny", "--out", "bench/results/none")
    assert done.returncode == 2
    assert "do not belong under bench/results" in done.stderr


@pytest.mark.slow
def test_a_dry_run_answers_every_item_of_every_phase(tmp_path: Path) -> None:
    arguments = ("--interpret", "--tiny", "--phase", "check,tune,kernels,step", "--out", str(tmp_path))
    done = run(*arguments, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    for phase in ("check", "kernels", "step"):
        assert json.loads((tmp_path / f"{phase}.json").read_text())["items"]
    assert "check: 0 items" in run(*arguments, "--resume", TRITON_INTERPRET="1").stdout
