"""Explicit casts: the policy, the walk that gives each operator its dtypes, and where casts stand.

`fxopt.passes.precision` is the stage that is made of these.
"""
