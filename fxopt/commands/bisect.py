"""``fxopt bisect``: which stage, rule and site makes a script fail."""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fxopt.bisection import Culprit, Trial, first_bad
from fxopt.commands import UsageError, models, options, positive
from fxopt.limits import VARIABLE, Limit, read_log
from fxopt.repro import GRAPH, SITE

__all__ = ["add_to"]

HELP = "find the stage, the rule and the site that makes a script fail"
DESCRIPTION = f"""\
Runs SCRIPT again and again, each time letting fxopt take fewer or more steps, until it knows the one with which it
fails and without which it passes, and writes a script that shows it.

SCRIPT is a Python file, and one of two things:
  it has a function `{models.FACTORY}` (or FILE.py:NAME), which returns (model, inputs): one training step of the model
  must be as near to fp64 as eager PyTorch's, loss and gradients (fxopt.testing). The file may have OPTIONS, a dict for
  the backend, and loss(output), the scalar to differentiate. No dropout: random numbers would differ.
  it has none: it compiles with backend="fxopt" itself, and is right if it exits with 0.

exit code: 1 if a step was found; 0 if SCRIPT passes; 2 if it fails without fxopt's help, or for a mistake."""
EXAMPLES = """\
examples:
  fxopt bisect broken.py
  fxopt bisect broken.py:make --precision bf16
"""


def add_to(subparsers: Any) -> None:
    """Add the command to argparse's subparsers."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("bisect", help=HELP, description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    parser.add_argument("script", metavar="SCRIPT[:factory]")
    options.add_flags(parser)
    parser.add_argument("--out", metavar="DIR", help="where the repro goes (default: a new temporary directory)")
    parser.add_argument(
        "--limit", type=positive, default=1800, metavar="S", help="seconds for one run (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print an object, and no text")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """What the arguments say. Raises UsageError."""
    directory = Path(arguments.out or tempfile.mkdtemp(prefix="fxopt-bisect-"))
    directory.mkdir(parents=True, exist_ok=True)
    runs = Runs(_command(arguments.script, options.given(arguments)), directory, arguments.limit)
    full = _reproduced(runs)
    if full is None:
        _say(arguments, {"found": False}, "it passes with all of fxopt's steps: there is nothing to find")
        return 0
    culprit = first_bad(runs.attempt, full)
    repro = _repro(runs, culprit)
    found = {"found": True, "step": vars(culprit.step), "said": culprit.bad.said, "repro": str(repro)}
    _say(arguments, found, _told(culprit, repro, len(full.steps)))
    return 1


def _command(script: str, chosen: Mapping[str, Any]) -> list[str]:
    """What runs the script: itself, or a trial of its factory."""
    path, _, factory = script.partition(":")
    if not Path(path).is_file():
        raise UsageError(f"no file {path!r}: say SCRIPT.py or SCRIPT.py:factory")
    if factory or models.FACTORY in _functions(path):
        target = f"{path}:{factory or models.FACTORY}"
        return [sys.executable, "-m", "fxopt.commands.trial", target, json.dumps(chosen)]
    if chosen:
        raise UsageError(f"{path} compiles by itself: its options are where it calls torch.compile, not here")
    return [sys.executable, path]


def _functions(path: str) -> set[str]:
    try:
        body = ast.parse(Path(path).read_text()).body
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no Python: {error}") from error
    return {one.name for one in body if isinstance(one, ast.FunctionDef)}


@dataclass
class Runs:
    """Runs of one command under limits."""

    command: Sequence[str]
    directory: Path
    seconds: int
    compiler: str = "inductor"
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))

    def attempt(self, steps: int | None, keep: Path | None = None) -> Trial:
        """Run it with so many steps, None for all."""
        log = self.directory / "steps.jsonl"
        log.unlink(missing_ok=True)
        limit = Limit(steps, self.compiler, log.resolve(), keep and keep.resolve())
        code, said = self.execute(self.command, {VARIABLE: limit.variable()})
        trial = Trial(code != 0, read_log(log), said)
        log.unlink(missing_ok=True)
        taken = "all steps" if steps is None else f"{steps} steps"
        state = f"fails (exit code {code})" if trial.failed else "passes"
        self.console.print(Text(f"{taken}, {len(trial.steps)} taken, compiled by {self.compiler}: {state}"))
        return trial

    def execute(self, command: Sequence[str], variables: Mapping[str, str]) -> tuple[int, str]:
        """(exit code, the end of what it printed); a run that takes too long has failed."""
        environment = {**os.environ, **variables}
        try:
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                stdin=subprocess.DEVNULL, timeout=self.seconds, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return 124, f"it took longer than {self.seconds} s (--limit)"
        return done.returncode, "\n".join(done.stdout.strip().splitlines()[-15:])


def _reproduced(runs: Runs) -> Trial | None:
    """A run that fails with all steps; None if none does. Raises UsageError where it fails with none, too.

    Without Inductor a run takes seconds and not a minute, so that is tried first: wrong rewrites are wrong there, too.
    """
    for runs.compiler in ("aot_eager", "inductor"):
        full = runs.attempt(None)
        if full.failed:
            break
    else:
        return None
    if not full.steps:
        raise UsageError(f"it fails before fxopt has done anything:\n{full.said}")
    none = runs.attempt(0)
    if none.failed:
        raise UsageError(_not_ours(runs, none))
    return full


def _not_ours(runs: Runs, none: Trial) -> str:
    """Whose fault it is where fxopt changes nothing and the script fails."""
    if runs.compiler == "inductor":
        runs.compiler = "aot_eager"
        if not runs.attempt(0).failed:
            return (
                f"it fails with fxopt's steps all left out, and passes without Inductor: Inductor's fault\n{none.said}"
            )
    runs.compiler = "eager"
    whose = "the script's own" if runs.attempt(0).failed else "AOTAutograd's"
    return f"it fails with fxopt's steps all left out: the fault is {whose}\n{none.said}"


def _repro(runs: Runs, culprit: Culprit) -> Path:
    """The smallest script that fails: the site alone, the graph alone, or the script itself under the limit."""
    steps = culprit.step.step
    runs.attempt(steps, keep=runs.directory)
    for name in (SITE, GRAPH):
        path = runs.directory / name
        if path.exists() and runs.execute([sys.executable, str(path)], {VARIABLE: ""})[0] != 0:
            return path
    path = runs.directory / "script.py"
    limit = Limit(steps, runs.compiler).variable()
    path.write_text(_WHOLE.format(step=culprit.step, command=list(runs.command), variable=VARIABLE, limit=limit))
    return path


_WHOLE = '''"""The script under a limit: it fails with {step}."""

import os
import subprocess
import sys

os.environ[{variable!r}] = {limit!r}
sys.exit(subprocess.call({command!r}))
'''


def _told(culprit: Culprit, repro: Path, steps: int) -> str:
    step = culprit.step
    lines = [f"step {step.step} of {steps} makes it fail: {step}"]
    lines += [f"  {step.code}"] if step.code else []
    lines += ["the run that fails ends with:", *(f"  {line}" for line in culprit.bad.said.splitlines()[-8:])]
    return "\n".join([*lines, f"reproduce with: python {repro}"])


def _say(arguments: argparse.Namespace, found: Mapping[str, Any], text: str) -> None:
    print(json.dumps(found, indent=1) if arguments.json else text)
