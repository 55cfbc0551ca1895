"""Fuzz fxopt: random modules through the whole backend, under every option, against eager in fp64.

    python -m fxopt.testing.fuzz --minutes 10 --corpus out/fuzz

Resumes from the corpus folder. Exits with 1 if a case failed, with 2 for a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fxopt.commands import UsageError
from fxopt.draw import SeededDraw
from fxopt.rule import Draw
from fxopt.testing.corpus import Corpus
from fxopt.testing.judge import Verdict, run, run_together
from fxopt.testing.random_modules import draw_part
from fxopt.testing.trial import Trial, draw_trial, judgeable, together

TOGETHER = 8
"""Cases of one module: Dynamo's trace and the capture are two thirds of what a case takes."""

SHRINK_SECONDS = 120.0


class Fuzz:
    """One run. inductor: the share of modules that Inductor compiles; limit: the most cases, over all runs."""

    def __init__(self, corpus: Corpus, seconds: float, inductor: float = 0.02, limit: int | None = None):
        self.corpus, self.seconds, self.inductor, self.limit = corpus, seconds, inductor, limit
        self.kinds: collections.Counter[str] = collections.Counter()
        self.counts: collections.Counter[str] = collections.Counter()
        self.failures: list[dict[str, Any]] = []
        self.began = self.saved = time.monotonic()

    def run(self, show: Callable[[Fuzz], None] = lambda fuzz: None) -> dict[str, Any]:
        """Fuzz until the time or the limit is reached. Returns the summary, which is JSON."""
        for trial in self.corpus.crashed():
            self.failed(trial, Verdict("crash", "the process died while this case ran"))
        for trial in self.corpus.failures():
            verdict = run(trial)
            self.corpus.forget(trial)
            if verdict.failure:
                self.failed(trial, verdict, small=True)
        while not self.over():
            self.turn()
            show(self)
            if self.corpus.state.drawn % 16 == 0:
                self.save()
        self.save()
        return self.summary()

    def save(self) -> None:
        """Write down how far it got, for a process that is ended."""
        now = time.monotonic()
        self.corpus.state.seconds += now - self.saved
        self.saved = now
        self.corpus.save()

    def over(self) -> bool:
        enough = self.limit is not None and self.corpus.state.cases >= self.limit
        return enough or time.monotonic() - self.began >= self.seconds

    def turn(self) -> None:
        """One module under several options."""
        state = self.corpus.state
        draw = SeededDraw(state.seed * 1_000_003 + state.drawn)
        state.drawn += 1
        trials = together(self.draw(draw), draw, TOGETHER)
        with self.corpus.running(trials):
            verdicts = run_together(trials)
        for trial, verdict in zip(trials, verdicts, strict=True):
            self.kinds[verdict.kind or "right"] += 1
            if verdict.kind == "invalid":
                state.invalid += 1
                continue
            state.cases += 1
            self.count(trial, verdict)
            self.corpus.learn(trial, verdict)
            if verdict.failure:
                self.failed(trial, verdict)

    def draw(self, draw: Draw) -> Trial:
        """A new case, or a change of one that was unlike all before it."""
        if not self.corpus.kept or draw.choice(True, False):
            return draw_trial(draw, self.inductor)
        changed = mutated(draw.choice(*self.corpus.kept[-200:]), draw)
        return changed if judgeable(changed) else draw_trial(draw, self.inductor)

    def count(self, trial: Trial, verdict: Verdict) -> None:
        """What the summary says of all cases."""
        self.counts[f"compiler={trial.how['compiler']}"] += 1
        self.counts.update(f"{name}={value}" for name, value in trial.options.items() if value not in (None, [], False))
        for report in verdict.reports:
            self.counts.update(f"rewrote {item.rule}" for item in report.rewrites)

    def failed(self, trial: Trial, verdict: Verdict, small: bool = False) -> None:
        """Make a failure small, unless it is, and write it down."""
        if not small and verdict.kind != "crash":
            with self.corpus.running([trial]):
                trial, verdict = shrunk(trial, verdict)
        script = self.corpus.fail(trial, verdict)
        self.failures.append({"kind": verdict.kind, "failure": verdict.failure, "script": str(script)})

    def summary(self) -> dict[str, Any]:
        """Cases, seconds and failures of this run and of all runs on this corpus."""
        seconds, judged = time.monotonic() - self.began, sum(self.kinds.values()) - self.kinds["invalid"]
        state = self.corpus.state
        return {
            "cases": judged,
            "seconds": round(seconds, 1),
            "cases_per_second": round(judged / seconds, 2) if seconds else 0.0,
            "verdicts": dict(self.kinds),
            "failures": self.failures,
            "counts": dict(self.counts.most_common()),
            "features": len(self.corpus.features),
            "seed": state.seed,
            "all_cases": state.cases,
            "all_seconds": round(state.seconds, 1),
        }


def mutated(trial: Trial, draw: Draw) -> Trial:
    """`trial` with a part put in, taken out or drawn anew, other options, and other random numbers."""
    spec, at = trial.spec, draw.size(0, len(trial.spec.parts))
    parts = list(spec.parts)
    parts[at : at + draw.choice(0, 1)] = [draw_part(draw)] if draw.choice(True, True, False) else []
    setting = {**spec.setting, "seed": draw.size(0, 999)}
    fresh = draw_trial(draw)
    loss = draw.choice(spec.loss, fresh.spec.loss)
    changed = type(spec)(setting, tuple(parts[:5]), loss)
    return Trial(changed, draw.choice(trial.options, fresh.options), {**fresh.how, "compiler": trial.how["compiler"]})


def shrunk(trial: Trial, verdict: Verdict, seconds: float = SHRINK_SECONDS) -> tuple[Trial, Verdict]:
    """The smallest case found that fails in the same way: step by step, as long as a step keeps the failure."""
    until = time.monotonic() + seconds
    going = True
    while going:
        going = False
        for smaller in trial.smaller():
            if time.monotonic() > until:
                return trial, verdict
            found = run(smaller) if judgeable(smaller) else Verdict()
            if found.kind == verdict.kind:
                trial, verdict, going = smaller, found, True
                break
    return trial, verdict


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fxopt.testing.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (10)")
    parser.add_argument("--cases", type=int, help="stop once the corpus has seen this many cases")
    parser.add_argument("--seed", type=int, help="of the corpus, if it is new (0)")
    parser.add_argument("--corpus", type=Path, default=Path("out/fuzz"), help="folder to resume from (out/fuzz)")
    parser.add_argument("--inductor", type=float, default=0.02, help="share of modules that Inductor compiles (0.02)")
    parser.add_argument("--json", type=Path, help="write the summary here too")
    given = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        if given.minutes <= 0 or not 0 <= given.inductor <= 1:
            raise UsageError("--minutes must be above 0, --inductor between 0 and 1")
        fuzz = Fuzz(Corpus(given.corpus, given.seed), 60 * given.minutes, given.inductor, given.cases)
    except UsageError as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        return 2
    torch.set_num_threads(1)
    summary = _shown(fuzz, console)
    text = json.dumps(summary, indent=1)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(text + "\n")
    print(text)
    return int(bool(summary["failures"]))


def _shown(fuzz: Fuzz, console: Console) -> dict[str, Any]:
    """Run with a progress bar, where there is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("fuzz", total=fuzz.seconds)

        def show(one: Fuzz) -> None:
            state, passed = one.corpus.state, time.monotonic() - one.began
            told = f"{state.cases} cases, {len(one.failures)} failures, {len(one.corpus.features)} features"
            progress.update(task, completed=passed, description=told)

        return fuzz.run(show)


if __name__ == "__main__":
    sys.exit(main())
