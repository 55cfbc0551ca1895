"""Compiling many kernels in processes of their own, none of which can take the others down."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from rich.console import Console
from rich.progress import track

from fxopt.kernels.interpreter import interpreting
from fxopt.kernels.offline import Job, Resources, compile_offline, recalled, remember

__all__ = ["LIMIT", "Outcome", "compile_all", "compile_shown", "serve"]

Outcome = Resources | str
"""What a kernel uses, or a sentence why it was not compiled."""

LIMIT = 120.0
"""Seconds for one kernel: ours take 0.2 to 20; a tile of AMD's that spills can take hours."""

Compile = Callable[[Job], Resources]


def compile_all(
    jobs: Sequence[Job], processes: int, limit: float = LIMIT, compiler: Compile = compile_offline
) -> Iterator[tuple[Job, Outcome]]:
    """Each of `jobs` with what came of it, in the order in which they are done; what is remembered comes first.

    A job whose compiler raises, dies or takes longer than `limit` seconds is a sentence; the rest go on.
    Raises RuntimeError where Triton interprets.
    """
    if interpreting():
        raise RuntimeError("triton was imported with TRITON_INTERPRET=1 and compiles nothing: unset it and start again")
    known = {job: recalled(job) for job in jobs}
    yield from ((job, found) for job, found in known.items() if found is not None)
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Job, Outcome]] = queue.SimpleQueue()
    left = [job for job, found in known.items() if found is None]
    for job in left:
        waiting.put(job)
    workers = [_Worker(compiler, limit) for _ in range(min(processes, len(left)))]
    try:
        for worker in workers:
            threading.Thread(target=_feed, args=(worker, waiting, done), daemon=True).start()
        for _ in left:
            job, outcome = done.get()
            if isinstance(outcome, Resources):
                remember(job, outcome)
            yield job, outcome
    finally:
        for worker in workers:
            worker.close()


def compile_shown(jobs: Sequence[Job], processes: int, limit: float = LIMIT) -> dict[Job, Outcome]:
    """`compile_all`, with a progress bar where there is a terminal; nothing to do is done anywhere."""
    if not jobs:
        return {}
    console, different = Console(stderr=True), list(dict.fromkeys(jobs))
    compiled, quiet = compile_all(different, processes, limit), not console.is_terminal
    return dict(track(compiled, "compiling", len(different), console=console, transient=True, disable=quiet))


def _feed(worker: _Worker, waiting: queue.SimpleQueue[Job], done: queue.SimpleQueue[tuple[Job, Outcome]]) -> None:
    with contextlib.suppress(queue.Empty):
        while not worker.closed:
            job = waiting.get_nowait()
            try:
                done.put((job, worker.ask(job)))
            except OSError as error:
                done.put((job, f"no process to compile in: {error}"))


class _Worker:
    """A process that compiles one job after another, replaced by a new one where it had to be ended."""

    def __init__(self, compiler: Compile, limit: float) -> None:
        self.compiler, self.limit, self.closed = compiler, limit, False
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, job: Job) -> Outcome:
        """What comes of `job`. Raises OSError where no process can be had."""
        process = self.process or self._start()
        try:
            self.connection.send(job)
            if self.connection.poll(self.limit):
                return self.connection.recv()
            why = f"compilation took longer than {self.limit:g} s"
        except (EOFError, ConnectionError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            why = f"the compiler's process ended with exit code {process.returncode}"
        self.process = None
        _kill(process)
        return why

    def _start(self) -> subprocess.Popen[bytes]:
        """A new interpreter. A fork of a process with threads, as torch's is, may hang; multiprocessing's spawn runs
        the main module again, which may be a training script that does not ask whether it is `__main__`."""
        self.connection, theirs = multiprocessing.Pipe()
        command = f"from fxopt.kernels.farm import serve; serve({theirs.fileno()})"
        paths = os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))
        process = subprocess.Popen(
            [sys.executable, "-c", command],
            env=os.environ | {"PYTHONPATH": paths},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches the asking process alone
        )
        self.process = process
        theirs.close()
        with contextlib.suppress(EOFError, ConnectionError):
            self.connection.send(self.compiler)
            self.connection.recv()  # imports take 3 s, which are not the kernel's
        return process

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.closed = True
        if self.process is not None:
            _kill(self.process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and the assembler that it may be waiting for."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def serve(descriptor: int) -> None:
    """In a process of its own: answer jobs that come over a pipe until nobody asks; a compiler comes first."""
    connection: Connection[Any, Any] = Connection(descriptor)
    with contextlib.suppress(EOFError, OSError):
        compiler = connection.recv()
        connection.send(None)
        while True:
            connection.send(_outcome(compiler, connection.recv()))


def _outcome(compiler: Compile, job: Job) -> Outcome:
    try:
        return compiler(job)
    except Exception as error:
        lines = [line.strip() for line in f"{error}".splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[-1] if lines else 'without a message'}"
