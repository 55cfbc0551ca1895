"""The GPU benchmark where there is no GPU: its store, its verdicts, and a dry run of every phase."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import kernels, step, turns
from gpu.ahead import Ahead
from gpu.batch import batches, held_by, seconds
from gpu.check import Check, items
from gpu.item import Answer, Item, Settings
from gpu.norm_problem import NormProblem
from gpu.problem import Outputs, Tensors
from gpu.room import Room
from gpu.session import SHARES
from gpu.step import Gate
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


# --- what is compiled ahead --------------------------------------------------------------------------------------


def test_who_measures_is_alone_on_the_card_and_who_prepares_is_not() -> None:
    found: list[str] = []

    def prepare() -> None:
        with turns.beside_others():
            found.append("prepared")

    with turns.among_workers():
        with turns.beside_others():
            prepare()
        with turns.alone():
            other = threading.Thread(target=prepare)
            other.start()
            other.join(0.3)
            assert found == ["prepared"]
        other.join(10)
    assert found == ["prepared"] * 2


def test_a_step_waits_between_being_compiled_and_running() -> None:
    gate, found = Gate(), list[str]()

    def step_of_a_model() -> int:
        found.append("compiled")
        gate.wait()
        found.append("ran")
        return 7

    gate.start(step_of_a_model)
    assert found == ["compiled"]
    assert gate.finish() == 7
    assert found == ["compiled", "ran"]
    with pytest.raises(ZeroDivisionError):
        Gate().start(lambda: 1 // 0)


class FakeProcess:
    """Compiles until it is told to go on, or killed."""

    def __init__(self) -> None:
        self.goes_on, self.ended = threading.Event(), False

    def ask(self, command: str, item: Item, timeout: float) -> Answer:
        assert command == "compile"
        assert self.goes_on.wait(timeout)
        return {"of": item.name}

    def kill(self) -> None:
        self.goes_on.set()

    def end(self) -> None:
        self.ended = True


class FakeProcesses:
    """Makes them."""

    def __init__(self) -> None:
        self.made: list[FakeProcess] = []

    def take(self, fresh: bool) -> FakeProcess:
        self.made.append(FakeProcess())
        return self.made[-1]


def until(holds: Callable[[], bool]) -> None:
    """Wait for another thread."""
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_as_many_are_compiled_ahead_as_memory_allows_and_the_rest_is_left_to_who_asks() -> None:
    first, second, third, large = (
        Item("step", name, seconds=9.0, ahead_gib=gib) for name, gib in (("1", 2.0), ("2", 2.0), ("3", 1.0), ("4", 6.0))
    )
    processes: Any = FakeProcesses()
    ahead = Ahead(processes, [large, first, second, third], Room(4.5), 3, lambda item: 10.0)
    until(lambda: len(processes.made) == 2)
    assert ahead.seconds_left(first) > 5
    assert ahead.seconds_left(third) == 9
    assert ahead.take(large) is None, "it does not fit"
    processes.made[0].goes_on.set()
    begun = ahead.take(first)
    assert begun is not None
    assert begun[1] == {"of": "1"}
    assert ahead.take(third) is None, "it waits for memory, and nobody waits for it"
    ahead.release(first)
    time.sleep(0.1)
    ahead.close()
    assert len(processes.made) == 2
    assert [one.ended for one in processes.made] == [False, True], "the first belongs to who took it"


def test_estimates_of_a_first_run_are_what_the_documentation_says() -> None:
    """16 cores, 80 GB: docs/gpu.md."""
    cores, gib, settings = 16, 76.0, Settings()
    checks, timed, trained = items(settings, 320), kernels.items(settings), step.items(settings)
    main = max(held_by(batch) for batch in batches(trained, gib, cores))
    assert max(one.gib for one in timed) < main < gib - held_ahead(trained[:11]), "three cases begin at once"
    of_checks = sum(one.seconds for one in checks) / cores
    assert 0.6 < 60 * SHARES["check"] / of_checks < 1
    of_kernels = sum(seconds(batch, main, cores) for batch in batches(timed, main, cores))
    assert of_kernels < 60 * SHARES["kernels"]
    assert sum(SHARES[phase] for phase in ("check", "kernels", "step")) == pytest.approx(9)
    measuring = [seconds(batch, main, cores, lambda item: 0.0) for batch in batches(trained, main, cores)]
    assert sum(measuring) < 60 * SHARES["step"] + 60, "were all compiled, one case of the eight would be left"
    assert max(one.seconds for one in trained) < of_kernels, "what begins with `kernels` is compiled when that is done"


def held_ahead(group: list[Item]) -> float:
    """GiB."""
    return sum(one.ahead_gib for one in group)


# --- the command -------------------------------------------------------------------------------------------------


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
