"""A process that works on one item at a time, so that a crash on the GPU loses that item and nothing else."""

from __future__ import annotations

import contextlib
import importlib
import os
import traceback
from multiprocessing.connection import Connection
from typing import Any, cast

import torch

from fxopt.errors import brief
from fxopt.metering import release
from gpu import turns
from gpu.item import Answer, Compiles, Item, Job, Settings

JOBS = {
    "check": "gpu.check:Check",
    "kernels": "gpu.kernels:Kernels",
    "step": "gpu.step:Training",
    "tune": "gpu.tune:Tuning",
}
"""Imported when needed: a worker of the phase `check` has no use for transformers."""


def serve(connection: Connection, settings: Settings, log: str) -> None:
    """Answer ("compile", item), ("prepare", item), ("measure", turn) and ("drop", None) until the connection closes.

    An answer with "error" in it says that the command failed; after one with "lost" the process ends, since its CUDA
    context is of no more use. Whatever is printed goes to the file `log`.
    """
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if settings.interpret:
        torch.set_num_threads(1)
    bench = Bench(settings)
    while True:
        try:
            command, argument = connection.recv()
        except (EOFError, OSError):
            return
        answer = bench.answer(command, argument)
        connection.send(answer)
        if answer.get("lost"):
            return


class Bench:
    """The item that a worker is at."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.job: Job | None = None
        self.compiled = False

    def answer(self, command: str, argument: Any) -> Answer:
        """Do what is asked; errors are answers."""
        try:
            answer = self._do(command, argument)
            self._synchronize()  # what the GPU has against it belongs to this item
            return answer
        except Exception as error:
            traceback.print_exc()
            self.job = None
            return {"error": brief(error), "lost": self._context_is_lost()}

    def _do(self, command: str, argument: Any) -> Answer:
        if command == "measure" and self.job is not None:
            with turns.alone():
                return self.job.measure(argument)
        if command == "prepare" and self.job is not None and self.compiled:
            self.compiled = False
            return self.job.prepare()
        self.job, self.compiled = None, False
        torch.compiler.reset()  # else equal functions of many items meet Dynamo's recompile limit
        release()
        if command not in ("compile", "prepare"):
            return {}
        with contextlib.nullcontext() if argument.fresh else turns.beside_others():
            self.job = job = job_of(argument, self.settings)
            if command == "prepare":
                return job.prepare()
        self.compiled = True
        return cast(Compiles, job).compile()

    def _synchronize(self) -> None:
        if self.settings.device == "cuda":
            torch.cuda.synchronize()

    def _context_is_lost(self) -> bool:
        try:
            self._synchronize()
        except Exception:
            return True
        return False


def job_of(item: Item, settings: Settings) -> Job:
    """The item at work."""
    module, name = JOBS[item.phase].split(":")
    made: Job = getattr(importlib.import_module(module), name)(item, settings)
    return made
