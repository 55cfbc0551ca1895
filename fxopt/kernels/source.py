"""Generated kernels as Python modules: rendered from templates, written to a cache directory, imported from there.

Triton reads the source of a kernel from its file, and people read it there too, so a kernel's text is a file under its
own hash: equal text is one file and one kernel, in this process and in the next.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import linecache
import os
import re
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from fxopt.score.term import Term

__all__ = ["TRITON_DTYPES", "Kernel", "cache_directory", "generate", "render", "write_whole"]

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("fxopt.kernels"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TRITON_DTYPES = {"bf16": "tl.bfloat16", "fp16": "tl.float16", "fp32": "tl.float32"}
"""What kernels compute on, by its name in signatures."""

_IMPORTING = threading.Lock()  # graphs may be compiled, and backwards run, on several threads


@dataclass(frozen=True)
class Kernel:
    """One generated kernel: what the launcher, the offline compiler and the dump need.

    name:      its function in `source`, "attention_forward" say; of its family, not of its spec.
    source:    the text of a Python module that needs nothing but triton.
    signature: its arguments in order with their Triton types ("*bf16", "i32"); "constexpr" for the tile sizes that a
               `Config` gives. There are no floats: constants are part of the source, since a Python float would reach
               the kernel as fp64 from one launcher and as fp32 from another.
    terms:     which term of a score program, or of its derivative, each variable of the source holds that holds one;
               for who reads the source. Equal sources are equal kernels whatever is said here.
    """

    name: str
    source: str
    signature: tuple[tuple[str, str], ...]
    terms: Mapping[str, Term] = field(default_factory=dict, compare=False, repr=False)

    @property
    def key(self) -> str:
        """A hash of the source, which names the file and what is remembered of the kernel."""
        return _key(self.source)

    @property
    def path(self) -> Path:
        """Where the source lies once the kernel is loaded."""
        return _path(self.name, self.source)

    def written(self) -> Path:
        """`path`, once the source is there. Raises OSError."""
        return _written(self.name, self.source)

    @property
    def tiles(self) -> tuple[str, ...]:
        """The names of the tile sizes."""
        return tuple(name for name, kind in self.signature if kind == "constexpr")

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of all others: pointers and integers."""
        return tuple(name for name, kind in self.signature if kind != "constexpr")

    def load(self) -> Any:
        """The function as ``triton.jit`` makes it; the same object for equal sources."""
        with _IMPORTING:
            return _load(self.name, self.source)


@functools.lru_cache(4096)
def _key(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _path(name: str, source: str) -> Path:
    return cache_directory() / "kernels" / f"{name}_{_key(source)}.py"


@functools.lru_cache(4096)
def _load(name: str, source: str) -> Any:
    module_name = f"fxopt_generated_{name}_{_key(source)}"
    path = _written(name, source)
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # so that inspect finds the module of its functions
    # Without the file (a cache that somebody empties) tracebacks and Triton still have the text.
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
    spec.loader.exec_module(module)
    return getattr(module, name)


def _written(name: str, source: str) -> Path:
    path = _path(name, source)
    if not path.is_file() or path.read_text() != source:
        write_whole(path, source)
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, its directories too: processes share the cache. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def cache_directory() -> Path:
    """``$FXOPT_CACHE``, else ``fxopt`` in the user's cache directory, else in the temporary one."""
    given = os.environ.get("FXOPT_CACHE")
    if given:
        return Path(given)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parent = home if home.is_dir() else home.parent
    usable = os.access(parent, os.W_OK) and parent.is_dir()
    return home / "fxopt" if usable else Path(tempfile.gettempdir()) / f"fxopt-{os.getuid()}"


def render(template: str, values: Mapping[str, Any]) -> str:
    """`template` (a file of ``fxopt/kernels/templates``) with `values`; a name that is missing is an error."""
    return _ENVIRONMENT.get_template(template).render(**values)


def generate(name: str, signature: Sequence[tuple[str, str]], body: str, helpers: Sequence[str] = ()) -> Kernel:
    """The kernel `name` of these arguments: `body` is its docstring and code, indented; helpers: functions it calls.

    Blank lines of the code, where macros of a template say nothing, are left out, and long loads wrapped.
    """
    _, docstring, code = re.split(r'(""".*?""")', body, maxsplit=1, flags=re.DOTALL)
    lines = [_wrapped(line) for line in code.split("\n") if line.strip()]
    written = [f"{one}: tl.constexpr" if kind == "constexpr" else one for one, kind in signature]
    function = "\n".join(["@triton.jit", f"def {name}(", *_in_lines(written), "):", f"    {docstring}", *lines])
    head = "import triton\nimport triton.language as tl"
    return Kernel(name, "\n\n\n".join([head, *(one.strip() for one in helpers), function]) + "\n", tuple(signature))


def _in_lines(arguments: Sequence[str]) -> list[str]:
    """Arguments, as many to a line as fit."""
    lines: list[str] = []
    for argument in arguments:
        if lines and len(lines[-1]) + len(argument) < 112:
            lines[-1] += f" {argument},"
        else:
            lines.append(f"    {argument},")
    return lines


def _wrapped(line: str) -> str:
    """A long load with its mask on a line of its own."""
    at = line.find(", mask=")
    if len(line) <= 120 or at < 0:
        return line
    return f"{line[: at + 1]}\n{' ' * (line.rfind('tl.load(', 0, at) + 8)}{line[at + 2 :]}"
