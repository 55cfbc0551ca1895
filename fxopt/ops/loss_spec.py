"""What a linear layer's cross-entropy is, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["LossAndGradients", "LossSpec", "Wanted"]


@dataclass(frozen=True)
class LossSpec:
    """The constants of a loss. With z = ``softcap * tanh(scale * logits / softcap)`` (softcap 0: z = scale * logits),
    lse = ``log(sum(exp(z)))``, e = label_smoothing and y the target, a row's loss is

        lse - (1 - e) z[y] - e mean(z) + z_loss lse^2

    and 0 where y is ignore_index; reduction: "mean" over the rows that are not ignored, "sum" or "none".
    """

    scale: float
    softcap: float
    label_smoothing: float
    z_loss: float
    ignore_index: int
    reduction: str

    @property
    def constants(self) -> tuple[float, float, float, float, int]:
        """All but the reduction, which is not the business of a row; symbols, as dynamic shapes bring, as numbers."""
        numbers = (self.scale, self.softcap, self.label_smoothing, self.z_loss)
        scale, softcap, label_smoothing, z_loss = map(float, numbers)
        return scale, softcap, label_smoothing, z_loss, int(self.ignore_index)


@dataclass(frozen=True)
class Wanted:
    """Which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def flags(self) -> tuple[bool, bool, bool]:
        return self.hidden, self.weight, self.bias

    @property
    def products(self) -> int:
        """How many matrix products the gradients take, once those by the logits are known."""
        return self.hidden + self.weight

    def __bool__(self) -> bool:
        return any(self.flags)


@dataclass(frozen=True)
class LossAndGradients:
    """What one pass over the rows gives, in fp32 (losses; fp64 for fp64) and `gradient_dtype`.

    losses: [N], zero where ignored; count: how many rows are not ignored; hidden [N, H], weight [V, H] and bias [V]:
    gradients of the sum of ``upstream * losses`` (of its mean, if that is the reduction), None where not wanted;
    argmax, lse: [N], the class of the largest logit and logsumexp(z), of ignored rows too, None where not wanted.
    """

    losses: Tensor
    count: int | Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    argmax: Tensor | None
    lse: Tensor | None

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.weight, self.bias
