"""Operators that fxopt puts into graphs. Importing this package registers them."""

from fxopt.ops import attention, key_intervals, linear_cross_entropy, norm

__all__ = ["attention", "key_intervals", "linear_cross_entropy", "norm"]
