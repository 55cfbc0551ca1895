"""The kernels that ``fxopt kernels`` compiles: what each family names as representative of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fxopt.kernels.cards import Card
from fxopt.kernels.configs import Config
from fxopt.kernels.source import Kernel

__all__ = ["FAMILIES", "Shipped", "catalog"]

FAMILIES = ("attention", "norm", "linear_cross_entropy")
"""Each has a module of this package with a function ``shipped(card)``."""


@dataclass(frozen=True)
class Shipped:
    """A kernel for one representative spec, with its candidates on a card.

    name:    unique, with what tells it from others of its family: "attention_forward bf16 d64 causal".
    configs: the default first, as the family's own launches choose among them.
    aligned: the arguments, pointers and strides, that 16 divides: a launcher specialises on that, and so do we.
    """

    name: str
    kernel: Kernel
    configs: tuple[Config, ...]
    aligned: tuple[str, ...] = ()


def catalog(card: Card, families: Sequence[str] = FAMILIES) -> Iterator[Shipped]:
    """What is shipped for `card`. Families import this module, and so are imported here only when asked for."""
    from fxopt.kernels import attention_shipped, linear_cross_entropy, norm

    modules = {"attention": attention_shipped, "norm": norm, "linear_cross_entropy": linear_cross_entropy}
    for family in families:
        yield from modules[family].shipped(card)
