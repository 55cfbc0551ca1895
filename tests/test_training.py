"""What a training script does with a model besides one step, under `backend="fxopt"`, against fp64."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
from allocations import peak_bytes
from harness import BACKEND, assert_loss_rewritten, check, compiled, rewritten
from torch import Tensor, nn

import fxopt
from fxopt.testing import compare, step
from fxopt.testing.compare import Step
from fxopt.testing.exact import Widen

pytestmark = pytest.mark.filterwarnings("error::fxopt.FxoptWarning")
# One layer: what is tested here lies around the layers, and compilation is what takes the time.
SMALL = {"num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def no_reports() -> Iterator[None]:
    fxopt.clear_reports()
    yield
    fxopt.clear_reports()


def small(family: str = "llama", **changes: Any) -> tuple[Any, models.Inputs]:
    """A one-layer model of `family` and a batch."""
    return models.build(family, **{**SMALL, **changes})


@pytest.mark.slow
def test_compile_in_place_then_generate() -> None:
    """`model.compile` keeps the model's type: the same object trains compiled and generates what eager would."""
    model, inputs = small(use_cache=True)
    twin = copy.deepcopy(model)
    model.compile(backend=BACKEND)
    for each in (model, twin):
        sgd = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(2):
            each(**inputs).loss.backward()
            sgd.step()
            sgd.zero_grad()
    assert_loss_rewritten()
    prompt = inputs["input_ids"][:, :5]
    words = [each.eval().generate(prompt, max_new_tokens=3, do_sample=False) for each in (model, twin)]
    assert words[0].shape == (2, 8)
    assert torch.equal(*words)


def test_generate_of_the_compiled_wrapper() -> None:
    model, inputs = small()
    call = compiled(model)
    call(**inputs).loss.backward()
    model.eval()
    prompt = inputs["input_ids"][:, :4]
    expected = copy.deepcopy(model).generate(prompt, max_new_tokens=3, do_sample=False)
    assert torch.equal(call.generate(prompt, max_new_tokens=3, do_sample=False), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, pytest.param(torch.inference_mode, marks=pytest.mark.slow)])
def test_eval_with_and_without_labels(mode: Callable[[], Any]) -> None:
    """After a training step, `eval()` with labels gives loss and logits, without them logits and no loss."""
    model, inputs = small()
    call = compiled(model)
    call(**inputs).loss.backward()
    model.eval()
    unlabelled = {k: v for k, v in inputs.items() if k != "labels"}
    with mode():
        labelled, plain, eager = call(**inputs), call(**unlabelled), model(**inputs)
        with Widen():
            exact = copy.deepcopy(model).double()(**inputs)
        assert plain.loss is None
        for found in (labelled, plain):
            assert torch.equal(found.logits.argmax(-1), eager.logits.argmax(-1))
        for found in (labelled.loss, labelled.logits, plain.logits):
            theirs, right = (eager.loss, exact.loss) if found.dim() == 0 else (eager.logits, exact.logits)
            compare(_step(found), _step(theirs), _step(right)).check()


@pytest.mark.parametrize("as_tensor", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradient_accumulation_with_num_items(as_tensor: bool) -> None:
    """The sum of two micro-batches over the number of words in both, as `Trainer` does it."""
    model, first = small(mask="right")
    second = models.inputs_for("llama", model, "left", seed=7)
    count: Any = sum((batch["labels"][:, 1:] != models.IGNORED).sum() for batch in (first, second))
    count = count if as_tensor else int(count)

    def accumulated(call: Callable[..., Any], module: nn.Module) -> Step:
        module.zero_grad()
        losses = [call(**batch, num_items_in_batch=count).loss for batch in (first, second)]
        for loss in losses:
            loss.backward()
        return _gathered(module, losses)

    wide = copy.deepcopy(model).double()
    ours, eager = accumulated(compiled(model), model), accumulated(model, model)
    assert_loss_rewritten()
    with Widen():
        compare(ours, eager, accumulated(wide, wide)).check()


@pytest.mark.parametrize(
    ("dynamic", "sizes"),
    [
        pytest.param(None, [(2, 11), (3, 19), (1, 8), (5, 27)], id="automatic"),
        pytest.param(None, [(1, 11), (2, 11), (2, 19), (4, 27), (3, 2)], id="from-one", marks=pytest.mark.slow),
        pytest.param(True, [(2, 11), (3, 19), (1, 8), (5, 27)], id="dynamic", marks=pytest.mark.slow),
        pytest.param(False, [(2, 11), (1, 19)], id="static", marks=pytest.mark.slow),
    ],
)
@pytest.mark.fault("batch sizes 0 and 1")
@pytest.mark.fault("dims becoming dynamic")
def test_batch_and_sequence_sizes_may_change(dynamic: bool | None, sizes: list[tuple[int, int]]) -> None:
    """A size of its own for batch 1, a dynamic graph for the rest, and after that nothing is compiled again."""
    model, _ = small()
    call = compiled(model, dynamic=dynamic)
    for batch, seq in sizes:
        check(model, call, models.inputs_for("llama", model, batch=batch, seq=seq))
    if BACKEND == "fxopt":
        assert len(fxopt.reports()) <= 3, "compiled again for sizes that a dynamic graph covers"
        assert_loss_rewritten(len(fxopt.reports()))


@pytest.mark.fault("batch sizes 0 and 1")
def test_empty_batch_does_as_eager() -> None:
    model, inputs = small()
    call = compiled(model)
    call(**inputs).loss.backward()
    empty = models.inputs_for("llama", model, batch=0)
    outcomes = [_outcome(lambda each=each: step(each, empty, parameters=model).loss) for each in (call, model)]
    assert outcomes[0] == outcomes[1]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.fault("checkpoint and autograd.Function bodies")
def test_gradient_checkpointing() -> None:
    model, inputs = small()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check(model, compiled(model), inputs)
    assert_loss_rewritten()


class Adapted(nn.Module):
    """LoRA by hand: a frozen linear and a trained product of rank 4."""

    def __init__(self, base: nn.Linear, rank: int = 4, scale: float = 2.0):
        super().__init__()
        self.base, self.scale = base, scale
        self.down = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, rank) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + nn.functional.linear(nn.functional.linear(x, self.down), self.up) * self.scale


@pytest.mark.parametrize("head", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.fault("partly frozen or tied weights")
def test_lora_by_hand(head: bool) -> None:
    """Frozen base, embedding and head; adapters on two projections, and on the head itself in the slow case."""
    model, inputs = small()
    model.requires_grad_(False)
    attention = model.model.layers[0].self_attn
    attention.q_proj, attention.v_proj = Adapted(attention.q_proj), Adapted(attention.v_proj)
    if head:
        model.lm_head = Adapted(model.lm_head)
    found = check(model, compiled(model), inputs, outputs=("logits",))
    assert sum(error.name.startswith("grad ") for error in found.errors) == (6 if head else 4)
    assert model.get_input_embeddings().weight.grad is None
    if not head:
        assert_loss_rewritten()


@pytest.mark.slow
def test_two_models_in_one_process() -> None:
    """Compiled and trained in turns; neither sees the other's weights."""
    (first, a), (second, b) = small("llama"), small("gpt_neox")
    calls = compiled(first), compiled(second)
    for _ in range(2):
        check(first, calls[0], a)
        check(second, calls[1], b)
    assert_loss_rewritten(2)


@pytest.mark.fault("partly frozen or tied weights")
def test_tied_weights() -> None:
    """One gradient, from the embedding and from the head."""
    model, inputs = small(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check(model, compiled(model), inputs, outputs=("logits",))
    assert_loss_rewritten()


def test_loss_curve_follows_fp64() -> None:
    """Ten steps of SGD: at each the loss is as near to the fp64 run's as eager's has been so far."""
    model, inputs = small()
    twin, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    ours, eager = _curve(compiled(model), model, inputs), _curve(twin, twin, inputs)
    with Widen():
        exact = _curve(wide, wide, inputs)
    assert exact[-1] < exact[0] - 0.5, "nothing was learnt"
    worst = (eager - exact).abs().cummax(0).values
    floor = 2 * torch.finfo(torch.float32).eps * exact.abs()
    assert ((ours - exact).abs() <= 2 * worst + floor).all(), torch.stack([ours - exact, eager - exact])


def test_trainer_runs(tmp_path: Any) -> None:
    """Three steps of `transformers.Trainer` on a model that was compiled in place."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate, which is no dependency of fxopt")
    from transformers import Trainer, TrainingArguments

    model, _ = small()
    twin = copy.deepcopy(model)
    model.compile(backend=BACKEND)
    data = [{"input_ids": row, "labels": row} for row in models.tokens(12)]

    def losses(each: nn.Module) -> list[float]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", seed=0,
        )  # fmt: skip
        trainer = Trainer(model=each, args=arguments, train_dataset=data)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    found, expected = losses(model), losses(twin)
    assert_loss_rewritten()
    assert len(found) == 3
    assert found == pytest.approx(expected, rel=1e-6)


def _step(value: Tensor) -> Step:
    """A lone value as a step, for `compare`."""
    return Step(value if value.dim() == 0 else torch.zeros(()), {"value": value}, {}, torch.finfo(torch.float32).eps)


def _gathered(module: nn.Module, losses: list[Tensor]) -> Step:
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    return Step(torch.stack(losses).sum().detach(), {}, gradients, torch.finfo(torch.float32).eps)


def _outcome(work: Callable[[], Tensor]) -> str:
    """The value, or the kind of error: compilers raise their own types for what eager raises."""
    try:
        return str(work().item())
    except Exception:
        return "an error"


def _curve(call: Callable[..., Any], module: nn.Module, inputs: models.Inputs) -> Tensor:
    sgd = torch.optim.SGD(module.parameters(), lr=0.2)  # at 0.5 the loss rises again, and errors tenfold in two steps
    losses = []
    for _ in range(10):
        sgd.zero_grad()
        loss = call(**inputs).loss
        loss.backward()
        sgd.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


class WithAccuracy(nn.Module):
    """A model whose step returns its loss and how many of the next tokens it got right, as trainers log it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        found = self.model(**inputs)
        with torch.no_grad():
            labels = inputs["labels"][:, 1:]
            counted = labels != models.IGNORED
            right = (found.logits[:, :-1].argmax(-1) == labels) & counted
        return found.loss, right.sum() / counted.sum()


class WithZLoss(nn.Module):
    """A model whose loss has a z-loss added to it, as trainers of large models do."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        found = self.model(**inputs)
        log_z = found.logits[:, :-1].float().logsumexp(-1)
        counted = inputs["labels"][:, 1:] != models.IGNORED
        found.loss = found.loss + 1e-2 * (log_z.square() * counted).sum() / counted.sum()
        return found


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_a_z_loss_beside_the_loss(family: str) -> None:
    model, inputs = small(family, vocab_size=256, mask="right")
    module = WithZLoss(model)
    check(module, compiled(module, fullgraph=True), inputs)
    assert_loss_rewritten()
    assert "logsumexp too" in rewritten()[0].detail


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_token_accuracy_beside_the_loss(family: str) -> None:
    """Neither makes the logits of all 2048 tokens and 8192 words, 64 MiB; those of 1024 are there at a time."""
    model, inputs = small(family, vocab_size=8192, batch=32, seq=64, mask="right")
    # Where every third next token is the one the model would choose, the accuracy is no zero.
    with torch.no_grad():
        chosen = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.argmax(-1)
    hit = torch.arange(1, 64) % 3 == 0
    inputs["labels"][:, 1:][:, hit] = chosen[:, :-1][:, hit]
    twin, module = WithAccuracy(copy.deepcopy(model)), WithAccuracy(model)
    call = compiled(module, fullgraph=True)
    found = []
    for each in (call, twin):
        loss, accuracy = each(**inputs)
        loss.backward()
        found.append((loss.detach(), accuracy, [p.grad for p in each.parameters()]))
    assert_loss_rewritten()
    assert "argmax too" in rewritten()[0].detail
    assert found[0][1] == found[1][1] > 0.3
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    logits = 32 * 64 * 8192 * 4
    needed = [peak_bytes(lambda each=each: each(**inputs)[0].backward()) for each in (call, twin)]
    assert needed[0] < logits < needed[1] // 2
