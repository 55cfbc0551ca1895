"""Is a compiled model as accurate as eager PyTorch? The question is put to fp64, not to a tolerance.

Three runs of one training step: eager in fp64 (the truth), eager in the model's own dtype, and the compiled model in
that dtype. The rule, for the loss, the outputs asked for and every gradient, with e(x) = ||x - truth||:

    e(compiled) <= RATIO * e(eager) + FLOOR * eps * (||truth|| + typical)

`RATIO` is 2: another order of the same sums must not lose more than a bit. `FLOOR` is 2, that is four roundings of
eps / 2: eager may be right by luck (a loss is one number), and a correct rounding of the truth is already one away.
`eps` is that of the coarsest dtype at work: parameters', loss's, or ambient autocast's. `typical` is the norm that
the tensor would have if its entries were as large as the model's gradient entries are (root mean square); without it
no rule could hold for gradients that are zero in exact arithmetic and rounding noise in any other (the bias of
attention keys: softmax does not see it). It is 0 for losses and outputs.

The truth is computed in fp64 throughout: models cast to float32 inside (norms, softmax, losses, RoPE tables), which
would make the truth no better than what it judges, so every such cast is widened (`Widen`).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.differential import typical_entry
from fxopt.testing.exact import Widen

RATIO = 2.0
FLOOR = 2.0

Loss = Callable[[Any], Tensor]
Context = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Step:
    """What one training step produced: scalar loss, named outputs, for each parameter its gradient or None.

    `eps` is the machine epsilon of the coarsest floating dtype that took part.
    """

    loss: Tensor
    outputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]
    eps: float

    def named(self) -> dict[str, Tensor | None]:
        """Every tensor under the name that a message gives it."""
        outputs = {f"output {name}": value for name, value in self.outputs.items()}
        return {"loss": self.loss, **outputs, **{f"grad {name}": value for name, value in self.gradients.items()}}


@dataclass(frozen=True)
class Error:
    """How far one tensor is from the truth, relative to the truth's norm: compiled, eager, and what is allowed."""

    name: str
    compiled: float
    eager: float
    allowed: float
    norm: float

    @property
    def ok(self) -> bool:
        """False also when the compiled value is NaN and the truth is not."""
        return self.compiled <= self.allowed

    @property
    def excess(self) -> float:
        """Compiled over allowed; above 1 (or NaN, counted as infinite) the rule is broken."""
        ratio = self.compiled / self.allowed if self.allowed else (0.0 if self.compiled == 0 else math.inf)
        return math.inf if math.isnan(ratio) else ratio

    def __str__(self) -> str:
        return (
            f"{self.name}: compiled {self.compiled:.2e}, eager {self.eager:.2e}, allowed {self.allowed:.2e}"
            f" ({self.excess:.3g}x), norm {self.norm:.3g}"
        )


@dataclass(frozen=True)
class Comparison:
    """The errors of one step, worst first, and structural differences (a gradient on one side only, a shape)."""

    errors: tuple[Error, ...]
    differences: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.differences and all(error.ok for error in self.errors)

    def __getitem__(self, name: str) -> Error:
        return next(error for error in self.errors if error.name == name)

    def __str__(self) -> str:
        bad = [str(error) for error in self.errors if not error.ok]
        shown = [*self.differences, *bad[:8]]
        more = [f"and {len(bad) - 8} more"] if len(bad) > 8 else []
        verdict = "within the fp64 rule" if self.ok else f"{len(bad)} of {len(self.errors)} break the fp64 rule"
        worst = [] if bad or not self.errors else [f"worst: {self.errors[0]}"]
        return "\n  ".join([verdict, *shown, *more, *worst])

    def check(self) -> Comparison:
        """Return self, or raise AssertionError naming what is worst."""
        if not self.ok:
            raise AssertionError(str(self))
        return self


def loss_of(output: Any) -> Tensor:
    """The scalar to differentiate: `output.loss`, the first of a tuple, or a scalar tensor itself."""
    loss = getattr(output, "loss", None)
    if loss is None:
        loss = output[0] if isinstance(output, tuple) else output
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise TypeError(f"no scalar loss in {type(output).__name__}: pass loss=, a function from the output to one")
    return loss


def step(
    model: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    parameters: nn.Module | None = None,
    loss: Loss = loss_of,
    outputs: Sequence[str] = (),
    context: Context = contextlib.nullcontext,
) -> Step:
    """One forward and backward of `model(**inputs)`; old gradients are dropped first.

    `parameters` is the module whose gradients to read when `model` is a function; `outputs` are attributes of the
    model's output to keep (detached); `context` is entered around the forward only, as autocast should be.
    """
    module = parameters if parameters is not None else model
    if not isinstance(module, nn.Module):
        raise TypeError("model is a function: pass parameters=, the module that it runs")
    module.zero_grad(set_to_none=True)
    with context():
        output = model(**inputs)
        scalar = loss(output)
        device = scalar.device.type
        ambient = [torch.get_autocast_dtype(device)] if torch.is_autocast_enabled(device) else []
    kept = {name: getattr(output, name).detach() for name in outputs}
    scalar.backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in _parameters(module)}
    dtypes = {scalar.dtype, *(p.dtype for p in module.parameters()), *ambient}
    return Step(scalar.detach(), kept, gradients, max(torch.finfo(d).eps for d in dtypes if d.is_floating_point))


def truth(model: nn.Module, inputs: Mapping[str, Any], *, loss: Loss = loss_of, outputs: Sequence[str] = ()) -> Step:
    """The same step in fp64, on a copy: parameters, buffers, floating inputs and every cast inside are widened."""
    wide = copy.deepcopy(model).double()
    with Widen():
        return step(wide, {k: _to_double(v) for k, v in inputs.items()}, loss=loss, outputs=outputs)


def compare(compiled: Step, eager: Step, exact: Step) -> Comparison:
    """Apply the rule of this module to two steps in one dtype and the exact one; gradients of None must agree."""
    ours, theirs, right = compiled.named(), eager.named(), exact.named()
    typical = typical_entry(exact.gradients)
    errors, differences = [], []
    for name, reference in right.items():
        mine, other = ours.get(name), theirs.get(name)
        difference = _difference(name, mine, other)
        if difference:
            differences.append(difference)
        elif mine is not None and other is not None and reference is not None:
            entry = typical if name.startswith("grad ") else 0.0
            errors.append(_error(name, mine, other, reference, eager.eps, entry))
    return Comparison(tuple(sorted(errors, key=lambda e: -e.excess)), tuple(differences))


def errors(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    backend: str | Callable[..., Any] = "fxopt",
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    loss: Loss = loss_of,
    outputs: Sequence[str] = (),
    context: Context = contextlib.nullcontext,
) -> Comparison:
    """Run one training step three ways and compare; `model` itself is left as it was (copies are run).

    Args:
        model: any module in a floating dtype, in the mode (train, eval) to test; no dropout, or the runs differ.
        inputs: keyword arguments of one call.
        backend, options, dynamic: handed to `torch.compile`.
        loss: from the model's output to the scalar to differentiate.
        outputs: attributes of the output to compare too, such as `("logits",)`.
        context: entered around the forward of the two low-precision runs, such as
            `lambda: torch.autocast("cpu", torch.bfloat16)`.
    """
    eager, ours = copy.deepcopy(model), copy.deepcopy(model)
    extra = {} if options is None else {"options": dict(options)}
    compiled = torch.compile(ours, backend=backend, dynamic=dynamic, **extra)  # type: ignore[call-overload]
    return compare(
        step(compiled, inputs, parameters=ours, loss=loss, outputs=outputs, context=context),
        step(eager, inputs, loss=loss, outputs=outputs, context=context),
        truth(model, inputs, loss=loss, outputs=outputs),
    )


def assert_close_to_fp64(model: nn.Module, inputs: Mapping[str, Any], **how: Any) -> Comparison:
    """`errors`, raising AssertionError with the worst tensors and their numbers where the rule is broken."""
    return errors(model, inputs, **how).check()


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name.removeprefix("_orig_mod."), p) for name, p in module.named_parameters())


def _to_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _difference(name: str, ours: Tensor | None, theirs: Tensor | None) -> str | None:
    if (ours is None) != (theirs is None):
        return f"{name}: compiled gives {_brief(ours)}, eager {_brief(theirs)}"
    if ours is not None and theirs is not None and _brief(ours) != _brief(theirs):
        return f"{name}: compiled is {_brief(ours)}, eager {_brief(theirs)}"
    return None


def _brief(value: Tensor | None) -> str:
    return "None" if value is None else f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _error(name: str, ours: Tensor, theirs: Tensor, exact: Tensor, eps: float, typical: float) -> Error:
    norm = float(exact.norm())
    scale = norm or 1.0
    off, eager_off = (float((x.double() - exact).norm()) / scale for x in (ours, theirs))
    floor = FLOOR * eps * (norm + typical * math.sqrt(exact.numel())) / scale
    return Error(name, off, eager_off, RATIO * eager_off + floor, norm)
