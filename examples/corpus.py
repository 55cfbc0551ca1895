"""Text that every machine with Python has, as tokens: the standard library's own sources."""

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3", "encodings"}
END = "<|end|>"


def sources(limit: int) -> list[str]:
    """Return up to `limit` bytes of the standard library's files, whole and in an order that is always the same."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if not SKIPPED.intersection(path.relative_to(root).parts))
    random.Random(0).shuffle(paths)
    texts: list[str] = []
    size = 0
    for path in paths:
        if size >= limit:
            break
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        size += path.stat().st_size
    return texts


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Return a byte-level byte-pair tokenizer of `vocab` entries learned from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(folder: Path, vocab: int, tokens: int, limit: int = 8_000_000) -> Path:
    """Write a tokenizer and the first `tokens` tokens of the corpus to `folder`, if they are not there already.

    Returns the path of the tokens, an int64 tensor of shape (tokens,). Raises ValueError where the corpus is shorter.
    """
    name = f"python-{vocab}-{limit}"
    path = folder / f"{name}-{tokens}.pt"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    texts = sources(limit)
    tokenizer = train_tokenizer(texts, vocab)
    tokenizer.save(str(folder / f"{name}.json"))
    stream: list[int] = []
    for text in texts:
        stream += tokenizer.encode(text + END).ids
        if len(stream) >= tokens:
            torch.save(torch.tensor(stream[:tokens]), path)
            return path
    raise ValueError(f"the standard library here gives {len(stream)} tokens, {tokens} are needed: lower --steps")


def batches(path: Path, batch: int, length: int) -> Iterator[torch.Tensor]:
    """Yield the tokens at `path` in order, int64 of shape (batch, length) at a time."""
    stream: torch.Tensor = torch.load(path)
    size = batch * length
    for start in range(0, len(stream) - size + 1, size):
        yield stream[start : start + size].view(batch, length)
