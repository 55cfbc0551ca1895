"""The rules that ship with fxopt, in the order they run."""

if __name__ != "fxopt.passes":
    raise ImportError(f"import this package as fxopt.passes, not {__name__}")

from fxopt.passes import attention, linear_cross_entropy, norm
from fxopt.rule import Rule

RULES: tuple[Rule, ...] = (linear_cross_entropy.RULE, attention.RULE, norm.RULE)
