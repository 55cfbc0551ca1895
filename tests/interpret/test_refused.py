"""A kernel that does not compile for the card: its sites are reverted, with one warning that names its source."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import check, problem
from torch import Tensor, fx

import fxopt
from fxopt import backend, site_kernels
from fxopt.kernels import refused
from fxopt.kernels.cards import CARDS
from fxopt.kernels.offline import Job, Resources
from fxopt.kernels.refused import KernelError
from fxopt.kernels.source import Kernel
from fxopt.ops import logit_rows, loss_launch

SOURCE = re.compile(r"its source is (\S+\.py)")


@pytest.fixture(autouse=True)
def nobody_was_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refused, "_WARNED", set())


def model(x: Tensor, weight: Tensor) -> Tensor:
    """Attention of x [1, 2, 40, 16], and a norm."""
    scores = x @ x.transpose(-1, -2) * 0.25
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    return F.rms_norm(scores.masked_fill(~mask, float("-inf")).softmax(-1) @ x, (16,), weight, 1e-6)


def given() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 2, 40, 16, requires_grad=True), torch.ones(16, requires_grad=True)


@pytest.mark.fault("a kernel that does not compile for the card")
def test_sites_whose_kernels_do_not_compile_are_reverted_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def outcomes(jobs: Sequence[Job], processes: int) -> dict[Job, Resources | str]:
        """Everything compiles but attention's forward."""
        wrong = "CompilationError: at 12:8"
        return {one: wrong if one.kernel.name == "attention_forward" else Resources(1, 0, 0, True) for one in jobs}

    def compiler(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if "fxopt.attention" in str(gm.graph):
            raise RuntimeError("PassManager::run failed")
        return gm.forward

    monkeypatch.setattr(site_kernels, "compile_shown", outcomes)
    monkeypatch.setattr(site_kernels, "_cards", lambda gm: {CARDS[1]})
    reports: list[fxopt.Report] = []

    def through(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        options = fxopt.Options.parse({"kernels": "interpret", "force": ["norm"]})
        found, call = backend.run(gm, inputs, options, compiler)
        reports.append(fxopt.Report([found]))
        return call

    x, weight = given()
    with pytest.warns(fxopt.FxoptWarning) as seen:
        out = torch.compile(model, backend=through)(x, weight)
    torch.testing.assert_close(out, model(x, weight))
    (report,) = reports
    assert [one.rule for one in report.rewrites] == ["norm"]
    (refusal,) = [one for one in report.refusals if one.rule == "attention"]
    (warning,) = [str(one.message) for one in seen if issubclass(one.category, fxopt.FxoptWarning)]
    (path,) = SOURCE.findall(warning)
    assert "def attention_forward(" in Path(path).read_text()
    assert path in refusal.reasons[0]
    assert "CompilationError: at 12:8" in warning


def test_a_failure_that_no_kernel_explains_reverts_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if "fxopt" in str(gm.graph):
            raise RuntimeError("no")
        return gm.forward

    monkeypatch.setattr(site_kernels, "compile_shown", lambda jobs, _: {one: Resources(1, 0, 0, True) for one in jobs})
    monkeypatch.setattr(site_kernels, "_cards", lambda gm: {CARDS[1]})

    def through(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return backend.run(gm, inputs, fxopt.Options.parse({"kernels": "interpret"}), compiler)[1]

    x, weight = given()
    with pytest.warns(fxopt.FxoptWarning, match="stage compile failed"):
        out = torch.compile(model, backend=through)(x, weight)
    torch.testing.assert_close(out, model(x, weight))


@pytest.mark.fault("a kernel that does not compile for the card")
@pytest.mark.parametrize(
    ("module", "kernel", "options"),
    [
        (loss_launch, "linear_cross_entropy_backward", {"recompute": True}),
        (loss_launch, "linear_cross_entropy_backward", {"recompute": True, "reduction": "none", "z_loss": 0.1}),
        (logit_rows, "cross_entropy_rows", {"recompute": False, "softcap": 5.0}),
    ],
)
def test_an_operator_that_is_launched_in_the_middle_of_a_step_is_computed_by_aten(
    module: Any, kernel: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, tried = module.launch, []

    def refusing(one: Kernel, *rest: Any) -> None:
        tried.append(one.name)
        if one.name == kernel:
            raise KernelError(one, "OutOfResources: out of resource: shared memory")
        launch(one, *rest)

    monkeypatch.setattr(module, "launch", refusing)
    *tensors, target = problem()
    upstream = torch.linspace(-1, 1, 70) if options.get("reduction") == "none" else 0.3
    with pytest.warns(fxopt.FxoptWarning, match=f"the kernel {kernel} does not compile here .*ATen computes"):
        check(tensors, target, upstream, lowering="interpret", **options)
    assert kernel in tried
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(tensors, target, upstream, lowering="interpret", **options)
