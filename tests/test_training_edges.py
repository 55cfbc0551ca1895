"""Precisions, unusual uses of the outputs, and wrong input: fxopt does what eager (or Inductor) does."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
from harness import BACKEND, assert_loss_rewritten, check, compiled, refused, rewritten
from torch import Tensor, nn

import fxopt

pytestmark = pytest.mark.filterwarnings("error::fxopt.FxoptWarning")


@pytest.fixture(autouse=True)
def no_reports() -> Iterator[None]:
    fxopt.clear_reports()
    yield
    fxopt.clear_reports()


def small(family: str = "llama", **changes: Any) -> tuple[Any, models.Inputs]:
    """A one-layer model of `family` and a batch."""
    return models.build(family, **{"num_hidden_layers": 1, **changes})


def _bf16() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.fault("autocast regions")
def test_autocast_around_the_model() -> None:
    model, inputs = small()
    check(model, compiled(model), inputs, context=_bf16, outputs=("logits",))
    assert_loss_rewritten()


def test_bf16_parameters() -> None:
    model, inputs = small(dtype=torch.bfloat16)
    found = check(model, compiled(model), inputs, outputs=("logits",))
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    assert found["loss"].compiled < 1e-2
    assert_loss_rewritten()


@pytest.mark.fault("dropout active in eval")
def test_dropout_is_drawn_anew_and_repeats_under_a_seed() -> None:
    """Another generator order than eager's is allowed: compare means over seeds, and a seed with itself."""
    model, inputs = small("bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1)
    call = compiled(model)

    def draws(each: Callable[..., Any], seeds: range) -> Tensor:
        return torch.stack([_seeded(each, inputs, seed) for seed in seeds])

    ours, eager = draws(call, range(24)), draws(model, range(100, 124))
    assert torch.equal(draws(call, range(3)), ours[:3])
    assert ours.unique().numel() > 20
    noise = (ours.var() / len(ours) + eager.var() / len(eager)).sqrt()
    assert (ours.mean() - eager.mean()).abs() < 5 * noise
    assert 0.4 < float(ours.std() / eager.std()) < 2.5
    model.eval()
    assert torch.equal(_seeded(call, inputs, 0), _seeded(call, inputs, 1)), "dropout is active in eval"


def _seeded(call: Callable[..., Any], inputs: models.Inputs, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return call(**inputs).loss


def test_a_checkpoint_around_a_compiled_layer_counts_only_what_that_saves() -> None:
    """The first forward is compiled within it, under its saved-tensor hooks; the second one is not."""
    layer = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.GELU())
    compiled = torch.compile(layer, backend="fxopt")
    x = torch.randn(4, 8, requires_grad=True)
    torch.utils.checkpoint.checkpoint(compiled, x, use_reentrant=False).sum().backward()
    found, x.grad = x.grad, None
    layer(x).sum().backward()
    assert found is not None
    assert x.grad is not None
    torch.testing.assert_close(found, x.grad)


def test_a_graph_is_compiled_where_torch_forbids_saved_tensor_hooks() -> None:
    x = torch.randn(4, 8)
    compiled = torch.compile(lambda x: torch.nn.functional.layer_norm(x, (8,)).square(), backend="fxopt")
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        found = compiled(x)
    torch.testing.assert_close(found, torch.nn.functional.layer_norm(x, (8,)).square())


def test_use_cache_returns_the_cache_too() -> None:
    model, inputs = small(use_cache=True)
    check(model, compiled(model), inputs)
    output = compiled(model)(**inputs)
    assert output.past_key_values.get_seq_length() == models.SEQ
    assert_loss_rewritten()


class Extra(nn.Module):
    """A user's module around a model, adding to its loss a term that reads the logits in the same graph."""

    def __init__(self, model: nn.Module, term: Callable[[Any], Tensor]):
        super().__init__()
        self.model, self.term = model, term

    def forward(self, **inputs: Any) -> Tensor:
        output = self.model(**inputs)
        return output.loss + self.term(output)


def _z_loss(output: Any) -> Tensor:
    return 1e-2 * output.logits.float().logsumexp(-1).square().mean()


def test_logits_used_beside_the_loss_outside_the_graph() -> None:
    """The loss is rewritten all the same; the logits are computed for the extra term, differentiably."""
    model, inputs = small()
    check(model, compiled(model), inputs, loss=lambda output: output.loss + _z_loss(output))
    assert_loss_rewritten()


def test_loss_computed_from_the_logits_alone() -> None:
    model, inputs = small()
    check(model, compiled(model), inputs, loss=lambda output: output.logits.square().mean())


def test_logits_used_twice_in_the_graph() -> None:
    model, inputs = small()
    wrapped = Extra(model, _z_loss)
    check(wrapped, compiled(wrapped), inputs)
    if BACKEND == "fxopt":
        found = [item for item in (*rewritten(), *refused()) if "cross_entropy" in item.node]
        assert len(found) == 1
        reasons = " ".join(reason for refusal in refused() for reason in refusal.reasons)
        assert rewritten() or "also used by logsumexp" in reasons, reasons


@pytest.mark.fault("all labels ignored")
def test_all_labels_ignored_gives_nan_as_eager() -> None:
    model, inputs = small()
    inputs["labels"].fill_(models.IGNORED)
    assert torch.isnan(model(**inputs).loss)
    model.zero_grad()
    found = compiled(model)(**inputs).loss
    assert torch.isnan(found)
    found.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(ours[name].isnan(), parameter.grad.isnan()), name


@pytest.mark.parametrize("label", [models.VOCAB, -1])
@pytest.mark.fault("out-of-range targets")
def test_label_out_of_range_raises(label: int) -> None:
    """Eager raises IndexError; a compiler may raise another type, but must raise, and must work afterwards."""
    model, inputs = small()
    bad = {**inputs, "labels": inputs["labels"].clone()}
    bad["labels"][0, 3] = label
    call = compiled(model)
    check(model, call, inputs)
    with pytest.raises(IndexError):
        model(**bad)
    with pytest.raises((IndexError, RuntimeError)):
        call(**bad).loss.backward()
    check(model, call, inputs)


@pytest.mark.fault("retain_graph")
def test_retain_graph_does_as_inductor() -> None:
    """Whether a second backward works is decided by AOTAutograd's donated buffers; fxopt must not change it."""

    def twice(backend: str) -> str:
        torch.compiler.reset()
        model, inputs = small()
        loss = torch.compile(model, backend=backend)(**inputs).loss
        try:
            loss.backward(retain_graph=True)
            loss.backward()
        except RuntimeError as error:
            return str(error)
        return "".join(f"{p.grad.norm():.3e} " for p in model.parameters())

    assert twice(BACKEND) == twice("inductor")


def test_logits_after_a_step_are_never_those_of_the_new_weights() -> None:
    """Read before the optimizer's step, logits keep their values; read only afterwards, fxopt's raise."""
    model, inputs = small()
    call = compiled(model)
    expected = model(**inputs).logits.detach()
    read, unread = call(**inputs), call(**inputs)
    assert read.logits.sum().isfinite()
    unread.loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    torch.testing.assert_close(read.logits.detach().clone(), expected, rtol=1e-5, atol=1e-5)
    if BACKEND == "fxopt":
        with pytest.raises(RuntimeError):
            unread.logits.sum()


def test_logits_can_be_left_eager() -> None:
    model, inputs = small()
    if BACKEND == "fxopt":
        call = torch.compile(model, backend="fxopt", options={"logits": "eager"})
        check(model, call, inputs, outputs=("logits",))
        assert type(call(**inputs).logits) is Tensor
        assert not any(report.deferred for report in fxopt.reports())
