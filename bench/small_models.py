"""Models of six families, small enough for a second a step and large enough that casts have bytes."""

from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY, BATCH, LENGTH = 2_000, 4, 128
_WORDS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER: dict[str, Any] = {
    **_WORDS, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": LENGTH,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    **_WORDS, "n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": LENGTH,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
_CAUSAL, _MASKED, _PAIRS = (
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForMaskedLM,
    transformers.AutoModelForSeq2SeqLM,
)
# Of gpt2, which has no `loss_type`, transformers warns when it looks for one, and that breaks the graph between head
# and loss. "one graph" is gpt2 with its loss_type set.
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (_CAUSAL, _DECODER),
    "qwen3": (_CAUSAL, _DECODER),
    "gemma2": (_CAUSAL, {**_DECODER, "query_pre_attn_scalar": 32, "sliding_window": 64}),
    "gpt2": (_CAUSAL, _GPT2),
    "gpt2, one graph": (_CAUSAL, _GPT2),
    "bert": (_MASKED, {**_DECODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "t5": (_PAIRS, {**_WORDS, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4,
                    "dropout_rate": 0.0, "decoder_start_token_id": 0}),
}  # fmt: skip


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a model in train mode with random weights, no dropout, and a batch of random tokens with labels."""
    kind, settings = MODELS[name]
    family, _, whole = name.partition(", ")
    config = transformers.AutoConfig.for_model(family, **{"attention_dropout": 0.0, "use_cache": False, **settings})
    config._attn_implementation = "eager" if name in ("gemma2", "t5") else "sdpa"
    torch.manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    model = kind.from_config(config).train()
    if whole:
        model.loss_type = "ForCausalLM"
    return model, {"input_ids": tokens, "labels": tokens.clone()}
