"""What fxopt tests itself with, for users' own models and rules."""

from fxopt.testing.compare import Comparison, Error, Step, assert_close_to_fp64, compare, errors, step, truth

__all__ = ["Comparison", "Error", "Step", "assert_close_to_fp64", "compare", "errors", "step", "truth"]
