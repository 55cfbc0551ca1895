"""What the fuzz run found, a test each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import captured, targets
from planned import reading
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxopt import compat
from fxopt.capture import capture
from fxopt.differential import same_function
from fxopt.passes import precision
from fxopt.passes.attention import RULE
from fxopt.passes.linear_cross_entropy import RULE as LOSS
from fxopt.precision.policy import Policy
from fxopt.rewrite import apply_rule
from fxopt.verify import VerificationError


def attention(q: Tensor) -> Tensor:
    return (q @ q.mT * 0.3).softmax(-1) @ q


def test_a_tuple_of_symbolic_sizes_may_be_passed_whole() -> None:
    found = captured(lambda x: torch.as_strided(x * 2, x.shape, x.stride()).sum(), torch.randn(3, 5, 8), dynamic=True)
    assert not found.kept
    assert "aten.as_strided.default" in targets(found.module)


@pytest.mark.fault("checkpoint and autograd.Function bodies")
def test_attention_in_a_checkpoint_trains_uncompiled() -> None:
    """The differential check runs graphs so; a checkpoint unpacks what was saved once for each look at it."""
    fn = lambda q: checkpoint(attention, q, use_reentrant=False)  # noqa: E731
    graph = captured(fn, torch.randn(2, 4, 8, requires_grad=True)).module
    outcome = apply_rule(RULE, graph)
    assert outcome.rewrites
    same_function(graph, outcome.module, graph.meta["inputs"])


def test_graphs_of_symbolic_sizes_are_compared_in_fp64() -> None:
    graph = captured(attention, torch.randn(2, 5, 8, requires_grad=True), dynamic=True).module
    outcome = apply_rule(RULE, graph)
    assert outcome.rewrites
    same_function(graph, outcome.module, graph.meta["inputs"])


def test_a_batch_as_large_as_its_rows_are_long() -> None:
    """Dynamo has one symbol for both then, and views leave (s * s) // s where s was."""

    def fn(h: Tensor) -> Tensor:
        batch, length = h.shape[:2]
        q = h.view(batch, length, 4, 4).transpose(1, 2)
        q = q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (attention(q).transpose(1, 2)).reshape(batch, length, 16)

    assert len(apply_rule(RULE, captured(fn, torch.randn(5, 5, 16), dynamic=True).module).rewrites) == 1


def test_strides_that_differ_for_empty_tensors_alone() -> None:
    """``Max(1, s - 1)`` and ``s - 1``: one was computed for a contiguous tensor, one for a product of casts."""

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x[:, :-1], w)
        return logits.square().mean(), logits

    graph = captured(fn, torch.randn(2, 5, 8), torch.randn(31, 8), dynamic=True).module
    policy = Policy.parse("bf16")
    assert policy is not None
    assert "aten.to.dtype" in targets(precision.apply(graph, policy).module)


@pytest.mark.parametrize(
    "fn",
    [
        lambda q: F.dropout((q @ q.mT).softmax(-1), 0.25, True) @ q,
        lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.25),
    ],
)
def test_a_dropout_drawn_anew_is_compared_with_nothing_dropped(fn: Callable[[Tensor], Tensor]) -> None:
    """Else ``options={"verify": True}`` would leave every such site alone."""
    graph = captured(fn, torch.randn(2, 2, 5, 8, requires_grad=True)).module
    outcome = apply_rule(RULE, graph)
    assert outcome.rewrites
    same_function(graph, outcome.module, graph.meta["inputs"])
    wrong = apply_rule(RULE, captured(lambda q: fn(q * 1.01), *graph.meta["inputs"]).module)
    with pytest.raises(VerificationError, match="output 0 differs"):
        same_function(graph, wrong.module, graph.meta["inputs"])


def test_a_checkpointed_body_that_takes_a_number_is_cast() -> None:
    """A symbolic size that a later layer fixes is passed to the body as a number."""
    linear = nn.Linear(24, 7)
    graph = captured(
        lambda h: linear(checkpoint(attention, h, use_reentrant=False)),
        torch.randn(2, 5, 24, requires_grad=True), dynamic=True,
    ).module  # fmt: skip
    (call,) = graph.graph.find_nodes(op="call_function", target=compat.tag_activation_checkpoint)
    assert 24 in call.args
    policy = Policy.parse("bf16")
    assert policy is not None
    assert "aten.to.dtype" in targets(precision.apply(graph, policy).module)


def test_what_an_operator_holds_is_planned_for_by_hints_where_sizes_change() -> None:
    """The loss's formula needs numbers; without them its graph had no plan, and no budget was kept."""
    weight = torch.randn(31, 16, requires_grad=True)
    found: list[Any] = []
    for dynamic in (False, True):
        hidden, labels = torch.randn(10, 16), torch.arange(10)
        if dynamic:
            for tensor in (hidden, labels):
                torch._dynamo.mark_dynamic(tensor, 0)

        def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            graph = apply_rule(LOSS, capture(gm).module, force=True).module
            return reading(found)(graph, inputs)

        torch.compiler.reset()
        torch.compile(lambda h, y: F.cross_entropy(F.linear(h, weight), y), backend=backend)(hidden, labels)
    static, symbolic = (max(joint.running) for joint, _ in found)
    assert static == symbolic > 0


def test_rows_of_logits_and_of_labels_are_one_size_by_the_loss_that_needs_them_to_be() -> None:
    """Each has symbols of its own, and the guard that the loss installs says that the products are equal."""
    weight = torch.randn(31, 16, requires_grad=True)

    def fn(h: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, weight).reshape(-1, 31), labels.reshape(-1), reduction="none")

    labels = torch.arange(24).view(3, 8)  # no size of the rows', since equal sizes share a symbol
    graph = captured(fn, torch.randn(4, 6, 16), labels, dynamic=True).module
    assert len(apply_rule(LOSS, graph, force=True).rewrites) == 1


def test_heads_of_values_may_be_repeated_further_on_than_those_of_keys() -> None:
    """A cast or a factor behind one repetition: keys are read before theirs, values after."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (one.repeat_interleave(2, 1) for one in (k, v))
        return (q @ k.mT * 0.3).softmax(-1) @ v.mul(1.5)

    q, k, v = (torch.randn(2, heads, 5, 8, requires_grad=True) for heads in (4, 2, 2))
    graph = captured(fn, q, k, v).module
    outcome = apply_rule(RULE, graph)
    assert outcome.rewrites
    same_function(graph, outcome.module, graph.meta["inputs"])


def test_a_mask_made_of_the_scores_is_refused_where_no_gradient_shows_it() -> None:
    """Without one, a detached copy of the scores reads as the scores, and a mask may not read them."""
    q, k, v = (torch.randn(2, 2, 5, 8) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT * 0.35
        return s.masked_fill(~(s.detach() < 1.0), float("-inf")).softmax(-1) @ v

    with torch.no_grad():
        outcome = apply_rule(RULE, captured(attend, q, k, v).module)
    assert outcome.rewrites == []
    assert any("by what the scores are" in reason for item in outcome.refusals for reason in item.reasons)
