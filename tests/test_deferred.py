"""Deferred tensors: what stays lazy, what a read costs, and that every use gives what eager gives or raises."""

import copy
import gc
import io
import multiprocessing.reduction
import pickle
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.optimization import Adafactor
from transformers.trainer_pt_utils import nested_concat, nested_detach, nested_numpify

from fxopt import deferred_values
from fxopt.compat import pytree
from fxopt.deferred import DeferredTensor, Projection, deferred

B, T, H, V = 2, 6, 8, 11
NAME = "logits (model.py:7)"
LABELS = torch.arange(B * T).remainder(V).view(B, T)
TAILS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "scale": lambda z: z * 0.5,
    "softcap": lambda z: torch.tanh(z / 3) * 3,
    "float": lambda z: z.float(),
}


def softcap(dtype: torch.dtype = torch.float64, autocast: torch.dtype | None = None) -> Projection:
    return Projection(TAILS["softcap"], dtype, autocast, NAME)


def leaves(dtype: torch.dtype = torch.float64, grad: bool = True, tokens: int = T) -> list[Tensor]:
    """Input, a layer before the head, the head's weight and bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, tokens, H), (H, H), (V, H), (V,)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor.requires_grad_(grad) for tensor in made]


def eager(hidden: Tensor, weight: Tensor, bias: Tensor | None, projection: Projection) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return (logits if projection.tail is None else projection.tail(logits)).to(projection.dtype)


def make(inputs: list[Tensor], projection: Projection | None = None, *, lazy: bool = True) -> Tensor:
    x, before, weight, bias = inputs
    projection = projection or softcap(weight.dtype)
    return (deferred if lazy else eager)(x @ before, weight, bias, projection)


def logits(grad: bool = True) -> Any:
    """A fresh deferred tensor. Any, for a test says what it is."""
    return make(leaves(grad=grad))


def plain(grad: bool = True) -> Tensor:
    return make(leaves(grad=grad), lazy=False)


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows in each projection that is computed to be read."""
    rows: list[int] = []
    project = deferred_values.project

    def counting(hidden: Tensor, *rest: Any) -> Tensor:
        rows.append(hidden.shape[:-1].numel())
        return project(hidden, *rest)

    monkeypatch.setattr(deferred_values, "project", counting)
    return rows


def is_lazy(value: Any) -> bool:
    return isinstance(value, DeferredTensor) and not value.is_computed


def outcome(use: Callable[[Tensor], Any], projection: Projection, *, lazy: bool) -> tuple[list[Any], list[Any]] | str:
    """What `use` returns and its gradients, or the name of the error that it raises."""
    inputs = leaves()
    try:
        results = pytree.tree_leaves(use(make(inputs, projection, lazy=lazy)))
        total = sum(result.sum() for result in results if result.requires_grad)
        grads = torch.autograd.grad(total, inputs, allow_unused=True) if isinstance(total, Tensor) else []
    except RuntimeError as error:
        return str(error).partition(":")[0]
    return [result.detach().clone() for result in results], list(grads)


def assert_same(ours: Any, theirs: Any) -> None:
    """Both fp64: equal but for the order of sums."""
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


# ---- values ----------------------------------------------------------------------------------------------------------

SHAPES = [(B, T, H), (H,), (7, H), (0, T, H), (2, 0, H), (1, 1, H), (2, 2, 3, H)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_everything_is_bit_equal_to_eager(dtype: torch.dtype, tail: str, bias: bool) -> None:
    _, _, weight, offset = leaves(dtype, grad=False)
    projection = Projection(TAILS[tail], torch.float32 if tail == "float" else dtype, None, NAME)
    for shape in SHAPES:
        hidden = torch.randn(shape).to(dtype)
        ours = deferred(hidden, weight, offset if bias else None, projection)
        theirs = eager(hidden, weight, offset if bias else None, projection)
        assert is_lazy(ours)
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
        assert torch.equal(ours.float(), theirs.float())
        assert torch.equal(ours, theirs)


def test_strided_hidden_states_and_weights() -> None:
    x, before, weight, bias = leaves(grad=False)
    hidden = (x @ before).transpose(0, 1)
    strided = weight.t().contiguous().t()
    theirs = eager(hidden, strided, bias, softcap())
    assert torch.equal(deferred(hidden, strided, bias, softcap()), theirs)
    assert_same(deferred(hidden, strided, bias, softcap())[1].clone(), theirs[1])
    assert_same(deferred(hidden, strided, bias, softcap())[:, 1].clone(), theirs[:, 1])


def _saved_on_cpu(value: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return value * value


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value * value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class _TripleInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.mark_dirty(value)
        return value.mul_(3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


def _retained(value: Tensor) -> Tensor:
    value.retain_grad()
    value.register_hook(lambda grad: grad * 2)
    value.exp().sum().backward(retain_graph=True)
    assert value.grad is not None
    return value * value.grad


def _leaf(value: Tensor) -> Tensor:
    leaf = value.detach().requires_grad_()
    leaf.exp().sum().backward()
    assert leaf.grad is not None
    return value * leaf.grad


USES: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda z: z.argmax(-1),
    "cross entropy": lambda z: F.cross_entropy(z.view(-1, V), LABELS.view(-1)),
    "shifted": lambda z: F.cross_entropy(z[:, :-1].contiguous().view(-1, V), LABELS[:, 1:].reshape(-1)),
    "shifted flat": lambda z: F.cross_entropy(z[..., :-1, :].reshape(-1, V), LABELS[:, 1:].reshape(-1)),
    "classes second": lambda z: F.cross_entropy(z.transpose(1, 2), LABELS),
    "float": lambda z: F.cross_entropy(z.float().view(-1, V), LABELS.view(-1)),
    "softmax": lambda z: z.softmax(-1) * torch.arange(V),
    "last row": lambda z: z[:, -1].log_softmax(-1)[:, 3],
    "topk": lambda z: z.topk(3).values,
    "gather": lambda z: z.log_softmax(-1).gather(-1, LABELS[..., None]),
    "kl": lambda z: F.kl_div(z[:, :3].log_softmax(-1), z[:, 3:].softmax(-1), reduction="batchmean"),
    "masked": lambda z: z[LABELS > 3].exp(),
    "positions": lambda z: (z[torch.arange(B), torch.tensor([2, 4])].exp(), z[:, [1, 3]].sin(), z[[1], :, [2]].sin()),
    "elements": lambda z: (z[0, [1, 2], [3, 4]].exp(), z[torch.ones(B, T, V, dtype=torch.bool)].sin()),
    "new axis": lambda z: (z[:, None, LABELS[0] % T].cos(), z[None].exp()),
    "index_select": lambda z: [z.index_select(dim, torch.tensor([1, 1])).exp() for dim in (-1, 0, 1, 2)],
    "one token": lambda z: (z[0, -1, 4], z[:, -1, 2:5].exp()),
    "cat": lambda z: (torch.cat([z, z.sin()]), torch.stack([z[:, 0], z[:, 1]]).exp()),
    "unbind": lambda z: [row.exp() for row in z.unbind(1)],
    "split": lambda z: [part.sin() for part in z.split(4, 1)],
    "expand": lambda z: (z[:, :1].expand(B, 4, V).exp(), z[..., :1].expand(B, T, 4).sin()),
    "unfold": lambda z: (z.unfold(1, 2, 1).sin(), z.unfold(2, 3, 2).cos(), z[0].diagonal().exp()),
    "as_strided": lambda z: z.as_strided((2, 3), (3, 1), 5).exp(),
    "where": lambda z: torch.where(z > 0, z, -z),
    "into plain": lambda z: torch.zeros(B, T, V, dtype=z.dtype).sub_(z).exp(),
    "square": lambda z: z * z,
    "offloaded": _saved_on_cpu,
    "gradient of it": lambda z: torch.autograd.grad(z.sum(), z, create_graph=True)[0] * z,
    "second order": lambda z: torch.autograd.grad((z.softmax(-1) * z).sum(), z, create_graph=True)[0].pow(2),
    "checkpoint": lambda z: checkpoint(lambda t: t.softmax(-1) * t, z, use_reentrant=False),
    "function": _Square.apply,
    "function in place": _TripleInPlace.apply,
    "retain_grad": _retained,
    "detached leaf": _leaf,
}


@pytest.mark.parametrize("tail", ["none", "softcap"])
@pytest.mark.parametrize("name", USES)
def test_uses_give_eagers_values_and_gradients(name: str, tail: str) -> None:
    projection = Projection(TAILS[tail], torch.float64, None, NAME)
    ours, theirs = (outcome(USES[name], projection, lazy=lazy) for lazy in (True, False))
    assert not isinstance(theirs, str)
    assert_same(ours, theirs)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_no_worse_than_eagers(dtype: torch.dtype, tail: str) -> None:
    """The rule of fxopt.testing: at most twice eager's distance from fp64, plus four roundings."""

    def run(dtype: torch.dtype, lazy: bool) -> list[Tensor]:
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in leaves(torch.bfloat16)]
        low = dtype if tail != "float" else torch.float64 if dtype == torch.float64 else torch.float32
        function = TAILS[tail] if tail != "float" else lambda z: z.to(low)
        value = make(inputs, Projection(function, low, None, NAME), lazy=lazy)
        last = value[:, -1].log_softmax(-1)
        loss = F.cross_entropy(value[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()) + last[:, 2].sum()
        return [value.double(), last.double(), loss.double(), *(g.double() for g in torch.autograd.grad(loss, inputs))]

    for ours, theirs, truth in zip(run(dtype, True), run(dtype, False), run(torch.float64, False), strict=True):
        floor = 2 * torch.finfo(dtype).eps * truth.norm()
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + floor


@pytest.mark.parametrize("tail", ["none", "softcap"])
def test_derivatives_against_differences(tail: str) -> None:
    projection = Projection(TAILS[tail], torch.float64, None, NAME)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (5, 4), (5,))]
    for use in (lambda z: z, lambda z: z[:, -1].exp()):
        assert torch.autograd.gradcheck(lambda *args, use=use: use(deferred(*args, projection)), inputs)
        assert torch.autograd.gradgradcheck(lambda *args, use=use: use(deferred(*args, projection)), inputs)


class _Ignored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_backward_computes_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.deferred.project", None)
    for projection in (softcap(), Projection(None, torch.float64, None, NAME)):
        inputs = leaves()
        assert torch.autograd.grad(_Ignored.apply(make(inputs, projection)).sum(), inputs, allow_unused=True)[2] is None
    make(inputs, projection).sum().backward()  # a linear layer's gradients need none of its results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_of_a_linear_layer_keep_their_dtypes(dtype: torch.dtype) -> None:
    """A cast to fp32 follows the layer, and backward runs under an autocast that the forward did not."""
    found = []
    for lazy in (True, False):
        _, _, weight, bias = leaves(dtype)
        value = (deferred if lazy else eager)(
            torch.ones(B, H, dtype=dtype), weight, bias, Projection(None, torch.float32, None, NAME)
        )
        assert value.dtype == torch.float32
        with torch.autocast("cpu", torch.float16, enabled=lazy):
            found.append(torch.autograd.grad(value.sin().sum(), (weight, bias)))
    torch.testing.assert_close(*found)


def test_only_what_requires_gradients_gets_them() -> None:
    for tail in (None, TAILS["softcap"]):
        for which in range(1, 8):
            inputs = [tensor.detach() for tensor in leaves()[1:]]
            inputs[0] = torch.randn(B, T, H, dtype=torch.float64)
            wanted = [tensor.requires_grad_() for index, tensor in enumerate(inputs) if which >> index & 1]
            projection = Projection(tail, torch.float64, None, NAME)
            ours = torch.autograd.grad(deferred(*inputs, projection).exp().sum(), wanted)
            assert_same(ours, torch.autograd.grad(eager(*inputs, projection).exp().sum(), wanted))


# ---- laziness --------------------------------------------------------------------------------------------------------

LAZY: dict[str, Callable[[Any], Any]] = {
    "detach": lambda z: z.detach(),
    "data": lambda z: z.data,
    "float": lambda z: z.float(),
    "half": lambda z: z.half(),
    "to dtype": lambda z: z.to(torch.bfloat16),
    "to device": lambda z: z.to("cpu"),
    "cpu": lambda z: z.cpu(),
    "contiguous": lambda z: z.contiguous(),
    "last": lambda z: z[:, -1],
    "all but last": lambda z: z[:, :-1],
    "first": lambda z: z[0],
    "ellipsis": lambda z: z[..., :],
    "step": lambda z: z[:, ::2],
    "view": lambda z: z.view(-1, V),
    "reshape": lambda z: z.reshape(T, B, V),
    "flatten": lambda z: z.flatten(0, 1),
    "unsqueeze": lambda z: z.unsqueeze(1),
    "squeeze": lambda z: z[:, :1].squeeze(1),
    "transpose": lambda z: z.transpose(1, 2),
    "permute": lambda z: z.permute(1, 0, 2),
    "expand": lambda z: z.expand(3, B, T, V),
    "vocabulary": lambda z: z[..., 2:4],
    "mask": lambda z: z[LABELS > 3],
    "positions": lambda z: z[torch.arange(B), torch.tensor([2, 4])],
    "index_select": lambda z: z.index_select(1, torch.tensor([1])),
    "many": lambda z: z.detach()[:, -2:].float().flatten(0, 1)[1],
}


@pytest.mark.parametrize("name", LAZY)
def test_lazy_operations_compute_nothing(name: str, projected: list[int]) -> None:
    ours, theirs = LAZY[name](logits()), LAZY[name](plain())
    assert is_lazy(ours)
    assert not projected
    assert (ours.shape, ours.dtype, ours.requires_grad) == (theirs.shape, theirs.dtype, theirs.requires_grad)
    if name not in ("mask", "positions", "index_select"):  # copies, whose strides eager leaves to the index kernel
        assert (ours.stride(), ours.storage_offset()) == (theirs.stride(), theirs.storage_offset())
    torch.testing.assert_close(ours.clone(), theirs)


def test_metadata_computes_nothing(projected: list[int]) -> None:
    value = logits()
    assert value.shape == (B, T, V)
    assert (value.size(-1), value.dim(), len(value), value.numel(), value.nbytes) == (V, 3, B, B * T * V, B * T * V * 8)
    assert (value.dtype, value.device.type, value.element_size()) == (torch.float64, "cpu", 8)
    assert value.is_floating_point()
    assert value.stride() == (T * V, V, 1)
    assert value.is_contiguous()
    assert value.requires_grad
    assert not value.is_leaf
    assert value.grad_fn is not None
    assert torch.is_tensor(value)
    assert repr(value) == "tensor(deferred, size=(2, 6, 11), dtype=torch.float64, device='cpu', requires_grad=True)"
    assert str(value) == repr(value) == f"{value}"
    assert value.to("meta").device.type == "meta"
    for like in (torch.zeros_like(value), torch.empty_like(value), torch.full_like(value, 3), value.new_ones(2, 3)):
        assert type(like) is Tensor
        assert (like.device, like.dtype) == (value.device, value.dtype)
    assert not projected


COSTS: list[tuple[str, Callable[[Any], Any], int]] = [
    ("last row", lambda z: z[:, -1].argmax(-1), B),
    ("last row, cast", lambda z: z[:, -1].float().softmax(-1), B),
    ("last row, as list", lambda z: z[:, -1].tolist(), B),
    ("last row, copied for numpy", lambda z: z[:, -1].detach().clone().numpy(), B),
    ("generate's copy", lambda z: z[:, -1, :].to(copy=True, dtype=torch.float32), 0),
    ("an element", lambda z: z[0, -1, 3].item(), 1),
    ("formatted", lambda z: f"{z[0, -1, 3]:.3f}", 1),
    ("some classes", lambda z: z[0, -1, 2:5].softmax(-1), 1),
    ("flat range", lambda z: z.view(-1)[2 * V + 3 : 2 * V + 7].exp(), 1),
    ("transposed", lambda z: z.transpose(1, 2)[:, :, -1].exp(), B),
    ("two of six", lambda z: z[:, ::3].exp(), 4),
    ("masked", lambda z: z[LABELS == 3].exp(), 1),
    ("masked by a mask of nothing", lambda z: z[LABELS < 0].exp(), 0),
    ("more than half", lambda z: z[:, :-1].exp(), B * T),
    ("straddling rows", lambda z: z.view(-1)[3 : 3 + V].exp(), B * T),
    ("into the next row", lambda z: z.view(-1)[V - 2 : V + 1].exp(), B * T),
    ("clone", lambda z: z.clone(), B * T),
    ("twice", lambda z: (z.argmax(-1), z.softmax(-1), z[:, 0].exp(), z.detach().numpy()), B * T),
    ("the same row twice", lambda z: (z[:, -1].exp(), z.detach()[:, -1].sin(), z[:, -1, 4].cos()), B),
    ("all rows one by one", lambda z: [z[:, t].exp() for t in range(T)], B * T // 2 + B * T),
]


@pytest.mark.parametrize(("use", "rows"), [cost[1:] for cost in COSTS], ids=[cost[0] for cost in COSTS])
def test_a_read_costs_its_rows(use: Callable[[Any], Any], rows: int, projected: list[int]) -> None:
    use(logits())
    assert sum(projected) == rows


@pytest.mark.parametrize(
    "use",
    [
        lambda z: z.transpose(0, 1).float(),
        lambda z: z[:, :-1].transpose(1, 2).half(),
        lambda z: z.view(torch.int32),
        lambda z: z[:, -1].view(torch.int16),
    ],
)
def test_layouts_and_bits_are_eagers(use: Callable[[Tensor], Tensor]) -> None:
    ours, theirs = use(logits(grad=False)), use(plain(grad=False))
    assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
    assert torch.equal(ours, theirs)


def test_a_read_whole_frees_the_rows_read_before() -> None:
    value, before = logits(grad=False), _count(B * V)
    value[:, -1].exp()
    assert _count(B * V) - before == 1
    value.exp()
    assert _count(B * V) - before == 0


def _count(numel: int) -> int:
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    return sum(found.numel() == numel for found in tensors)


def test_memory_is_freed_by_reference_count() -> None:
    gc.collect()
    gc.disable()
    try:
        hidden, weight = torch.randn(B, T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
        value = deferred(hidden, weight, None, Projection(None, torch.float32, None, NAME))
        views = [value[:, -1], value.float(), value.detach()]
        references = [weakref.ref(tensor) for tensor in (value, *views)] + [weakref.ref(value._source)]
        views[0].exp().sum().backward()
        value.softmax(-1)
        value.mul(2)
        del value, views
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()


def test_an_unread_tensor_holds_its_inputs_only() -> None:
    inputs = leaves(grad=False)
    hidden = inputs[0] @ inputs[1]
    before = _count(B * T * V)
    value = deferred(hidden, inputs[2], inputs[3], softcap())
    assert _count(B * T * V) - before == 1  # the deferred tensor itself
    value.exp()
    assert _count(B * T * V) - before == 2


# ---- staleness -------------------------------------------------------------------------------------------------------


def _step(make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[..., None]:
    def update(hidden: Tensor, weight: Tensor, bias: Tensor) -> None:
        weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
        make_optimizer([weight, bias]).step()

    return update


UPDATES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "sgd": _step(lambda params: torch.optim.SGD(params, lr=0.1)),
    "adamw": _step(lambda params: torch.optim.AdamW(params, foreach=False)),
    "adamw foreach": _step(lambda params: torch.optim.AdamW(params, foreach=True)),
    "adamw fused": _step(lambda params: torch.optim.AdamW(params, fused=True)),
    "adafactor": _step(Adafactor),
    "in place": lambda h, w, b: w.add_(1),
    "through data": lambda h, w, b: w.data.add_(1),
    "bias": lambda h, w, b: b.mul_(2),
    "bias through data": lambda h, w, b: b.data.mul_(2),
    "hidden": lambda h, w, b: h.zero_(),
    "freed storage": lambda h, w, b: w.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("name", UPDATES)
def test_reading_after_an_update_raises(name: str) -> None:
    x, before, weight, bias = leaves()
    hidden = x @ before
    make_it = lambda: deferred(hidden, weight, bias, softcap())  # noqa: E731
    value, read, row, cast, taken = make_it(), make_it(), make_it(), make_it().float(), make_it()[LABELS > 3]
    expected = read.clone(), row[:, -1].clone()
    with torch.no_grad():
        UPDATES[name](hidden, weight, bias)
    for stale in (value, value[:, -1], value.detach(), value.float(), cast, row, row[:, 0]):
        with pytest.raises(RuntimeError, match="updated in place since the forward") as error:
            stale.sum()
        message = str(error.value)
        assert NAME in message
        assert "optimizer.step()" in message
        assert 'options={"logits": "eager"}' in message
    with pytest.raises(RuntimeError, match="updated in place"):
        value[LABELS > 3].sum()
    if name == "hidden":  # rows taken by an index before that are copies of the hidden states
        assert_same(taken.clone(), expected[0][LABELS > 3])
    else:
        with pytest.raises(RuntimeError, match="updated in place"):
            taken.sum()
    assert (value.shape, value[:, -1].shape, value.float().dtype) == ((B, T, V), (B, V), torch.float32)
    assert "deferred" in repr(value)
    assert torch.equal(read, expected[0])
    assert torch.equal(row[:, -1], expected[1])


def test_no_false_alarms() -> None:
    x, before, weight, bias = leaves()
    with torch.no_grad():
        weight[0, 0] = torch.nan
    value = make([x, before, weight, bias])
    weight.grad = torch.ones_like(weight)
    weight.requires_grad_(False).requires_grad_(True)
    assert torch.equal(value.nan_to_num(), eager(x @ before, weight, bias, softcap()).nan_to_num())
    value, expected = make([x, before, weight, bias]), make([x, before, weight, bias], lazy=False)
    weight.data = torch.zeros_like(weight)  # other memory: the values are still those of the forward
    assert torch.equal(value.nan_to_num(), expected.nan_to_num())


def test_backward_after_an_update_raises_as_in_eager() -> None:
    for lazy in (True, False):
        inputs = leaves()
        total = make(inputs, lazy=lazy).exp().sum()
        with torch.no_grad():
            inputs[2].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


# ---- changing it in place --------------------------------------------------------------------------------------------


def writes(value: Tensor, *, by: str) -> Any:
    """Programs that write. Each returns what must be as in eager."""
    view, detached, cast = value[:, 0], value.detach(), value.float()
    match by:
        case "div_":
            value.div_(2.0)
        case "augmented":
            value *= 2
            value[:, 0] -= 1
        case "mask":
            value[value > 0] = 0.5
        case "masked_fill_":
            value.masked_fill_(value < 0, -1.0)
        case "clamp_":
            torch.clamp_(value, -0.5, 0.5)
        case "exp_":
            value.exp_()
        case "copy_":
            value.copy_(value.detach().clone() ** 2)
        case "zero_":
            value.zero_()
        case "setitem":
            value[:, 0, :3] = torch.ones(3, dtype=value.dtype)
            value[0] += 1
        case "from itself":
            value[:, 0] = value[:, 1]
        case "through a view":
            view.mul_(view.detach().clone())
        case "through a view of a view":
            value.view(-1, V)[1:5][1].mul_(3)
        case "through detach":
            detached.mul_(2)
        case "through data":
            value.data.mul_(2)
        case "through numpy":
            value.detach().numpy()[0] = 1.0
        case "through a read row's numpy":
            view.exp()
            view.detach().numpy()[...] = 1.0
        case "through a read row's bits":
            view.exp()
            view.detach().view(torch.int64).zero_()
        case "through dlpack":
            torch.from_dlpack(value.detach()).mul_(2)
        case "after a read row":
            view.exp()
            view.mul_(2)
        case "without grad":
            with torch.no_grad():
                value[:, 0] = 0
        case "foreach":
            torch._foreach_mul_([value, value.detach().clone()], 2.0)
        case "out":
            with torch.no_grad():
                torch.exp(value.detach().clone(), out=value)
        case "detach_":
            return value.detach_().mul_(2)
        case "to itself":
            value.add_(value.detach())
        case "transposed":
            value.transpose(1, 2)[0].mul_(2)
        case "saved for backward":
            square = value * value
            value.mul_(2)
            return square
        case "view saved for backward":
            square = view * view
            value.mul_(2)
            return square
        case "saved result":
            value.exp_().mul_(2)
        case _:
            raise AssertionError(by)
    return value.sin(), view.sin(), detached.sin(), cast.sin(), value[:, 0].float(), value.view(-1, V)[3].cos()


WRITES = (
    "div_", "augmented", "mask", "masked_fill_", "clamp_", "exp_", "copy_", "zero_", "setitem", "from itself",
    "through a view", "through a view of a view", "through detach", "through data", "through numpy",
    "through a read row's numpy", "through a read row's bits", "through dlpack", "after a read row", "without grad",
    "foreach", "out", "detach_", "to itself", "transposed", "saved for backward", "view saved for backward",
    "saved result",
)  # fmt: skip


@pytest.mark.parametrize("by", WRITES)
def test_writing_does_what_it_does_in_eager(by: str) -> None:
    ours, theirs = (outcome(lambda value: writes(value, by=by), softcap(), lazy=lazy) for lazy in (True, False))
    assert isinstance(theirs, str) == ("saved" in by)
    if isinstance(theirs, str):
        assert ours == theirs
    else:
        assert_same(ours, theirs)


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z.t_() if z.dim() == 2 else z.transpose_(0, 1),
        lambda z: z.squeeze_(),
        lambda z: z.unsqueeze_(0),
        lambda z: z.detach().resize_(3),
        lambda z: z.detach().set_(torch.ones(3, dtype=z.dtype)),
        lambda z: setattr(z, "data", torch.ones(3, dtype=z.dtype)),
    ],
)
def test_what_cannot_follow_says_so(change: Callable[[Any], Any]) -> None:
    value = logits()
    with pytest.raises(RuntimeError, match="clone") as error:
        change(value)
    assert NAME in str(error.value)
    assert 'options={"logits": "eager"}' in str(error.value)
    assert torch.equal(value, plain())


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_an_out_argument_is_not_resized() -> None:
    with pytest.raises(RuntimeError, match=r"clone.*resized it from \[2, 6, 11\] to \[3\]"):
        torch.exp(torch.ones(3, dtype=torch.float64), out=logits(grad=False))


# ---- random programs of views ----------------------------------------------------------------------------------------


@st.composite
def view_programs(draw: st.DrawFn) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """Views and casts, each drawn for the shape the last one left."""
    shape, program = torch.empty(B, T, V), []
    for _ in range(draw(st.integers(1, 6))):
        name, step = draw(_steps(tuple(shape.shape), shape.is_contiguous()))
        shape = step(shape)
        program.append((name, step))
        if shape.dim() == 0:
            break
    return program


@st.composite
def _steps(draw: st.DrawFn, shape: tuple[int, ...], contiguous: bool) -> tuple[str, Callable[[Tensor], Tensor]]:
    dim = draw(st.integers(0, len(shape) - 1))
    start, stop = sorted(draw(st.tuples(st.integers(0, shape[dim]), st.integers(0, shape[dim]))))
    other, step = draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 3))
    cut = (slice(None),) * dim + (slice(start, stop, step),)
    choices: list[tuple[str, Callable[[Tensor], Tensor]]] = [
        (f"[{dim}: {start}:{stop}:{step}]", lambda t: t[cut]),
        (f"transpose {dim} {other}", lambda t: t.transpose(dim, other)),
        (f"unsqueeze {dim}", lambda t: t.unsqueeze(dim)),
        ("detach", lambda t: t if t.requires_grad else t.detach()),
        ("double", lambda t: t.double()),
        ("contiguous", lambda t: t.contiguous()),
        (f"movedim {dim} {other}", lambda t: t.movedim(dim, other)),
    ]
    if shape[dim]:
        place = draw(st.integers(-shape[dim], shape[dim] - 1))
        chosen = torch.tensor(draw(st.lists(st.integers(0, shape[dim] - 1), max_size=3)), dtype=torch.long)
        choices += [
            (f"select {dim} {place}", lambda t: t.select(dim, place)),
            (f"index {dim} {chosen.tolist()}", lambda t: t[(slice(None),) * dim + (chosen,)]),
            (f"index_select {dim} {chosen.tolist()}", lambda t: t.index_select(dim, chosen)),
        ]
    if contiguous and len(shape) > 1:
        choices.append(("flatten", lambda t: t.flatten(0, 1)))
        choices.append(("unflatten", lambda t: t.reshape(1, -1, *shape[1:]) if t.numel() else t))
    return draw(st.sampled_from(choices))


@given(program=view_programs(), written=st.integers(-1, 5), read=st.integers(-1, 5))
def test_any_views_are_eagers_views(program: list[Any], written: int, read: int) -> None:
    """Values, gradients and aliasing, with a read (of the value so far) and a write somewhere between."""

    def run(lazy: bool) -> list[Tensor]:
        inputs = leaves()
        base = value = make(inputs, lazy=lazy)
        for position, (_, step) in enumerate(program):
            if position == read:
                value.sum()
            if position == written:
                value.mul_(3)
            value = step(value)
        grads = torch.autograd.grad(value.sin().sum() + base.cos().sum(), inputs)
        return [value.detach().clone(), base.detach().clone(), *grads]

    ours, theirs = run(True), run(False)
    assert_same(ours, theirs)


# ---- leaving PyTorch, and other processes ----------------------------------------------------------------------------


def test_conversions() -> None:
    expected = plain(grad=False)
    value = logits()
    with pytest.raises(RuntimeError, match="requires grad"):
        value.numpy()
    with pytest.raises(RuntimeError, match="requires grad"):
        np.asarray(value)
    assert np.array_equal(logits().numpy(force=True), expected.numpy())
    assert np.array_equal(np.asarray(logits().detach()), expected.numpy())
    assert np.array_equal(np.from_dlpack(logits(grad=False)), expected.numpy())
    assert torch.equal(torch.from_dlpack(logits(grad=False)), expected)
    assert logits().tolist() == expected.tolist()
    assert logits()[0, 0].tolist() == pytest.approx(expected[0, 0].tolist(), rel=1e-12)
    assert f"{logits()[1, 2, 3]:.6f}" == f"{expected[1, 2, 3]:.6f}"
    assert float(logits(grad=False)[1, 2, 3]) == pytest.approx(expected[1, 2, 3].item(), rel=1e-12)
    assert bool((logits() == expected).all())
    assert torch.allclose(logits(), expected)
    assert type(logits().cpu().double().exp()) is Tensor
    assert torch.equal(torch.tensor(logits(grad=False).tolist(), dtype=torch.float64), expected)


def test_memory_is_real_memory() -> None:
    value = logits(grad=False)
    row = value[1]
    assert value.data_ptr() == value.numpy().__array_interface__["data"][0] != 0
    assert row.data_ptr() == value.data_ptr() + T * V * 8
    assert value.untyped_storage().data_ptr() == row.untyped_storage().data_ptr() == value.data_ptr()
    assert value.untyped_storage().nbytes() == value.nbytes
    assert torch.from_dlpack(value).data_ptr() == value.data_ptr()
    with pytest.raises(RuntimeError, match="data pointer"):
        Tensor.data_ptr(value)  # as C++ code asks for it: no null pointer
    assert value.share_memory_() is value
    assert value.is_shared()
    assert torch.equal(value, plain(grad=False))


def test_copies_are_ordinary_tensors() -> None:
    expected = plain(grad=False)
    copies = {
        "pickle": lambda z: pickle.loads(pickle.dumps(z)),
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "save": _saved_and_loaded,
        "multiprocessing": lambda z: pickle.loads(multiprocessing.reduction.ForkingPickler.dumps(z)),
    }
    for name, duplicate in copies.items():
        found = duplicate(logits(grad=False))
        assert type(found) is Tensor, name
        assert torch.equal(found, expected), name
        found = duplicate({"a": logits(grad=False)[:, -1]})["a"]
        assert_same(found.detach().clone(), expected[:, -1])
    assert pickle.loads(pickle.dumps(logits())).requires_grad
    twice = logits(grad=False)
    first, second = copy.deepcopy([twice, twice])
    assert first is second
    leaf = logits().detach().requires_grad_()
    assert copy.deepcopy(leaf).requires_grad
    assert copy.deepcopy(leaf).is_leaf
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(logits())  # as for any tensor that autograd computed


def _saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_transformers_and_pytrees() -> None:
    value, expected = logits(), plain(grad=False)
    output = CausalLMOutputWithPast(loss=value.new_zeros(()), logits=value)
    assert output["logits"] is output[1] is output.to_tuple()[1] is value
    assert any(leaf is value for leaf in pytree.tree_leaves(output))
    detached = nested_detach((output.logits, {"a": output.logits}))
    assert is_lazy(detached[0])
    assert torch.equal(nested_concat(detached[0], detached[1]["a"]), torch.cat([expected, expected]))
    assert np.array_equal(nested_numpify(detached[0]), expected.numpy())
    low = make(leaves(torch.bfloat16, grad=False))
    assert nested_numpify(low).dtype == np.float32


# ---- ambient state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ambient", [None, torch.bfloat16, torch.float16], ids=str)
def test_the_autocast_of_the_forward_holds(recorded: torch.dtype | None, ambient: torch.dtype | None) -> None:
    def autocast(dtype: torch.dtype | None) -> Any:
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype)

    def run(lazy: bool) -> list[Tensor]:
        inputs = [tensor.detach().requires_grad_() for tensor in leaves(torch.float32)[1:]]
        inputs[0] = torch.linspace(-1, 1, B * T * H).view(B, T, H).requires_grad_()
        projection = Projection(TAILS["softcap"], recorded or torch.float32, recorded, NAME)
        with nullcontext() if lazy else autocast(recorded):
            value = (deferred if lazy else eager)(*inputs, projection)
        with autocast(ambient):
            value.sum()
        return [value, *torch.autograd.grad(value.float().square().sum(), inputs)]

    for ours, theirs in zip(run(True), run(False), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_inference_mode(projected: list[int]) -> None:
    inputs = leaves()
    expected = plain(grad=False)
    with torch.inference_mode():
        value = make(inputs)
        for lazy in (value.reshape(-1, V), value.flatten(0, 1), value.float(), value[:, -1], value.contiguous()):
            assert is_lazy(lazy)
        assert_same(value[:, -1].argmax(-1), expected[:, -1].argmax(-1))
        assert projected == [B]
        assert torch.equal(value.matmul(torch.eye(V, dtype=value.dtype)), expected)
        assert torch.equal(value.mul_(2), expected * 2)
        stale = make(inputs)
        inputs[2].add_(1)
        with pytest.raises(RuntimeError, match="updated in place"):
            stale.sum()
    assert torch.equal(value + 1, expected * 2 + 1)


def test_read_in_inference_mode_then_trained_on() -> None:
    inputs, others = leaves(), leaves()
    value = make(inputs)
    with torch.inference_mode():
        value.argmax(-1)
    value.mul_(2)
    theirs = make(others, lazy=False).mul(2)
    ours, expected = (t.exp().sum() + (t[:, 0] * t.detach()[:, 1]).sum() for t in (value, theirs))
    assert_same(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, others))


def test_no_grad() -> None:
    with torch.no_grad():
        value = logits()
    assert not value.requires_grad
    assert value.is_leaf
    assert torch.equal(value, plain())


@pytest.mark.parametrize(
    "transformed",
    [
        torch.vmap(lambda t: t.softmax(-1)),
        torch.vmap(lambda t: t[-1].float()),
        torch.func.grad(lambda t: F.cross_entropy(t.view(-1, V), LABELS.view(-1))),
        lambda z: torch.func.vjp(torch.exp, z)[1](torch.ones_like(z))[0],
        lambda z: torch.func.jvp(torch.exp, (z,), (torch.ones_like(z),))[1],
        torch.vmap(torch.func.grad(lambda t: t.exp().sum())),
    ],
)
def test_function_transforms(transformed: Callable[[Tensor], Tensor]) -> None:
    assert_same(transformed(logits(grad=False)).clone(), transformed(plain(grad=False)))


def test_forward_mode_raises_instead_of_dropping_the_tangent() -> None:
    hidden, weight = torch.randn(B, H), torch.randn(V, H)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(hidden, hidden)
        with pytest.raises(RuntimeError, match="forward mode AD"):
            deferred(dual, weight, None, Projection(None, torch.float32, None, NAME))


def test_threads_compute_once(projected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    project = deferred_values.project
    monkeypatch.setattr(deferred_values, "project", lambda *args: time.sleep(0.02) or project(*args))
    value, found = logits(grad=False), []
    reads = [lambda: found.append(value.sum().item())] * 8 + [value.data_ptr] * 8
    threads = [threading.Thread(target=read) for read in reversed(reads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert projected == [B * T]
    assert len(found) == 8
    assert len(set(found)) == 1


def test_arguments() -> None:
    hidden, weight, bias = torch.randn(B, H), torch.randn(V, H), torch.randn(V)
    for wrong in ((hidden, weight.t(), None), (hidden, weight, bias[1:]), (hidden, bias, None)):
        with pytest.raises(ValueError, match=r"model\.py:7"):
            deferred(*wrong, Projection(None, torch.float32, None, NAME))


def test_other_subclasses_are_computed_at_once() -> None:
    class Marked(Tensor):
        pass

    hidden, weight = torch.randn(B, H), torch.randn(V, H)
    found = deferred(hidden.as_subclass(Marked), weight, None, Projection(None, torch.float32, None, NAME))
    assert isinstance(found, Marked)
    assert torch.equal(found.as_subclass(Tensor), F.linear(hidden, weight))
    lazy = deferred(hidden, weight, None, Projection(None, torch.float32, None, NAME))
    assert type(deferred(lazy, torch.ones(3, V), None, Projection(None, torch.float32, None, NAME))) is Tensor


# ---- in compiled code ------------------------------------------------------------------------------------------------


def _in_place(value: Tensor) -> Any:
    value *= 2
    value[:, 0] = 0
    return value.exp()


def _trained(value: Tensor) -> Tensor:
    loss = F.cross_entropy(value.flatten(0, 1), torch.zeros(value.shape[0] * value.shape[1], dtype=torch.long))
    return loss if value.requires_grad else loss * 2


COMPILED: dict[str, Callable[[Tensor], Any]] = {
    "loss": _trained,
    "cast": lambda z: z.double().softmax(-1),
    "view": lambda z: (z.view(-1, V), z[:, -1:].exp()),
    "same": lambda z: z,
    "in place": _in_place,
    "detach": lambda z: z.detach().argmax(-1).double(),
    "shape": lambda z: torch.ones(3) * z.shape[1] * z.size(0) * len(z) * z.numel() * z.dim(),
    "arithmetic": lambda z: 1 - z * torch.arange(V),
    "branch": lambda z: z.sin() if isinstance(z, Tensor) and z.dtype == torch.float64 else None,
    "output": lambda z: CausalLMOutputWithPast(logits=z).logits.exp(),
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_code_reads_the_right_values(name: str, backend: str) -> None:
    """Dynamo breaks the graph where it meets one. Shapes and what requires gradients change between calls."""
    compiled = torch.compile(COMPILED[name], backend=backend)
    for tokens, grad in ((T, True), (3, True), (4, False)) if backend == "aot_eager" else ((T, True), (3, True)):
        found = []
        for lazy, function in ((True, compiled), (False, COMPILED[name])):
            inputs = leaves(tokens=tokens, grad=grad)
            value = make(inputs, lazy=lazy)
            results = [*pytree.tree_leaves(function(value)), value.cos()]
            total = sum(result.sum() for result in results)
            grads = torch.autograd.grad(total, inputs) if grad else []
            found.append([result.detach().clone() for result in results] + list(grads))
        assert_same(*found)


def test_compiled_code_and_autograd_see_each_others_writes() -> None:
    for write in (lambda z: z.mul_(2), torch.compile(_in_place, backend="aot_eager")):
        for save in (lambda z: z * z, torch.compile(lambda z: z * z, backend="aot_eager")):
            for lazy in (True, False):
                value = make(leaves(), lazy=lazy)
                saved = save(value)
                write(value)
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    saved.sum().backward()


def test_compiled_code_gets_views_of_the_same_values() -> None:
    def both(value: Tensor, view: Tensor) -> Tensor:
        value.mul_(2)
        return view.sum()

    found = logits(grad=False), plain(grad=False)
    compiled = torch.compile(both, backend="aot_eager")
    assert_same(compiled(found[0], found[0][:, 0]), both(found[1], found[1][:, 0]))
