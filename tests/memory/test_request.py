"""Options of the memory plan: units, mistakes, what they come to on a device, and what a process holds besides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt import Options
from fxopt.errors import OptionError
from fxopt.memory.rates import CPU, DEVICES, device_named, device_of
from fxopt.memory.request import Budget, Request, parse_budget
from fxopt.memory.resident import Inputs, found_optimizer, optimizer_bytes, resident_bytes
from fxopt.memory.units import parse_bytes, show_bytes

CPU_DEVICE = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GiB", 12 * 2**30), ("12 gib", 12 * 2**30), ("1.5GB", 1_500_000_000), ("800MiB", 800 * 2**20), ("7", 7)],
)
def test_bytes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@given(st.integers(1, 2**50))
def test_what_is_shown_reads_back_to_a_percent(size: int) -> None:
    assert parse_bytes(show_bytes(size)) == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize("text", ["", "GiB", "12GiBB", "-3GiB", "a lot", "1e3MiB"])
def test_what_is_no_number_of_bytes_says_what_to_write(text: str) -> None:
    with pytest.raises(ValueError, match="12GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("memory_budget", "12 parsecs", "12GiB"),
        ("memory_budget", 12, "12 bytes: write the unit"),
        ("memory_budget", 1.5, "must be bytes"),
        ("memory_budget", True, "must be bytes"),
        ("memory_budget", "0%", "above 0%"),
        ("memory_budget", "120%", "at most 100%"),
        ("memory_budget", "many%", "80%"),
        ("optimizer", "adamW", "did you mean 'adamw'"),
        ("optimizer", -1, "bytes of its state"),
        ("optimizer", True, "bytes of its state"),
        ("accumulation", 4, "True"),
        ("offload", "25GB/s", "GB/s"),
        ("offload", -1.0, "GB/s"),
        ("infeasible", "ignore", "minimum"),
    ],
)
def test_a_mistake_says_what_to_write_instead(option: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options.parse({option: value})


def test_no_budget_asks_for_no_plan_and_a_budget_is_part_of_the_key() -> None:
    assert Options.parse({"optimizer": "sgd"}).memory is None
    wanted = {"memory_budget": "2GiB", "optimizer": 8, "accumulation": True, "offload": 25, "infeasible": "minimum"}
    assert Options.parse(wanted).memory == Request(Budget(2 * 2**30), 8.0, True, 25.0, "minimum", True)
    never = Options.parse({**wanted, "choose": "never"}).memory
    assert never is not None
    assert not never.measure


def test_parts_of_a_card_need_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    share, auto = parse_budget("75%"), parse_budget("auto")
    assert share is not None
    assert auto is not None
    for budget, name in ((share, "75%"), (auto, "auto")):
        with pytest.raises(OptionError, match=f"memory_budget='{name}'.* on cpu"):
            budget.on(CPU_DEVICE, CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * 2**30)
    card = torch.device("cuda")
    assert share.on(card, DEVICES["rtx4090"]) == 18 * 2**30
    assert auto.on(card, DEVICES["rtx4090"]) == 7 * 2**30


def test_devices_are_found_by_name_and_a_cpu_has_nothing_to_offload_to() -> None:
    assert device_named("RTX 4090").memory == 24 * 2**30
    assert device_of(CPU_DEVICE) is CPU
    assert Request(Budget(1), offload=25.0).link(CPU) == 0
    assert Request(Budget(1), offload=True).link(DEVICES["h100"]) == DEVICES["h100"].link
    with pytest.raises(OptionError, match="did you mean 'rtx4090'"):
        device_named("rtx409")


@pytest.mark.parametrize(
    ("make", "bytes_each"),
    [
        (torch.optim.AdamW, 8),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 4),
    ],
)
@pytest.mark.parametrize("stepped", [False, True])
def test_an_optimizer_is_found_by_its_state_or_its_class(make: Any, bytes_each: int, stepped: bool) -> None:
    parameter = torch.nn.Parameter(torch.randn(129, 257))
    optimizer = make([parameter])
    if stepped:
        parameter.sum().backward()
        optimizer.step()
    assert found_optimizer([(129, 257)]) == pytest.approx(bytes_each, abs=0.01)
    assert found_optimizer([(3, 5, 7, 11)]) is None


def test_what_a_process_holds_adds_up() -> None:
    inputs = Inputs(trained=4000, elements=1000, frozen=500, batch=64)
    assert optimizer_bytes("adamw", inputs) == 8000
    assert optimizer_bytes("sgd_momentum", inputs) == 4000
    assert optimizer_bytes("adamw8bit", inputs) == 2 * 1000 + 2 * 4 * 4
    assert optimizer_bytes(2.5, inputs) == 2500
    found = resident_bytes(inputs, 8000, True, CPU)
    wanted = {"parameters": 4500, "optimizer": 8000, "accumulated gradients": 4000, "batch": 64}
    assert found == {**wanted, "libraries": CPU.reserve}


def test_a_plan_is_remembered_by_the_bytes_that_auto_came_to() -> None:
    from fxopt.memory.steps import ALONE
    from fxopt.passes.memory_plan import _key

    gm = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
    keys = [_key(gm, Request(Budget()), free, CPU_DEVICE, ALONE, "") for free in (2**30, 2**31, 2**30)]
    assert keys[0] == keys[2] != keys[1]
