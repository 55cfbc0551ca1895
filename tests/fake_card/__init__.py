"""A CUDA device without a card, in a process of its own: fake CUDA tensors go through Dynamo, autograd and AOTAutograd.

`install` must be called before torch is imported: torch asks once which devices there are.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "guard.cpp"
BUILT = HERE.parent.parent / "out" / "fake_card"


def install() -> None:
    """Let this process take fake CUDA tensors. Raises RuntimeError where torch is imported or has a CUDA of its own."""
    if "torch" in sys.modules:
        raise RuntimeError("fake_card.install() comes before torch is imported")
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent
    if (root / "lib" / "libtorch_cuda.so").exists():
        raise RuntimeError("this torch has a CUDA of its own, which a second one would break")
    for library in (root / "lib" / "libtorch_global_deps.so", root / "lib" / "libtorch_cpu.so", _library(root)):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    _let_autocast_in()


def _library(root: Path) -> Path:
    """`guard.cpp` compiled against the torch in `root`: once for both as they are, whoever comes first."""
    parts = (SOURCE.read_text(), importlib.metadata.version("torch"), sys.version)
    path = BUILT / f"guard_{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(f".{os.getpid()}")
        libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{root / 'include'}"]
        subprocess.run(["g++", *flags, str(SOURCE), *libraries, "-o", str(made)], check=True)
        os.replace(made, path)
    return path


def _let_autocast_in() -> None:
    """Autocast on CUDA switches itself off, with a warning, where Python's torch.cuda sees no device."""
    import torch
    import torch.cuda.amp.common as common

    common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True  # type: ignore[assignment]
