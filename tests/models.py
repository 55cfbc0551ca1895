"""Tiny random `transformers` models, one factory per family, built from configurations alone (no network).

Every factory returns a model in train mode and the keyword arguments of one call, labels among them. Sizes are small
enough for a second or two of compilation, and odd where an even number would hide a mistake: 203 words so that the
vocabulary is no multiple of a vector, 27 positions, 2 key heads for 4 query heads.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

VOCAB, BATCH, SEQ = 203, 2, 27
IGNORED = -100
Inputs = dict[str, Any]
Task = Literal["causal", "masked", "seq2seq", "image"]
Mask = Literal["none", "right", "left", "packed"]

_AUTO = {
    "causal": transformers.AutoModelForCausalLM,
    "masked": transformers.AutoModelForMaskedLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "image": transformers.AutoModelForImageClassification,
}
# Dropout is switched off explicitly: two compilers that draw random numbers in another order cannot be compared.
_NO_DROPOUT = {
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "dropout": 0.0, "dropout_rate": 0.0, "classifier_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "classifier_dropout_prob": 0.0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "activation_dropout": 0.0, "summary_first_dropout": 0.0,
}  # fmt: skip
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, **_TOKENS,
}  # fmt: skip
_GQA = {**_DECODER, "num_key_value_heads": 2}
# A window shorter than the sequence, so that it masks something.
_WINDOW = {"sliding_window": 9}
_MOE = {"num_local_experts": 8, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """A `transformers` model type and the settings that make it tiny.

    `attention` lists the implementations it supports, `padded` whether a 2-D `attention_mask` means anything to it,
    and `rewritten` whether its loss is a linear followed by a cross entropy over a vocabulary (which must be
    rewritten) or something else (which may be refused, with a reason). `attentions` is how often it attends.
    """

    name: str
    settings: Mapping[str, Any]
    task: Task = "causal"
    attention: tuple[str, ...] = ("sdpa", "eager")
    padded: bool = True
    rewritten: bool = True
    attentions: int = 2


FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        Family("llama", _GQA),
        Family("mistral", {**_GQA, **_WINDOW}),
        Family("qwen2", _GQA),
        Family("qwen3", {**_GQA, "head_dim": 16}),
        Family("gemma", {**_GQA, "head_dim": 16}),
        Family("gemma2", {**_GQA, **_WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16}, attention=("eager",)),
        Family("phi3", _GQA),
        # Its class has no loss of its own, and the warning about that breaks the graph between head and loss.
        Family(
            "gpt2",
            {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **_TOKENS},
            rewritten=False,
        ),
        Family("gpt_neox", {**_DECODER, "tie_word_embeddings": False}),
        Family("bert", {**_DECODER, "type_vocab_size": 2}, task="masked"),
        Family(
            "t5",
            {"vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
             "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
            task="seq2seq", attention=("eager",), attentions=6,
        ),
        Family(
            "vit",
            {**{k: v for k, v in _DECODER.items() if k.startswith(("hidden", "inter", "num"))},
             "image_size": 16, "patch_size": 4, "num_channels": 3, "num_labels": 7},
            task="image", padded=False, rewritten=False,
        ),
        Family("mixtral", {**_GQA, **_MOE}),
        Family("gpt_oss", {**_GQA, **_MOE, **_WINDOW, "head_dim": 16}, attention=("eager",)),
    )
}  # fmt: skip


def config(family: str, attention: str = "sdpa", **changes: Any) -> PretrainedConfig:
    """The tiny configuration of `family` with `changes` applied last; unknown names are left out, not stored."""
    settings: dict[str, Any] = {**FAMILIES[family].settings, **changes}
    made = transformers.AutoConfig.for_model(family, **settings)
    for key, value in {**_NO_DROPOUT, "use_cache": False}.items():
        if hasattr(made, key) and key not in changes:
            setattr(made, key, value)
    made._attn_implementation = attention
    return made


def build(
    family: str,
    attention: str | None = None,
    mask: Mask = "none",
    *,
    batch: int = BATCH,
    seq: int = SEQ,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> tuple[PreTrainedModel, Inputs]:
    """A model of `family` in train mode and the inputs of one call; the same seed gives the same weights and data."""
    settings = config(family, attention or FAMILIES[family].attention[0], **changes)
    torch.manual_seed(seed)
    model = _AUTO[FAMILIES[family].task].from_config(settings)
    unsettle(model)
    return model.to(dtype).train(), inputs_for(family, model, mask, batch=batch, seq=seq, seed=seed)


def unsettle(model: torch.nn.Module, scale: float = 0.05) -> None:
    """Add noise to every parameter in place: a weight of one or a bias of zero would hide that it was dropped."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)


def inputs_for(
    family: str, model: PreTrainedModel, mask: Mask = "none", *, batch: int = BATCH, seq: int = SEQ, seed: int = 0
) -> Inputs:
    """Fresh inputs for a model that `build` made: token ids (or pixels), labels and, if asked, a padding mask."""
    torch.manual_seed(seed + 1000)
    return _INPUTS[FAMILIES[family].task](model, mask, batch, seq)


def tokens(batch: int = BATCH, seq: int = SEQ, vocab: int = VOCAB) -> torch.Tensor:
    """int64 [batch, seq] of words above the special ones."""
    return torch.randint(3, vocab, (batch, seq))


def padding(batch: int, seq: int, side: Mask) -> torch.Tensor:
    """int64 [batch, seq]: row b keeps `seq - 5 b` words (one at least), so that the first row has no padding."""
    kept = torch.tensor([max(1, seq - 5 * row) for row in range(batch)])[:, None]
    positions = torch.arange(seq)[None, :]
    return ((positions >= seq - kept) if side == "left" else (positions < kept)).long()


def packed(batch: int, seq: int) -> torch.Tensor:
    """Positions int64 [batch, seq] of three documents a row, of other lengths in each row."""
    rows = []
    for row in range(batch):
        first, second = 5 + row, seq // 2 + 2 * row
        rows.append(torch.cat([torch.arange(n) for n in (first, second - first, seq - second)]))
    return torch.stack(rows)


def _causal(model: PreTrainedModel, mask: Mask, batch: int, seq: int) -> Inputs:
    ids = tokens(batch, seq, model.config.vocab_size)
    if mask == "none":
        return {"input_ids": ids, "labels": ids.clone()}
    if mask == "packed":
        return {"input_ids": ids, "labels": ids.clone(), "position_ids": packed(batch, seq)}
    kept = padding(batch, seq, mask)
    return {"input_ids": ids * kept, "attention_mask": kept, "labels": ids.masked_fill(kept == 0, IGNORED)}


def _masked(model: PreTrainedModel, mask: Mask, batch: int, seq: int) -> Inputs:
    inputs = _causal(model, mask, batch, seq)
    shown = torch.rand(batch, seq) < 0.7
    shown[:, 0] = False
    return {**inputs, "labels": inputs["labels"].masked_fill(shown, IGNORED)}


def _seq2seq(model: PreTrainedModel, mask: Mask, batch: int, seq: int) -> Inputs:
    inputs = _causal(model, mask, batch, seq)
    labels = tokens(batch, seq - 4, model.config.vocab_size)
    labels[-1, -3:] = IGNORED
    return {**inputs, "labels": labels}


def _image(model: PreTrainedModel, mask: Mask, batch: int, seq: int) -> Inputs:
    side = model.config.image_size
    return {"pixel_values": torch.randn(batch, 3, side, side), "labels": torch.arange(batch) % model.config.num_labels}


_INPUTS: dict[str, Callable[[PreTrainedModel, Mask, int, int], Inputs]] = {
    "causal": _causal,
    "masked": _masked,
    "seq2seq": _seq2seq,
    "image": _image,
}
