"""Offloading changes no number: copies are waited for before they are read, sources live until they are copied."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from link import Simulation
from offloaded import Deep, Graphs, Late, Offloading, gradients

from fxopt.memory import solution
from fxopt.memory.offload import Places
from fxopt.ops import transfer
from fxopt.ops.offload_operator import FETCH, HOLD, SEND
from fxopt.ops.pinned import HOST
from fxopt.ops.transfer import TRANSFERS


@pytest.fixture(autouse=True)
def empty_pool() -> Iterator[None]:
    HOST.clear()
    yield
    HOST.clear()


def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    streams = Late()
    monkeypatch.setattr(transfer, "streams_of", lambda _: streams)
    return streams


def batch() -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def calls(graphs: Graphs, target: Any) -> int:
    return sum(node.target is target for part in (graphs.forward, graphs.backward) for node in part.graph.nodes)


def test_gradients_are_the_same_and_the_host_memory_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, backend, streams = Deep(), Offloading(), late(monkeypatch)
    run, x = torch.compile(model, backend=backend), batch()
    wanted = gradients(model, model, x)
    loss = run(x)
    (graphs,) = backend.graphs
    sizes = [node.meta["val"].nbytes for node in graphs.cut.joint.forward if node.name in graphs.offloaded]
    assert len(sizes) >= 3 * len(model.layers)
    assert HOST.lent == sum(sizes)
    model.zero_grad()
    loss.backward()
    assert equal([one.grad for one in model.parameters() if one.grad is not None], wanted)
    assert streams.copies == 2 * len(sizes)
    assert (TRANSFERS.flying, HOST.lent) == (0, 0)
    held = HOST.held
    assert equal(gradients(model, run, x), wanted)
    assert HOST.held == held == sum(sizes)


def test_who_reads_too_early_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the waits the same step is wrong: what the other tests find is no accident."""
    streams = late(monkeypatch)
    model, x = Deep(), batch()
    wanted = gradients(model, model, x)
    monkeypatch.setattr(TRANSFERS, "land", lambda _: None)
    found = gradients(model, torch.compile(model, backend=Offloading()), x)
    assert not equal(found, wanted)
    streams.finish()
    assert (TRANSFERS.flying, HOST.lent) == (0, 0)


def test_a_graph_that_is_retained_keeps_its_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    late(monkeypatch)
    model, x = Deep(), batch()
    wanted = gradients(model, model, x)
    loss = torch.compile(model, backend=Offloading())(x)
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert equal([one.grad for one in model.parameters() if one.grad is not None], wanted)
        assert HOST.lent > 0
    del loss
    assert (TRANSFERS.flying, HOST.lent) == (0, 0)


@settings(
    max_examples=6, phases=[Phase.explicit, Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), depth=st.integers(1, 5))
def test_whatever_is_offloaded(data: st.DataObject, depth: int) -> None:
    """Law: bit-equal gradients, nothing read before it is there, two blocks in flight at most, all memory returned."""
    torch.compiler.reset()

    def choose(_: Any, names: list[str]) -> list[str]:
        return data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1), label="offloaded")

    model, backend, x = Deep(depth), Offloading(choose), batch()
    with pytest.MonkeyPatch.context() as patch:
        late(patch)
        assert equal(gradients(model, torch.compile(model, backend=backend), x), gradients(model, model, x))
        assert (TRANSFERS.flying, HOST.lent) == (0, 0)
    (graphs,) = backend.graphs
    assert calls(graphs, SEND) == calls(graphs, FETCH) == len(graphs.offloaded)
    places = Places.of(graphs.cut.joint)
    step = Simulation(dict.fromkeys([*places.block, *places.stage], 1.0), 10.0, {**places.block, **places.stage}).run(
        graphs.forward, graphs.backward
    )
    assert step.faults == []
    assert step.blocks <= 2


class Stop(Exception):
    """A step that fails."""


def failing(part: str, at: float) -> Any:
    """Raise in the forward or the backward, `at` of the way between its first and last copy."""

    def stop() -> None:
        raise Stop

    def change(graphs: Graphs) -> None:
        module = getattr(graphs, part)
        places = [node for node in module.graph.nodes if node.target in (SEND, FETCH, HOLD)]
        with module.graph.inserting_after(places[int(at * (len(places) - 1))]):
            module.graph.call_function(stop)
        module.recompile()

    return change


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_a_step_that_raises_returns_its_memory(part: str, at: float) -> None:
    model = Deep()
    run = torch.compile(model, backend=Offloading(change=failing(part, at)))
    with pytest.raises(Stop):
        run(batch()).backward()
    gc.collect()
    assert (TRANSFERS.flying, HOST.lent) == (0, 0)
    assert HOST.held > 0


def test_copies_of_a_step_that_raised_live_until_they_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a copy engine reads and writes may not become another tensor's memory under its hands."""
    streams = late(monkeypatch)
    run = torch.compile(Deep(), backend=Offloading(change=failing("forward", 0.5)))
    with pytest.raises(Stop):
        run(batch())
    gc.collect()
    flying = sum(not streams.done(event) for event in streams.begun)
    assert TRANSFERS.flying == flying > 0
    assert HOST.lent > 0
    streams.finish()
    assert (TRANSFERS.flying, HOST.lent) == (0, 0)


class Turned(torch.nn.Module):
    """Of what its product saves, one is a transpose and one a part of a larger tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([x @ self.weight, x], dim=1).sin()
        kept = wide[:, :16].clone(memory_format=torch.preserve_format)
        turned = (x @ self.weight).T.sin()
        return ((kept @ self.weight).sin() @ turned).square().mean()


def test_only_what_is_large_and_in_one_piece_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, list[bool]]] = []

    def look(joint: Any, _: list[str]) -> list[str]:
        for least in (1, 8 * 16 * 4, 8 * 32 * 4, 2**21):
            monkeypatch.setattr(solution, "LEAST_OFFLOAD", least)
            seen.append((joint, list(solution.offloadable(joint))))
        return []

    torch.compile(Turned(), backend=Offloading(look))(batch())
    refused = 0
    for least, (joint, may) in zip((1, 8 * 16 * 4, 8 * 32 * 4, 2**21), seen, strict=True):
        for at, allowed in enumerate(may):
            value = joint.forward[at].meta["val"]
            whole = isinstance(value, torch.Tensor) and value.is_contiguous() and joint.owner[at] == at
            assert allowed == (whole and value.nbytes >= least and joint.size[at] > 0)
            refused += isinstance(value, torch.Tensor) and joint.owner[at] == at and not value.is_contiguous()
    assert refused > 0
    assert [any(may) for _, may in seen] == [True, True, True, False]
