"""The models that are trained: shapes of Llama-3.2-1B and Qwen3-0.6B with random weights, whole or with LoRA."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, Qwen3Config, Qwen3ForCausalLM

LLAMA: dict[str, object] = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}  # fmt: skip
"""https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json"""

QWEN3: dict[str, object] = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
}
"""https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/config.json"""

TINY: dict[str, object] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""Over either, for a dry run."""

MODELS: dict[str, tuple[dict[str, object], Callable[..., PretrainedConfig], type[nn.Module]]] = {
    "Llama-3.2-1B": (LLAMA, LlamaConfig, LlamaForCausalLM),
    "Qwen3-0.6B": (QWEN3, Qwen3Config, Qwen3ForCausalLM),
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 16, 32


def model(name: str, lora: bool, tiny: bool, device: str) -> nn.Module:
    """A model of `MODELS` in bf16 (fp32 if tiny) with random weights from seed 0, in training mode."""
    shape, config, kind = MODELS[name]
    torch.manual_seed(0)
    changes = TINY if tiny else {}
    made = config(**shape | changes, use_cache=False, attn_implementation="sdpa")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if tiny else torch.bfloat16)
    try:
        with torch.device(device):
            built: nn.Module = kind(made).train()
            return with_lora(built) if lora else built
    finally:
        torch.set_default_dtype(default)


class LoRA(nn.Module):
    """A frozen linear layer and a trained correction of low rank (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.01)  # of zeros, the other factor would have no gradient to compare

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        corrected: Tensor = self.base(x) + self.up(self.down(x)) * (ALPHA / RANK)
        return corrected


def with_lora(model: nn.Module) -> nn.Module:
    """Freeze every parameter and give each of `PROJECTIONS` a correction that is trained."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in PROJECTIONS and isinstance(child, nn.Linear):
                setattr(module, name, LoRA(child))
    return model
