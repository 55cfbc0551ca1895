"""Copies run beside the computation: on a simulated link, for a CPU and for a Llama on a card that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from link import Simulation, Step
from offloaded import Deep, Offloading

from fxopt.memory.offload import Places
from fxopt.ops.offload_operator import FETCH, HOLD, SEND

TESTS = Path(__file__).resolve().parent.parent
DEPTH = 5
MIB = 2**20


def activations(_: Any, names: list[str]) -> list[str]:
    """What the two products of each block make and read, but for the head's."""
    return [name for name in names if name.startswith(("addmm", "gelu"))][: 2 * DEPTH]


def simulated(change: Any = lambda _: None) -> tuple[Any, dict[str, float], Places]:
    """Graphs that offload, seconds by node (a product takes one), places."""
    backend = Offloading(activations, change)
    torch.compile(Deep(DEPTH), backend=backend)(torch.randn(8, 16))
    (graphs,) = backend.graphs
    places = Places.of(graphs.cut.joint)
    return graphs, dict.fromkeys(places.products, 1.0), places


def run(found: tuple[Any, dict[str, float], Places], link: float) -> Step:
    graphs, seconds, places = found
    return Simulation(seconds, link, {**places.block, **places.stage}).run(graphs.forward, graphs.backward)


def test_a_step_takes_as_long_as_the_slower_of_copies_and_computation() -> None:
    found = simulated()
    a_block = 2 * 8 * 64 * 4  # bytes: two of float32 [8, 64]
    for seconds in (0.25, 1.0, 1.5, 4.0, 16.0):  # that a block's copies take; its products take 2 forward, 4 backward
        step = run(found, a_block / seconds)
        assert step.faults == []
        assert step.blocks == 2
        assert step.copying == pytest.approx([seconds * DEPTH] * 2)
        for total, computing, copying, block in zip(step.seconds, step.computing, step.copying, (2, 4), strict=True):
            assert max(computing, copying) <= total <= max(computing, copying) + block + seconds
    assert run(found, a_block / 0.25).seconds == pytest.approx(run(found, 1e30).seconds)


def test_the_simulation_finds_what_is_wrong() -> None:
    """Graphs without the ties are late, or read what is not there."""

    def unwait(graphs: Any) -> None:
        for node in graphs.backward.graph.find_nodes(op="call_function", target=HOLD):
            if node.args[1]:
                node.replace_all_uses_with(node.args[0])

    assert any("nobody waited" in fault for fault in run(simulated(unwait), 1e3).faults)

    def forget(graphs: Any) -> None:
        """Sources are let go after their last reader of the forward."""
        for node in graphs.forward.graph.find_nodes(op="call_function", target=HOLD):
            node.args = (node.args[0], node.args[1], [one for one in node.args[2] if one.target is SEND])

    assert any("is let go while" in fault for fault in run(simulated(forget), 1e3).faults)

    def fetch_at_once(graphs: Any) -> None:
        first, *others = graphs.backward.graph.find_nodes(op="call_function", target=FETCH)
        for node in others:
            node.args = (node.args[0], first.args[1])
            first.append(node)

    assert run(simulated(fetch_at_once), 1e3).blocks > 2


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """Of a process with a fake card (tests/fake_card/offload.py)."""
    cases = {
        "none": {"share": 0.0, "link": 0.0},
        "slow": {"share": 0.1, "link": 2e9},
        "pcie4": {"share": 0.0, "link": 25e9},
        "fast": {"share": 0.0, "link": 100e9},
        "below": {"share": -0.1, "link": 100e9},
        "hopeless": {"share": -0.9, "link": 100e9},
    }
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": paths}
    command = [sys.executable, "-m", "fake_card.offload", json.dumps(cases)]
    done = subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_plans_for_a_card_keep_to_their_budget_and_hide_their_copies(answers: dict[str, Any]) -> None:
    for name in ("slow", "pcie4", "fast", "below"):
        found = answers[name]
        step = found["step"]
        assert step["faults"] == []
        assert step["blocks"] <= 2
        assert found["peak"] <= found["budget"] * 1.001
        assert sum(step["seconds"]) <= 1.03 * sum(step["computing"]), name
        assert len(found["on host"]) == len(found["offloaded"])
        assert min(found["offloaded"].values(), default=2 * MIB) >= 2 * MIB


@pytest.mark.slow
def test_a_faster_link_saves_recomputation(answers: dict[str, Any]) -> None:
    assert answers["none"]["offloaded"] == {}
    assert answers["none"]["again"] > 1.1 * answers["pcie4"]["again"] > 1.1 * answers["fast"]["again"]
    assert sum(answers["fast"]["step"]["seconds"]) < 0.97 * sum(answers["none"]["step"]["seconds"])
    assert sum(answers["fast"]["offloaded"].values()) > sum(answers["pcie4"]["offloaded"].values())


@pytest.mark.slow
def test_offloading_goes_below_the_least_that_recomputing_needs(answers: dict[str, Any]) -> None:
    assert answers["below"]["offloaded"]
    assert answers["below"]["budget"] < answers["none"]["budget"]
    assert list(answers["hopeless"]) == ["budget"]
