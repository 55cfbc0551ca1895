"""Attention by generated Triton kernels: what is launched for a call, forward and backward.

Nothing here looks at values, so that the same code is traced by AOTAutograd. Copies are made of tensors whose last
stride is not 1, and of upstream gradients that are expanded.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxopt.kernels.attention import (
    backward_kv_kernel,
    backward_pairs_kernel,
    backward_q_kernel,
    delta_kernel,
    forward_kernel,
    slots_by_kernel,
)
from fxopt.kernels.attention_configs import configs, grain_of, row_config
from fxopt.kernels.attention_spec import AttentionKernelSpec
from fxopt.kernels.cards import card_of
from fxopt.kernels.configs import config_for
from fxopt.kernels.source import Kernel
from fxopt.ops.attention_call import Attention
from fxopt.ops.attention_gradients import Gradients, Wanted
from fxopt.ops.launch import count_blocks, launch, triton_dtype, uninitialized, uninitialized_like
from fxopt.ops.query_tiles import query_tiles

__all__ = ["backward", "forward", "spec_of"]


def spec_of(call: Attention) -> AttentionKernelSpec:
    """What the kernels of a call are generated for."""
    spec = call.spec
    banded = call.intervals is None
    return AttentionKernelSpec(
        dtype=triton_dtype(call.q.dtype), depth=call.q.shape[-1], width=call.v.shape[-1], scale=spec.scale,
        program=spec.program, predicate=spec.predicate,
        lower=spec.lower if banded else None, upper=spec.upper if banded else None,
        dropout=spec.dropout, empty=spec.empty, intervals=not banded,
        sink="" if call.sink is None else triton_dtype(call.sink.dtype),
        captures=tuple(f"*{triton_dtype(one.dtype)}" for one in call.captures), grain=grain_of(card_of(call.q.device)),
    )  # fmt: skip


class _Launcher:
    """Launches of one call, which share most of their arguments."""

    def __init__(self, call: Attention, tensors: dict[str, Tensor]):
        self.call, self.spec, self.card = call, spec_of(call), card_of(call.q.device)
        self.values: dict[str, Any] = {
            "batch": call.batch, "heads": call.heads, "group": call.group, "queries": call.queries, "keys": call.keys,
            "Sink": call.sink, "Intervals": call.intervals, "Seed": call.seed,
        }  # fmt: skip
        if call.intervals is not None:
            self.values["intervals_b"] = _stride(call.intervals, 0)
        for slot in self.spec.slots:
            self.values[f"C{slot}"] = call.captures[slot]
            self.values |= {f"c{slot}_{axis}": stride for axis, stride in enumerate(call.captures[slot].stride())}
        self.add(tensors)

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Tensors [B, H, S, width] by argument, with their strides."""
        for name, one in tensors.items():
            self.values[name] = one
            self.values |= {f"{_snake(name)}_{axis}": one.stride(at) for at, axis in enumerate("bhs")}

    def __call__(self, kernel: Kernel, tiles: str, across: int, **more: Any) -> None:
        """Launch `kernel`, a program for each tile of rows ("q"), columns ("k") or both, of each of `across` slices."""
        if kernel.tiles == ("BLOCK_Q",):
            config = row_config(self.spec.width, self.card)
        else:
            config = config_for(kernel, configs(kernel.name, self.spec, self.card), self.card)
        blocks = across
        for axis in tiles:
            size = {"q": self.call.queries, "k": self.call.keys}[axis]
            blocks *= count_blocks(size, config.tile(f"BLOCK_{axis.upper()}"))
        launch(kernel, blocks, self.values | more, config)


def _snake(name: str) -> str:
    """ "ByOut" -> "by_out"."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def _stride(tensor: Tensor, axis: int) -> int:
    return tensor.stride(axis) if tensor.shape[axis] > 1 else 0


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` with entries of a row side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _inputs(call: Attention) -> dict[str, Tensor]:
    return {"Q": _rows(call.q), "K": _rows(call.k), "V": _rows(call.v)}


def forward(call: Attention) -> tuple[Tensor, Tensor]:
    """(out, lse), with the sink and what rows without keys give."""
    out, lse = call.new_out(), call.new_lse()
    launcher = _Launcher(call, {**_inputs(call), "Out": out})
    launcher(forward_kernel(launcher.spec), "q", _slices(call), Lse=lse)
    return out, lse


def backward(
    call: Attention, upstream: Tensor, out: Tensor, lse: Tensor, wanted: Wanted
) -> tuple[Gradients, Tensor | None]:
    """Gradients by q, k, v and captures, and by the sink [H]."""
    delta = uninitialized(lse.shape, lse.dtype, lse)
    launcher = _Launcher(call, {**_inputs(call), "Out": out, "ByOut": _rows(upstream)})
    launcher.values |= {"Lse": lse, "Delta": delta}
    launcher(delta_kernel(AttentionKernelSpec(launcher.spec.dtype, 16, launcher.spec.width, 1.0)), "q", _slices(call))
    found = Gradients(
        uninitialized_like(call.q) if wanted.q else None,
        uninitialized_like(call.k) if wanted.k else None,
        uninitialized_like(call.v) if wanted.v else None,
        Gradients.to_add_to(call, Wanted(False, False, False, False, wanted.captures)).captures,
    )
    by_inputs = {"ByQ": found.q, "ByK": found.k, "ByV": found.v}
    launcher.add({name: one for name, one in by_inputs.items() if one is not None})
    by_rows, by_columns, by_pairs = slots_by_kernel(launcher.spec, wanted.captures)
    _by_rows(launcher, found, by_rows)
    _by_columns(launcher, found, by_columns)
    for slot in by_pairs:
        _by_pairs(launcher, found, slot)
    return found, _by_sink(call, lse, delta) if wanted.sink else None


def _slices(call: Attention) -> int:
    return call.batch * call.heads


def _by_rows(launcher: _Launcher, found: Gradients, slots: tuple[int, ...]) -> None:
    if found.q is None and not slots:
        return
    call = launcher.call
    sums = {f"ByC{slot}": call.new_lse() for slot in slots}
    launcher(backward_q_kernel(launcher.spec, found.q is not None, slots), "q", _slices(call), **sums)
    for slot in slots:
        _add_to_capture(launcher, found, slot, sums[f"ByC{slot}"].unsqueeze(-1))


def _by_columns(launcher: _Launcher, found: Gradients, slots: tuple[int, ...]) -> None:
    by_k, by_v, call = found.k is not None, found.v is not None, launcher.call
    if not (by_k or by_v or slots):
        return
    shape = (call.batch, call.heads, call.keys)
    sums = {f"ByC{slot}": uninitialized(shape, call.wide, call.q) for slot in slots}
    more: dict[str, Any] = dict(sums)
    if call.intervals is not None:
        tiles = call.query_tiles
        if tiles is None:
            tiles = query_tiles(call.intervals, call.keys, launcher.spec.grain, launcher.spec.spreads)
        more |= {"QueryTiles": tiles, "tiles_b": _stride(tiles, 0)}
    launcher(backward_kv_kernel(launcher.spec, by_k, by_v, slots), "k", call.batch * call.key_heads, **more)
    for slot in slots:
        _add_to_capture(launcher, found, slot, sums[f"ByC{slot}"].unsqueeze(2))


def _by_pairs(launcher: _Launcher, found: Gradients, slot: int) -> None:
    call, reads = launcher.call, launcher.spec.loads[slot].reads
    shape = (call.batch if "b" in reads else 1, call.heads if "h" in reads else 1, call.queries, call.keys)
    values = uninitialized(shape, call.wide, call.q)
    launcher(backward_pairs_kernel(launcher.spec, slot), "qk", shape[0] * shape[1], ByC=values)
    _add_to_capture(launcher, found, slot, values)


def _add_to_capture(launcher: _Launcher, found: Gradients, slot: int, values: Tensor) -> None:
    """Add values [B, H, Sq, Sk], of size 1 where they are summed already, to the elements that the load reads."""
    call, reads = launcher.call, launcher.spec.loads[slot].reads
    axes = [axis for axis, name in enumerate("bhqk") if name not in reads and values.shape[axis] != 1]
    values = values.sum(axes, keepdim=True) if axes else values
    total = found.captures[slot]
    assert total is not None
    b, h, q, k = (slice(0, size) for size in values.shape)
    launcher.spec.score.accumulate(slot, total, values, b, h, q, k, call.captures)


def _by_sink(call: Attention, lse: Tensor, delta: Tensor) -> Tensor:
    """[H]: the sink's weight in each row, times what the row loses by it."""
    assert call.sink is not None
    weight = (call.sink.to(lse.dtype)[:, None] - lse).exp()
    return -(weight * delta).sum((0, 2))
