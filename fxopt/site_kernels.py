"""Which kernels the rewritten sites of a graph launch, and which of them their card does not take."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import operator
import os
from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from fxopt.errors import brief
from fxopt.fake import arguments, value_of
from fxopt.kernels.cards import Card, as_if_on, card_of
from fxopt.kernels.farm import Outcome, compile_shown
from fxopt.kernels.offline import Job
from fxopt.kernels.refused import KernelError
from fxopt.kernels.source import Kernel
from fxopt.ops.launch import Launch
from fxopt.ops.launched import kernels_of
from fxopt.rewrite import submodules
from fxopt.rule import Place
from fxopt.score.term import Term

__all__ = ["Use", "Used", "refused_sites", "used_kernels"]

_LOG = logging.getLogger("fxopt")


@dataclasses.dataclass(frozen=True)
class Use:
    """A kernel that a rewritten site launches: the site's name and place, and where its program's terms come from."""

    rule: str
    site: str
    place: Place
    origins: Mapping[Term, Place]


@dataclasses.dataclass
class Used:
    """A kernel's uses, and on which cards, of those asked about, it is launched how."""

    uses: list[Use] = dataclasses.field(default_factory=list)
    launches: dict[Card, Launch] = dataclasses.field(default_factory=dict)


def used_kernels(gm: fx.GraphModule, cards: Sequence[Card]) -> dict[Kernel, Used]:
    """By kernel: those that are launched where the tensors of `gm` are, and those of `cards`."""
    found: dict[Kernel, Used] = collections.defaultdict(Used)
    for node in _site_nodes(gm):
        origins = node.meta.get("origins", {})
        uses = [Use(node.meta["rule"], name, place, origins) for name, place in node.meta["sites"]]
        kernels: dict[Kernel, None] = {}
        for card in (None, *cards):
            with contextlib.nullcontext() if card is None else as_if_on(card):
                launches = _kernels_of(node)
            kernels |= dict.fromkeys(launches)
            if card is not None:
                for kernel, launch in launches.items():
                    found[kernel].launches.setdefault(card, launch)
        for kernel in kernels:
            found[kernel].uses += uses
    return found


def _site_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes of fxopt's operators that stand for sites, in bodies too."""
    nodes = [node for module in submodules(gm) for node in module.graph.nodes if "sites" in node.meta]
    return [node for node in nodes if getattr(node.target, "namespace", "") == "fxopt"]


def _kernels_of(node: fx.Node) -> dict[Kernel, Launch]:
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    read = {arguments(user)[1] for user in node.users if user.target is operator.getitem}
    return kernels_of(node.target, args, kwargs, read)


def refused_sites(gm: fx.GraphModule) -> dict[tuple[str, str], KernelError]:
    """By rule and site: the sites of `gm` on CUDA with a kernel that does not compile for the card they are on.

    Every kernel is compiled once more, in processes of their own, at seconds each: for when something has failed. A
    graph whose kernels cannot be told has none that are refused.
    """
    try:
        return _refused(gm)
    except Exception as error:  # the failure that is looked into must not be hidden by another
        _LOG.info("kernels of a graph that failed could not be compiled one by one: %s", brief(error))
        return {}


def _refused(gm: fx.GraphModule) -> dict[tuple[str, str], KernelError]:
    found: dict[tuple[str, str], KernelError] = {}
    for card in _cards(gm):
        uses = {kernel: used for kernel, used in used_kernels(gm, (card,)).items() if card in used.launches}
        jobs = {
            kernel: Job(kernel, used.launches[card].config, card, used.launches[card].aligned)
            for kernel, used in uses.items()
        }
        outcomes = compile_shown(list(jobs.values()), len(os.sched_getaffinity(0)))
        for kernel, job in jobs.items():
            why = _why_not(outcomes[job], card)
            if why:
                found |= {(use.rule, use.site): KernelError(kernel, why) for use in uses[kernel].uses}
    return found


def _cards(gm: fx.GraphModule) -> set[Card]:
    """The cards that sites are on."""
    values = [value_of(item) for node in _site_nodes(gm) for item in node.all_input_nodes]
    return {card_of(value.device) for value in values if isinstance(value, Tensor) and value.device.type == "cuda"}


def _why_not(outcome: Outcome, card: Card) -> str:
    if isinstance(outcome, str):
        return outcome
    if outcome.fits:
        return ""
    return f"it needs {outcome.shared_bytes:,} bytes of shared memory, {card.name} has {card.shared:,}"
