"""The models that are measured: random weights, shapes small enough for two cores, a vocabulary that is not small."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A model and the batch it is trained on: `batch` sequences of `length` tokens, labels equal to the inputs."""

    build: Callable[[], nn.Module]
    vocab: int = 32_000
    batch: int = 4
    length: int = 512

    def inputs(self) -> Batch:
        """Return `input_ids` and `labels`, int64 of shape (batch, length), the same on every call."""
        tokens = torch.randint(self.vocab, (self.batch, self.length), generator=torch.Generator().manual_seed(1))
        return {"input_ids": tokens, "labels": tokens}


SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "use_cache": False,
    "attn_implementation": "sdpa",
}


def llama(**changes: object) -> LlamaForCausalLM:
    """Return a Llama of `SHAPE` with random weights from seed 0; `changes` go over `SHAPE`."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "tie_word_embeddings": False, **changes})).train()


def gemma() -> GemmaForCausalLM:
    """Return a Gemma of `SHAPE`, whose output projection is its embedding."""
    torch.manual_seed(0)
    return GemmaForCausalLM(GemmaConfig(**SHAPE, head_dim=32, tie_word_embeddings=True)).train()


CASES = {
    "llama-4L": Case(llama),
    "gemma-tied": Case(gemma),
    "llama-bf16-params": Case(lambda: llama().to(torch.bfloat16)),
}


def deep_llama(layers: int) -> Case:
    """Return a narrow Llama of `layers` layers on a short sequence: much to compile, little to compute."""
    shape = {"hidden_size": 64, "intermediate_size": 172, "vocab_size": 4_096, "num_hidden_layers": layers}
    return Case(lambda: llama(**shape), vocab=4_096, batch=2, length=64)


def find(name: str) -> Case:
    """Return the case called `name`; `deep-N` is `deep_llama(N)`."""
    if name.startswith("deep-"):
        return deep_llama(int(name.removeprefix("deep-")))
    return CASES[name]
