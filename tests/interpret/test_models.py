"""Whole models by interpreted kernels: one training step of small transformers models against eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import models
import pytest
from harness import by_aot_eager
from torch import fx

import fxopt
from fxopt.testing import assert_close_to_fp64

# A stage that fails falls back with a warning, and the fallback is right: without this, nothing here could fail.
pytestmark = pytest.mark.filterwarnings("error::fxopt.FxoptWarning")

INTERPRET = {"kernels": "interpret"}
TWO_HEADS = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32}
GROUPED = {**TWO_HEADS, "num_key_value_heads": 1}
SMALL: dict[str, dict[str, Any]] = {
    "llama": GROUPED, "gemma2": GROUPED, "gpt_oss": {**GROUPED, "num_local_experts": 3}, "bert": TWO_HEADS,
    "t5": {"num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "d_model": 32},
}  # fmt: skip
"""One layer, and few tiles: each takes the interpreter about as long, however little is in it."""


def built(family: str) -> tuple[Any, dict[str, Any]]:
    attention = "sdpa" if family == "llama" else "eager"
    return models.build(family, attention, "none", batch=1, seq=20, vocab_size=61, **SMALL[family])


def assert_rewritten() -> None:
    rules = {one.rule for report in fxopt.reports() for one in report.rewrites}
    assert rules >= {"attention", "norm", "linear_cross_entropy"}, str(fxopt.reports()[-1])


def without_inductor(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    return by_aot_eager(graph, inputs, fxopt.Options.parse(INTERPRET))


@pytest.mark.parametrize("family", sorted(SMALL))
def test_a_step_by_generated_kernels_is_as_accurate_as_eager(family: str) -> None:
    """Inductor, which compiles the rest of a graph for half a minute, is left out but for llama."""
    fxopt.clear_reports()
    how: dict[str, Any] = {"backend": without_inductor}
    assert_close_to_fp64(*built(family), **how if family != "llama" else {"backend": "fxopt", "options": INTERPRET})
    assert_rewritten()


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(SMALL.keys() - {"llama"}))
def test_with_inductor_around_the_kernels(family: str) -> None:
    fxopt.clear_reports()
    assert_close_to_fp64(*built(family), backend="fxopt", options=INTERPRET)
    assert_rewritten()
