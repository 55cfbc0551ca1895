"""Hypothesis strategies: tensors, random modules, and what rules draw. See also `programs` and `interval_masks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fxopt.rule import Rule
from fxopt.testing.layouts import LAYOUTS, code_of, made
from fxopt.testing.random_modules import ModuleSpec, draw_module

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DRAWN = ("contiguous", "transposed", "strided", "offset", "misaligned")


class HypothesisDraw:
    """A `fxopt.rule.Draw` on hypothesis: sizes and choices shrink, seeds replay, layouts vary.

    `code(value)` is an expression that makes a drawn value again.
    """

    def __init__(self, draw: st.DrawFn):
        self.draw = draw
        self._codes: dict[int, tuple[Tensor, str]] = {}  # the tensor too, so that its id is nobody else's

    def size(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return self.draw(st.integers(low, high))

    def choice(self, *options: Any) -> Any:
        """One of `options`."""
        return self.draw(st.sampled_from(options))

    def tensor(self, *shape: int, dtype: torch.dtype, requires_grad: bool = True) -> Tensor:
        """Normal values in any of the layouts, all axes of which are real."""
        layout, seed = self.draw(st.sampled_from(_DRAWN)), self._seed()
        tensor = made(*shape, dtype=dtype, seed=seed, layout=layout, requires_grad=requires_grad)
        sizes = "".join(f"{size}, " for size in shape)
        code = f"made({sizes}dtype={dtype}, seed={seed}, layout={layout!r}, requires_grad={requires_grad})"
        self._codes[id(tensor)] = tensor, code
        return tensor

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """An int64 tensor of values in [low, high)."""
        return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(self._seed()))

    def code(self, value: Any) -> str:
        """An expression that makes `value` again: by its seed if it was drawn here, else by its numbers."""
        return self._codes[id(value)][1] if id(value) in self._codes else code_of(value)

    def _seed(self) -> int:
        return self.draw(st.integers(0, 2**31 - 1))


@st.composite
def tensors(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = FLOATS,
    most_axes: int = 4,
    most: int = 6,
    empty: bool = True,
    requires_grad: bool | None = None,
) -> Tensor:
    """Any dtype of `dtypes`, up to `most_axes` axes of up to `most` elements, or none if `empty`, in any layout."""
    shape = draw(st.lists(st.integers(0 if empty else 1, most), max_size=most_axes))
    wanted = draw(st.booleans()) if requires_grad is None else requires_grad
    return made(
        *shape, dtype=draw(st.sampled_from(dtypes)), seed=draw(st.integers(0, 2**31 - 1)),
        layout=draw(st.sampled_from(sorted(LAYOUTS))), requires_grad=wanted,
    )  # fmt: skip


@st.composite
def modules(draw: st.DrawFn, most: int = 4, random: bool = False) -> ModuleSpec:
    """A training module of up to `most` parts (`ModuleSpec`): norms, attention, losses, views, writes, shared weights.

    random: whether it may draw random numbers (dropout).
    """
    spec = draw_module(HypothesisDraw(draw), most)
    return spec if random else spec.without_draws()


def drawn_inputs(rule: Rule) -> st.SearchStrategy[dict[str, Any]]:
    """Inputs that `rule` must accept, by argument name."""
    return drawn_with_code(rule).map(lambda drawn: drawn[0])


@st.composite
def drawn_with_code(draw: st.DrawFn, rule: Rule) -> tuple[dict[str, Any], dict[str, str]]:
    """The same, and for each an expression that makes it again."""
    source = HypothesisDraw(draw)
    values = rule.inputs(source)
    return values, {name: source.code(value) for name, value in values.items()}
