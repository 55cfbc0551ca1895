"""Inductor's scheduler keeps the order that offloading needs, and what is predicted of its code is what is measured."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from allocations import peak_bytes
from offloaded import Deep, Late, gradients

import fxopt
from fxopt import compat
from fxopt.memory import rates, solution
from fxopt.memory.offload import movable
from fxopt.memory.plan import OFFLOADED
from fxopt.memory.request import Budget, Request
from fxopt.ops import transfer
from fxopt.ops.pinned import HOST
from fxopt.passes import memory_plan

MIB = 2**20
DEPTH, ROWS, WIDTH = 4, 64, 32
PRODUCTS = {"forward": 2, "backward": 4}
"""Of a block."""


class Seen(compat.PassesThroughDynamo):
    """Ends a compilation: all there is to see was seen, and no kernel is compiled."""


@pytest.fixture(scope="module")
def lowered() -> dict[str, Any]:
    """Wrapper code by part of the step, and replays with and without offloading, of all that may be."""
    found: dict[str, Any] = {}

    def decide(joint: Any, stock: Any, budget: float, trial: Any, link: float) -> Any:
        may = np.array([movable(node) for node in joint.forward]) & (solution.read_from(joint) < joint.blocks - 1)
        saved = joint.needed & ~joint.view  # and nothing is made again: torch's choice does that across blocks
        offloaded = saved & (joint.size >= 1024) & may
        found["bytes"] = int(joint.size[offloaded].sum())
        found["least"] = trial(solution.Solution(saved, np.zeros_like(saved), optimal=True))
        codes: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            own = compat.lower
            patch.setattr(compat, "lower", lambda *how: (done := own(*how), codes.append(done.code))[0])
            found["offloaded"] = trial(solution.Solution(saved & ~offloaded, offloaded, optimal=True))
        found["forward"], found["backward"] = codes
        raise Seen("")

    def backend(gm: Any, inputs: Any) -> Any:
        with memory_plan.planning(gm, Request(Budget(2**30), 0.0), "a test") as plan:
            return compat.compile_graph(gm, inputs, {"custom_partitioner_fn": plan.partitioner})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_plan, "decide", decide)
        patch.setattr(memory_plan, "_recall", lambda key: None)
        torch.compiler.reset()
        with pytest.raises(Seen):
            torch.compile(Deep(DEPTH, WIDTH), backend=backend)(torch.randn(ROWS, WIDTH))
    return found


def calls(code: str) -> list[tuple[str, str, list[str]]]:
    """(what, result, buffers of the argument that says what is waited for) of products and copies, in order."""
    found = []
    names: dict[str, str] = {}
    for line in code[code.index("def call") :].splitlines():
        if made := re.search(r"(\w+) = torch\.ops\.fxopt\.(send|fetch|hold)\.default\((.*)\)", line):
            landed = re.search(r"\[(.*?)\]", made[3]) if made[2] == "hold" else None
            waited = [names.get(one, one) for one in re.findall(r"\w+", landed[1])] if landed else []
            found.append((made[2], made[1], waited))
        elif renamed := re.fullmatch(r"\s*(\w+) = (\w+)", line):
            names[renamed[1]] = renamed[2]  # an operator's result, and the buffer that it is
        elif re.search(r"extern_kernels\.(add)?mm\(", line):
            found.append(("product", "", []))
    return found


@pytest.mark.parametrize(("part", "begin"), [("forward", "send"), ("backward", "fetch")])
def test_copies_run_beside_a_block_and_no_more_than_two(lowered: dict[str, Any], part: str, begin: str) -> None:
    products, flying, most, waits = 0, dict[str, int](), 0, 0
    copies = [name for what, name, _ in calls(lowered[part]) if what == begin]
    for what, name, landed in calls(lowered[part]):
        products += what == "product"
        if what == begin:
            flying[name] = products
            most = max(most, len(flying))
        for one in landed:
            beside = products - flying.pop(one)
            assert 1 <= beside <= 2 * PRODUCTS[part]
            waits += 1
    assert waits == len(copies) >= 2 * DEPTH
    assert not flying
    assert most <= 2 * -(-len(copies) // DEPTH)


def test_what_is_offloaded_is_not_on_the_device(lowered: dict[str, Any]) -> None:
    """When the forward is done, all of it is gone; the backward begins with two blocks' at most."""
    least, offloaded = lowered["least"], lowered["offloaded"]
    assert least.forward[-1] - offloaded.forward[-1] == lowered["bytes"]
    assert offloaded.peak < least.peak - 0.3 * lowered["bytes"]


def test_kernels_take_what_is_fetched_for_aligned(lowered: dict[str, Any]) -> None:
    code = lowered["backward"]
    fetched = [name for what, name, _ in calls(code) if what == "fetch"]
    assert code.count("16, 'torch.ops.fxopt.fetch.default')") == len(fetched)


@pytest.mark.slow
def test_a_planned_step_offloads_within_its_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """On a CPU that is said to have a link: compiled code, copies made as late as may be, memory by the profiler."""
    linked = dataclasses.replace(rates.CPU, link=2e10)
    monkeypatch.setattr(memory_plan, "device_of", lambda _: linked)
    monkeypatch.setattr(solution, "LEAST_OFFLOAD", 2**16)
    monkeypatch.setenv("FXOPT_CACHE", str(tmp_path))
    torch.manual_seed(0)
    model, x = Deep(6, 256), torch.randn(2048, 256)
    wanted = gradients(model, model, x)
    options = {"memory_budget": "80MiB", "offload": True, "optimizer": "sgd"}
    for _ in range(2):  # the second time the plan is remembered
        streams = Late()
        monkeypatch.setattr(transfer, "streams_of", lambda _, streams=streams: streams)
        torch.compiler.reset()
        run = torch.compile(model, backend="fxopt", options=options)
        found = gradients(model, run, x)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
        plan = fxopt.reports()[-1].graphs[0].plan
        assert plan is not None
        assert plan.bytes_of(OFFLOADED) > 30 * MIB
        assert streams.copies == 2 * sum(row.decision == OFFLOADED for row in plan.rows)
        assert HOST.lent == 0
        model.zero_grad()
        resident = x.nbytes + sum(one.nbytes for one in model.parameters())
        measured = resident + peak_bytes(lambda run=run: run(x).backward())
        assert measured <= plan.budget
        assert plan.predicted == pytest.approx(measured, rel=0.01)
