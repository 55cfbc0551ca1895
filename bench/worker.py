"""One backend and one model in a process of its own, which works when told to.

Started by measure.Worker. A command is a line of JSON on standard input, an answer a line of JSON on what was standard
output; whatever else the process prints goes to standard error. It ends when standard input does.
"""

import json
import os
import statistics
import sys
import time
from typing import Any

import torch
from backends import compile_as
from cases import find
from rss import peak_over_rest


class Trainer:
    """A model under a backend, and the measurements that can be asked of it by name."""

    def __init__(self, case: str, backend: str) -> None:
        found = find(case)
        self.backend = backend
        self.model = found.build()
        self.inputs = found.inputs()
        self.run = compile_as(self.model, backend)

    def step(self) -> torch.Tensor:
        """Run forward and backward once and return the loss."""
        self.model.zero_grad(set_to_none=True)
        loss: torch.Tensor = self.run(**self.inputs).loss
        loss.backward()
        return loss.detach()

    def timed(self) -> float:
        """Return the seconds of one step."""
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start

    def compile(self) -> dict[str, float]:
        """Return the seconds of the first step, and those by which it was longer than the ones after it."""
        first = self.timed()
        later = statistics.median(self.timed() for _ in range(3))
        return {"first_step_s": first, "compile_s": first - later}

    def steps(self, count: int) -> list[float]:
        """Return the seconds of each of `count` steps."""
        return [self.timed() for _ in range(count)]

    def memory(self) -> float:
        """Return the peak of one step over the process at rest, without gradients, in MiB."""
        self.model.zero_grad(set_to_none=True)
        return peak_over_rest(self.step)

    def check(self) -> dict[str, float]:
        """Return the loss and the norm of all gradients, to see that every backend computes the same."""
        loss = self.step()
        squares = sum(p.grad.double().square().sum() for p in self.model.parameters() if p.grad is not None)
        return {"loss": loss.item(), "grad_norm": float(squares) ** 0.5}

    def explain(self, html: str) -> dict[str, Any]:
        """Write the page of `fxopt.explain` to `html`; return the seconds of both, its bytes and the verdict."""
        import fxopt

        inputs: dict[str, Any] = dict(self.inputs)
        start = time.perf_counter()
        report = fxopt.explain(self.model, **inputs)
        explained = time.perf_counter()
        path = report.to_html(html)
        written = time.perf_counter()
        return {
            "explain_s": explained - start,
            "html_s": written - explained,
            "bytes": path.stat().st_size,
            "verdict": report.verdict,
        }

    def report(self) -> dict[str, Any]:
        """Return what fxopt says it did: the verdict, the rules that fired and the seconds of its stages."""
        if not self.backend.startswith("fxopt"):
            return {}
        import fxopt

        reports = fxopt.reports()
        timings: dict[str, float] = {}
        for stage, seconds in (item for report in reports for item in report.timings.items()):
            timings[stage] = timings.get(stage, 0.0) + seconds
        return {
            "verdict": reports[-1].verdict,
            "rewrites": [site.rule for report in reports for site in report.rewrites],
            "timings": timings,
        }


def main() -> None:
    """Serve the trainer named on the command line: CASE BACKEND."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    trainer = Trainer(*sys.argv[1:3])
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        answers.write(json.dumps(getattr(trainer, command)(*arguments)) + "\n")


if __name__ == "__main__":
    main()
