"""One backend's training run in a process of its own; started by compare.py, which reads its lines of JSON.

python examples/compare_one.py BACKEND[+PRECISION] LAYERS TOKENS_FILE
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))  # for memory.py

from corpus import batches
from rss import begin_peak, end_peak
from train_llama import BATCH, LENGTH, make_model, train

WARM = 3  # steps before any is timed: by then everything is compiled and the optimizer has its state
WATCHED = 3  # steps at the end whose memory is measured; giving memory back to the system first makes them slower


def main() -> None:
    """Train on every batch of the file; print a line a step, then one with what the whole run needed."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes to standard error
    name, layers, path = sys.argv[1:]
    backend, _, precision = name.partition("+")
    data = list(batches(Path(path), BATCH, LENGTH))
    losses = train(make_model(int(layers)), backend, data, precision or None)
    peaks: list[float] = []
    for number in range(len(data)):
        watched = number >= len(data) - WATCHED
        rest = begin_peak() if watched else 0
        start = time.perf_counter()
        loss = next(losses)
        lines.write(json.dumps({"loss": loss, "seconds": time.perf_counter() - start}) + "\n")
        if watched:
            peaks.append(end_peak(rest))
    lines.write(json.dumps({"peak_mib": statistics.median(peaks), "verdict": verdict(backend)}) + "\n")


def verdict(backend: str) -> str:
    """Return fxopt's verdict on the graph it compiled last, "" for other backends."""
    if backend != "fxopt":
        return ""
    import fxopt

    return fxopt.reports()[-1].verdict


if __name__ == "__main__":
    main()
