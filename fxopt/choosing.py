"""Choosing at each site among our kernel, what else the rule knows, and Inductor: measured once, and remembered.

A site is copied out of its graph with static sizes, each candidate is put in its place and compiled as the whole graph
will be, and forward and backward are timed on drawn tensors. Nothing here may cost a training run more than time: a
candidate that fails is out, with its reason in the report, and a site that cannot be measured is decided without.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, fx

from fxopt import compat
from fxopt.choice import INDUCTOR, OURS, Choice, Measured, decide
from fxopt.compat import pytree
from fxopt.errors import brief
from fxopt.excerpt import Excerpt, Unmeasurable, ambient, draw, excerpt
from fxopt.fake import value_of
from fxopt.fallback import warn_once
from fxopt.kernels.cards import card_of
from fxopt.kernels.configs import tuning_is_on
from fxopt.kernels.refused import warn_of
from fxopt.kernels.tuning import tune
from fxopt.metering import CudaMeter, Meter, Run, release, undisturbed
from fxopt.remembering import Key, recall, remember
from fxopt.rule import Place, Rule, Site
from fxopt.site_kernels import refused_sites

__all__ = ["Chooser"]

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
Tell = Callable[[str], object]

TUNING = "tuning"
"""What the meter is told that it measures where it is a configuration of a candidate's kernel."""

_LOG = logging.getLogger("fxopt")


class Chooser:
    """Measures the candidates of sites, and remembers what it found.

    compiler: as the graph that the sites are in will be compiled; None only recalls what was measured before.
    settings: what that compiler's results depend on besides the graph; part of what measurements are kept by.
    meter:    takes milliseconds and bytes; by default on CUDA, and nothing on a CPU.
    tunes:    whether every configuration of a candidate's kernels is measured first, and the fastest kept.
    """

    def __init__(self, compiler: Compiler | None, settings: str = "", meter: Meter | None = None, tunes: bool = False):
        self.compiler, self.settings, self.tunes = compiler, settings, tunes
        self.meter = CudaMeter() if meter is None else meter

    def choose(self, rule: Rule, site: Site) -> Choice | None:
        """The choice at `site`; None on a device where nothing is measured, an empty one where this site cannot be."""
        card = self.meter.card(value_of(site.anchor).device)
        if not card:
            return None
        try:
            measured = self._measured(rule, site, card)
            if all(one.milliseconds is None for one in measured):
                raise Unmeasurable("; ".join(map(str, measured)))
            return Choice(decide(measured, rule.saves_memory(site)), measured)
        except compat.DYNAMO_CONTROL:
            raise
        except Exception as error:  # a decision that cannot be made is made as if nobody asked
            return Choice(unmeasured=str(error) if isinstance(error, Unmeasurable) else brief(error))

    def _measured(self, rule: Rule, site: Site, card: str) -> tuple[Measured, ...]:
        """From memory, or now. Raises `Unmeasurable`, and what the rule's hooks raise."""
        found = excerpt(site)
        candidates = rule.replacements(site)
        text = "\n".join([f"version {rule.version}", " ".join(candidates), self.settings, found.text()])
        # What tuning found is in force wherever it is on, and so are the times that were taken after it.
        tuned, untuned = Key(rule.name, f"tuned\n{text}", card), Key(rule.name, text, card)
        measured = (recall(tuned) if tuning_is_on() else ()) or (() if self.tunes else recall(untuned))
        if measured:
            return measured
        if self.compiler is None:
            raise Unmeasurable("nothing is remembered of such a site, and it is measured when it is compiled")
        with compat.apart(), undisturbed(value_of(site.anchor).device):
            inputs = draw(found, rule)
            names = [*candidates, INDUCTOR]
            with _telling(f"fxopt: measuring {rule.name} at {Place.of(site.anchor)} by {', '.join(names)}") as tell:
                measured = tuple(self._measure(name, site, candidates.get(name), inputs, tell) for name in names)
        remember(tuned if self.tunes else untuned, measured)
        return measured

    def _measure(
        self, name: str, site: Site, replacement: Callable[..., Any] | None, inputs: Sequence[Tensor], tell: Tell
    ) -> Measured:
        """One candidate, by itself: what it holds is let go of before the next."""
        graph = None
        try:
            found = excerpt(site)
            with ambient(found.site.anchor):
                graph = found.module if replacement is None else found.rewritten(replacement)
                tuned = () if replacement is None else self._tune(graph, found, inputs, tell)
                assert self.compiler is not None
                run = _step(self.compiler(graph, inputs), found, inputs)
                milliseconds, held = self.meter(name, run)
            return Measured(name, milliseconds, held, tuned=tuned)
        except Exception as error:
            if name == OURS and not isinstance(error, torch.OutOfMemoryError):
                _warn(site, graph, error)
            return Measured(name, None, failure=brief(error))
        finally:
            release()

    def _tune(self, graph: fx.GraphModule, found: Excerpt, inputs: Sequence[Tensor], tell: Tell) -> tuple[str, ...]:
        """Measure the kernels that `graph` launches, run as it is: within a compiled one their configurations are
        chosen already. What cannot be tuned is measured all the same, by its defaults."""
        if not self.tunes:
            return ()
        try:
            run = _step(graph, found, inputs)
            card = card_of(value_of(found.site.anchor).device)
            return tuple(map(str, tune(run, card, lambda once: self.meter(TUNING, once)[0], tell=tell)))
        except Exception as error:
            return (f"nothing: {brief(error)}",)


def _step(call: Callable[..., Any], found: Excerpt, inputs: Sequence[Tensor]) -> Run:
    """A forward of `call` in the site's grad mode and autocast, and a backward by every input that wants a gradient."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]

    def outputs() -> list[Tensor]:
        with ambient(found.site.anchor):
            return [item for item in pytree.tree_leaves(call(*inputs)) if item.requires_grad]

    upstream = [torch.randn_like(item) for item in outputs()]

    def run() -> object:
        results = outputs()
        return torch.autograd.grad(results, wanted, upstream, allow_unused=True) if results else None

    return run


def _warn(site: Site, graph: fx.GraphModule | None, error: Exception) -> None:
    """Warn that fxopt's own candidate at `site`, which is `graph` if it came to that, failed with `error`."""
    refused = {} if graph is None else refused_sites(graph)
    for one in refused.values():
        warn_of(one, "Sites that need it are left to others")
    if not refused:
        part = f"fxopt's {site.rule} at {Place.of(site.anchor)}"
        warn_once(part, "the site is left to others", error, graph or fx.GraphModule({}, fx.Graph()), {})


@contextlib.contextmanager
def _telling(line: str) -> Iterator[Tell]:
    """Show `line` while the work goes on, on a terminal, and after it what is told; a log elsewhere gets both at level
    INFO."""
    _LOG.info(line)
    if not sys.stderr.isatty():
        yield _LOG.info
        return
    with Console(stderr=True).status(line) as status:
        yield lambda more: status.update(f"{line}: {more}")
