"""fxopt's version, part of every cache key, and those of what it stands on, part of every report."""

from __future__ import annotations

import functools
import platform
from importlib import metadata

VERSION = "0.1.0"


@functools.cache
def versions() -> dict[str, str]:
    """By name, the versions that decisions depend on; "none" for what is not installed."""
    found = {"fxopt": VERSION, "python": platform.python_version()}
    return found | {name: _installed(name) for name in ("torch", "triton", "transformers")}


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"
