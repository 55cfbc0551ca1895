"""Which kernels an operator would launch is found without launching any, whatever the process does with Triton."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import captured
from torch import Tensor

from fxopt import compat, dump_kernels
from fxopt.compat import FakeTensorMode
from fxopt.kernels.cards import CARDS, INTERPRETER, as_if_on, card_of
from fxopt.kernels.offline import Job, Resources
from fxopt.kernels.source import Kernel
from fxopt.ops import attention_operator, loss_operator, norm_operator
from fxopt.ops.launched import kernels_of
from fxopt.ops.norm import NormSpec
from fxopt.passes.attention import RULE
from fxopt.rewrite import apply_rule

F32 = torch.float32
NORM = (*vars(NormSpec("rms", 1e-6, "square", F32, F32, False, 0.0, F32, F32)).values(), "interpret")
FORWARD_AND_BACKWARD = ["attention_forward", "attention_delta", "attention_backward_q", "attention_backward_kv"]


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even imported, and so neither compiled nor run."""

    def refuse(kernel: Kernel) -> None:
        raise AssertionError(f"{kernel.name} was loaded")

    monkeypatch.setattr(Kernel, "load", refuse)


def attention(lowering: str, *wanted: bool) -> list[str]:
    """wanted: of q, k and v, the gradients."""
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 2, 40, 16, requires_grad=want) for want in wanted)
        constants = ("", "", 0.25, None, 0, 0.0, "zero", True, lowering)
        arguments = (q, k, v, None, None, None, None, [], *constants)
        return [one.name for one in kernels_of(attention_operator.FORWARD, arguments, {}, {0})]


def test_backwards_are_those_that_autograd_will_ask_for() -> None:
    assert attention("interpret", False, False, False) == ["attention_forward"]
    assert attention("interpret", True, True, True) == FORWARD_AND_BACKWARD
    assert attention("interpret", True, False, False) == FORWARD_AND_BACKWARD[:3]
    assert attention("interpret", False, False, True) == [*FORWARD_AND_BACKWARD[:2], FORWARD_AND_BACKWARD[3]]


def test_what_a_card_would_launch_is_known_without_one() -> None:
    assert attention("auto", True, True, True) == []
    with as_if_on(CARDS[1]):
        assert attention("auto", True, True, True) == FORWARD_AND_BACKWARD
        assert attention("aten", True, True, True) == []
        assert card_of(torch.device("cpu")) is CARDS[1]
    assert card_of(torch.device("cpu")) is INTERPRETER


def test_a_launch_is_noted_with_what_it_is_specialised_on() -> None:
    with FakeTensorMode(), as_if_on(CARDS[0]):
        x, weight = torch.empty(9, 24)[1:, 4:20], torch.empty(16)
        (launch,) = kernels_of(norm_operator.FORWARD, (x, None, weight, None, None, *NORM), {}, {0}).values()
        (shifted,) = kernels_of(
            norm_operator.FORWARD, (x[:, 1:], None, weight[1:], None, None, *NORM), {}, {0}
        ).values()
    assert launch.aligned != shifted.aligned
    assert {"X", "Weight"} <= {*launch.aligned}
    assert launch.config.num_warps


def test_by_aten_there_are_none() -> None:
    assert attention("aten", True, True, True) == []


@pytest.mark.parametrize(("read", "by_stream"), [({0}, False), ({0, 1}, True)])
def test_a_result_that_nobody_reads_has_no_gradient(read: set[int], by_stream: bool) -> None:
    with FakeTensorMode():
        x, residual = (torch.empty(4, 24, requires_grad=True) for _ in range(2))
        arguments = (x, residual, torch.empty(24), None, None, *NORM)
        kernels = kernels_of(norm_operator.FORWARD, arguments, {}, read)
    backward = next(one for one in kernels if one.name == "norm_backward")
    assert ("By_stream" in backward.arguments) == by_stream


def loss(recompute: bool) -> list[str]:
    with FakeTensorMode():
        hidden, weight, target = torch.empty(64, 32), torch.empty(100, 32), torch.empty(64, dtype=torch.int64)
        constants: tuple[Any, ...] = (1.0, 0.0, 0.0, 0.0, -100, "mean", False, False, True, True, False, recompute)
        arguments = (hidden, weight, None, target, *constants, "interpret")
        return [one.name for one in kernels_of(loss_operator.FORWARD, arguments, {}, {0})]


def test_a_loss_goes_by_tiles_or_by_chunks() -> None:
    assert loss(recompute=True) == ["linear_cross_entropy_forward"]
    assert loss(recompute=False) == ["cross_entropy_rows"]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    row = torch.arange(q.shape[2])
    scores = (q @ k.transpose(2, 3)).masked_fill(row[None, :] > row[:, None], -torch.inf)
    return torch.softmax(scores, -1) @ v


def test_symbolic_sizes_are_stood_in_for_and_no_guard_is_installed(tmp_path: Path) -> None:
    tensors = [torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3)]
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 2)
    module = apply_rule(RULE, captured(causal, *tensors).module, lowering="interpret").module
    values = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    shape_env = compat.fake_mode_of(values).shape_env  # type: ignore[union-attr]
    before = len(shape_env.guards)
    assert [one.kernel for one in dump_kernels.write(module, tmp_path)[0]] == FORWARD_AND_BACKWARD
    assert len(shape_env.guards) == before


def test_a_dump_says_what_kernels_take_of_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled here: that is `tests/kernels`' and the commands'."""
    monkeypatch.undo()
    asked: list[Job] = []

    def compiled(jobs: list[Job], _: int) -> dict[Job, Any]:
        asked.extend(jobs)
        used = {job: Resources(64, 0, 1024, True) for job in jobs}
        return used | {job: "CompilationError: no" for job in jobs if job.kernel.name == "attention_delta"}

    monkeypatch.setattr(dump_kernels, "compile_shown", compiled)
    tensors = [torch.randn(2, 4, 32, 16, requires_grad=True) for _ in range(3)]
    module = apply_rule(RULE, captured(causal, *tensors).module).module
    assert dump_kernels.write(module, tmp_path) == ([], [])
    found, faults = dump_kernels.write(module, tmp_path, CARDS[:2])
    assert [one.kernel for one in found] == FORWARD_AND_BACKWARD
    used = {"registers": 64, "spill_bytes": 0, "shared_bytes": 1024, "fits": True}
    assert found[0].resources == {"sm_80": used, "sm_86": used}
    assert found[1].resources == {}
    assert faults == [f"attention_delta for sm_{arch}: CompilationError: no" for arch in (80, 86)]
    assert {job.card for job in asked} == {*CARDS[:2]}
    assert all(one.path.read_text() for one in found)
