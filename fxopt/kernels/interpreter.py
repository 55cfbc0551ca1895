"""Triton's interpreter, for tests: kernels run on CPU tensors, block by block in numpy, with bf16 repaired.

The interpreter (triton 3.6 to 3.9) stores bf16 as the 16 bits of a uint16 and computes on those: sums of bf16 are
silently wrong, and fp32 is cut to bf16 rather than rounded. Here operators on bf16 are computed in fp32 and rounded to
nearest even, as a GPU does. What it does not model: that `tl.dot` needs 16 elements, races, TF32, warps and stages; a
load out of bounds ends the process.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from triton import knobs

__all__ = ["interpreting", "repair_bf16"]

_OPERATORS = (
    *("fadd", "fsub", "fmul", "fdiv", "fneg", "frem", "fma", "clampf", "fabs", "precise_divf"),
    *("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "precise_sqrt", "sin", "cos", "erf", "floor", "ceil"),
    *("minimumf", "minnumf", "maximumf", "maxnumf"),
)


def interpreting() -> bool:
    """Whether ``TRITON_INTERPRET=1`` was set before triton was imported: then kernels are interpreted, all of them."""
    return bool(knobs.runtime.interpret)


@functools.cache
def repair_bf16() -> None:
    """Make the interpreter's bf16 right, for the rest of the process."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    for name in (*_OPERATORS, *(name[7:] for name in dir(builder) if name.startswith("create_fcmp"))):
        if hasattr(builder, f"create_{name}"):
            _widen_operator(interpreter, f"create_{name}")
    _widen_dot(interpreter)
    _refuse_reductions(interpreter)
    _round_casts(interpreter)


def _is_bf16(interpreter: Any, value: Any) -> bool:
    import triton.language as tl

    return isinstance(value, interpreter.TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widened(interpreter: Any, value: Any) -> Any:
    import triton.language as tl

    if not _is_bf16(interpreter, value):
        return value
    return interpreter.TensorHandle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(values: Any) -> Any:
    """The bits of bf16 nearest to fp32 `values`, ties to even, NaN kept."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def _widen_operator(interpreter: Any, name: str) -> None:
    import triton.language as tl

    original = getattr(interpreter.InterpreterBuilder, name)
    compares = name.startswith("create_fcmp")

    def operator(self: Any, *operands: Any) -> Any:
        if not any(_is_bf16(interpreter, one) for one in operands):
            return original(self, *operands)
        found = original(self, *(_widened(interpreter, one) for one in operands))
        return found if compares else interpreter.TensorHandle(_rounded(found.data.astype(np.float32)), tl.bfloat16)

    setattr(interpreter.InterpreterBuilder, name, operator)


def _widen_dot(interpreter: Any) -> None:
    original = interpreter.InterpreterBuilder.create_dot

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, _widened(interpreter, a), _widened(interpreter, b), *rest)

    interpreter.InterpreterBuilder.create_dot = dot


def _refuse_reductions(interpreter: Any) -> None:
    """Reductions of bf16 would be of bits; a kernel of ours never has any, since it would round at every step."""
    original = interpreter.ReduceOps.apply_impl

    def apply(self: Any, operands: Any) -> Any:
        if not isinstance(operands, tuple) and _is_bf16(interpreter, operands.handle):
            raise NotImplementedError("a reduction of bf16 is not interpreted: widen the operand to fp32 first")
        return original(self, operands)

    interpreter.ReduceOps.apply_impl = apply


def _round_casts(interpreter: Any) -> None:
    import triton.language as tl

    original = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return _rounded(values)
        if (source, target) == (tl.bfloat16, tl.float32):
            return (values.astype(np.uint32) << 16).view(np.float32)
        return original(values, source, target, rounding)

    interpreter._convert_float = convert
