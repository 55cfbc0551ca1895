"""Mixed precision: what reviews found."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mixed import BF16, FP32, Stages, autocast, dtypes_in, relative, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxopt import OptionError
from fxopt.fake import value_of
from fxopt.precision.calls import class_of_einsum
from fxopt.precision.casts import READERS, is_made
from fxopt.rewrite import submodules

pytestmark = pytest.mark.filterwarnings("error::fxopt.FxoptWarning")
aten = torch.ops.aten


# --- operators ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("fxopt_tests::low_only", mutates_args=())
def low_only(x: Tensor) -> Tensor:
    if x.dtype != BF16:
        raise TypeError(f"bf16 only, not {x.dtype}")
    return x * 2


@torch.library.custom_op("fxopt_tests::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


for operator in (low_only, double):
    operator.register_fake(torch.empty_like)


def test_an_operator_of_another_package_gets_the_dtype_it_asks_for() -> None:
    function = lambda x, w: torch.ops.fxopt_tests.low_only((x @ w).bfloat16()).float()  # noqa: E731
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    found, stages = run(function, x, w)
    assert dtypes_in(stages.nodes(torch.ops.fxopt_tests.low_only.default)[0]) == [BF16]
    exact = 2 * (x.double() @ w.double())
    with autocast():
        eager = function(x, w)
    assert relative(found, exact) <= 2 * relative(eager, exact) + 8 * torch.finfo(FP32).eps


@pytest.mark.parametrize(("chosen", "dtype"), [(None, FP32), ("follow", BF16), ("low", BF16), ("fp32", FP32)])
def test_an_operator_of_another_package_can_be_named(chosen: str | None, dtype: torch.dtype) -> None:
    named: dict[str, Any] = {} if chosen is None else {"ops": {"fxopt_tests.double": chosen}}
    function = lambda x, w: torch.ops.fxopt_tests.double(x @ w)  # noqa: E731
    found, stages = run(function, torch.randn(4, 8), torch.randn(8, 8), given={"compute": "bf16", **named})
    assert dtypes_in(stages.nodes(torch.ops.fxopt_tests.double.default)[0]) == [dtype]
    assert found.dtype == FP32


@pytest.mark.parametrize(
    ("chosen", "equations"),
    [
        ("low", "ij,jk->ik ij,jk ...ij,...jk->...ik ij,ij->i ...,...->"),
        ("fp32", "ij-> ij->j ii ij,kl->il ...i->i"),
        ("follow", "i,j->ij ij,ij->ij ij->ji ii->i ...i,...i->...i"),
    ],
)
def test_an_einsum_is_a_product_where_operands_share_a_summed_index(chosen: str, equations: str) -> None:
    for equation in equations.split():
        assert class_of_einsum(equation) == chosen, equation


def test_an_einsum_that_sums_is_not_rounded() -> None:
    assert run(lambda x: torch.einsum("ij->", x), x := torch.rand(64, 64))[0] == x.sum()


@pytest.mark.parametrize("name", ["put", "scatter", "number"])
def test_sums_by_index_are_in_fp32(name: str) -> None:
    at = torch.zeros(512, dtype=torch.int64)
    rows = at[:, None].expand(-1, 4)

    def summed(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        if name == "put":
            return y[:4].index_put((at,), y, accumulate=True)
        return torch.scatter(y[:4], 0, rows, y if name == "scatter" else 1.0, reduce="add")  # type: ignore[call-overload, no-any-return]

    x, w = torch.rand(512, 16), torch.rand(16, 4)
    with torch.no_grad():
        found, stages = run(summed, x, w)
    nodes = stages.nodes(aten.index_put.default, aten.scatter.reduce, aten.scatter.value_reduce)
    assert [{one for one in dtypes_in(node) if one.is_floating_point} for node in nodes] == [{FP32}]
    torch.testing.assert_close(found, summed(x, w), rtol=0.01, atol=0.05)


@pytest.mark.parametrize("function", [torch.special.i1, torch.special.i1e, torch.special.ndtri, torch.special.erfcx])
def test_functions_without_a_kernel_in_16_bits(function: Callable[[Tensor], Tensor]) -> None:
    x, w = torch.rand(4, 8, requires_grad=True), torch.rand(8, 8)
    run(lambda x, w: function(torch.sigmoid(x @ w)), x, w)[0].sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


# --- what stays in its dtype -------------------------------------------------------------------------------------


def elu_(x: Tensor, w: Tensor) -> Tensor:
    return F.elu(F.conv2d(x, w), inplace=True)


def read_before_and_after(x: Tensor, w: Tensor) -> Tensor:
    y = F.conv2d(x, w, padding=1)
    before = F.conv2d(y.view(y.shape) * 1, w, padding=1)
    y.mul_(2)
    return before + F.conv2d(y, w, padding=1)


def written_by_a_view(x: Tensor, w: Tensor) -> Tensor:
    y = F.conv2d(x, w, padding=1)
    y[:, 0].mul_(3)
    return F.conv2d(y, w, padding=1)


@pytest.mark.parametrize("ambient", [False, True])
@pytest.mark.parametrize("function", [elu_, read_before_and_after, written_by_a_view])
def test_a_product_that_is_written_to_has_16_bits(function: Callable[..., Tensor], ambient: bool) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 4, 6, 6), (torch.randn(4, 4, 3, 3) / 6).requires_grad_()
    (right,) = torch.autograd.grad(function(x, w).square().sum(), w)
    with autocast() if ambient else contextlib.nullcontext():
        found, stages = run(function, x, w)
    for node in stages.nodes(aten.conv2d.default, aten.convolution.default):
        assert dtypes_in(node)[:2] == [BF16, BF16]
    assert relative(found.detach().float(), function(x, w).detach()) < 2**-6
    assert relative(torch.autograd.grad(found.float().square().sum(), w)[0], right) < 2**-5


def test_notes_name_the_dtype_that_a_product_stays_in() -> None:
    def region(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x @ w

    for dtype, name in ((BF16, "bf16"), (FP32, "fp32"), (torch.float64, "float64")):
        x, w = torch.ones(2, 8, dtype=dtype), torch.ones(8, 8, dtype=dtype)
        notes = run(region, x, w)[1].reports[0].notes
        assert any(f"stays in {name}: autocast is switched off here" in note for note in notes), notes


def test_cells_of_recurrent_networks_are_noted() -> None:
    _, stages = run(nn.GRUCell(8, 8), torch.randn(2, 8))
    (node,) = stages.nodes(aten.gru_cell.default)
    assert set(dtypes_in(node)) == {FP32}
    assert any("stays in fp32: its products are inside of one operator" in note for note in stages.reports[0].notes)


# --- readers -----------------------------------------------------------------------------------------------------


def error_of_gradient(call: Callable[..., Tensor], inputs: Sequence[Tensor], exact: Tensor) -> float:
    x = inputs[0].detach().clone().requires_grad_()
    call(x, *inputs[1:]).backward()
    assert x.grad is not None
    return relative(x.grad, exact)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("view", [False, True])
def test_gradients_of_many_readers_are_not_all_summed_in_16_bits(view: bool, checkpointed: bool) -> None:
    count = 24

    def readers(h: Tensor, w: Tensor) -> Tensor:
        h = h.view(4, 8, 64).transpose(0, 1) if view else h
        return torch.stack([torch.tanh(F.linear(h, w[at])).sum() for at in range(count)]).sum()

    def many(x: Tensor, w: Tensor) -> Tensor:
        h = torch.tanh(x)
        return checkpoint(readers, h, w, use_reentrant=False) if checkpointed else readers(h, w)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    x, w = torch.randn(32, 64), torch.randn(count, 64, 64) / 8
    right = x.double().requires_grad_()
    many(right, w.double()).backward()
    assert right.grad is not None
    with autocast():
        theirs = error_of_gradient(many, (x, w), right.grad)
    stages = Stages()
    assert error_of_gradient(torch.compile(many, backend=stages), (x, w), right.grad) < 1.3 * theirs
    shared = [cast for cast in stages.report.casts if cast.bytes == x.numel() * 2]
    assert len(shared) == count // READERS


def test_what_requires_no_grad_and_weights_are_cast_once() -> None:
    def many(x: Tensor, w: Tensor) -> Tensor:
        return torch.stack([torch.tanh(F.linear(x * at, w)).sum() for at in range(8)]).sum()

    def readers(*inputs: Tensor) -> list[int]:
        _, stages = run(many, *inputs)
        return [cast.readers for cast in stages.report.casts if cast.after == "bfloat16" and cast.readers > 1]

    weight = torch.randn(8, 8)
    assert readers(torch.randn(4, 8), nn.Parameter(weight)) == [8]
    assert readers(torch.randn(4, 8, requires_grad=True), weight) == [8]


# --- patterns ----------------------------------------------------------------------------------------------------


class Inner(nn.Module):
    """Breaks its graph where `breaks`."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.a, self.breaks = nn.Linear(8, 8), breaks

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return x * 2


class Outer(nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.first, self.inner, self.second = nn.Linear(8, 8), Inner(breaks), nn.Linear(8, 8)
        self.drop, self.same = nn.Dropout(0.0), nn.Identity()

    def forward(this, x: Tensor) -> Tensor:
        return this.same(this.drop(this.second(this.inner(this.first(x)))))  # type: ignore[no-any-return]


def kept_by(pattern: str, model: Callable[[Tensor], Tensor]) -> list[int]:
    """Which of the linears of `model` stay in fp32."""
    _, stages = run(model, torch.randn(3, 8), given={"compute": "bf16", "keep_fp32": [pattern]})
    linears = stages.nodes(aten.linear.default)
    assert len(linears) == 3
    return [at for at, node in enumerate(linears) if dtypes_in(node)[1] == FP32]


@pytest.mark.parametrize("breaks", [False, True])
def test_patterns_name_modules_from_the_model_that_is_compiled(breaks: bool) -> None:
    expected = {"second": [2], "inner.a": [1], "inner": [1], "this.first": [0], "drop": [], "same": []}
    for pattern, kept in expected.items():
        assert kept_by(pattern, Outer(breaks)) == kept, pattern
    for pattern in ("nope", "a"):  # each time, for every model
        for _ in range(2):
            with pytest.raises(OptionError, match=f"'{pattern}' matches no module of the model, which has drop, first"):
                kept_by(pattern, Outer(breaks))


def test_patterns_where_a_function_that_calls_the_model_is_compiled() -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).sum()  # type: ignore[no-any-return]

    for pattern in ("second", "net.second"):
        _, stages = run(loss, Outer(), torch.randn(3, 8), given={"compute": "bf16", "keep_fp32": [pattern]})
        assert dtypes_in(stages.nodes(aten.linear.default)[2])[1] == FP32


def test_a_pattern_for_another_of_the_layers_that_are_compiled_one_by_one() -> None:
    model, stages = nn.Sequential(Inner(False), Inner(False)), Stages({"compute": "bf16", "keep_fp32": ["1"]})
    for layer in model:
        layer.compile(backend=stages)
    model(torch.randn(3, 8))
    assert [dtypes_in(node)[1] for node in stages.nodes(aten.linear.default)] == [BF16, FP32]


# --- where casts stand -------------------------------------------------------------------------------------------

ROWS = torch.zeros(64, dtype=torch.int64)


@pytest.mark.parametrize(
    "repeated",
    [
        lambda x: x.repeat(16, 1),
        lambda x: x.tile(16, 1),
        lambda x: x.repeat_interleave(16, 0),
        lambda x: x[ROWS],
        lambda x: x.index_select(0, ROWS),
        lambda x: x.gather(0, ROWS[:, None].expand(-1, 8)),
        lambda x: F.pad(x, (0, 0, 0, 60)),
    ],
)
def test_a_cast_goes_above_what_repeats_a_tensor_without_gradient(repeated: Callable[[Tensor], Tensor]) -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return repeated(x.exp()) @ w

    x, w = torch.randn(4, 8), nn.Parameter(torch.randn(8, 8))
    for wants, size in ((False, 4), (True, 64)):
        found, stages = run(function, x.requires_grad_(wants), w)
        (cast,) = [one for one in stages.report.casts if one.after == "bfloat16" and one.bytes != 2 * 64]
        assert cast.bytes == 2 * 8 * size
        assert torch.equal(found.bfloat16(), repeated(x.exp().bfloat16()) @ w.bfloat16())


def test_a_cast_stays_below_a_mask_and_padding_that_is_not_zero() -> None:
    x, w = torch.rand(4, 8), torch.randn(8, 8)
    for moved in (lambda x: x[x[:, 0] > -1], lambda x: F.pad(x, (0, 0, 0, 60), value=0.3)):
        _, stages = run(lambda x, w, moved=moved: moved(x.exp()) @ w, x, w)
        assert [one.source for one in stages.report.casts if one.source.startswith("exp")] == []


# --- bodies of checkpoints ---------------------------------------------------------------------------------------


def with_a_sum(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w).tanh() + w.pow(2).sum()


def stopped(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        part = w[:4]
    return F.linear(x, part).tanh().sum() + F.linear(x, w).sum()


@pytest.mark.parametrize(
    "body",
    [
        lambda x, w: x @ w.t(),
        lambda x, w: F.linear(x, w[:4]).tanh(),
        lambda x, w: F.linear(x, w[:4]).tanh() @ w[2:6],
        lambda x, w: F.linear(x, w) + x @ w,
        with_a_sum,
        stopped,
    ],
)
@pytest.mark.parametrize("given_as", [lambda w: w, lambda w: w.t(), lambda w: w[2:10]])
def test_weights_of_checkpointed_bodies_are_cast_outside(
    body: Callable[..., Tensor], given_as: Callable[[Tensor], Tensor]
) -> None:
    def step(x: Tensor, w: Tensor) -> Tensor:
        return checkpoint(body, x.tanh(), given_as(w), use_reentrant=False)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    x, w = torch.randn(4, 8, requires_grad=True), nn.Parameter(torch.randn(8, 8) / 3)
    w = nn.Parameter(torch.randn(12, 8) / 3) if given_as(torch.empty(12, 8)).shape == (8, 8) else w
    found, stages = run(step, x, w)
    inside = [
        node for graph in stages.graphs for one in submodules(graph) if one is not graph for node in one.graph.nodes
    ]
    cast = [str(node.args[0]) for node in inside if is_made(node) and value_of(node).dtype == BF16]
    assert len([one for one in cast if "tanh" not in one]) == (body is stopped)
    right = torch.autograd.grad(step(x, w).square().sum(), (x, w))
    for ours, theirs in zip(torch.autograd.grad(found.square().sum(), (x, w)), right, strict=True):
        assert relative(ours, theirs) < 2**-5


def test_a_weight_that_a_body_writes_to_is_cast_where_it_is_read() -> None:
    def body(x: Tensor, w: Tensor) -> Tensor:
        w.mul_(2)
        return F.linear(x, w).tanh() @ w[:4]

    def step(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            return checkpoint(body, x, w, use_reentrant=False)  # type: ignore[no-any-return]

    x, w = torch.randn(4, 4), torch.randn(4, 4)
    assert relative(run(step, x, w.clone())[0], step(x, w.clone())) < 2**-5
