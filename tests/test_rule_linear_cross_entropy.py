"""The loss rule: every spelling it takes, every reason it gives, and what becomes of the logits' other readers."""

# ruff: noqa: E501  (a table of one-line models)

import pytest
import torch
import torch.nn.functional as F
from graphs import captured, targets

import fxopt
from fxopt.deferred import DeferredTensor
from fxopt.kernels.cards import CARDS, as_if_on
from fxopt.passes.linear_cross_entropy import RULE
from fxopt.rewrite import apply_rule, candidates

B, T, H, V = 2, 5, 8, 24


def arguments(dtype=torch.float32):
    hidden = torch.randn(B, T, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, V, (B, T))


def applied(fn, *args, dynamic=None, **how):
    return apply_rule(RULE, captured(fn, *(args or arguments()), dynamic=dynamic).module, **how)


def loss_of(logits, target, **how):
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), **how)


SPELLINGS = {
    "matmul": lambda h, w, t: loss_of(h @ w.t(), t),
    "mT": lambda h, w, t: loss_of(h @ w.mT, t),
    "transpose": lambda h, w, t: loss_of(torch.matmul(h, w.transpose(0, 1)), t),
    "addmm": lambda h, w, t: loss_of(torch.addmm(w[:, 0], h.flatten(0, 1), w.t()), t),
    "bias added": lambda h, w, t: loss_of(h @ w.t() + w[:, 0], t),
    "linear with bias": lambda h, w, t: loss_of(F.linear(h, w, w.sum(-1)), t),
    "scale": lambda h, w, t: loss_of(F.linear(h, w) * 0.25, t),
    "divided": lambda h, w, t: loss_of((F.linear(h, w) / 8.0).float(), t),
    "softcap": lambda h, w, t: loss_of(torch.tanh(F.linear(h, w) / 5.0) * 5.0, t),
    "scale and softcap": lambda h, w, t: loss_of(torch.tanh(F.linear(h, w) * 0.5 / 5.0).double() * 5.0, t),
    "shifted labels": lambda h, w, t: loss_of(F.linear(h, w).float(), F.pad(t, (0, 1), value=-100)[..., 1:].contiguous()),
    "shifted logits": lambda h, w, t: loss_of(F.linear(h, w)[..., :-1, :].contiguous(), t[..., 1:].contiguous()),
    "last token": lambda h, w, t: F.cross_entropy(F.linear(h, w)[:, -1], t[:, -1]),
    "classes second": lambda h, w, t: F.cross_entropy(F.linear(h, w).transpose(1, 2), t),
    "classes second, permuted": lambda h, w, t: F.cross_entropy(F.linear(h, w).permute(1, 2, 0), t.t()),
    "sum over items": lambda h, w, t: loss_of(F.linear(h, w).float(), t, reduction="sum") / 7,
    "none, masked": lambda h, w, t: (loss_of(F.linear(h, w), t, reduction="none") * (t.reshape(-1) > 3)).sum(),
    "none, classes second": lambda h, w, t: F.cross_entropy(F.linear(h, w).mT, t, reduction="none").mean(),
    "smoothing": lambda h, w, t: loss_of(F.linear(h, w), t, label_smoothing=0.2, ignore_index=3),
    "nll": lambda h, w, t: F.nll_loss(F.log_softmax(F.linear(h, w), -1).view(-1, V), t.view(-1)),
    "nll in fp32": lambda h, w, t: F.nll_loss(F.linear(h, w).view(-1, V).log_softmax(-1, torch.float32), t.view(-1)),
    "nll, classes second": lambda h, w, t: F.nll_loss(F.linear(h, w).mT.log_softmax(1), t),
    "logsumexp": lambda h, w, t: (lambda z: (z.logsumexp(-1) - z.gather(-1, t[..., None])[..., 0]).mean())(F.linear(h, w)),
    "logsumexp kept": lambda h, w, t: (
        lambda z: (z.logsumexp(-1, keepdim=True) - z.gather(-1, t.unsqueeze(-1))).mean()
    )(F.linear(h, w)),
    "log probability": lambda h, w, t: (
        lambda z: (z.gather(-1, t.unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1)).exp().sum()
    )(F.linear(h, w)),
    "gathered": lambda h, w, t: F.linear(h, w).log_softmax(-1).gather(-1, t.unsqueeze(-1)).squeeze(-1).sum(),
    "z-loss of all rows": lambda h, w, t: (
        lambda z: loss_of(z, t) + 0.1 * z.logsumexp(-1).square().mean()
    )(F.linear(h, w)),
    "z-loss of rows that count": lambda h, w, t: (
        lambda z: loss_of(z, t, ignore_index=3) + 0.1 * (z.logsumexp(-1).pow(2) * (t != 3)).sum() / (t != 3).sum()
    )(F.linear(h, w)),
    "z-loss of other rows": lambda h, w, t: (
        lambda z: loss_of(z[:, :-1], t[:, 1:]) + 0.1 * torch.logsumexp(z, -1, keepdim=True).square().mean()
    )(torch.tanh(F.linear(h, w) / 5.0) * 5.0),
    "z-loss, classes second": lambda h, w, t: (
        lambda z: F.cross_entropy(z, t, reduction="sum") + 0.1 * z.logsumexp(1).square().sum()
    )(F.linear(h, w).mT),
    "z-loss by hand": lambda h, w, t: (
        lambda z: (lambda lse: (lse - z.gather(-1, t[..., None])[..., 0] + 0.1 * lse.square()).mean())(z.logsumexp(-1))
    )(F.linear(h, w)),
    "z for the log": lambda h, w, t: (
        lambda z: torch.stack((loss_of(z, t), z.detach().logsumexp(-1).mean()))
    )(F.linear(h, w)),
    "gathered, negated": lambda h, w, t: (-F.linear(h, w).log_softmax(-1).gather(2, t.unsqueeze(2))).mean(),
}  # fmt: skip


DYNAMIC = {"shifted logits", "softcap", "classes second", "none, masked", "logsumexp", "gathered", "z-loss of other rows"}
"""Spellings whose moves and reductions between them meet every kind of symbolic size."""


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        pytest.param(name, dynamic, marks=pytest.mark.slow if dynamic and name not in DYNAMIC else ())
        for name in SPELLINGS
        for dynamic in (False, True)
    ],
)
def test_spellings_are_found_and_right(name, dynamic):
    from fxopt.differential import same_function

    args = arguments()
    graph = captured(SPELLINGS[name], *args, dynamic=dynamic).module
    outcome = apply_rule(RULE, graph)
    assert len(outcome.rewrites) == 1, [item.reasons for item in outcome.refusals]
    assert not any("softmax" in target or "cross_entropy_loss" in target for target in targets(outcome.module))
    if not dynamic:
        same_function(graph, outcome.module, graph.meta["inputs"])


REFUSED = {
    "class weights": (lambda h, w, t: loss_of(F.linear(h, w), t, weight=w[:, 0].detach()), "weighs its classes"),
    "probabilities": (lambda h, w, t: loss_of(F.linear(h, w), F.one_hot(t, V).float().view(-1, V)), None),
    "scaled by a tensor": (lambda h, w, t: loss_of(F.linear(h, w) * h.mean(), t), "combines the logits with another value"),
    "integer logits": (lambda h, w, t: loss_of(F.linear(h, w).int().float(), t), "casts the logits to torch.int32"),
    "another activation": (lambda h, w, t: loss_of(F.linear(h, w).relu(), t), "come from relu (aten.relu.default)"),
    "two caps": (lambda h, w, t: loss_of(F.linear(h, w).tanh().tanh(), t), "is a second tanh"),
    "negative cap": (lambda h, w, t: loss_of(F.linear(h, w).tanh() * -2.0, t), "capped by -2.0"),
    "vocabulary sliced": (lambda h, w, t: loss_of(F.linear(h, w)[..., :20], t.clamp(max=19)), "slices the vocabulary axis"),
    "wrong axis": (lambda h, w, t: F.cross_entropy(F.linear(h, w[:T]), t[:, :T] % T), "takes its classes along axis 1"),
    "softmax axis": (lambda h, w, t: F.nll_loss(F.linear(h, w).log_softmax(0).view(-1, V), t.view(-1)), "normalises axis 0"),
    "not a layer": (lambda h, w, t: loss_of(torch.matmul(h, h.mT), t % T), "no linear layer"),
    "an embedding's rows": (lambda h, w, t: loss_of(w[t], t % H), "not from a linear layer"),
    "another's target": (
        lambda h, w, t: (F.linear(h, w).logsumexp(-1) - (2 * F.linear(h, w)).gather(-1, t[..., None])[..., 0]).mean(), None,
    ),
    "summed over rows": (
        lambda h, w, t: (lambda z: (z.logsumexp(1) - z.gather(-1, t[:, :1, None].expand(B, V, 1))[..., 0]).mean())(F.linear(h, w)),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name):
    fn, sentence = REFUSED[name]
    try:
        outcome = applied(fn)
    except RuntimeError:
        assert sentence is None  # not a program PyTorch runs
        return
    assert not outcome.rewrites
    reasons = [refusal.reasons[0] for refusal in outcome.refusals]
    assert sentence is None or [sentence in reason for reason in reasons] == [True], reasons


def test_small_vocabularies_are_left_alone_unless_forced():
    hidden, _, target = arguments()
    args = hidden, torch.randn(H, H, requires_grad=True), target % H
    (refusal,) = applied(SPELLINGS["matmul"], *args).refusals
    assert refusal.cost
    assert refusal.reasons == ("8 classes for hidden states of 8: the logits are no larger than what they come from",)
    assert len(applied(SPELLINGS["matmul"], *args, force=True).rewrites) == 1


def test_logits_that_the_graph_reads_are_not_fused_away():
    def confidence(h, w, t):
        logits = F.linear(h, w)
        return loss_of(logits, t), logits.softmax(-1).amax(-1)

    (refusal,) = applied(confidence).refusals
    assert "is also used by softmax (test_rule_linear_cross_entropy.py" in refusal.reasons[0]


# --- argmax of the same logits ------------------------------------------------------------------------------------


def padded(target, ignore=-100):
    return F.pad(target, (0, 1), value=ignore)[..., 1:].contiguous()


def argmax_beside(loss, *reads, linear=F.linear):
    """A model that returns a loss of logits and what `reads` make of the same logits."""

    def model(h, w, t):
        logits = linear(h, w)
        return loss(logits, t), *(read(logits) for read in reads)

    return model


def without_gradients(read):
    def inside(logits):
        with torch.no_grad():
            return read(logits)

    return inside


ARGMAXES = {
    "all rows": argmax_beside(loss_of, lambda z: z.argmax(-1)),
    "kept axis": argmax_beside(loss_of, lambda z: z.argmax(2, keepdim=True)),
    "of the flat logits": argmax_beside(loss_of, lambda z: z.view(-1, V).argmax(dim=1)),
    "max": argmax_beside(loss_of, lambda z: z.max(-1).indices, lambda z: torch.max(z, -1, keepdim=True)[1]),
    "in fp32": argmax_beside(lambda z, t: loss_of(z.float(), t), lambda z: z.argmax(-1), lambda z: z.float().argmax(-1)),
    "fewer rows": argmax_beside(lambda z, t: loss_of(z.float(), padded(t)), lambda z: z[:, :-1].argmax(-1)),
    "the loss's rows": argmax_beside(lambda z, t: loss_of(z[:, :-1], t[:, 1:]), lambda z: z[:, :-1].argmax(-1)),
    "more rows": argmax_beside(lambda z, t: loss_of(z[:, :-1], t[:, 1:]), lambda z: z.argmax(-1)),
    "other rows": argmax_beside(lambda z, t: loss_of(z[:, 1:], t[:, 1:]), lambda z: z[:, 0].argmax(-1)),
    "one of all": argmax_beside(lambda z, t: F.cross_entropy(z[:, -1], t[:, -1]), lambda z: z.argmax(-1)),
    "classes second": argmax_beside(lambda z, t: F.cross_entropy(z.mT, t), lambda z: z.mT.argmax(1), lambda z: z.mT.argmax(1, True)),
    "batch second": argmax_beside(loss_of, lambda z: z.transpose(0, 1)[1:].argmax(-1)),
    "loss transposed": argmax_beside(lambda z, t: loss_of(z.transpose(0, 1), t.t()), lambda z: z.argmax(-1)),
    "per row, fewer": argmax_beside(lambda z, t: loss_of(z[:, 1:], t[:, 1:], reduction="none").exp().mean(), lambda z: z.argmax(-1)),
    "ignored class": argmax_beside(lambda z, t: loss_of(z[:, 1:], t[:, 1:], ignore_index=3), lambda z: z.argmax(-1)),
    "smoothed": argmax_beside(lambda z, t: loss_of(z[:, 1:], padded(t)[:, 1:], label_smoothing=0.1), lambda z: z.argmax(-1)),
    "capped": argmax_beside(loss_of, lambda z: z.argmax(-1), linear=lambda h, w: 5.0 * torch.tanh(F.linear(h, w).float() / 5.0)),
    "scaled": argmax_beside(loss_of, lambda z: z.argmax(-1), linear=lambda h, w: F.linear(h, w).float() * -0.3),
    "detached": argmax_beside(loss_of, lambda z: z.detach()[:, 1:].argmax(-1)),
    "no_grad": argmax_beside(loss_of, without_gradients(lambda z: z[:, :-1].argmax(-1))),
    "log probability": argmax_beside(lambda z, t: z.log_softmax(-1).gather(-1, t[..., None]).mean(), lambda z: z.argmax(-1)),
    "logsumexp": argmax_beside(lambda z, t: (z.logsumexp(-1) - z.gather(-1, t[..., None])[..., 0]).mean(), lambda z: z.argmax(-1)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("dynamic", "dtype"),
    [
        (False, torch.float32),
        (True, torch.bfloat16),
        pytest.param(True, torch.float32, marks=pytest.mark.slow),
        pytest.param(False, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ARGMAXES)
def test_an_argmax_comes_from_the_same_pass(name, dynamic, dtype):
    """Of whole numbers, which are exact in every order of their sums and often equal."""
    from fxopt.differential import same_function

    hidden, weight = (torch.randint(-1, 2, (rows, H)).to(dtype) for rows in (B * T, V))
    args = hidden.view(B, T, H).requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (B, T))
    graph = captured(ARGMAXES[name], *args, dynamic=dynamic).module
    outcome = apply_rule(RULE, graph)
    assert [item.detail.count("argmax too") for item in outcome.rewrites] == [1], [r.reasons for r in outcome.refusals]
    assert not any("aten.argmax" in target or "aten.max" in target for target in targets(outcome.module))
    inputs = [int(item) if isinstance(item, torch.SymInt) else item for item in graph.meta["inputs"]]
    for before, after in zip(graph(*inputs)[1:], outcome.module(*inputs)[1:], strict=True):
        assert torch.equal(before, after)
        assert before.stride() == after.stride()
    if not dynamic:
        same_function(graph, outcome.module, inputs)


REFUSED_ARGMAXES = {
    "of all": (argmax_beside(loss_of, lambda z: z.argmax()), "is the argmax of all logits together"),
    "over rows": (argmax_beside(loss_of, lambda z: z.argmax(1)), "takes its classes along axis 1, the vocabulary is axis 2"),
    "some classes": (argmax_beside(loss_of, lambda z: z[..., :20].argmax(-1)), "slices the vocabulary axis"),
    "values": (argmax_beside(loss_of, lambda z: z.max(-1)[0]), "is also used by max_1"),
    "top": (argmax_beside(loss_of, lambda z: z.topk(1)[1]), "is also used by topk"),
    "of another scale": (argmax_beside(loss_of, lambda z: (z * -1.0).argmax(-1)), "with scale and cap (-1.0, None), the loss some with (1.0, None)"),
    "rounded": (argmax_beside(loss_of, lambda z: z.bfloat16().argmax(-1)), "rounds the logits to torch.bfloat16"),
    "detached output": (argmax_beside(loss_of, lambda z: z.detach()), "is also used by detach"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_ARGMAXES)
def test_an_argmax_of_other_logits_is_refused(name):
    fn, sentence = REFUSED_ARGMAXES[name]
    outcome = applied(fn)
    assert not outcome.rewrites
    assert sentence in outcome.refusals[0].reasons[0]


@pytest.mark.parametrize(
    ("dtype", "loss", "other"),
    [
        (torch.float32, loss_of, {"tiles": True}),
        (torch.bfloat16, loss_of, {"chunks": False}),
        (torch.bfloat16, lambda z, t: loss_of(z, t, reduction="none"), {}),
        (torch.bfloat16, lambda z, t: loss_of(z, t) + z.float().logsumexp(-1).square().mean(), {}),
        (torch.float64, loss_of, {}),
    ],
    ids=["fp32", "bf16", "row by row", "z-loss", "fp64"],
)
def test_on_a_card_the_way_that_the_cost_model_does_not_take_is_a_candidate(dtype, loss, other):
    """The model takes chunks in fp32, and in bf16 for hidden states of 2048 tiles."""
    hidden, weight = torch.randn(1, 2, 2048), torch.randn(4096, 2048)
    args = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.randint(0, 4096, (1, 2))
    graph = captured(lambda h, w, t: loss(F.linear(h, w), t), *args).module
    (site,) = [one for one in candidates(RULE, graph) if isinstance(one, fxopt.Site)]
    assert RULE.candidates(site) == {}, "there is one way on a CPU"
    with as_if_on(CARDS[3]):
        found = RULE.candidates(site)
    assert {name: one.keywords["recompute"] for name, one in found.items()} == other


REFUSED_SUMS = {
    "over all": (lambda z: z.logsumexp((1, 2)), "sums over 2 axes, not over each row's classes"),
    "over rows": (lambda z: z.logsumexp(1), "takes its classes along axis 1, the vocabulary is axis 2"),
    "of another scale": (lambda z: (0.5 * z).logsumexp(-1), "with scale and cap (0.5, None), the loss some with (1.0, None)"),
    "of another tensor": (lambda z: (z + 1.0).logsumexp(-1), "is also used by add"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_SUMS)
def test_a_logsumexp_of_other_logits_is_refused(name):
    summed, sentence = REFUSED_SUMS[name]

    def model(h, w, t):
        logits = F.linear(h, w)
        return loss_of(logits, t) + 0.1 * summed(logits).square().mean()

    outcome = applied(model)
    assert not outcome.rewrites
    assert sentence in " ".join(reason for item in outcome.refusals for reason in item.reasons)


@pytest.mark.parametrize(
    ("linear", "sentence"),
    [
        (lambda h, w: F.linear(h, w) / 3.0, "div (aten.div.Tensor) rounds the logits to torch.bfloat16, which makes more of them equal"),
        (lambda h, w: 5.0 * torch.tanh(F.linear(h, w) * 0.2), "mul (aten.mul.Tensor) rounds the logits to torch.bfloat16"),
        (lambda h, w: h @ w.t() + w[:, 0], "adds the bias to logits in torch.bfloat16"),
    ],
)  # fmt: skip
def test_an_argmax_of_logits_that_are_rounded_again_is_refused(linear, sentence):
    model = argmax_beside(loss_of, lambda z: z.argmax(-1), linear=linear)
    (refusal,) = applied(model, *arguments(torch.bfloat16)).refusals
    assert sentence in refusal.reasons[0]
    assert len(applied(model).rewrites) == 1  # in fp32 that is no rounding to speak of


@pytest.mark.parametrize("first", ["argmax", "loss"])
def test_an_argmax_may_come_before_the_loss_and_what_it_needs(first):
    def model(h, w, t):
        logits = F.linear(h, w)
        with torch.no_grad():
            best = logits.argmax(-1)
            right = (best == t).float().mean() if first == "argmax" else None
        loss = loss_of(logits, padded(t))
        return loss, best if right is None else right

    outcome = applied(model)
    if first == "argmax":  # and is read before the loss: both cannot be had at one place
        assert any("switches grad mode" in reason for reason in outcome.refusals[0].reasons)
    else:
        assert len(outcome.rewrites) == 1
        loss, _ = outcome.module(*arguments())
        assert loss.requires_grad


def test_two_argmaxes_share_no_memory():
    model = argmax_beside(loss_of, lambda z: z.argmax(-1), lambda z: z.argmax(-1))
    _, one, other = applied(model).module(*arguments())
    one.zero_()
    assert other.any()


@pytest.mark.parametrize("read", [lambda z: z, lambda z: z[:, :-1].float()], ids=["logits", "some rows"])
def test_logits_are_deferred_beside_their_argmax(read):
    def model(h, w, t):
        logits = F.linear(h, w)
        given = read(logits)
        return loss_of(logits, t), given, given.argmax(-1)

    args = arguments()
    found = torch.compile(model, backend=aot_eager_pipeline)(*args)
    assert isinstance(found[1], DeferredTensor)
    for ours, eager in zip(found, model(*args), strict=True):
        torch.testing.assert_close(ours, eager)


def test_logits_that_are_an_output_need_deferring():
    def model(h, w, t):
        logits = F.linear(h, w)
        return loss_of(logits, t), logits

    (refusal,) = applied(model, may_defer=False).refusals
    assert 'a graph output; options={"logits": "deferred"}' in refusal.reasons[0]
    assert applied(model).deferrable == ["linear"]


@pytest.mark.parametrize("which", ["read by the loss", "beside the loss"])
def test_an_output_whose_shape_is_known_only_at_run_time_is_not_deferred(which):
    def model(h, w, t):
        flat = F.linear(h, w)
        logits = flat.view(*t.shape, V)
        return F.cross_entropy(logits.view(-1, V) if which == "read by the loss" else flat, t.view(-1)), logits

    hidden, weight, target = arguments()
    hidden = hidden.detach().flatten(0, 1).requires_grad_()
    (refusal,) = applied(model, hidden, weight, target, dynamic=True).refusals
    assert refusal.reasons[0].endswith("is also a graph output")
    assert len(applied(model, hidden, weight, target, dynamic=False).deferrable) == 1


OUTPUTS = {
    "logits": lambda z: z,
    "cast again": lambda z: z.float(),
    "last rows": lambda z: z[:, -2:],
    "flat": lambda z: z.view(-1, z.shape[-1]),
    "twice": lambda z: (z, z),
    "capped and raw": lambda z: (z, 3.0 * torch.tanh(z / 3.0)),
    "one row": lambda z: z[:, -1] * 2.0,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_deferred_and_read_as_eager_gives_them(name, transposed, dtype):
    def model(h, w, b, t):
        logits = h @ w + b if transposed else F.linear(h, w * 2.0, b)
        return loss_of(logits.float(), t), OUTPUTS[name](logits)

    hidden, weight, target = arguments(dtype)
    weight = weight.detach().t().contiguous().requires_grad_() if transposed else weight
    args = [hidden, weight, torch.randn(V, dtype=dtype, requires_grad=True)]
    found = []
    for fn in (model, torch.compile(model, backend=aot_eager_pipeline)):
        leaves = [arg.detach().clone().requires_grad_() for arg in args]
        loss, given = fn(*leaves, target)
        given = given if isinstance(given, tuple) else (given,)
        if fn is not model:
            assert all(isinstance(one, DeferredTensor) for one in given)
            assert name != "twice" or given[0] is given[1]
        total = loss + sum((one.float() * torch.linspace(-1, 1, one.shape[-1])).sum() for one in given)
        total.backward()
        found.append([*given, *(leaf.grad for leaf in leaves)])
    floor = 4 * torch.finfo(dtype).eps
    for eager, ours in zip(*found, strict=True):
        assert eager.shape == ours.shape
        assert eager.dtype == ours.dtype
        assert ((eager - ours).float().norm() / eager.float().norm()).item() <= floor


def aot_eager_pipeline(gm, inputs):
    from torch._dynamo.backends.debugging import aot_eager

    from fxopt.backend import run

    return run(gm, inputs, fxopt.Options(), aot_eager)[1]


def test_a_loss_in_a_checkpoint_keeps_its_logits_inside():
    from torch.utils.checkpoint import checkpoint

    def body(h, w, t):
        logits = F.linear(h, w)
        return loss_of(logits, t), logits

    inside = applied(lambda h, w, t: checkpoint(lambda *a: body(*a)[0], h, w, t, use_reentrant=False))
    assert len(inside.rewrites) == 1
    assert not inside.deferrable
    escaping = applied(lambda h, w, t: checkpoint(body, h, w, t, use_reentrant=False))
    assert "is also a graph output" in escaping.refusals[0].reasons[0]


@pytest.mark.fault("a match across a mutation")
def test_mutated_logits_are_refused():
    def model(h, w, t):
        logits = F.linear(h, w)
        logits[..., 0] = -1e4
        return loss_of(logits, t)

    outcome = applied(model)
    assert not outcome.rewrites
    assert any("in place" in reason or "used by" in reason for reason in outcome.refusals[0].reasons)
