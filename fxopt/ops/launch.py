"""Launching generated kernels: on CUDA so that Inductor sees the launch, or under Triton's interpreter on a CPU.

An operator whose lowering is Triton is traced through by AOTAutograd where its tensors are on a GPU: its allocations
and launches become nodes of the joint graph, as with ``torch.library.triton_op``, and Inductor compiles the launches
into its wrapper. Interpreted launches cannot be traced, so there the operator stays opaque.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fxopt import compat
from fxopt.errors import brief
from fxopt.kernels.cards import is_on_card
from fxopt.kernels.configs import ALIGNMENT, Config
from fxopt.kernels.interpreter import interpreting, repair_bf16
from fxopt.kernels.refused import KernelError, is_refusal
from fxopt.kernels.source import Kernel

__all__ = [
    "LOWERINGS",
    "Launch",
    "Lowering",
    "Noting",
    "check_lowering",
    "count_blocks",
    "kernels_on",
    "launch",
    "operator",
    "runs_triton",
    "triton_dtype",
    "uninitialized",
    "uninitialized_like",
]

Lowering = Literal["auto", "aten", "interpret"]
"""How an operator is computed: "auto": by generated Triton kernels on CUDA, else by ATen; "aten": by ATen anywhere;
"interpret": by the Triton kernels under the interpreter (tests; ``TRITON_INTERPRET=1``)."""

LOWERINGS: tuple[str, ...] = get_args(Lowering)

MOST_BLOCKS = 2**31 - 1
"""Of the first axis of a CUDA grid, the only one that our kernels use: the others end at 65,535."""


def check_lowering(lowering: str) -> None:
    """Raise ValueError for a lowering that is none."""
    if lowering not in LOWERINGS:
        raise ValueError(f"lowering is {lowering!r}: it must be one of {', '.join(LOWERINGS)}")


def runs_triton(like: Tensor, lowering: str) -> bool:
    """Whether an operator on tensors such as `like` is computed by Triton kernels; fp64 never is."""
    asked = lowering == "interpret" or (lowering == "auto" and is_on_card(like.device))
    return asked and like.dtype != torch.float64


def kernels_on(device: torch.device) -> str:
    """What reports call the kernels of operators that are computed by Triton there."""
    return "generated kernels" if device.type == "cuda" else "generated kernels, interpreted"


def launch(kernel: Kernel, blocks: int, values: Mapping[str, Any], config: Config) -> None:
    """Run `kernel` on `blocks` programs: tensors and ints from `values`, tile sizes and warps from `config`.

    values: by argument, and others that the kernel does not have. No blocks: nothing is launched. Within `Noting` the
    kernel is noted and nothing is launched.
    Raises ValueError for more blocks than a grid has, RuntimeError on a CPU in a process whose triton compiles, and
    `KernelError` where Triton does not compile it for the card.
    """
    noting = _NOTING.get()
    if noting is not None:
        aligned = tuple(name for name in kernel.arguments if _aligned(values[name]))
        noting.kernels.setdefault(kernel, Launch(config, aligned))
        return
    if compat.guard_or_false(blocks == 0):
        return
    if compat.guard_or_false(blocks > MOST_BLOCKS):
        raise ValueError(f"{kernel.name} would need {blocks} blocks, and a grid has at most {MOST_BLOCKS}")
    function, tiles = kernel.load(), dict(config.tiles)
    warps = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    arguments = {name: values[name] for name in kernel.arguments}
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    if interpreting():
        repair_bf16()
        with _INTERPRETING:
            function[(blocks,)](**arguments, **tiles)
    elif first.device.type == "cpu":
        raise RuntimeError('kernels="interpret" needs TRITON_INTERPRET=1 in the environment before triton is imported')
    elif compat.is_traced(first):
        torch.library.wrap_triton(function)[(blocks,)](**arguments, **tiles, **warps)
    else:
        with torch.cuda.device(first.device):  # Triton launches on the current device, which need not be this one
            try:
                function[(blocks,)](**arguments, **tiles, **warps)
            except Exception as error:
                if not is_refusal(error):
                    raise
                raise KernelError(kernel, brief(error)) from error


def _aligned(value: Any) -> bool:
    """Whether 16 divides an integer, or the address of a tensor, by its offset: allocations begin at multiples."""
    offset = value.storage_offset() * value.element_size() if isinstance(value, Tensor) else value
    return int(offset) % ALIGNMENT == 0


_INTERPRETING = threading.Lock()  # the interpreter patches triton.language while it runs


_NOTING: contextvars.ContextVar[Noting | None] = contextvars.ContextVar("fxopt_noting", default=None)


@dataclass(frozen=True)
class Launch:
    """How a kernel was to be launched: by which configuration, and which of its arguments 16 divides."""

    config: Config
    aligned: tuple[str, ...]


class Noting(compat.TorchDispatchMode):
    """Within, in this thread, fxopt's operators on fake tensors do all but launch: `kernels` are those they would.

    Each with its first launch.

    The code that launches is what runs, so nobody else need know which kernels an operator has. Backwards are noted
    with ``torch.autograd.set_multithreading_enabled(False)``: else they run in other threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[Kernel, Launch] = {}
        self._outer: list[contextvars.Token[Noting | None]] = []

    def __enter__(self) -> Noting:
        self._outer.append(_NOTING.set(self))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _NOTING.reset(self._outer.pop())

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An operator of torch's, as it is; with ``out=`` there is nothing to do, and some have no meta kernel."""
        out = (kwargs or {}).get("out")
        return op(*args, **(kwargs or {})) if out is None else out


def count_blocks(size: int, tile: int) -> int:
    """How many tiles of `tile` cover `size`."""
    return -(-size // tile)


def uninitialized(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Memory on the device of `like` for a kernel to write to.

    By `torch.empty`: where launches are traced, AOTAutograd's elimination of common subexpressions
    (torch/_functorch/compile_utils.py) takes two equal calls of `new_empty` or `empty_like` for one tensor.
    """
    return torch.empty(tuple(shape), dtype=dtype, device=like.device)


def uninitialized_like(like: Tensor) -> Tensor:
    """The same of the shape and dtype of `like`, axes in the order of its strides, but the last, which has stride 1."""
    outer = range(like.dim() - 1)
    order = outer if like.is_contiguous() else sorted(outer, key=like.stride, reverse=True)
    made = uninitialized([*(like.shape[axis] for axis in order), like.shape[-1]], like.dtype, like)
    return made.permute(*(order.index(axis) for axis in outer), -1)


def operator(
    name: str, schema: str, launches: Callable[..., bool], traced: Callable[..., bool] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: a function of tensors as a custom operator, traced through where its Triton kernels are compiled.

    schema: as for ``torch.library.custom_op``; nothing is mutated. launches: from the operator's arguments, whether
    the function launches Triton kernels. traced: the same, whether AOTAutograd is to see what is in the function, which
    then must consist of ATen operators and `launch`; where it launches, if not given.
    """
    wanted = launches if traced is None else traced

    def define(function: Callable[..., Any]) -> Any:
        made = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
        compat.decompose_within(
            made, compat.FunctionalTensorMode, lambda *arguments: not interpreting() and wanted(*arguments), function
        )
        compat.decompose_within(made, Noting, launches, function)
        return made

    return define


def triton_dtype(dtype: torch.dtype) -> str:
    """The name of `dtype` in a Triton signature, "bf16" say. Raises KeyError for one that kernels do not take."""
    return _TRITON_DTYPES[dtype]


_TRITON_DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
