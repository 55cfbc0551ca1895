"""``python -m fxopt`` is the command ``fxopt``."""

import sys

from fxopt.cli import main

if __name__ == "__main__":  # processes that compile kernels import this file as well
    sys.exit(main())
