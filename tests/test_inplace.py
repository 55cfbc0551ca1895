"""In-place operators become functional where nothing but the program's text can tell, and stay where something can."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchgen
from graphs import captured, targets
from test_capture import replayed
from torch.utils.checkpoint import checkpoint

from fxopt import inplace, verify
from fxopt.capture import trace
from fxopt.fake import propagate
from fxopt.simplify import simplify

aten = torch.ops.aten
ROWS = 6


def leaves():
    return torch.randn(ROWS, ROWS, requires_grad=True), torch.randn(ROWS, requires_grad=True)


def assert_replays(fn, **how):
    before, after = replayed(fn, *leaves(), **how)
    for one, other in zip(before, after, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def writes(module):
    return [name for name in targets(module) if re.search(r"[^_]_\.|__i", name)]


def scores(x, w):
    s = x @ x.t()
    s *= 0.5
    s += w
    s /= 2.0
    s -= w.detach()
    return s.softmax(-1)


def statements(x, w):
    """The tensor is read by its own name after the write, and once more before it."""
    s = x @ x.t()
    kept = s.exp() * w
    s.masked_fill_(torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1), float("-inf"))
    s.mul_(2.0)
    return s.softmax(-1) + kept


def activations(x, w):
    return (x * w).tanh_() + (x + w).sigmoid_() + (x - w).relu_() + (x @ x.t()).clamp_(max=2.0).exp_()


def tensors(x, w):
    return (x * w).add_(x, alpha=0.3) + (x + w).lerp_(x, 0.2) + (x * w).addmm_(x, x, beta=0.5)


def through_a_view(x, w):
    s = (x @ x.t()).view(2, 3, ROWS)
    s += w
    return s.transpose(0, 1).sum(0)


def viewed_later(x, w):
    s = x @ x.t()
    s += w
    return s.view(-1)[3:] * s.t().reshape(-1)[3:]


def viewed_before(x, w):
    s = x @ x.t()
    total = s.view(-1).sum() * w
    s += w
    return s * total


def reads_itself(x, w):
    s = x * w
    s += s.view(-1).view(ROWS, ROWS)
    return s


def without_grad(x, w):
    with torch.no_grad():
        scale = x.abs().amax(-1)
        scale += 1.0
        scale.sqrt_()
    return x / scale * w


def gains_grad(x, w):
    s = x.detach() * 2.0
    with torch.no_grad():
        s += 1.0
    s *= w
    return s


def under_autocast(x, w):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = x @ x.t()
        s *= 0.5
        s += s.detach()
        s.masked_fill_(x > 0.5, 1.0)
    return s.float() * w


def in_a_checkpoint(x, w):
    def layer(a):
        s = a @ a.t()
        s += w
        return s.tanh_()

    return checkpoint(layer, x, use_reentrant=False)


def idle_dropout(x, w):
    return F.dropout(x * w, 0.5, training=False, inplace=True) + F.dropout(x + w, 0.0, inplace=True)


def flags(x, w):
    mask = x.detach() > 0
    mask &= w.detach() > 0
    mask |= x.detach() > 1
    weight = torch.ones(ROWS, ROWS)
    weight *= mask
    return x * weight * w


LEGAL = (
    scores, statements, activations, tensors, through_a_view, viewed_later, viewed_before, reads_itself, without_grad,
    gains_grad, under_autocast, in_a_checkpoint, idle_dropout, flags,
)  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("fn", LEGAL, ids=lambda fn: fn.__name__)
def test_unseen_writes_go_bit_for_bit(fn, dynamic):
    assert_replays(fn, dynamic=dynamic)


@pytest.mark.parametrize("fn", LEGAL, ids=lambda fn: fn.__name__)
def test_nothing_is_written_and_values_are_fresh(fn):
    module = captured(fn, *leaves()).module
    bodies = [body for body in module.modules() if isinstance(body, torch.fx.GraphModule)]
    assert [name for body in bodies for name in writes(body)] == []
    verify.canonical(module)
    for body in bodies:
        before = str(body.graph)
        aliases = [verify.storage_of(node.meta.get("val")) for node in body.graph.nodes]
        simplify(body)
        assert str(body.graph) == before
        propagate(body)
        again = [verify.storage_of(node.meta.get("val")) for node in body.graph.nodes]
        assert partition(aliases) == partition(again)


def partition(items):
    return [items.index(item) if item is not None else None for item in items]


def to_an_input(x, w):
    y = x.detach()
    y *= 2.0
    return y * w


def to_a_constant(x, w):
    c = torch.tensor([1.0, 2.0])
    c += 1.0
    return x * c[0] * w


def base_read_later(x, w):
    s = x @ x.t()
    s[0] += w
    return s.softmax(-1)


def sibling_read_later(x, w):
    s = x @ x.t()
    row = s[0]
    s += w
    return s * row


def part_of_memory(x, w):
    s = x @ x.t()
    one = s[:3]
    one += w
    return one * one.as_strided((3, ROWS), (ROWS, 1), 3 * ROWS)


def split_before(x, w):
    s = x.detach() * 2.0
    parts = s.split(3)
    s += w.detach()
    return parts[0] * parts[1] * w


def is_an_output(x, w):
    s = x * w
    s.add_(w)
    return s.cos(), s


def output_through_a_view(x, w):
    s = x * w
    flat = s.view(-1)
    s += w
    return s.cos(), flat


def widens(x, w):
    s = (x * w).bfloat16()
    s += w
    return s.float()


def converted_by_autocast(x, w):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = x * w
        s.addmm_(x, x)
        t = x + w
        t.addmm_(x, x)
    return s + t


def other_strides(x, w):
    s = (x * w).t()
    s.addmm_(x, x)
    return s * w


def random(x, w):
    return F.dropout(x * w, 0.5, inplace=True)


def hides_from_autograd(x, w):
    s = x * w
    with torch.no_grad():
        s *= 3.0
    return s * w


def own_derivative(x, w):
    return F.elu(x * w, inplace=True)


def changes_shape(x, w):
    s = x * w
    s.t_()
    s *= 2.0
    return s


def detached_later(x, w):
    s = x * w
    with torch.no_grad():
        s *= 3.0
    early = s + w
    s.detach_()
    return early + s


def bernoulli(x, w):
    s = x * w
    s.bernoulli_(w.detach().sigmoid())
    return s + w


def given_to_a_body(x, w):
    s = x.detach() * 2.0
    seen = checkpoint(lambda a: a.view(-1) * 1.5, s, use_reentrant=False)
    s += 1.0
    return seen * w[0] + s.sum()


ILLEGAL = {
    to_an_input: ["mul_"],
    to_a_constant: ["add_"],
    base_read_later: ["add_", "copy_"],
    sibling_read_later: ["add_"],
    part_of_memory: ["add_"],
    split_before: ["add_"],
    is_an_output: ["add_"],
    output_through_a_view: ["add_"],
    widens: ["add_"],
    converted_by_autocast: ["addmm_", "addmm_"],
    other_strides: ["addmm_"],
    random: ["dropout_"],
    bernoulli: ["bernoulli_"],
    hides_from_autograd: ["mul_"],
    own_derivative: ["elu_"],
    changes_shape: ["t_", "mul_"],
    detached_later: ["mul_", "detach_"],
    given_to_a_body: ["add_"],
}


@pytest.mark.parametrize("fn", ILLEGAL, ids=lambda fn: fn.__name__)
def test_writes_that_can_be_seen_stay(fn):
    found = captured(fn, *leaves())
    assert [name.split(".")[1] for name in writes(found.module)] == ILLEGAL[fn]
    before = str(found.module.graph)
    simplify(found.module)
    assert str(found.module.graph) == before
    assert_replays(fn)


def test_a_view_of_a_constant_is_the_constant():
    """Its fake value has memory of its own: the constant is a real tensor."""
    constant = torch.ones(3)
    module = trace(lambda x: x * constant.view(3, 1).add_(1.0), {"x": torch.randn(3)})
    assert writes(module) == ["aten.add_.Tensor"]


def test_a_write_that_follows_an_unseen_one_is_judged_afresh():
    """The second write is seen, the first is not: it goes, and the second's memory is then the twin's."""

    def fn(x, w):
        s = x * w
        s += w
        row = s[0]
        s *= 2.0
        return s * row

    module = captured(fn, *leaves()).module
    assert targets(module)[:2] == ["aten.mul.Tensor", "aten.add.Tensor"]
    assert writes(module) == ["aten.mul_.Tensor"]
    assert_replays(fn)


def test_a_copy_goes_with_the_write_it_was_made_for():
    module = trace(lambda x, w: (x * 1.0).add_(w).mul_(2.0), {"x": torch.randn(3), "w": torch.randn(3)})
    assert targets(module) == ["aten.add.Tensor", "aten.mul.Tensor"]


def test_operators_with_a_derivative_of_their_own_are_known():
    """Of every operator that derivatives.yaml lists in place, the twin is refused, or nothing is differentiated."""
    listed = Path(torchgen.__file__).parent / "packaged/autograd/derivatives.yaml"
    names = set(re.findall(r"^- name: ([a-z]\w*_)[.(]", listed.read_text(), re.MULTILINE))
    assert "elu_" in names
    comparisons = {"eq_", "ge_", "gt_", "le_", "lt_", "ne_"}  # the twin's dtype is bool, which has no gradient
    linear = {"conj_physical_"}  # grad.conj_physical() in both
    for name in names - comparisons - linear - inplace._OWN_DERIVATIVE:
        packet = getattr(aten, name)
        for overload in packet.overloads():
            node = torch.fx.Graph().call_function(getattr(packet, overload))
            assert inplace.twin_of(node) is None, f"{name}.{overload}"
