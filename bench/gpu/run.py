"""Check and time fxopt's kernels and training steps on the GPU of this machine; see docs/gpu.md.

python bench/gpu/run.py                        everything, within 9 minutes
python bench/gpu/run.py --resume               what the last run had no time for
python bench/gpu/run.py --phase kernels        one phase
python bench/gpu/run.py --interpret --tiny     a dry run without a GPU: does the code work
"""

import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent
PATHS = [str(BENCH), str(BENCH.parent)]  # a bare copy of the tree, without an installed fxopt, is enough
sys.path[:0] = PATHS

if __name__ == "__main__":
    from gpu.cli import main

    sys.exit(main())
