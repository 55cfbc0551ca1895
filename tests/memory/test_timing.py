"""Times of products: measured once a machine, of what can run alone, and modelled like the measured ones otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt import compat, metering, remembering
from fxopt.memory import timing
from fxopt.memory.cost import flops_of, seconds_of
from fxopt.memory.rates import CPU
from fxopt.memory.timing import MeasuredTimes, ModelledTimes

HOST = torch.device("cpu")
BANDWIDTH = 2e10
"""Of the clock below, bytes a second. All but a copy takes 3 s."""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was timed, by a clock that never looks; nothing is remembered from elsewhere."""
    monkeypatch.setenv("FXOPT_CACHE", str(tmp_path))
    remembering.forget()
    found: list[str] = []

    def clock(run: Callable[[], Any], device: torch.device) -> float:
        result = run()
        copied = result.numel() == timing.COPIED // 4
        found.append("copy" if copied else str(tuple(result.shape)))
        return 2 * timing.COPIED / BANDWIDTH if copied else 3.0

    monkeypatch.setattr(timing, "seconds", clock)
    return found


def nodes(function: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[fx.Node]:
    """The calls of `function` on fake tensors of `shapes`."""
    with compat.FakeTensorMode():
        graph = make_fx(function)(*(torch.empty(shape, dtype=dtype) for shape in shapes)).graph
    return list(graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)) or [
        node for node in graph.nodes if node.op == "call_function"
    ]


def times(found: MeasuredTimes, node: fx.Node) -> float:
    return found(node, flops_of(node))


LARGE = ((2048, 512), (512, 512), (512, 512))


def test_each_call_is_measured_once_a_machine(calls: list[str]) -> None:
    chain = nodes(lambda x, a, b: (x @ a) @ b, *LARGE)
    clock = MeasuredTimes(HOST, CPU)
    assert clock.device.bandwidth == pytest.approx(BANDWIDTH)
    assert [times(clock, node) for node in chain] == [3.0, 3.0]
    assert calls == ["copy", "(2048, 512)"]
    remembering.forget()  # another process
    assert times(MeasuredTimes(HOST, CPU), chain[0]) == 3.0
    assert len(calls) == 2
    (turned,) = nodes(lambda x, a: x @ a.t(), *LARGE[:2])
    times(MeasuredTimes(HOST, CPU), turned)
    assert len(calls) == 3  # other strides are another call


def test_what_is_small_is_modelled(calls: list[str]) -> None:
    (node,) = nodes(torch.mm, (64, 64), (64, 64))
    clock = MeasuredTimes(HOST, CPU)
    assert times(clock, node) == seconds_of(node, flops_of(node), clock.device)
    assert calls == ["copy"]


@pytest.mark.parametrize("reason", ["fails", "takes too long", "too large"])
def test_what_cannot_be_measured_takes_as_long_as_the_others_would(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    (known,), (unknown,) = nodes(torch.mm, *LARGE[:2]), nodes(torch.mm, (4096, 512), (512, 512))
    clock = MeasuredTimes(HOST, CPU)
    times(clock, known)
    if reason == "takes too long":
        monkeypatch.setattr(timing, "PATIENCE", -1.0)
    elif reason == "too large":
        monkeypatch.setattr(timing, "MOST_BYTES", 4096 * 512 * 4)
    else:
        monkeypatch.setattr(timing, "seconds", lambda run, device: 1 / 0)
    modelled = ModelledTimes(clock.device)
    ratio = 3.0 / modelled(known, flops_of(known))
    assert times(clock, unknown) == pytest.approx(ratio * modelled(unknown, flops_of(unknown)))
    assert calls == ["copy", "(2048, 512)"]


def test_integers_may_say_how_much_there_is_to_do(calls: list[str]) -> None:
    (node,) = nodes(torch.mm, (2048, 512), (512, 512), dtype=torch.int32)
    times(MeasuredTimes(HOST, CPU), node)
    assert calls == ["copy"]


def test_random_numbers_and_the_device_stay_as_they_were(calls: list[str]) -> None:
    (node,) = nodes(torch.mm, *LARGE[:2])
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    times(MeasuredTimes(HOST, CPU), node)
    assert torch.equal(torch.rand(3), wanted)


def test_without_a_card_nothing_is_measured_for_one(calls: list[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert MeasuredTimes(torch.device("cuda"), CPU).device is CPU
    assert calls == []


def test_the_clock_of_a_cpu_takes_the_quickest_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 5.0, 10.0, 12.0, 20.0, 29.0])
    monkeypatch.setattr(metering.time, "perf_counter", lambda: next(ticks))
    runs: list[int] = []
    assert metering.seconds(lambda: runs.append(1), HOST) == 2.0
    assert len(runs) == 4
    assert metering.machine_of(HOST).endswith("threads")
