"""Plans of code that Inductor compiles: what is replayed is what is allocated, and plans are remembered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import peak_bytes
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt
from fxopt import compat
from fxopt.errors import BudgetError, FxoptWarning
from fxopt.memory.plan import KEPT, RECOMPUTED, Plan
from fxopt.memory.rates import CPU
from fxopt.memory.steps import EARLIER, Step, family_of, note_piece, piece_of, step_of
from fxopt.passes import memory_plan


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered from elsewhere."""
    monkeypatch.setenv("FXOPT_CACHE", str(tmp_path))
    fxopt.clear_reports()


SCALAR = {"cpp.simdlen": 1}
"""Kernels without vectors allocate the same, and compile in half the time."""


def llama(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=512, use_cache=False)).train()


BESIDE = 48 * 1024
"""Bytes by which formulas of operators exceed what they hold: they count ignored rows and blocks in full."""
TOKENS = torch.randint(512, (2, 128), generator=torch.Generator().manual_seed(0))


def trained(model: Any, options: dict[str, Any]) -> Any:
    """A step's function under `options`, after one step."""
    torch.compiler.reset()
    compiled = torch.compile(model, backend="fxopt", options={"optimizer": "sgd", "inductor": SCALAR, **options})

    def step() -> None:
        model.zero_grad(set_to_none=True)
        compiled(input_ids=TOKENS, labels=TOKENS).loss.backward()

    step()
    return step


def last_plan() -> Plan:
    return fxopt.reports()[-1].plans[0]


def resident(model: torch.nn.Module) -> int:
    return sum(one.nbytes for one in model.parameters()) + TOKENS.nbytes


def measured(model: torch.nn.Module, step: Any) -> int:
    model.zero_grad(set_to_none=True)
    return peak_bytes(step) + resident(model)


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [one.grad.clone() for one in model.parameters() if one.grad is not None]


def test_a_llama_keeps_to_its_budget_and_its_gradients(tmp_path: Path) -> None:
    model = llama(1)
    step = trained(model, {"memory_budget": "1GiB"})
    wanted, loose = gradients(model), last_plan()
    assert measured(model, step) == pytest.approx(loose.predicted - CPU.reserve, abs=BESIDE)
    with pytest.raises(BudgetError, match="smallest that would do is") as raised:
        trained(model, {"memory_budget": 2**20})
    budget = (raised.value.minimum + loose.predicted) // 2
    step = trained(model, {"memory_budget": budget})
    plan = last_plan()
    assert plan.bytes_of(KEPT) < loose.bytes_of(KEPT)
    assert plan.bytes_of(RECOMPUTED) > 0
    assert 0.95 * budget - BESIDE - CPU.reserve <= measured(model, step) <= budget
    assert measured(model, step) == pytest.approx(plan.predicted - CPU.reserve, abs=BESIDE)
    for one, other in zip(gradients(model), wanted, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()
    assert fxopt.Report.from_json(fxopt.reports()[-1].to_json()).plans == [plan]
    text = str(fxopt.reports()[-1])
    assert "memory: peak" in text
    assert "made again in" in text


def test_a_plan_is_remembered_and_a_broken_file_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, decided = llama(1), []
    real = memory_plan.decide
    monkeypatch.setattr(memory_plan, "decide", lambda *given: decided.append(1) or real(*given))
    trained(model, {"memory_budget": "1GiB"})
    first = last_plan()
    trained(model, {"memory_budget": "1GiB"})
    assert last_plan() == first
    assert decided == [1]
    (file,) = (tmp_path / "plans").iterdir()
    assert json.loads(file.read_text())["plan"]["predicted"] == first.predicted
    file.write_text("{")
    trained(model, {"memory_budget": "1GiB"})
    assert decided == [1, 1]
    trained(model, {"memory_budget": "2GiB"})
    assert decided == [1, 1, 1]


def test_planning_that_fails_leaves_training_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no plan today")

    monkeypatch.setattr(memory_plan, "decide", broken)
    model = llama(1)
    with pytest.warns(FxoptWarning, match="memory plan of graph 0 failed .*no plan today.*no budget is kept"):
        trained(model, {"memory_budget": "1GiB"})
    (report,) = fxopt.reports()
    assert report.plans == []
    assert any("no budget is kept" in note for note in report.graphs[0].notes)
    assert all(one.grad is not None for one in model.parameters())


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_code_that_only_runs_with_data_is_planned_by_the_model() -> None:
    layer = torch.nn.Linear(16, 16)
    torch.compiler.reset()
    options = {"optimizer": "sgd", "inductor": SCALAR, "memory_budget": "1GiB"}
    run = torch.compile(lambda x: layer(x[x[:, 0] > 0]).sum(), backend="fxopt", options=options)
    run(torch.randn(64, 16, requires_grad=True)).backward()
    assert any("cannot be replayed" in note for note in last_plan().notes)
    assert last_plan().predicted > 0


def test_graphs_of_one_step_share_the_budget() -> None:
    first, second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        x = first(torch.nn.functional.one_hot(input_ids % 64, 64).float()).tanh()
        torch._dynamo.graph_break()
        return type("Out", (), {"loss": second(x).square().sum()})

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList([first, second])
            self.forward = forward

    trained(Both(), {"memory_budget": "1GiB"})
    one, other = [report.plans[0] for report in fxopt.reports() if report.plans]
    assert any("half of what is left" in note for note in one.notes)
    assert any("shared with graph 0" in note for note in other.notes)
    held = other.parts[EARLIER]
    assert held == sum(one.resident.values()) + one.retained
    assert other.predicted > held


def test_layers_compiled_one_by_one_share_the_budget() -> None:
    """Each call's graph is planned for all four layers: what they hold together is within the budget."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=4)
    model = LlamaForCausalLM(config).train().model
    rotary = model.rotary_emb(torch.empty(0), torch.arange(128)[None])
    start = torch.randn(4, 128, 64, requires_grad=True)
    layers = torch.nn.ModuleList(model.layers)
    held = sum(one.nbytes for one in layers.parameters()) + start.nbytes + sum(one.nbytes for one in rotary)

    def run() -> Any:
        x = start
        for layer in layers:
            x = layer(x, position_embeddings=rotary)
        return x

    def step() -> None:
        layers.zero_grad(set_to_none=True)
        start.grad = None
        run().square().mean().backward()

    def compiled(budget: int | str) -> Plan:
        torch.compiler.reset()
        for layer in layers:
            layer.compile(backend="fxopt", options={"optimizer": "sgd", "inductor": SCALAR, "memory_budget": budget})
        step()
        return last_plan()

    loose = compiled("1GiB")
    assert any("4 modules like this one" in note for note in loose.notes)
    assert loose.resident["parameters"] == sum(one.nbytes for one in layers.parameters())
    step()
    wanted, most = gradients(layers), peak_bytes(step) + held
    with pytest.raises(BudgetError) as raised:
        compiled(2**20)
    budget = (raised.value.minimum + most) // 2
    tight = compiled(budget)
    assert tight.bytes_of(KEPT) < loose.bytes_of(KEPT)
    step()
    assert peak_bytes(step) + held <= budget
    assert raised.value.minimum < 0.8 * most
    for one, other in zip(gradients(layers), wanted, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


class Layer(torch.nn.Linear):
    """One of several, whose frame is not torch's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).tanh()


@pytest.mark.parametrize(
    ("how", "count"),
    [("all", 3), ("two", 2), ("wrapped", 3), ("broken", 3), ("alone", 1), ("whole", 1)],
)
def test_calls_of_a_graph_are_counted(how: str, count: int) -> None:
    """By the modules of its class in the list that holds the one whose frame is compiled."""
    layers = torch.nn.ModuleList([*(Layer(4, 4) for _ in range(3)), torch.nn.Linear(4, 4)])
    found: list[int] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        found.append(family_of(compat.frame_being_compiled()).calls)
        return gm.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = layer(x)
            if how == "broken":
                torch._dynamo.graph_break()
        return x

    torch.compiler.reset()
    if how in ("all", "two"):
        for layer in [*layers][: 3 if how == "all" else 2]:
            layer.compile(backend=backend)
    elif how == "wrapped":
        for at in range(3):
            layers[at] = torch.compile(layers[at], backend=backend)
    elif how == "alone":
        torch.compile(Layer(4, 4), backend=backend)(torch.ones(4))
    run = torch.compile(forward, backend=backend) if how in ("broken", "whole") else forward
    run(torch.ones(4, requires_grad=True))
    assert found[0] == count
    torch.compiler.reset()


class Mixer(torch.nn.Module):
    """A layer of another class."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Layer(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * x


def steps_of(model: torch.nn.Module, compiled: list[torch.nn.Module], x: torch.Tensor) -> list[Step]:
    """What each graph finds as `compiled`, modules of `model`, are called one after the other; and each is noted."""
    found: list[Step] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        family = family_of(compat.frame_being_compiled())
        found.append(step_of(family, compat.ends_in_break(gm)))
        note_piece(piece_of(f"graph {len(found) - 1}", family, 100, 10), family, found[-1].more)
        return gm.forward

    torch.compiler.reset()
    for module in compiled:
        module.compile(backend=backend)
    model(x)
    return found


def test_classes_that_alternate_share_the_budget() -> None:
    model = torch.nn.Sequential(Layer(4, 4), Mixer(), Layer(4, 4), Mixer())
    first, other = steps_of(model, [*model], torch.ones(4, requires_grad=True))
    assert (first.calls, first.earlier, first.more) == (2, (), True)
    assert (other.calls, other.held, other.more) == (2, 110, False)
    # Whatever else is compiled next is of another step.
    (alone,) = steps_of(lone := Mixer(), [lone], torch.ones(4, requires_grad=True))
    assert alone == Step()


def test_the_graph_of_a_layer_whose_input_wants_no_gradient_is_in_the_place_of_the_others() -> None:
    model = torch.nn.Sequential(Layer(4, 4), Layer(4, 4), Mixer())
    first, second, last = steps_of(model, [*model], torch.ones(4))
    assert (first.held, first.more) == (0, True)
    assert (second.held, second.more) == (0, True)
    assert (last.held, last.more) == (110, False)


@pytest.mark.parametrize("by", ["method", "function"])
def test_a_model_whose_forward_is_compiled_is_all_there_is(by: str) -> None:
    model, found = Mixer(), list[Step]()

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        found.append(step_of(family_of(compat.frame_being_compiled()), compat.ends_in_break(gm)))
        return gm.forward

    torch.compiler.reset()
    call = torch.compile(model.forward if by == "method" else lambda x: 2 * model(x), backend=backend)
    call(torch.ones(4, requires_grad=True))
    assert found == [Step()]


class Broken(torch.nn.Module):
    """Two pieces, or one and nothing after it."""

    def __init__(self, trailing: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.trailing = Layer(4, 4), Layer(4, 4), trailing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return x if self.trailing else self.second(x)


def test_a_step_that_begins_anew_and_another_model_find_no_pieces() -> None:
    x = torch.ones(4, requires_grad=True)
    for model in (Broken(trailing=True), whole := Broken(), whole):
        first, *rest = steps_of(model, [model], x)
        assert (first.earlier, first.more) == ((), True)
        assert [(one.held, one.more) for one in rest] == ([] if model.trailing else [(110, False)])


@pytest.mark.slow
def test_a_weight_in_16_bits_is_cast_again_where_there_is_no_room() -> None:
    model = llama(1)
    with pytest.raises(BudgetError) as raised:
        trained(model, {"memory_budget": 2**20, "precision": "bf16"})
    trained(model, {"memory_budget": raised.value.minimum, "precision": "bf16"})
    casts = [row for row in last_plan().rows if row.name.startswith(("convert_element_type", "_to_copy"))]
    assert any(row.decision == RECOMPUTED and row.bytes == 2 * 64 * 128 for row in casts)
