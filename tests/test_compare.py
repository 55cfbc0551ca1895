"""The comparison itself must fail when it should: each test plants one mistake in a model's backend."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxopt.testing import assert_close_to_fp64, compare, errors, step, truth
from fxopt.testing.exact import Widen


class Net(nn.Module):
    """A linear, a softmax in float32 with a bias it cannot see, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.out = nn.Linear(16, 32), nn.Linear(32, 16)
        self.shift, self.unused = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.linear(x) + self.shift, -1, dtype=torch.float32).to(x.dtype)
        return self.out(weights).float().square().mean()


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"x": torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).to(dtype)}


def spoilt(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """A backend that runs the graph eagerly and applies `change` to its first output."""

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        return lambda *args: (change(gm(*args)[0]),)

    return backend


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is a few units of the last place too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.by = by
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.by, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_passes(dtype: torch.dtype) -> None:
    found = assert_close_to_fp64(Net().to(dtype), inputs(dtype), backend="eager")
    assert len(found.errors) == 6, "loss and five gradients; the unused parameter has none on either side"
    assert found["grad shift"].norm < 1e-15, "a gradient that is zero in exact arithmetic"
    assert str(found).startswith("within the fp64 rule")


@pytest.mark.parametrize("off", [1e-5, -1e-5])
def test_wrong_loss_fails(off: float) -> None:
    with pytest.raises(AssertionError, match="1 of 6 break the fp64 rule\n  loss: compiled"):
        assert_close_to_fp64(Net(), inputs(), backend=spoilt(lambda loss: loss + off * loss.detach()))


def test_wrong_gradient_fails_and_names_it() -> None:
    found = errors(Net(), inputs(), backend=spoilt(lambda loss: Scaled.apply(loss, 1 + 2e-6)))
    assert not found.ok
    assert found["loss"].ok
    assert not found["grad out.weight"].ok
    assert "break the fp64 rule" in str(found)
    assert str(found).count("grad ") >= 2


def test_missing_gradient_fails() -> None:
    model = Net()
    eager, exact = step(model, inputs()), truth(model, inputs())
    ours = step(model, inputs())
    ours.gradients["out.bias"] = None  # type: ignore[index]
    with pytest.raises(AssertionError, match=r"grad out\.bias: compiled gives None"):
        compare(ours, eager, exact).check()


def test_wrong_shape_or_dtype_fails() -> None:
    model = Net()
    eager, exact = step(model, inputs()), truth(model, inputs())
    ours = step(model, inputs())
    ours.gradients["out.bias"] = ours.gradients["out.bias"].double()  # type: ignore[index, union-attr]
    with pytest.raises(AssertionError, match=r"compiled is float64\[16\], eager float32\[16\]"):
        compare(ours, eager, exact).check()


def test_nan_fails_where_the_truth_is_a_number() -> None:
    with pytest.raises(AssertionError, match="nan"):
        assert_close_to_fp64(Net(), inputs(), backend=spoilt(lambda loss: loss * float("nan")))


def test_truth_is_not_narrowed_inside() -> None:
    """The same function written in fp64 by hand agrees to fp64's own rounding; `.double()` alone stops at fp32's."""
    model, x = Net(), inputs()["x"].double()
    found = truth(model, inputs()).loss
    wide = Net().double()
    exact = wide.out(torch.softmax(wide.linear(x) + wide.shift, -1)).square().mean()
    narrowed = wide(x)
    assert (found - exact).abs() / exact < 1e-15
    assert (narrowed - exact).abs() / exact > 1e-10


def test_widen_reaches_what_a_checkpoint_recomputes() -> None:
    seen = []

    def body(x: Tensor) -> Tensor:
        y = x.float()
        seen.append(y.dtype)
        return y.exp().sin()

    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    with Widen():
        torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False).sum().backward()
    assert seen == [torch.float64, torch.float64]


def test_grouped_mm_in_fp64_is_that_of_fp32() -> None:
    rows, weight = torch.randn(7, 16, requires_grad=True), torch.randn(3, 16, 8, requires_grad=True)
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    narrow = torch.autograd.grad(nn.functional.grouped_mm(rows, weight, offs=ends).square().sum(), (rows, weight))
    wide_inputs = [t.detach().double().requires_grad_() for t in (rows, weight)]
    with Widen():
        wide = torch.autograd.grad(nn.functional.grouped_mm(*wide_inputs, offs=ends).square().sum(), wide_inputs)
    for a, b in zip(narrow, wide, strict=True):
        assert b.dtype == torch.float64
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_a_model_without_a_loss_is_refused() -> None:
    with pytest.raises(TypeError, match="pass loss="):
        errors(nn.Linear(4, 4), {"input": torch.randn(2, 4)}, backend="eager")
