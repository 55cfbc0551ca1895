"""Bugs put into rules on purpose: small patches, each with what must catch it, and a function that meets it.

`BUGS` is for tests of verification (tests/test_seeded_bugs.py) and of ``fxopt bisect``: `rule` is one of fxopt's rules
with one thing wrong, `options()` compile with it in place of the right one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.passes import attention, linear_cross_entropy, norm
from fxopt.rule import Pattern, Rule

EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Bug:
    """A rule with one thing wrong.

    function: what meets the bug, of the tensors that `arguments` makes.
    catcher:  "interface" (`verify.same_interface` and `same_value`, always on), "fp64" (`differential.same_function`,
              with ``options={"verify": True}``), or "laws" (`fxopt.testing.check_laws` alone).
    message:  what the catcher says, as a regular expression.
    """

    name: str
    rule: Rule
    function: Callable[..., Any]
    arguments: Callable[[], tuple[Tensor, ...]]
    catcher: str
    message: str

    def options(self) -> dict[str, Any]:
        """fxopt's options with the broken rule alone, run last and forced."""
        removed = [f"-{right.name}" for right in (linear_cross_entropy.RULE, attention.RULE, norm.RULE)]
        return {"rules": [*removed, self.rule], "force": [self.rule.name], "verify": True}


def _broken(right: Rule, wrong: Callable[..., Any], name: str) -> Rule:
    """`right` with another replacement, which still gets the site's lowering."""

    @functools.wraps(right.replacement)
    def replacement(**values: Any) -> Any:
        return wrong(right.replacement, values)

    return dataclasses.replace(right, name=name.replace(" ", "_"), replacement=replacement)


# --- what meets them ---------------------------------------------------------------------------------------------


def normed(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A residual add and the norm of Llama; both are read."""
    total = x + residual
    h = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * h, total


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention written out, keys of fewer heads."""
    k, v = (one.repeat_interleave(2, 1) for one in (k, v))
    later = torch.arange(k.shape[2])[None, :] > torch.arange(q.shape[2])[:, None]
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(later, float("-inf")).softmax(-1) @ v


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with dropout."""
    return F.dropout((q @ k.repeat_interleave(2, 1).mT).softmax(-1), 0.25, True) @ v.repeat_interleave(2, 1)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with capped scores."""
    return (5.0 * torch.tanh(q @ k.repeat_interleave(2, 1).mT / 5.0)).softmax(-1) @ v.repeat_interleave(2, 1)


def lost(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """A loss with ignored rows."""
    return F.cross_entropy(F.linear(hidden, weight), target)


def swished(x: Tensor) -> Tensor:
    """A pointwise function."""
    return x * torch.sigmoid(1.5 * x)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def _of_norm() -> tuple[Tensor, ...]:
    return _normal(2, 3, 16, seed=0), _normal(2, 3, 16, seed=1), _normal(16, seed=2)


def _of_attention() -> tuple[Tensor, ...]:
    return _normal(2, 4, 6, 8, seed=0), _normal(2, 2, 6, 8, seed=1), _normal(2, 2, 6, 8, seed=2)


def _of_loss() -> tuple[Tensor, ...]:
    target = torch.tensor([0, 5, -100, 30, 7])
    return _normal(5, 8, seed=0), _normal(31, 8, seed=1), target


def _of_swish() -> tuple[Tensor, ...]:
    return (_normal(3, 5, seed=0),)


# --- bugs --------------------------------------------------------------------------------------------------------


def _of_norms(name: str, wrong: Callable[..., Any], catcher: str, message: str) -> Bug:
    return Bug(name, _broken(norm.RULE, wrong, name), normed, _of_norm, catcher, message)


def _of_attentions(
    name: str, wrong: Callable[..., Any], catcher: str, message: str, function: Callable[..., Any] = attended
) -> Bug:
    return Bug(name, _broken(attention.RULE, wrong, name), function, _of_attention, catcher, message)


def _of_losses(name: str, wrong: Callable[..., Any], catcher: str, message: str) -> Bug:
    return Bug(name, _broken(linear_cross_entropy.RULE, wrong, name), lost, _of_loss, catcher, message)


def _of_swishes(name: str, replacement: Callable[..., Any], catcher: str, message: str) -> Bug:
    rule = Pattern(
        name=name.replace(" ", "_"), spellings=(swished_by,), replacement=replacement,
        inputs=lambda draw: {"x": draw.tensor(draw.size(1, 4), 5, dtype=torch.float32), "k": 1.5},
    )  # fmt: skip
    return Bug(name, rule, swished, _of_swish, catcher, message)


def swished_by(x: Tensor, k: float) -> Tensor:
    """The spelling of `swished`."""
    return x * torch.sigmoid(k * x)


def _another_form(**changes: Any) -> Callable[..., Any]:
    return lambda right, values: right(**{**values, "form": dataclasses.replace(values["form"], **changes)})


def _sqrt_for_rsqrt(right: Callable[..., Any], values: dict[str, Any]) -> Any:
    total = values["x"] + values["residual"]
    return values["weight"] * total * torch.sqrt(total.pow(2).mean(-1, keepdim=True) + values["eps"]), total


def _without_residual(right: Callable[..., Any], values: dict[str, Any]) -> Any:
    return right(**{**values, "residual": torch.zeros_like(values["residual"])})


def _stream_before_the_add(right: Callable[..., Any], values: dict[str, Any]) -> Any:
    return right(**values)[0], values["x"].clone()


def _gradient_stopped(right: Callable[..., Any], values: dict[str, Any]) -> Any:
    return right(**{**values, "weight": values["weight"].detach()})


def _outputs_alias(right: Callable[..., Any], values: dict[str, Any]) -> Any:
    out, _ = right(**values)
    return out, out.view(out.shape)


def _transposed(out: Any, axes: tuple[int, int]) -> Any:
    return out.transpose(*axes).contiguous().transpose(*axes)


def _dropout_recomputed(right: Callable[..., Any], values: dict[str, Any]) -> Any:
    """What a partitioner does that recomputes a dropout: the value of one draw, the gradient of another."""
    one, other = right(**values), right(**values)
    return other + (one - other).detach()


def _dropout_constant(right: Callable[..., Any], values: dict[str, Any]) -> Any:
    return right(**{**values, "dropout": 0.0})


def _heads_swapped(right: Callable[..., Any], values: dict[str, Any]) -> Any:
    return right(**{**values, "value": values["value"].flip(1)})


def _program_without_cap(right: Callable[..., Any], values: dict[str, Any]) -> Any:
    kept = tuple(one for one in values["programs"] if one[0] != "program")
    return right(**{**values, "programs": kept})


def _given(**changes: Any) -> Callable[..., Any]:
    return lambda right, values: right(**{**values, **changes})


def _another_ignored(right: Callable[..., Any], values: dict[str, Any]) -> Any:
    target = values["target"]
    return right(**{**values, "target": target.masked_fill(target == 5, values["ignore_index"])})


BUGS: tuple[Bug, ...] = (
    _of_norms("sqrt for rsqrt", _sqrt_for_rsqrt, "fp64", "output 0 differs"),
    _of_norms("residual dropped", _without_residual, "fp64", "differs"),
    _of_norms("stream before the add", _stream_before_the_add, "fp64", "output 1 differs"),
    _of_norms("eps outside the root", _another_form(eps_at="root"), "fp64", "output 0 differs"),
    _of_norms("one added to the weight", _another_form(offset=1.0), "fp64", "output 0 differs"),
    _of_norms("gradient of the weight stopped", _gradient_stopped, "fp64", "gradient of input 2 differs"),
    _of_norms("outputs that alias", _outputs_alias, "interface", "aliasing of the outputs changed"),
    _of_norms("result in fp64", lambda right, values: tuple(one.double() for one in right(**values)), "interface",
              "dtype was torch.float32"),
    _of_norms("wrong strides", lambda right, values: (_transposed(right(**values)[0], (0, 2)), right(**values)[1]),
              "interface", "stride was"),
    _of_attentions("mask classes swapped", _given(band=(0, None)), "fp64", "output 0 differs"),
    _of_attentions("mask dropped", _given(band=(None, None)), "fp64", "output 0 differs"),
    _of_attentions("scale of another head size", _given(scale=0.25), "fp64", "output 0 differs"),
    _of_attentions("key heads swapped", _heads_swapped, "fp64", "output 0 differs"),
    _of_attentions("heads laid out last", _given(heads_last=True), "interface", "stride was"),
    _of_attentions("cap of the scores dropped", _program_without_cap, "fp64", "output 0 differs", capped),
    _of_attentions("dropout recomputed in the backward", _dropout_recomputed, "laws", "gradients are not those",
                   dropped),
    _of_attentions("dropout never drawn", _dropout_constant, "interface", "should be drawn anew", dropped),
    _of_losses("rows ignored that count", _another_ignored, "fp64", "output 0 differs"),
    _of_losses("mean for sum", lambda right, values: tuple(one * 4 for one in right(**values)), "fp64",
               "output 0 differs"),
    _of_losses("labels smoothed", _given(label_smoothing=0.1), "fp64", "output 0 differs"),
    _of_swishes("input returned", lambda x, k: x.view(x.shape), "interface", "aliasing of the outputs changed"),
    _of_swishes("input written to", lambda x, k: x.detach().mul_(1.0) * torch.sigmoid(k * x), "interface",
                "in-place writes changed"),
    _of_swishes("a random number", lambda x, k: F.silu(k * x) / k + 0 * torch.rand_like(x), "interface",
                "random operators changed"),
    _of_swishes("rounded to bf16", lambda x, k: (F.silu(k * x) / k).bfloat16().float(), "laws",
                "against fp64"),
)  # fmt: skip
