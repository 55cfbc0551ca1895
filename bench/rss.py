"""The operating system's own account of how much memory a piece of work needs (Linux).

RSS sampled from outside misses short peaks, and a `TorchDispatchMode` makes compiled code run eagerly, so neither can
be used here. The kernel keeps the high-water mark of the resident set, `VmHWM`, and lowers it to the present size when
"5" is written to `/proc/self/clear_refs` (see proc(5)).
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

MIB = 2**20


def status_bytes(field: str) -> int:
    """Return a `kB` field of /proc/self/status in bytes, for example `VmRSS` or `VmHWM`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(f"/proc/self/status has no field {field!r}")


def begin_peak() -> int:
    """Give freed memory back to the system, lower the high-water mark to what is left, and return that in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def end_peak(rest: int) -> float:
    """Return the high-water mark since `begin_peak` over the `rest` it returned, in MiB."""
    return (status_bytes("VmHWM") - rest) / MIB


def peak_over_rest(work: Callable[[], object]) -> float:
    """Return the peak memory of `work()` over the memory in use before it, in MiB."""
    rest = begin_peak()
    result = work()
    peak = end_peak(rest)
    del result
    return peak
