"""The fuzz run: it finds a planted bug, makes it small, writes a script, and resumes where it ended."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt import passes
from fxopt.commands import UsageError
from fxopt.draw import SeededDraw
from fxopt.passes import linear_cross_entropy
from fxopt.testing import fuzz, modules
from fxopt.testing.corpus import Corpus
from fxopt.testing.judge import run
from fxopt.testing.random_modules import ModuleSpec
from fxopt.testing.trial import Trial, draw_trial, judgeable


def in_order(count: int, **wanted: Any) -> list[Trial]:
    """The first `count` cases whose options and way to run are as wanted."""
    found = (draw_trial(SeededDraw(seed)) for seed in range(10_000))
    chosen = (one for one in found if all({**one.options, **one.how}[name] == value for name, value in wanted.items()))
    return [next(chosen) for _ in range(count)]


@settings(max_examples=30)
@given(modules(random=True))
def test_modules_train_in_eager_and_come_back_from_json(spec: ModuleSpec) -> None:
    assert ModuleSpec.from_json(json.loads(spec.key())) == spec
    loss, *_ = spec.build()(**spec.inputs())
    assert loss.dim() == 0
    assert all(len(one.key()) for one in spec.smaller())
    assert not spec.without_draws().draws


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_cases_come_back_from_json_and_get_smaller(seed: int) -> None:
    trial = draw_trial(SeededDraw(seed))
    assert Trial.from_json(trial.key()) == trial
    assert all(one != trial for one in trial.smaller())
    while (smaller := next(trial.smaller(), None)) is not None:
        trial = smaller
    assert not trial.spec.parts


@pytest.mark.parametrize("compiler", ["graph", "aot", "planned"])
def test_some_cases_are_right(compiler: str) -> None:
    for trial in in_order(2, compiler=compiler, resized=False):
        verdict = run(trial)
        assert verdict.failure is None, f"{verdict.failure}\n{trial.spec.source()}"


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """fxopt with losses that count every row twice, wherever there is a `reduction="sum"`."""
    right = linear_cross_entropy.RULE

    def wrong(**values: Any) -> tuple[Tensor, ...]:
        loss, *rest = right.replacement(**values)
        return (loss * 2 if values["reduction"] == "sum" else loss, *rest)

    broken = dataclasses.replace(right, replacement=wrong)
    monkeypatch.setattr(passes, "RULES", (broken, *(rule for rule in passes.RULES if rule.name != right.name)))


def guilty() -> Trial:
    """A case that meets the planted bug, and more."""
    trial = in_order(1, compiler="graph", verify=False, rules=[], precision=None, dynamic=None, autocast=False)[0]
    part = draw_trial(SeededDraw(1)).spec.without_draws().parts[:1]
    loss = {**trial.spec.loss, "style": "sum over items", "shift": "before"}
    setting = {**trial.spec.setting, "dtype": "float32", "labels": "none ignored", "batch": 2, "length": 8}
    options = {**trial.options, "force": ["linear_cross_entropy"]}
    return dataclasses.replace(trial, spec=ModuleSpec(setting, part, loss), options=options)


@pytest.mark.slow
def test_a_planted_bug_is_found_shrunk_and_written_down(planted: None, tmp_path: Path) -> None:
    trial = guilty()
    verdict = run(trial)
    assert verdict.kind == "wrong", verdict
    small, found = fuzz.shrunk(trial, verdict, seconds=30)
    assert not small.spec.parts
    assert small.spec.loss["style"] in ("sum over items", "cross entropy", "logsumexp")
    script = Corpus(tmp_path).fail(small, found)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 1
    assert "class Model(nn.Module)" in script.read_text()


def test_a_failure_is_run_again_and_forgotten_once_it_is_none(tmp_path: Path) -> None:
    trial = guilty()
    corpus = Corpus(tmp_path, 5)
    corpus.fail(trial, dataclasses.replace(run(trial), kind="wrong", failure="it was"))
    corpus.save()
    summary = fuzz.Fuzz(Corpus(tmp_path), seconds=0.0).run()
    assert summary["failures"] == []
    assert not Corpus(tmp_path).failures()


@pytest.mark.slow
def test_it_resumes(tmp_path: Path) -> None:
    command = ["--corpus", str(tmp_path / "c"), "--seed", "3", "--inductor", "0", "--json", str(tmp_path / "s.json")]
    assert fuzz.main([*command, "--cases", "1", "--minutes", "2"]) == 0
    first = json.loads((tmp_path / "s.json").read_text())
    assert first["all_cases"] >= 1
    assert first["failures"] == []
    assert fuzz.main([*command, "--cases", str(first["all_cases"] + 1), "--minutes", "2"]) == 0
    second = json.loads((tmp_path / "s.json").read_text())
    assert second["all_cases"] == first["all_cases"] + second["cases"]
    assert second["features"] >= first["features"] > 0
    assert second["counts"]


@pytest.mark.slow
def test_a_case_that_took_the_process_down_is_reported(tmp_path: Path) -> None:
    (tmp_path / "running.json").write_text(json.dumps([guilty().key()]))
    summary = fuzz.Fuzz(Corpus(tmp_path), seconds=0.0).run()
    assert [item["kind"] for item in summary["failures"]] == ["crash"]


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("{]", [], "is not what a fuzz run writes"),
        ('{"seed": 1}', ["--seed", "2"], "was begun with --seed 1, not 2"),
        (None, ["--minutes", "0"], "--minutes must be above 0"),
    ],
)
def test_mistakes_are_named(
    content: str | None, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "state.json").write_text(content)
    assert fuzz.main(["--corpus", str(tmp_path), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_corpus_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="name a folder"):
        Corpus(tmp_path / "file")


def test_random_numbers_are_judged_where_a_slope_can_be_taken() -> None:
    drawn = [trial for trial in (draw_trial(SeededDraw(seed)) for seed in range(300)) if trial.spec.draws]
    assert drawn
    assert all(judgeable(trial) and trial.spec.setting["dtype"] == "float64" for trial in drawn)
    verdict = run(dataclasses.replace(drawn[0], how={**drawn[0].how, "compiler": "graph"}))
    assert verdict.failure is None, verdict.failure
