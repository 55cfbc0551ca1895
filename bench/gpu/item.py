"""What a run consists of: items, each one question to the GPU with one record for an answer, and how they are asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

Spec = dict[str, Any]
Answer = dict[str, Any]
"""What JSON can hold."""


@dataclass(frozen=True)
class Settings:
    """How every item of a run is asked.

    interpret: on CPU tensors, kernels under Triton's interpreter. tiny: shapes that take no time. seed: of what is
    drawn. compile_threads: that Inductor may use in a worker.
    """

    interpret: bool = False
    tiny: bool = False
    seed: int = 0
    compile_threads: int = 1

    @property
    def device(self) -> str:
        """Where tensors are."""
        return "cpu" if self.interpret else "cuda"

    @property
    def lowering(self) -> str:
        """Of our operators (`fxopt.ops.launch`)."""
        return "interpret" if self.interpret else "auto"

    @property
    def compiler(self) -> str:
        """The backend of contenders called "inductor": a dry run need not wait for g++."""
        return "aot_eager" if self.interpret else "inductor"


@dataclass(frozen=True)
class Item:
    """One question.

    name: unique in its phase. spec: for the job. seconds, gib: what preparing it takes at most, with others beside it.
    turns: how often it is then measured, alone on the card, `turn_seconds` each; `rest_gib` is held in between. group:
    items of a group are measured in turn, others in any order. fresh: in a process of its own, whose job sees by itself
    whether it is alone on the card. ahead_gib: what it holds once it is compiled, if that can be done before its turn:
    then `seconds` are those of compiling, and preparing takes as long as a turn.
    """

    phase: str
    name: str
    spec: Spec = field(default_factory=dict)
    seconds: float = 10.0
    gib: float = 1.5
    turns: int = 0
    turn_seconds: float = 0.0
    rest_gib: float = 1.0
    group: str = ""
    fresh: bool = False
    ahead_gib: float = 0.0

    @property
    def timeout(self) -> float:
        """Seconds after which whatever it does is given up."""
        return max(90.0, 5 * self.seconds)


class Job(Protocol):
    """An item at work in a worker process."""

    def prepare(self) -> Answer:
        """All that can be done beside others: build, compile, check, warm up."""

    def measure(self, turn: int) -> Answer:
        """Times, alone on the card."""


class Compiles(Job, Protocol):
    """A job of items with `ahead_gib`."""

    def compile(self) -> Answer:
        """What of `prepare` needs no more than that of the card's memory."""
