"""The pool of host memory: loans end by themselves, buffers are used again, and none is two tensors' at a time."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.memory.rates import CPU, device_named
from fxopt.memory.request import Budget, Request
from fxopt.ops import transfer
from fxopt.ops.pinned import FIT, SPARE, Pool
from fxopt.ops.transfer import Transfers


def test_a_loan_lasts_as_long_as_any_view() -> None:
    pool = Pool()
    memory, buffer = pool.take(64, pinned=False)
    part = memory.view(torch.float32).view(4, 4)[1:]
    del memory
    assert pool.lent == 64
    assert pool.buffer_of(part.flatten()) is None
    del part
    assert (pool.lent, pool.held) == (0, 64)
    again, same = pool.take(60, pinned=False)
    assert same is buffer
    assert again.shape == (60,)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 4000), st.integers(0, 5)), max_size=40))
def test_no_memory_is_lent_twice_and_little_is_held(requests: list[tuple[int, int]]) -> None:
    """Law: what is on loan is disjoint and keeps its content; what is held is bounded by what was once needed."""
    pool, held, most = Pool(), list[tuple[torch.Tensor, int]](), 0
    for number, (size, drop) in enumerate(requests):
        memory, _ = pool.take(size, pinned=False)
        memory.fill_(number % 251)
        held.append((memory, number % 251))
        assert all(bool((one == value).all()) for one, value in held)
        assert len({one.data_ptr() for one, _ in held}) == len(held)
        most = max(most, pool.lent)
        assert pool.lent <= FIT * sum(one.numel() for one, _ in held)
        assert pool.held <= SPARE * most
        del held[:drop], memory
    held.clear()
    assert pool.lent == 0


def test_threads_share_it() -> None:
    pool, wrong = Pool(), list[int]()

    def work(value: int) -> None:
        for _ in range(200):
            memory, _ = pool.take(512, pinned=False)
            memory.fill_(value)
            wrong.extend([value] * (not bool((memory == value).all())))

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong
    assert pool.lent == 0
    assert pool.held <= 4 * 2 * 512  # a thread takes the next before it lets go of the last


class Recorded:
    """Streams that copy nothing, and note what must come after what."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Any, list[Any]]] = []

    def copy(self, direction: str, target: Any, source: Any, after: Any) -> Any:
        event = f"{direction} {len(self.log)}"
        self.log.append((direction, event, list(after)))
        return event

    def wait(self, event: Any) -> None:
        self.log.append(("wait", event, []))

    def done(self, event: Any) -> bool:
        return False


def test_copies_wait_for_those_that_used_their_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy back for the one there; a copy into memory that was lent before for the last that read it."""
    streams, transfers, pool = Recorded(), Transfers(), Pool()
    monkeypatch.setattr(transfer, "streams_of", lambda _: streams)
    monkeypatch.setattr(transfer, "HOST", pool)
    source, device = torch.zeros(32), torch.device("cpu")
    host = transfers.send(source)
    transfers.land(host)
    back = transfers.fetch(host, device)
    del host
    transfers.land(back)
    transfers.land(back)  # nothing is under way any more
    other = transfers.send(source)
    assert pool.held == source.nbytes
    assert streams.log == [
        ("out", "out 0", []), ("wait", "out 0", []),
        ("in", "in 2", ["out 0"]), ("wait", "in 2", []),
        ("out", "out 4", ["in 2"]),
    ]  # fmt: skip
    del other


@pytest.mark.parametrize(
    ("offload", "device", "graphs", "link", "why"),
    [
        (False, "a100", False, 0.0, ""),
        (True, "a100", False, 0.85 * 25e9, ""),
        (12.0, "a100", False, 12e9, ""),
        (True, "a100", True, 0.0, "CUDA graphs"),
        (12.0, "cpu", False, 0.0, "cpu has no memory of its own"),
        (True, "cpu", False, 0.0, "cpu has no memory of its own"),
        (False, "cpu", True, 0.0, ""),
    ],
)
def test_where_there_is_a_link(offload: bool | float, device: str, graphs: bool, link: float, why: str) -> None:
    known = CPU if device == "cpu" else device_named(device)
    found, reason = Request(Budget(2**30), offload=offload).link_on(known, graphs)
    assert found == pytest.approx(link)
    assert reason.startswith("nothing is offloaded") == bool(why)
    assert why in reason
