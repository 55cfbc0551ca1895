"""Logits to losses and to their own gradient, by a Triton kernel: two reads of the logits and one write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.cards import card_of
from fxopt.kernels.configs import config_for
from fxopt.kernels.linear_cross_entropy import LossKernelSpec, row_configs, rows_kernel
from fxopt.ops.launch import launch, triton_dtype
from fxopt.ops.loss_spec import LossSpec
from fxopt.ops.rows import Rows


class LogitRows:
    """What `fxopt.ops.logit_blocks.LogitBlocks` is, for rows of which none are dropped."""

    def __init__(
        self, rows: Rows, vocabulary: int, step: int, spec: LossSpec, gradients: bool, bias: bool, argmax: bool,
        upstream: Tensor | None,
    ):  # fmt: skip
        self.rows, self.upstream = rows, upstream if gradients else None
        self.losses = rows.hidden.new_empty(rows.hidden.shape[0], dtype=torch.float32)
        self.argmax = torch.empty_like(rows.target) if argmax else None
        self.lse: Tensor | None = None  # asked for by tiles alone (`fxopt.ops.loss_operator`)
        self.bias = self.losses.new_zeros(vocabulary) if bias else None
        dtype, has_upstream = triton_dtype(rows.hidden.dtype), self.upstream is not None
        self.spec = LossKernelSpec(dtype, *spec.constants, argmax=argmax, gradient=gradients, upstream=has_upstream)

    def turn(self, logits: Tensor, chunk: slice) -> None:
        """Take in the logits [C, V] of the rows `chunk`; with gradients they are overwritten by theirs."""
        kernel, card = rows_kernel(self.spec), card_of(logits.device)
        arguments: dict[str, Any] = {
            "Logits": logits,
            "Target": self.rows.target[chunk].contiguous(),
            "Losses": self.losses[chunk],
            "vocabulary": logits.shape[1],
            "stride": logits.stride(0),
        }
        if self.upstream is not None:
            arguments["Upstream"] = self.upstream[chunk].contiguous()
        if self.argmax is not None:
            arguments["Best"] = self.argmax[chunk]
        launch(kernel, logits.shape[0], arguments, config_for(kernel, row_configs(card), card))
        if self.bias is not None:
            self.bias.add_(logits.sum(0, dtype=torch.float32))

    def free(self) -> None:
        """There are no buffers."""
