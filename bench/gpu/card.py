"""The card, and what else a number depends on."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch
from measure import git

from fxopt.metering import processor

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy")
OUTPUTS = ":!bench/results"


class NoGpu(RuntimeError):
    """There is no GPU that CUDA can use here."""


def describe(commit: str, interpret: bool) -> dict[str, Any]:
    """Card, memory, driver, versions and commit. Raises `NoGpu` without CUDA, unless kernels are interpreted."""
    return {
        **(_interpreter() if interpret else _cuda()),
        "cpu": processor(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "commit": commit or commit_here(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _interpreter() -> dict[str, Any]:
    return {"card": "none (interpreted)", "gib": 8.0, "driver": "none", "capability": "none"}


def _cuda() -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise NoGpu(
            "there is no GPU that torch can use (torch.cuda.is_available() is False): run this on one, or add"
            " --interpret --tiny for a dry run of the code on this machine"
        )
    seen = torch.cuda.get_device_properties(0)
    return {
        "card": seen.name,
        "gib": round(seen.total_memory / 2**30, 1),
        "driver": _driver(),
        "capability": f"{seen.major}.{seen.minor}",
        "cuda": torch.version.cuda,
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def commit_here() -> str:
    """The commit, and where the tree differs from it, a hash of how; "unknown" outside a repository."""
    commit = git("rev-parse", "HEAD")[:12]
    changes = git("diff", "HEAD", "--", ".", OUTPUTS) + git("status", "--porcelain", "--", ".", OUTPUTS)
    return f"{commit or 'unknown'}{'+' + hashlib.sha256(changes.encode()).hexdigest()[:6] if changes else ''}"


def slug(card: str) -> str:
    """The card's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
