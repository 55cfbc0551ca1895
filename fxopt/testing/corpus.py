"""The folder a fuzz run works from: cases that broke something, cases unlike all others, and how far the run got.

state.json          seed, how many cases were drawn, the features seen, totals
running.json        the cases that run now: if they are there at the start, they took the process down
failures/KEY.json   a case as small as it could be made, with KEY.py, which runs it
features/KEY.json   the first case of each feature; new cases are changes of these half of the time
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fxopt.commands import UsageError
from fxopt.testing.judge import Verdict
from fxopt.testing.trial import Trial

_REPRO = '''"""{kind}: {failure}

The module is written out below for reading; what runs is the case itself, which makes that very module.
Options: {options}
How: {how}
"""

# {source}

from fxopt.testing.judge import run
from fxopt.testing.trial import Trial

CASE = Trial.from_json({case!r})

if __name__ == "__main__":
    verdict = run(CASE)
    print(verdict.kind or "right", verdict.failure or "")
    raise SystemExit(bool(verdict.failure))
'''


@dataclasses.dataclass
class State:
    """How far a run got. drawn: modules drawn; cases: judged; invalid: refused by eager too."""

    seed: int
    drawn: int = 0
    cases: int = 0
    invalid: int = 0
    seconds: float = 0.0
    features: list[str] = dataclasses.field(default_factory=list)


class Corpus:
    """The folder. Raises `UsageError` where it is a file, or holds what no fuzz run wrote."""

    def __init__(self, folder: Path, seed: int | None = None):
        self.folder = folder
        try:
            for name in ("failures", "features"):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--corpus {folder}: {error.strerror}; name a folder that can be made") from error
        self.state = self._state(seed)
        self.features = set(self.state.features)
        self.kept = [trial for path in sorted((folder / "features").glob("*.json")) if (trial := _read(path))]

    def _state(self, seed: int | None) -> State:
        path = self.folder / "state.json"
        if not path.exists():
            return State(seed or 0)
        try:
            state = State(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} is not what a fuzz run writes ({error}): name another --corpus") from error
        if seed is not None and seed != state.seed:
            raise UsageError(f"{path} was begun with --seed {state.seed}, not {seed}: name another --corpus")
        return state

    def save(self) -> None:
        """Write down how far the run got."""
        self.state.features = sorted(self.features)
        (self.folder / "state.json").write_text(json.dumps(dataclasses.asdict(self.state), indent=1))

    @contextlib.contextmanager
    def running(self, trials: Sequence[Trial]) -> Iterator[None]:
        """Within, the folder says what runs, for the case that the process does not live to say it."""
        path = self.folder / "running.json"
        path.write_text(json.dumps([trial.key() for trial in trials]))
        yield
        path.unlink()

    def crashed(self) -> list[Trial]:
        """What ran when the process died the last time; known once."""
        path = self.folder / "running.json"
        if not path.exists():
            return []
        found = [Trial.from_json(text) for text in json.loads(path.read_text())]
        path.unlink()
        return found

    def failures(self) -> list[Trial]:
        """The cases that failed before."""
        return [trial for path in sorted((self.folder / "failures").glob("*.json")) if (trial := _read(path))]

    def learn(self, trial: Trial, verdict: Verdict) -> bool:
        """Keep a case with a feature that none before had. Returns whether it was kept."""
        new = verdict.features() - self.features
        self.features |= new
        if new:
            self.kept.append(trial)
            (self.folder / "features" / f"{_name(trial)}.json").write_text(trial.key())
        return bool(new)

    def fail(self, trial: Trial, verdict: Verdict) -> Path:
        """Write down a failure. Returns the path of the script that shows it."""
        path = self.folder / "failures" / f"{verdict.kind}_{_name(trial)}.json"
        path.write_text(trial.key())
        script = path.with_suffix(".py")
        script.write_text(repro(trial, verdict))
        return script

    def forget(self, trial: Trial) -> None:
        """Drop a failure that is none any more."""
        for path in (self.folder / "failures").glob(f"*_{_name(trial)}.*"):
            path.unlink()


def repro(trial: Trial, verdict: Verdict) -> str:
    """A script that shows the failure."""
    told: dict[str, Any] = {"kind": verdict.kind, "failure": " ".join((verdict.failure or "").split())[:400]}
    told = {name: text.replace('"""', "'''").replace("\\", "\\\\") for name, text in told.items()}
    source = "\n# ".join(trial.spec.source().splitlines()).replace("# \n", "#\n")
    return _REPRO.format(**told, options=trial.options, how=trial.how, source=source, case=trial.key())


def _name(trial: Trial) -> str:
    return hashlib.sha256(trial.key().encode()).hexdigest()[:12]


def _read(path: Path) -> Trial | None:
    """The case in a file; None for what an older version wrote, of parts that are no more."""
    try:
        return Trial.from_json(path.read_text())
    except (KeyError, ValueError, TypeError):
        return None
