"""What is timed, by value: a run that is cut short has the first of each list."""

from __future__ import annotations

from gpu.attention_problem import AttentionCase
from gpu.loss_problem import LossCase
from gpu.norm_problem import NormCase
from gpu.row_peers import LAYER, LLAMA


def attention(batch: int, heads: int, key_heads: int, length: int, depth: int, **more: object) -> AttentionCase:
    """Self-attention in bf16; a capture wants its gradient unless it is `frozen`."""
    sizes = {"batch": batch, "heads": heads, "key_heads": key_heads, "queries": length, "keys": length}
    return AttentionCase(**sizes, depth=depth, width=depth, **more)  # type: ignore[arg-type]


ATTENTION = {
    "causal 4x32x8x2048x64": attention(4, 32, 8, 2048, 64),
    "causal 1x32x8x8192x128": attention(1, 32, 8, 8192, 128),
    "window 1024, 1x32x8x8192x128": attention(1, 32, 8, 8192, 128, mask="window", window=1024),
    "documents 1x32x8x8192x128": attention(1, 32, 8, 8192, 128, mask="documents"),
    "softcap, causal 2x8x4x4096x256": attention(2, 8, 4, 4096, 256, score="softcap"),
    "bias, 8x12x12x512x64": attention(8, 12, 12, 512, 64, mask="none", score="bias"),
    "sinks, window 128, 1x64x8x4096x64": attention(1, 64, 8, 4096, 64, mask="window", window=128, sink=True),
    "causal 4x32x8x2048x128": attention(4, 32, 8, 2048, 128),
    "alibi, causal 2x32x32x2048x128": attention(2, 32, 32, 2048, 128, score="alibi", frozen="capture"),
    "lengths, causal 4x32x8x2048x128": attention(4, 32, 8, 2048, 128, mask="lengths"),
    "all 16x12x12x512x64": attention(16, 12, 12, 512, 64, mask="none"),
    "causal 1x16x8x8192x128": attention(1, 16, 8, 8192, 128),
    "causal fp16 4x32x8x2048x64": attention(4, 32, 8, 2048, 64, dtype="float16"),
}
"""Batch x heads x key heads x positions x head dim: Llama-3.2-1B, Llama-3.1-8B at 1 x 8192, windowed as Mistral,
packed; Gemma 2, T5, gpt-oss, Llama-3.1-8B at 4 x 2048, MPT, padded batches, BERT, Qwen3-0.6B."""

NORM = {
    "add + rms 8192x4096": NormCase(LLAMA, rows=8192, width=4096, residual=True),
    "add + rms 8192x2048": NormCase(LLAMA, rows=8192, width=2048, residual=True),
    "add + rms 8192x8192": NormCase(LLAMA, rows=8192, width=8192, residual=True),
    "rms 8192x4096": NormCase(LLAMA, rows=8192, width=4096),
    "rms 8192x2048": NormCase(LLAMA, rows=8192, width=2048),
    "layer 8192x4096": NormCase(LAYER, rows=8192, width=4096),
    "rms 262144x128": NormCase(LLAMA, rows=262144, width=128),
}
"""The last: of queries and keys, as Qwen3 has it."""

LOSS = {
    "8192 x 256000 x 2304": LossCase(rows=8192, classes=256_000, width=2304),
    "8192 x 128256 x 4096": LossCase(rows=8192, classes=128_256, width=4096),
    "8192 x 128256 x 2048": LossCase(rows=8192, classes=128_256, width=2048),
    "8192 x 151936 x 2048": LossCase(rows=8192, classes=151_936, width=2048),
    "8192 x 32000 x 4096": LossCase(rows=8192, classes=32_000, width=4096),
    "8192 x 256000 x 2304, softcap 30": LossCase(rows=8192, classes=256_000, width=2304, softcap=30.0),
    "8192 x 128256 x 4096, frozen weight": LossCase(rows=8192, classes=128_256, width=4096, frozen="weight"),
}
"""Tokens x classes x hidden size: Gemma 2 2B, Llama-3.1-8B, Llama-3.2-1B, Qwen3-1.7B, Llama-2-7B; LoRA."""

TINY = {"attention": 3, "norm": 1, "loss": 1}
"""How many of each a dry run looks at."""
