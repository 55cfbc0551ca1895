"""`fxopt plan`: its verdicts, the picture, the search for what fits, bad input, and the model against replayed code."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inspected import make

from fxopt.cli import main
from fxopt.commands import models
from fxopt.memory import fit, picture
from fxopt.memory.modelled import modelled_step
from fxopt.memory.plan import Plan, Timeline
from fxopt.memory.program import Program
from fxopt.memory.rates import device_named
from fxopt.memory.solution import Solution
from fxopt.memory.solve import solve
from fxopt.options import Options

Capture = pytest.CaptureFixture[str]
MOST = 16
FILE = f"{Path(__file__).parent / 'inspected.py'}:make"
LLAMA = (
    "--config",
    "llama",
    "--hidden",
    "64",
    "--layers",
    "2",
    "--heads",
    "4",
    "--intermediate",
    "128",
    "--vocab",
    "512",
)


def test_a_step_is_planned_in_json_and_drawn(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "pictures" / "step.png"
    arguments = [*LLAMA, "--seq", "128", "--budget", "4MiB", "--optimizer", "sgd"]
    assert main(["plan", *arguments, "--json", "--png", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    (plan,) = found["plans"]
    assert found["fits"]
    assert sum(plan["parts"].values()) == plan["predicted"] <= found["budget"] == 4 * 2**20
    assert found["minimum"] <= plan["predicted"]
    assert max(plan["timeline"]["forward"] + plan["timeline"]["backward"]) == plan["predicted"]
    assert any(
        group["where"].startswith("model.layers.*") and group["count"] > 1 for group in found["plans"][0]["groups"]
    )
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_a_budget_that_is_too_small_names_the_smallest(capsys: Capture) -> None:
    assert main(["plan", FILE, "--budget", "100GiB"]) == 0
    shown = capsys.readouterr().out
    assert "of 100.00 GiB; " in shown
    assert "in all" in shown
    assert main(["plan", FILE, "--budget", "1MiB", "--optimizer", "1000"]) == 1
    error = capsys.readouterr().err
    elements = sum(parameter.numel() for parameter in make()[0].parameters())
    minimum = int(error.split('would do is "')[1].split("MiB")[0])
    assert 1000 * elements < minimum * 2**20 < 1000 * elements + 2 * 2**20
    assert "TORCHDYNAMO" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "rtx4091"], "no device 'rtx4091' (did you mean 'rtx4090'?)"),
        (["--budget", "12 parsecs"], 'write "12GiB"'),
        (["--budget", "12"], 'write the unit, for example "12GiB"'),
        (["--budget", "80%"], "is a share of a card, and cpu is none: add --device rtx3060"),
        (["--budget", "180%", "--device", "h100"], "above 0% and at most 100%"),
        (["--budget", "auto", "--device", "h100"], "say --budget 24GiB or 80%"),
        ([], "say --budget 12GiB, or --device rtx3060"),
        (["--budget", "1GiB", "--optimizer", "adam"], "(did you mean 'adamw'?) must be one of"),
        (["--device", "l4", "--lower", "--offload"], "leave out one of the two"),
        (["--device", "l4", "--options", '{"precison": "bf16"}'], "precision"),
    ],
)
def test_mistakes_are_told_before_anything_is_traced(arguments: list[str], message: str, capsys: Capture) -> None:
    assert main(["plan", *LLAMA, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_fits_is_searched_for_models_only(capsys: Capture) -> None:
    assert main(["plan", FILE, "--budget", "1GiB", "--fit", "batch"]) == 2
    assert "--fit needs a --config model" in capsys.readouterr().err


@pytest.mark.slow
def test_the_largest_batch_fits_and_the_next_does_not(capsys: Capture) -> None:
    arguments = [*LLAMA, "--seq", "64", "--budget", "4MiB", "--optimizer", "sgd", "--fit", "batch", "--batch", "3"]
    assert main(["plan", *arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)["fit"]
    trials = dict(found["trials"])
    assert trials[found["largest"]] <= 4 * 2**20 < trials[found["largest"] + 1]
    assert f"batch {found['largest']} fits" in err


@given(
    st.integers(1, 1000), st.sampled_from([0, 0, 1]), st.integers(0, 10**4), st.integers(1, 99), st.integers(1, 10**5)
)
def test_search_finds_the_border_in_few_trials(slope: int, bend: int, fixed: int, start: int, budget: int) -> None:
    found = fit.largest(lambda size: fixed + slope * size + bend * size**2, budget, start)
    assert found.size == 0 or fixed + slope * found.size + bend * found.size**2 <= budget
    assert fixed + slope * (found.size + 1) + bend * (found.size + 1) ** 2 > budget
    assert len(found.trials) <= (MOST if bend else 9)


def test_a_line_marks_the_budget() -> None:
    plan = Plan(
        200, {"parameters": 50}, [], 180, 100, 0, {}, Timeline((60, 100, 150), (180, 120, 60)), 0.0, 1.0, 0.0, 1
    )
    lines = picture.in_text(plan).plain.splitlines()
    assert len(lines) == picture.HEIGHT + 1
    assert "─" in lines[0]
    assert lines[0].endswith("budget 200 B")
    assert lines[-2] == "█" * 6
    assert lines[-1] == "forbackward"


@pytest.mark.slow
def test_the_model_is_near_the_code_that_is_lowered() -> None:
    """The forward's peak to a percent; the backward's from -20% to +30% (docs/plan.md has larger models)."""
    from fxopt.outlook import Cut, outlook

    parser = argparse.ArgumentParser()
    models.add_flags(parser)
    subject = models.subject(parser.parse_args([*LLAMA, "--seq", "256", "--batch", "4"]))
    seen: list[Any] = []

    def planner(cut: Cut) -> None:
        lowest = solve(Program(cut.joint), None)
        assert lowest is not None
        nothing = np.zeros_like(cut.stock)
        for chosen, same in ((None, Solution(cut.stock, nothing, optimal=True)), (lowest, lowest)):
            seen.append((modelled_step(cut.joint, same).peaks, cut.replayed(chosen).peaks))

    outlook(subject.model, (), subject.arguments[1], Options.parse({}), device_named("rtx4090"), planner, Cut)
    for (forward, backward), (true_forward, true_backward) in seen:
        assert forward == pytest.approx(true_forward, rel=0.01)
        assert 0.8 * true_backward <= backward <= 1.3 * true_backward
