"""Measuring the candidates of kernels on the card that is there, and keeping the fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fxopt.kernels.cards import Card
from fxopt.kernels.configs import TRIAL, Config, Trial, remember, remembered, tuning_is_on
from fxopt.kernels.refused import is_refusal
from fxopt.kernels.source import Kernel

__all__ = ["Tuned", "tune"]

MARGIN = 0.98
"""Of the default's time that another candidate may take at most: below 2% medians differ by themselves."""

Run = Callable[[], object]
Timer = Callable[[Run], float]


@dataclass(frozen=True)
class Tuned:
    """What was measured of one kernel: each candidate with the milliseconds of the whole run, and the one that is kept.

    Candidates that do not compile, or do not fit the card, have None.
    """

    kernel: Kernel
    times: tuple[tuple[Config, float | None], ...]
    best: Config

    def __str__(self) -> str:
        """Which of how many is kept, and the milliseconds of the run with the default and with it."""
        known = dict(self.times)
        default = self.times[0][0]
        of = f"{self.kernel.name}, of {len(self.times)} configurations {self.best}"
        if self.best == default:
            return f"{of}: the default"
        was = "it fails" if known[default] is None else f"{known[default]:,.3g} ms"
        return f"{of}: {known[self.best]:,.3g} ms, the default {was}"


def tune(
    run: Run, card: Card, timer: Timer | None = None, again: bool = False, tell: Callable[[str], object] = str
) -> tuple[Tuned, ...]:
    """Find the fastest candidate of each kernel that `run` launches, and remember it for `card`.

    run: launches kernels, each with `config_for`, and may call ``backward``; not a compiled function, whose
    configurations are chosen. It is called once to see which kernels there are, then timed with one candidate of one
    kernel in place of what is remembered. timer: milliseconds of a callable, by default the median of `do_bench`.
    again: also measure kernels of which something is remembered. tell: gets a line before each candidate is compiled
    and timed, for seconds.

    Nothing is done with ``FXOPT_TUNE=0``, or where there is no card. Raises what `run` raises with the defaults; a
    candidate alone may fail. Other threads may train meanwhile: they are launched as before, and disturb the times.
    """
    if not tuning_is_on() or not card.model:
        return ()
    measure = timer or do_bench
    seen = Trial(card)
    _under(seen, run)()
    found = []
    for kernel, candidates in seen.launched.items():
        known = remembered(kernel, card) in candidates
        if len(candidates) > 1 and (again or not known):
            times = []
            for count, one in enumerate(candidates, 1):
                tell(f"{kernel.name}, configuration {count} of {len(candidates)}")
                times.append((one, _time(run, Trial(card, {kernel: one}), measure)))
            found.append(Tuned(kernel, tuple(times), _best(times)))
            remember(kernel, card, found[-1].best)
    return tuple(found)


def do_bench(run: Run) -> float:
    """The median milliseconds of `run`, with the second cache emptied before each; warm-ups of 10 ms, then 50 ms."""
    from triton import testing

    return float(testing.do_bench(run, warmup=10, rep=50, return_mode="median"))


def _under(trial: Trial, run: Run) -> Run:
    """`run` with `trial` in force, backwards included: they would run in threads of autograd's own."""

    def tried() -> None:
        token = TRIAL.set(trial)
        try:
            with torch.autograd.set_multithreading_enabled(False):
                run()
        finally:
            TRIAL.reset(token)

    return tried


def _time(run: Run, trial: Trial, timer: Timer) -> float | None:
    """Milliseconds, or None where Triton refuses the candidate; what CUDA says, an illegal address say, is raised."""
    try:
        return timer(_under(trial, run))
    except Exception as error:
        if not is_refusal(error):
            raise
        return None


def _best(times: Sequence[tuple[Config, float | None]]) -> Config:
    """The fastest; the first of all, the default, unless it is beaten by more than `MARGIN`."""
    default, of_default = times[0]
    timed = [(time, at) for at, (_, time) in enumerate(times) if time is not None]
    least, at = min(timed, default=(0.0, 0))
    return default if of_default is not None and least > MARGIN * of_default else times[at][0]
