"""Train a small Llama on Python's own sources under a backend of torch.compile.

    python examples/train_llama.py                      fxopt
    python examples/train_llama.py --backend inductor   or eager
    python examples/train_llama.py --precision bf16     fxopt in mixed precision

`train` below is the whole of it: the backend's name is the only thing that changes. `make demo` runs it under three
backends and compares them (compare.py).
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from corpus import batches, prepare
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, BATCH, LENGTH = 16_000, 4, 256
CACHE = Path(__file__).resolve().parent.parent / "out" / "demo"


def make_model(layers: int, seed: int = 0) -> LlamaForCausalLM:
    """Return a Llama with random weights, the same on every call."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def train(
    model: LlamaForCausalLM, backend: str, data: Iterable[torch.Tensor], precision: str | None = None
) -> Iterator[float]:
    """Train on every batch of `data`, int64 of shape (batch, length), and yield each loss.

    precision: None, or "bf16" under fxopt.
    """
    options: dict[str, Any] | None = {"precision": precision} if precision else None
    run = model if backend == "eager" else torch.compile(model, backend=backend, options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for tokens in data:
        loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def main() -> None:
    """Train, print each loss, and what fxopt did to the graph."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--backend", default="fxopt", help="eager, inductor, fxopt, ... (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="batches to train on (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="depth of the model (default: %(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp16"), help="mixed precision, fxopt only (default: none)")
    options = parser.parse_args()
    if options.precision and options.backend != "fxopt":
        parser.error(f"--precision is an option of fxopt, not of {options.backend}")

    data = batches(prepare(CACHE, VOCAB, options.steps * BATCH * LENGTH), BATCH, LENGTH)
    losses = train(make_model(options.layers), options.backend, data, options.precision)
    for number, loss in enumerate(losses, start=1):
        print(f"step {number:3}  loss {loss:.4f}", flush=True)

    if options.backend == "fxopt":
        import fxopt

        print(fxopt.reports()[-1])


if __name__ == "__main__":
    main()
