"""The models that are measured: random weights, shapes small enough for two cores, a vocabulary that is not small.

What they must reach, and how they are called in tables, is in step.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

Batch = dict[str, torch.Tensor]


def unpadded(tokens: torch.Tensor) -> Batch:
    """Return the batch of `tokens`, labels equal to the inputs."""
    return {"input_ids": tokens, "labels": tokens}


@dataclass(frozen=True)
class Case:
    """A model and the batch it is trained on: what `arranged` makes of `batch` sequences of `length` random tokens."""

    build: Callable[[], nn.Module]
    vocab: int = 32_000
    batch: int = 4
    length: int = 512
    arranged: Callable[[torch.Tensor], Batch] = unpadded

    def inputs(self) -> Batch:
        """Return `input_ids`, `labels` and what else the case has, int64 of shape (batch, length), always the same."""
        tokens = torch.randint(self.vocab, (self.batch, self.length), generator=torch.Generator().manual_seed(1))
        return self.arranged(tokens)


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


def mistral(**changes: object) -> MistralForCausalLM:
    """Return a Mistral of `SHAPE`: the Llama with a sliding window; `changes` go over `SHAPE`."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**{**SHAPE, "tie_word_embeddings": False, **changes})).train()


LENGTHS = (512, 437, 350, 191)  # of the padded sequences: 27% is padding
DOCUMENTS = (1_024, 768, 640, 512, 448, 320, 256, 128)  # packed into one sequence of 4,096


def padded(tokens: torch.Tensor) -> Batch:
    """Return sequences of `LENGTHS` tokens, padded on the right, with their 2-D mask; padding has the label -100."""
    mask = (torch.arange(tokens.shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    return {
        "input_ids": tokens * mask,
        "attention_mask": mask,
        "labels": tokens.masked_fill(mask == 0, -100),
    }


def packed(tokens: torch.Tensor) -> Batch:
    """Return documents of `DOCUMENTS` tokens in one sequence, told apart by positions that start again at 0."""
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])
    return {**unpadded(tokens), "position_ids": positions[None]}


CASES = {
    "llama-4L": Case(llama),
    "gemma-tied": Case(gemma),
    "llama-bf16-params": Case(lambda: llama().to(torch.bfloat16)),
    "llama-eager-2048": Case(
        lambda: llama(attn_implementation="eager", max_position_embeddings=2_048), batch=1, length=2_048
    ),
    "llama-padded": Case(llama, arranged=padded),
    "llama-packed": Case(lambda: llama(max_position_embeddings=4_096), batch=1, length=4_096, arranged=packed),
    "mistral-window": Case(lambda: mistral(max_position_embeddings=4_096, sliding_window=256), batch=1, length=4_096),
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
