"""Tiny models of every other causal language model that `transformers` knows, as far as sizes can be guessed.

Nothing here is keyed on a family: a configuration is made from its defaults, and whichever of the usual size
attributes it has are set small. What cannot be made or run that way in eager PyTorch is `Unbuildable`, with a reason.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import models
import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(models.FAMILIES))
MOST_PARAMETERS = 20_000_000

_SIZES: dict[int, tuple[str, ...]] = {
    2: (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
        "num_key_value_heads", "num_kv_heads",
        "num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "n_shared_experts", "n_group",
        "topk_group", "num_encoder_layers", "num_decoder_layers",
    ),
    4: (
        "num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads",
        "num_encoder_attention_heads", "num_decoder_attention_heads", "num_local_experts", "num_experts",
        "n_routed_experts", "moe_num_experts", "num_ln_in_parallel_attn",
    ),
    8: (
        "qk_rope_head_dim", "qk_nope_head_dim", "mamba_d_state", "state_size", "ssm_state_size", "mamba_n_heads",
        "num_heads",
    ),
    16: (
        "head_dim", "v_head_dim", "d_kv", "kv_lora_rank", "q_lora_rank", "mamba_d_head", "sliding_window",
        "attention_head_size",
    ),
    32: ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_dim"),
    64: (
        "hidden_size", "d_model", "n_embd", "embed_dim", "emb_dim", "n_positions", "max_position_embeddings", "n_ctx",
        "max_seq_len", "embedding_size", "mamba_expand_dim", "lru_width", "attention_hidden_size", "dim",
    ),
    96: (
        "intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "n_inner",
        "dff",
    ),
    models.VOCAB: ("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"),
}  # fmt: skip
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


class Unbuildable(Exception):
    """Eager PyTorch cannot run this model at a guessed size; the reason is in the message."""


def build(name: str) -> tuple[PreTrainedModel, models.Inputs]:
    """A tiny model of `name` in train mode that runs a training step in eager, and its inputs."""
    try:
        config = _tiny(CONFIG_MAPPING[name])
        with torch.device("meta"):
            size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise Unbuildable(f"{size:,} parameters at the guessed size")
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float().train()
        models.unsettle(model, 0.02)
        ids = models.tokens()
        inputs: models.Inputs = {"input_ids": ids, "labels": ids.clone()}
        loss = copy.deepcopy(model)(**inputs).loss  # a copy: recurrent models keep their last state
        loss.backward()
    except Unbuildable:
        raise
    except Exception as error:
        raise Unbuildable(f"{type(error).__name__}: {str(error)[:200]}") from error
    if not torch.isfinite(loss):
        raise Unbuildable(f"the loss is {loss.item()} in eager")
    return model, inputs


def _tiny(made: type[PretrainedConfig]) -> PretrainedConfig:
    """`made` with its sizes small, its dropouts off; a text configuration inside it is treated alike."""
    default = made()
    inner = default.get_text_config()
    if inner is not default:
        key = next(key for key, value in vars(default).items() if value is inner)
        return _quiet(made(**{key: _tiny(type(inner)).to_dict(), **_sizes(made, default)}))
    return _quiet(made(**_sizes(made, default)))


def _sizes(made: type[PretrainedConfig], default: PretrainedConfig) -> dict[str, Any]:
    known = {**{key: value for value, keys in _SIZES.items() for key in keys}, **_IDS}
    accepted = set(inspect.signature(made.__init__).parameters) | set(getattr(made, "__dataclass_fields__", {}))
    sizes = {key: value for key, value in known.items() if key in accepted and getattr(default, key, None) is not None}
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]  # latent attention has a key for every query head
    return sizes


def _quiet(config: PretrainedConfig) -> PretrainedConfig:
    for key in (key for key in dir(config) if "drop" in key and isinstance(getattr(config, key), float)):
        setattr(config, key, 0.0)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return config
