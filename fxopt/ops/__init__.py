"""Operators that fxopt puts into graphs. Importing this package registers them."""

from fxopt.ops import linear_cross_entropy, norm

__all__ = ["linear_cross_entropy", "norm"]
