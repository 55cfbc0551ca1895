"""The attention rule: what it finds, what it says of it, and what it leaves alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import LargestDraw, captured, targets
from torch import Tensor, fx

from fxopt.capture import trace
from fxopt.compat import FakeTensorMode
from fxopt.differential import same_function
from fxopt.fake import value_of
from fxopt.passes import attention as rule
from fxopt.passes.attention import RULE
from fxopt.rewrite import Outcome, apply_rule, candidates
from fxopt.rule import Site

MIN = torch.finfo(torch.float32).min
CLASSES = {
    "sdpa_with_causal_mask": "causal",
    "eager_causal": "causal",
    "tril_masked_fill": "causal",
    "triu_added": "causal",
    "windowed": "window(3)",
    "window_of_both_sides": "bidirectional window(2)",
    "softcapped": "causal",
    "with_sink": "all",
    "with_alibi": "causal",
    "with_learned_bias": "all",
    "with_given_mask": "all",
    "einsum_of_positions_first": "all",
    "grouped_heads": "all",
    "written_out_softmax": "all",
    "packed_documents": "causal & documents",
    "documents_by_pairs": "documents",
    "padded": "causal & padding",
    "up_to_lengths": "lengths",
    "prefix_and_causal": "prefix",
    "in_chunks": "causal & documents",
    "cross_attention": "all",
    "wide_values": "causal",
}
BLOCKS = {"softcapped", "with_learned_bias", "wide_values"}
"""Spellings that flash attention cannot compute."""


def inputs(batch: int = 2, heads: int = 4, length: int = 6, depth: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(batch, heads, length, depth, requires_grad=True) for _ in range(3))  # type: ignore[return-value]


def rewritten(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, **how: Any) -> Outcome:
    return apply_rule(RULE, captured(fn, *args, dynamic=dynamic).module, **how)


def reasons(outcome: Outcome) -> str:
    assert not outcome.rewrites, outcome.rewrites
    return "; ".join(reason for item in outcome.refusals for reason in item.reasons)


def agrees(fn: Callable[..., Any], outcome: Outcome, *args: Tensor) -> None:
    """The rewritten graph is the function, in fp64, gradients too."""
    graph = captured(fn, *args).module
    same_function(graph, outcome.module, graph.meta["inputs"])


def calls_of(gm: fx.GraphModule, name: str) -> int:
    return sum(str(node.target).startswith(name) for node in gm.graph.nodes)


def weighed(scores: Tensor, value: Tensor) -> Tensor:
    return scores.softmax(-1) @ value


# --- what it finds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", RULE.spellings, ids=lambda item: item.__name__)
def test_report_names_mask_and_lowering(spelling: Callable[..., Tensor]) -> None:
    values = RULE.inputs(LargestDraw(3))
    names = spelling.__code__.co_varnames[: spelling.__code__.co_argcount]
    outcome = apply_rule(RULE, trace(spelling, {name: values[name] for name in names}), force=True)
    (done,) = outcome.rewrites
    mask, lowering = done.detail.split(": ", 1)[1].split("; ", 1)
    assert mask.split(", ")[0] == CLASSES[spelling.__name__]
    assert ("blocks of scores" in lowering) == (spelling.__name__ in BLOCKS)
    assert calls_of(outcome.module, "fxopt.attention") == 1


def test_every_layer_shares_one_computation_of_intervals() -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        for _ in range(3):
            same = ids[:, None, :, None] == ids[:, None, None, :]
            q = F.scaled_dot_product_attention(q, k, v, attn_mask=same) + q
        return q

    outcome = rewritten(layers, *inputs(), torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]]))
    assert len(outcome.rewrites) == 3
    assert calls_of(outcome.module, "fxopt.attention") == 3
    assert calls_of(outcome.module, "fxopt.key_intervals") == 1


def test_mask_of_the_index_alone_is_no_tensor() -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        row = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=row[None, :] <= row[:, None])

    outcome = rewritten(causal, *inputs())
    assert targets(outcome.module) == ["fxopt.attention.default", "<built-in function getitem>"]


def test_repeated_heads_are_not_repeated() -> None:
    q, _, _ = inputs()
    _, k, v = inputs(heads=2)
    outcome = apply_rule(RULE, trace(rule.eager_causal, {"query": q, "key": k, "value": v}))
    (node,) = (node for node in outcome.module.graph.nodes if str(node.target) == "fxopt.attention.default")
    assert [item.meta["val"].shape[1] for item in node.args[:3]] == [4, 2, 2]


@pytest.mark.fault("dims becoming dynamic")
def test_dynamic_sequence_length() -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        row = torch.arange(q.shape[2])
        scores = q @ k.transpose(2, 3) * 0.3
        return weighed(scores.masked_fill(row[None, :] > row[:, None], MIN), v)

    tensors = inputs()
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 2)
    outcome = rewritten(causal, *tensors)
    assert "causal" in outcome.rewrites[0].detail
    q, k, v = (tensor.detach() for tensor in inputs(length=11))
    given = {"q": q, "k": k, "v": v, "s": 11}
    names = [node.name for node in outcome.module.graph.find_nodes(op="placeholder")]
    (found,) = outcome.module(*(given[name.removeprefix("l_")[0]] for name in names))
    assert torch.allclose(found, causal(q, k, v), atol=1e-6)


@pytest.mark.fault("autocast regions")
def test_autocast_is_what_the_operands_are_cast_to() -> None:
    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return weighed(q @ k.transpose(2, 3), v)

    outcome = rewritten(eager, *inputs())
    assert len(outcome.rewrites) == 1, outcome.refusals
    (node,) = (node for node in outcome.module.graph.nodes if str(node.target) == "fxopt.attention.default")
    assert {item.meta["val"].dtype for item in node.args[:3]} == {torch.bfloat16}


def test_checkpointed_body_sees_the_mask_outside() -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        row = torch.arange(q.shape[2])
        mask = row[None, :] <= row[:, None]
        return torch.utils.checkpoint.checkpoint(layer, q, k, v, mask, use_reentrant=False)

    outcome = rewritten(model, *inputs())
    assert [item.detail.split(": ")[1].split(";")[0] for item in outcome.rewrites] == ["causal"]


def test_a_slice_of_an_operand_is_not_the_operand() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return weighed(q[:, :, :4] @ k[:, :, :5].mT, v[:, :, :5])

    outcome = rewritten(sliced, *inputs())
    assert len(outcome.rewrites) == 1, outcome.refusals
    agrees(sliced, outcome, *inputs())


def test_a_piece_of_a_fused_projection() -> None:
    def fused(x: Tensor) -> Tensor:
        q, k, v = x.chunk(3, dim=-1)
        return weighed(q @ k.mT, v)

    x = torch.randn(2, 4, 6, 24, requires_grad=True)
    outcome = rewritten(fused, x)
    assert len(outcome.rewrites) == 1, outcome.refusals
    agrees(fused, outcome, x)


@pytest.mark.parametrize("sizes", [(0, 4, 6, 8), (2, 4, 0, 8), (2, 4, 6, 1), (2, 4, 6, 3), (1, 1, 2, 5)])
@pytest.mark.fault("batch sizes 0 and 1")
def test_sizes_of_nothing_and_odd_head_dims(sizes: tuple[int, int, int, int]) -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        row = torch.arange(q.shape[2])
        return weighed((q @ k.mT).masked_fill(row[None, :] > row[:, None], -1e9), v)

    outcome = rewritten(causal, *inputs(*sizes))
    assert len(outcome.rewrites) == 1, outcome.refusals
    agrees(causal, outcome, *inputs(*sizes))


# --- rows that nothing may be attended from ----------------------------------------------------------------------

EMPTY: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "added min": lambda q, k, v, keep: weighed(q @ k.mT + torch.where(keep, 0.0, MIN), v),
    "filled min": lambda q, k, v, keep: weighed((q @ k.mT).masked_fill(~keep, MIN), v),
    "sdpa bool": lambda q, k, v, keep: F.scaled_dot_product_attention(q, k, v, attn_mask=keep),
    "sdpa min": lambda q, k, v, keep: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(keep, 0.0, MIN)),
    "added -inf": lambda q, k, v, keep: weighed(q @ k.mT + torch.where(keep, 0.0, float("-inf")), v),
}


@pytest.mark.parametrize("spelling", EMPTY)
@pytest.mark.fault("fully masked rows")
def test_rows_without_keys_stay_what_they_were(spelling: str) -> None:
    keep = torch.tensor([[True, True, False, True, False, True], [False] * 6])[:, None, None, :]
    tensors = inputs()
    graph = captured(EMPTY[spelling], *tensors, keep).module
    outcome = apply_rule(RULE, graph)
    assert len(outcome.rewrites) == 1, outcome.refusals
    # By formulas: torch's CPU flash backward loses log(n) beside finfo.min in lse, and is n times too large there.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = differentiated(graph, graph.meta["inputs"])
    found = differentiated(outcome.module, graph.meta["inputs"])
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert (one - other).nan_to_num().abs().max() < 1e-5


def differentiated(gm: fx.GraphModule, values: list[Tensor]) -> list[Tensor]:
    leaves = [value.detach().clone().requires_grad_(value.is_floating_point()) for value in values]
    (out,) = gm(*leaves)
    (out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.fault("finfo.min masks")
def test_two_finite_masks_are_refused_where_they_may_meet() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        row = torch.arange(q.shape[2])
        causal = torch.where(row[None, :] <= row[:, None], 0.0, MIN)
        return weighed(q @ k.mT + (causal + torch.where(keep, 0.0, MIN)), v)

    outcome = rewritten(both, *inputs(), torch.ones(2, 1, 1, 6, dtype=torch.bool))
    assert "two masks of finite numbers" in reasons(outcome)


# --- dropout -----------------------------------------------------------------------------------------------------


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).softmax(-1), 0.25, True) @ v


@pytest.mark.parametrize("spelling", [dropped, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.25)])
def test_dropout_is_drawn_from_one_seed(spelling: Callable[..., Tensor]) -> None:
    outcome = rewritten(spelling, *inputs())
    assert "dropout 0.25" in outcome.rewrites[0].detail
    q, k, _ = (tensor.detach() for tensor in inputs(length=40))
    ones = torch.ones(2, 4, 40, 8)
    torch.manual_seed(5)
    (first,) = outcome_at(spelling, q, k, ones)
    torch.manual_seed(5)
    (again,) = outcome_at(spelling, q, k, ones)
    (other,) = outcome_at(spelling, q, k, ones)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert abs(float(other.mean()) - 1) < 0.05  # what is kept is scaled up


@pytest.mark.fault("recompute of dropout")
def test_dropout_is_the_same_in_both_directions() -> None:
    """The result is linear in the values, so <g, D v> = <D' g, v>, if the backward drops what the forward dropped."""
    compiled = torch.compile(dropped, backend="fxopt")
    q, k, v = inputs(length=40)
    upstream = torch.randn(2, 4, 40, 8)
    out = compiled(q, k, v)
    out.backward(upstream)
    assert v.grad is not None
    difference = (out.double() * upstream).sum() - (v.double() * v.grad).sum()
    assert abs(float(difference)) < 1e-6 * float(out.norm() * upstream.norm())
    assert not torch.equal(out, compiled(q, k, v))


def outcome_at(spelling: Callable[..., Tensor], *tensors: Tensor) -> Any:
    return rewritten(spelling, *tensors).module(*tensors)


# --- what it leaves alone ----------------------------------------------------------------------------------------


def with_probabilities(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = (q @ k.mT).softmax(-1)
    return probabilities @ v, probabilities


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def scaled_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * 2.0) @ v


def with_epsilon(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(q @ k.mT)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v


def no_grad_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    with torch.no_grad():
        probabilities = scores.softmax(-1)
    return probabilities @ v


def probabilities_on_the_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.mT @ (k @ q.mT).softmax(-1)


def without_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).sum(-2)


def one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weighed(q[:, :, :1] @ k.mT, v)


REFUSED = {
    with_probabilities: "is also a graph output",
    over_queries: "softmax over another axis",
    scaled_probabilities: "no matrix product reads the probabilities",
    no_grad_between: "switches grad mode",
    probabilities_on_the_right: "on its right",
    without_values: "no matrix product reads the probabilities",
    one_query: "nothing to win",
}


@pytest.mark.parametrize("fn", REFUSED, ids=lambda item: item.__name__)
def test_refused_with_the_reason(fn: Callable[..., Any]) -> None:
    assert REFUSED[fn] in reasons(rewritten(fn, *inputs()))


@pytest.mark.fault("a match across a mutation")
def test_operands_written_in_between() -> None:
    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        k.mul_(2.0)
        return weighed(scores, v)

    q, k, v = inputs()
    assert "writes in place" in reasons(rewritten(written, q, k.detach(), v))


def test_an_epsilon_in_the_sum_is_another_function() -> None:
    outcome = rewritten(with_epsilon, *inputs())
    assert not outcome.rewrites


def test_a_router_is_not_mentioned() -> None:
    def router(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
        return F.linear(x, weight).softmax(-1) @ experts

    outcome = rewritten(router, torch.randn(7, 8), torch.randn(4, 8), torch.randn(4, 3))
    assert not outcome.rewrites
    assert all("product of queries and keys" in reason for item in outcome.refusals for reason in item.reasons)


def test_sdpa_without_a_mask_is_left_to_torch() -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    outcome = rewritten(causal, *inputs())
    assert "flash kernel runs here already" in reasons(outcome)
    assert outcome.refusals[0].cost
    forced = rewritten(causal, *inputs(), force=True)
    assert len(forced.rewrites) == 1
    agrees(causal, forced, *inputs())


def test_mask_written_in_place_is_read_as_it_stands() -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        row = torch.arange(q.shape[2])
        mask = (row[None, :] <= row[:, None]).clone()
        mask[:, 0] = False
        mask[0, 0] = True
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    outcome = rewritten(masked, *inputs())
    assert outcome.rewrites[0].detail.split(": ")[1].startswith("dense")
    agrees(masked, outcome, *inputs())


@pytest.mark.fault("no_grad mid-graph")
def test_gradient_that_no_grad_cuts_stays_cut() -> None:
    def cut(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with torch.no_grad():
            constant = bias * 2.0
        return weighed(q @ k.mT + constant, v)

    bias = torch.randn(4, 6, 6, requires_grad=True)
    outcome = rewritten(cut, *inputs(), bias)
    assert len(outcome.rewrites) == 1, outcome.refusals
    agrees(cut, outcome, *inputs(), bias)


# --- how a site is computed --------------------------------------------------------------------------------------


def plain_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weighed((q @ k.mT).masked_fill(torch.ones(6, 6).triu(1) == 1, -torch.inf), v)


SDPA, KERNELS = "torch's scaled_dot_product_attention", "generated kernels"


@pytest.mark.parametrize(
    ("device", "dtype", "lowering", "expected"),
    [
        ("cpu", torch.float32, "auto", "flash kernel, no mask tensor"),
        ("cpu", torch.float32, "aten", "flash kernel, no mask tensor"),
        ("cpu", torch.float32, "interpret", f"{KERNELS}, interpreted"),
        ("cpu", torch.float64, "interpret", "flash kernel, no mask tensor"),
        ("cuda", torch.float32, "auto", KERNELS),
        ("cuda", torch.float32, "aten", SDPA),
        ("cuda", torch.float64, "auto", SDPA),
    ],
)
def test_how_a_site_is_computed(device: str, dtype: torch.dtype, lowering: str, expected: str) -> None:
    (site,) = candidates(RULE, captured(plain_causal, *(one.to(dtype) for one in inputs())).module)
    assert isinstance(site, Site)
    with FakeTensorMode():
        for node in site.input_nodes[:3]:
            node.meta["val"] = torch.empty(value_of(node).shape, dtype=dtype, device=device)
        assert RULE.computed(dataclasses.replace(site, lowering=lowering)) == expected


def test_the_report_says_what_the_options_ask_for() -> None:
    found = {lowering: rewritten(plain_causal, *inputs(), lowering=lowering) for lowering in ("aten", "interpret")}
    endings = {name: outcome.rewrites[0].detail.split("; ")[1] for name, outcome in found.items()}
    assert endings == {"aten": "flash kernel, no mask tensor", "interpret": "generated kernels, interpreted"}
