"""Whole models by interpreted kernels: one training step of small transformers models against eager PyTorch."""

from __future__ import annotations

import models
import pytest

import fxopt
from fxopt.testing import assert_close_to_fp64

# A stage that fails falls back with a warning, and the fallback is right: without this, nothing here could fail.
pytestmark = pytest.mark.filterwarnings("error::fxopt.FxoptWarning")

INTERPRET = {"kernels": "interpret"}


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llama", "sdpa"),
        *(pytest.param(name, "eager", marks=pytest.mark.slow) for name in ("gemma2", "gpt_oss", "t5", "bert")),
    ],
)
def test_a_step_by_generated_kernels_is_as_accurate_as_eager(family: str, attention: str) -> None:
    fxopt.clear_reports()
    model, inputs = models.build(family, attention, "none")
    assert_close_to_fp64(model, inputs, backend="fxopt", options=INTERPRET)
    rules = {one.rule for report in fxopt.reports() for one in report.rewrites}
    assert {"attention", "norm"} <= rules, str(fxopt.reports()[-1])
