"""`fxopt bisect`: the search, the limits that it sets, and seeded faults that it must name."""

import dataclasses
import functools
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inspected import Gated, make
from seeded_bugs import BUGS, Bug
from torch import Tensor, nn

import fxopt
from fxopt import backend
from fxopt.bisection import Trial, first_bad
from fxopt.cli import main
from fxopt.errors import OptionError
from fxopt.limits import VARIABLE, Limit, Taken, limit, read_log
from fxopt.repro import SITE
from fxopt.testing import errors

F = nn.functional
Capture = pytest.CaptureFixture[str]


# --- the search ----------------------------------------------------------------------------------------------------


def trial(failed: bool, steps: int) -> Trial:
    return Trial(failed, [Taken(at + 1, "graph 0", "rewrite", f"rule {at + 1}") for at in range(steps)])


@given(st.integers(1, 200).flatmap(lambda total: st.tuples(st.integers(1, total), st.just(total))))
def test_first_bad_step_is_found_in_as_many_runs_as_its_number_has_bits(found: tuple[int, int]) -> None:
    bad, total = found
    runs: list[int] = []

    def attempt(steps: int) -> Trial:
        runs.append(steps)
        return trial(steps >= bad, steps)

    culprit = first_bad(attempt, trial(True, total))
    assert culprit.step.rule == f"rule {bad}"
    assert culprit.bad.failed
    assert len(runs) <= total.bit_length()


# --- limits --------------------------------------------------------------------------------------------------------


def limited(monkeypatch: pytest.MonkeyPatch, made: Limit) -> None:
    monkeypatch.setenv(VARIABLE, made.variable())


def test_no_variable_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert limit() is None


@pytest.mark.parametrize("text", ["{", '{"step": 1}', '{"compiler": "gcc"}', "7"])
def test_a_variable_that_nobody_wrote_is_an_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(OptionError, match=VARIABLE):
        limit()


STEPS = ["capture", "linear_cross_entropy", "linear_cross_entropy site", "attention", "norm", "norm site"]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, None])
def test_so_many_steps_are_taken_and_noted(steps: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The norm is forced."""
    limited(monkeypatch, Limit(steps, "aot_eager", tmp_path / "log"))
    model, inputs = make()
    fxopt.clear_reports()
    torch.compile(model, backend="fxopt", options={"force": ["norm"]})(**inputs)
    taken = read_log(tmp_path / "log")
    assert [f"{one.rule or one.stage}{' site' * bool(one.node)}" for one in taken] == STEPS[:steps]
    assert [one.step for one in taken] == list(range(1, len(taken) + 1))
    (report,) = fxopt.reports()
    assert len(report.rewrites) == sum(bool(one.node) for one in taken)
    if steps == 5:
        (left,) = report.refusals
        assert left.reasons == ("`fxopt bisect` lets no more sites be rewritten in this process",)


# --- seeded faults -------------------------------------------------------------------------------------------------


def pattern(name: str, spelling: Callable[..., Tensor], wrong: Callable[..., Tensor]) -> fxopt.Pattern:
    """A rule that puts `wrong` where `spelling` is."""
    shapes = [(8, 24), (8, 24)] if name == "swiglu" else [(8, 16), (16,)]

    def inputs(draw: Any) -> dict[str, Tensor]:
        drawn = [draw.tensor(*shape, dtype=torch.float32) for shape in shapes]
        return dict(zip(inspect.signature(spelling).parameters, drawn, strict=True))

    return fxopt.Pattern(name=name, replacement=wrong, spellings=(spelling,), inputs=inputs)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.rms_norm(x, (16,), weight)


def raises(gate: Tensor, up: Tensor) -> Tensor:
    raise RuntimeError("seeded")


SEEDED: dict[str, Any] = {
    "sigmoid for silu": pattern("swiglu", gated, lambda gate, up: torch.sigmoid(gate) * up),
    "gate and up swapped": pattern("swiglu", gated, lambda gate, up: F.silu(up) * gate),
    "a factor left out": pattern("swiglu", gated, lambda gate, up: F.silu(gate)),
    "computed in 16 bits": pattern("swiglu", gated, lambda gate, up: (F.silu(gate.bfloat16()) * up.bfloat16()).float()),
    "no gradient": pattern("swiglu", gated, lambda gate, up: F.silu(gate).detach() * up),
    "another stride": pattern("swiglu", gated, lambda gate, up: (F.silu(gate) * up).t().contiguous().t()),
    "it raises": pattern("swiglu", gated, raises),
    "sqrt for rsqrt": pattern("rms", normed, lambda x, weight: x * (x.pow(2).mean(-1, True) + 1e-7).sqrt() * weight),
    "weight left out": pattern("rms", normed, lambda x, weight: torch.rms_norm(x, (16,))),
}


def run_here(
    monkeypatch: pytest.MonkeyPatch, folder: Path, judge: Callable[..., None] | None = None, **options: Any
) -> Callable[..., Trial]:
    """What a trial of `fxopt bisect` does, in this process. judge: raises where a step under options is wrong."""

    def attempt(steps: int | None, keep: Path | None = None) -> Trial:
        log = folder / "log"
        log.unlink(missing_ok=True)
        limited(monkeypatch, Limit(steps, "aot_eager", log, keep))
        limit.__globals__["_parsed"].cache_clear()  # it counts
        torch.compiler.reset()
        try:
            (judge or (lambda options: errors(*make(), options=options).check()))(options)
        except Exception as error:
            return Trial(True, read_log(log), str(error))
        return Trial(False, read_log(log))

    return attempt


QUICK = ("sigmoid for silu", "it raises")


@pytest.mark.parametrize("fault", [pytest.param(one, marks=[] if one in QUICK else pytest.mark.slow) for one in SEEDED])
def test_seeded_rules_are_named_and_shown(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rule = SEEDED[fault]
    attempt = run_here(monkeypatch, tmp_path, rules=[rule], force=["norm"] if rule.name == "swiglu" else [])
    full = attempt(None)
    assert full.failed
    assert not attempt(0).failed
    culprit = first_bad(attempt, full)
    assert (culprit.step.stage, culprit.step.rule) == ("rewrite", rule.name)
    assert culprit.step.node
    assert culprit.step.module == ("layers.0" if rule.name == "swiglu" else "norm")
    assert culprit.step.source
    if fault in ("another stride", "it raises"):
        return  # there is nothing to put beside the site
    attempt(culprit.step.step, tmp_path)
    repro = (tmp_path / SITE).read_text()
    assert f"made by rule {rule.name}" in repro
    with pytest.raises(AssertionError, match=r"against fp64|appears"):
        exec(compile(repro, SITE, "exec"), {"__name__": "__main__"})


class Meeting(nn.Module):
    """What meets a bug, as a training step; without inputs, since its arguments are parameters or buffers."""

    def __init__(self, bug: Bug):
        super().__init__()
        self.function, self.names = bug.function, list[str]()
        for at, value in enumerate(bug.arguments()):
            self.names.append(f"argument_{at}")
            held = nn.Parameter(value.detach()) if value.is_floating_point() else value
            (self.register_parameter if value.is_floating_point() else self.register_buffer)(self.names[-1], held)

    def forward(self) -> Tensor:
        found = self.function(*(getattr(self, name) for name in self.names))
        return sum(one.square().mean() for one in (found if isinstance(found, tuple) else (found,)))


def is_near(bug: Bug, options: dict[str, Any]) -> None:
    """The fp64 rule. Raises AssertionError."""
    errors(Meeting(bug), {}, options=options).check()


def has_own_gradient(bug: Bug, options: dict[str, Any]) -> None:
    """A seed repeats, and the gradient is that of what was drawn. Raises AssertionError. See `laws.own_gradient`."""
    model = Meeting(bug).double()
    along = [torch.randn(one.shape, generator=torch.Generator().manual_seed(0)).double() for one in model.parameters()]
    compiled = torch.compile(model, backend="fxopt", options=options)

    def seeded(by: float) -> Tensor:
        with torch.no_grad():
            for one, direction in zip(model.parameters(), along, strict=True):
                one.add_(direction, alpha=by)
        torch.manual_seed(0)
        return compiled()

    assert torch.equal(seeded(0.0), seeded(0.0)), "it does not repeat under a seed"
    seeded(0.0).backward()
    analytic = sum(float((one.grad * way).sum()) for one, way in zip(model.parameters(), along, strict=True))
    numeric = (seeded(1e-6) - seeded(-2e-6)).item() / 2e-6
    assert abs(numeric - analytic) <= 1e-3 * abs(analytic), f"the loss changes by {numeric}, gradients say {analytic}"


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_seeded_bugs_are_named(bug: Bug, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without verification of values, which would leave the site alone before anyone could be wrong."""
    judge = functools.partial(has_own_gradient if "dropout" in bug.name else is_near, bug)
    attempt = run_here(monkeypatch, tmp_path, judge, **{**bug.options(), "verify": False})
    full = attempt(None)
    assert full.failed
    assert not attempt(0).failed, "the fault is the judge's"
    culprit = first_bad(attempt, full)
    assert (culprit.step.stage, culprit.step.rule) == ("rewrite", bug.rule.name)
    assert culprit.step.node


def test_a_rule_that_fails_before_it_has_a_site_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rule = dataclasses.replace(SEEDED["sigmoid for silu"], inputs=lambda draw: {})
    attempt = run_here(monkeypatch, tmp_path, rules=[rule])
    full = attempt(None)
    assert "KeyError: 'gate'" in full.said
    culprit = first_bad(attempt, full)
    assert str(culprit.step).startswith("rule swiglu, as it looks for sites in graph")


def test_a_faulty_stage_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    capture = backend.capturing.capture

    def doubled(gm: torch.fx.GraphModule) -> Any:
        found = capture(gm)
        (silu, *_) = (node for node in found.module.graph.nodes if node.target is torch.ops.aten.silu.default)
        silu.target = torch.ops.aten.sigmoid.default
        found.module.recompile()
        return found

    monkeypatch.setattr(backend.capturing, "capture", doubled)
    attempt = run_here(monkeypatch, tmp_path)
    full = attempt(None)
    assert full.failed
    culprit = first_bad(attempt, full)
    assert str(culprit.step).startswith("stage capture of graph")


# --- the command ---------------------------------------------------------------------------------------------------

PRETENDS = """
import json, os, sys
limit = json.loads(os.environ["FXOPT_LIMIT"])
take = min(limit.get("steps", 9), 9)
with open(limit["log"], "a") as log:
    for step in range(1, take + 1):
        print(json.dumps({"step": step, "graph": "graph 0", "stage": "rewrite", "rule": f"rule {step}"}), file=log)
print("it ran", take)
sys.exit(WHEN)
"""


def pretend(folder: Path, when: str) -> str:
    """A script that takes up to 9 steps and exits with `when`."""
    path = folder / "script.py"
    path.write_text(PRETENDS.replace("WHEN", when))
    return str(path)


def test_a_script_is_bisected_by_its_exit_code(tmp_path: Path, capsys: Capture) -> None:
    script = pretend(tmp_path, "int(take >= 4)")
    assert main(["bisect", script, "--out", str(tmp_path / "out"), "--json"]) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["step"]["rule"] == "rule 4"
    assert found["said"] == "it ran 4"
    assert "9 steps, 9 taken" not in printed.err, "all steps were known to fail"
    repro = Path(found["repro"])
    assert "rule 4" in repro.read_text(), "nothing smaller than the script under its limit"


def test_what_is_not_found_is_said(tmp_path: Path, capsys: Capture) -> None:
    assert main(["bisect", pretend(tmp_path, "0")]) == 0
    assert capsys.readouterr().out == "it passes with all of fxopt's steps: there is nothing to find\n"
    assert main(["bisect", pretend(tmp_path, "3")]) == 2
    assert "the fault is the script's own\nit ran 0" in capsys.readouterr().err
    assert main(["bisect", pretend(tmp_path, "limit['compiler'] == 'inductor'")]) == 2
    assert "passes without Inductor: Inductor's fault" in capsys.readouterr().err
    assert main(["bisect", pretend(tmp_path, "limit['compiler'] != 'eager'")]) == 2
    assert "the fault is AOTAutograd's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (None, [], "no file"),
        ("def make(:", [], "is no Python"),
        ("import sys; sys.exit(1)", [], "it fails before fxopt has done anything"),
        ("pass", ["--precision", "bf16"], "compiles by itself: its options are where it calls torch.compile"),
    ],
)
def test_scripts_that_cannot_be_bisected(
    text: str | None, arguments: list[str], message: str, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "script.py"
    if text is not None:
        path.write_text(text)
    assert main(["bisect", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_does_not_end_has_failed(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "script.py").write_text("import time; time.sleep(60)")
    assert main(["bisect", str(tmp_path / "script.py"), "--limit", "1"]) == 2
    assert "it took longer than 1 s (--limit)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_with_a_faulty_rule_is_bisected_to_a_script_that_fails(tmp_path: Path, capsys: Capture) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from inspected import make
from test_bisect import SEEDED
OPTIONS = {{"rules": [SEEDED["sigmoid for silu"]]}}
""")
    assert main(["bisect", f"{script}:make", "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert "rule swiglu at mul" in printed.out
    assert "compiled by aot_eager: fails" in printed.err
    repro = tmp_path / "out" / SITE
    assert f"reproduce with: python {repro}" in printed.out
    done = subprocess.run([sys.executable, repro], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "against fp64" in done.stderr


def test_model_of_these_tests_is_what_it_is_called() -> None:
    model, inputs = make()
    assert isinstance(model, Gated)
    assert model(**inputs).dim() == 0
