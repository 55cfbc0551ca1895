"""Which model a command looks at: one that a Python file makes, or a `transformers` configuration with random weights.

The latter is made of fake tensors, which have shapes and no memory, so that a model of any size can be looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fxopt import compat
from fxopt.commands import UsageError, check_name, positive
from fxopt.errors import brief, nearest

__all__ = ["FACTORY", "Subject", "add_flags", "factory_of", "import_file", "make", "subject"]

FACTORY = "make"
"""The function of a file that is called where none is named."""

Inputs = Mapping[str, Any] | tuple[Any, ...]

_SETTINGS = {
    "hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "vocab": "vocab_size", "intermediate": "intermediate_size",
}  # fmt: skip
"""Flags and what `transformers` configurations call them; older ones map these names to their own."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OWN_FILE = "write FILE.py with a function that returns (model, inputs)"
_TASKS = {  # by the list of `transformers` that has a model type, the class that makes it: the first that does
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "AutoModelForSeq2SeqLM",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "AutoModelForMaskedLM",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "AutoModelForCausalLM",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "AutoModelForImageClassification",
}


@dataclass(frozen=True)
class Subject:
    """A model and the inputs of one call, by name or in order; fake: of tensors without memory."""

    model: Callable[..., Any]
    inputs: Inputs
    fake: bool = False

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(positional, by name)."""
        return ((), dict(self.inputs)) if isinstance(self.inputs, Mapping) else (tuple(self.inputs), {})


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what says which model: ``FILE.py:factory``, or ``--config`` and its sizes."""
    parser.add_argument(
        "target", nargs="?", metavar="FILE.py:factory",
        help=f"a function of a file that returns (model, inputs), inputs a dict or a tuple (default: {FACTORY})",
    )  # fmt: skip
    group = parser.add_argument_group("a `transformers` model with random weights, in place of a file")
    group.add_argument("--config", metavar="NAME", help="model type: llama, qwen3, gpt2, bert, t5, vit, ...")
    for flag, name in _SETTINGS.items():
        group.add_argument(
            f"--{flag.replace('_', '-')}", type=positive, metavar="N", help=f"{name} of the configuration"
        )
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other of its settings")
    group.add_argument("--batch", type=positive, default=2, metavar="N", help="sequences (default: %(default)s)")
    group.add_argument("--seq", type=positive, default=512, metavar="N", help="tokens of each (default: %(default)s)")
    group.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of the parameters (default: %(default)s)")
    group.add_argument("--attention", choices=("sdpa", "eager"), help="its attention (default: sdpa where it has that)")
    parser.add_argument("--real", action="store_true", help="allocate a --config model, whose weights are random")
    parser.add_argument("--fake", action="store_true", help="run a file's factory on tensors without memory")


def subject(arguments: argparse.Namespace) -> Subject:
    """The model that `arguments` name. Raises UsageError."""
    if (arguments.target is None) == (arguments.config is None):
        given = "both a file and --config" if arguments.target else "neither a file nor --config"
        raise UsageError(f"{given}: say FILE.py:factory, or --config NAME as in `--config llama --layers 4`")
    if arguments.target is not None:
        return make(factory_of(arguments.target), arguments.target, arguments.fake)
    with torch.device("cpu" if arguments.real else "meta"):
        model = _from_config(arguments)
    with _made_of(not arguments.real):
        if not arguments.real:
            model.to_empty(device="cpu")
        try:
            inputs = _inputs(model, arguments.batch, arguments.seq)
        except AttributeError as error:  # its configuration has parts, as those of text and pictures have
            raise UsageError(f"no inputs for {arguments.config} are known here ({error}): {OWN_FILE}") from error
    return Subject(model.train(), inputs, not arguments.real)


# --- of a file ---------------------------------------------------------------------------------------------------


def factory_of(target: str) -> Callable[[], Any]:
    """The function that "FILE.py:factory" names. Raises UsageError."""
    path, _, name = target.partition(":")
    module, name = import_file(path), name or FACTORY
    functions = [one for one, value in vars(module).items() if callable(value) and not one.startswith("_")]
    check_name(f"function in {path}", name, functions, f"Say {path}:NAME, or call it {FACTORY}.")
    return getattr(module, name)


def import_file(path: str) -> ModuleType:
    """The module that a file is, with its folder on ``sys.path`` as Python has it. Raises UsageError."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"no file {path!r}: say FILE.py:factory")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path!r} is no Python file: its name must end with .py")
    sys.path.insert(0, str(file.resolve().parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path} cannot be imported: {brief(error)}") from error
    return module


def make(factory: Callable[[], Any], name: str, fake: bool = False) -> Subject:
    """What `factory` returns. Raises UsageError if that is no model with its inputs."""
    try:
        with _made_of(fake):
            made = factory()
    except Exception as error:
        raise UsageError(f"{name} failed: {brief(error)}") from error
    if (
        not isinstance(made, tuple)
        or len(made) != 2
        or not callable(made[0])
        or not isinstance(made[1], Mapping | tuple)
    ):
        raise UsageError(f"{name} returned {type(made).__name__}: it must return (model, inputs), a dict or a tuple")
    return Subject(*made, fake)


# --- of a configuration ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _made_of(fake: bool) -> Iterator[None]:
    """Within, tensors are fake, or as they are."""
    with compat.FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
        yield


def _from_config(arguments: argparse.Namespace) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    name = arguments.config
    hint = f"transformers {transformers.__version__} has llama, qwen3, gpt2, bert, t5, vit and many more."
    check_name("model type", name, list(transformers.CONFIG_MAPPING), hint)
    config = _config(arguments)
    if arguments.attention is not None:
        config._attn_implementation = arguments.attention
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    made_by = _class_of(name)
    try:
        return getattr(transformers, made_by).from_config(config, dtype=_DTYPES[arguments.dtype])
    except Exception as error:
        raise UsageError(f"{name} cannot be made with these settings: {_in_a_line(error)}") from error


def _config(arguments: argparse.Namespace) -> Any:
    """The configuration, with what other settings follow from those given."""
    from transformers import AutoConfig

    plain = AutoConfig.for_model(arguments.config)
    settings = {name: value for flag, name in _SETTINGS.items() if (value := getattr(arguments, flag)) is not None}
    settings |= dict(map(_setting, arguments.set))
    known = sorted({*plain.to_dict(), *plain.attribute_map})
    for key in settings:
        if not hasattr(plain, key):
            raise UsageError(f"the configuration of {arguments.config} has no {key!r}{nearest(key, known)}")
    settings = _implied(plain, settings, arguments.seq) | settings
    try:
        return AutoConfig.for_model(arguments.config, **settings)
    except Exception as error:  # a dataclass of transformers' own that says what does not fit
        raise UsageError(f"the configuration of {arguments.config} refuses {settings}: {_in_a_line(error)}") from error


def _in_a_line(error: Exception) -> str:
    """All of a message: the first line of one of transformers' says nothing."""
    return " ".join(str(error).split())[:400]


def _implied(plain: Any, settings: Mapping[str, Any], seq: int) -> dict[str, Any]:
    """Settings that must fit those given: key heads, special tokens within the vocabulary, positions for `seq`."""
    found: dict[str, Any] = {"use_cache": False} if hasattr(plain, "use_cache") else {}
    heads, key_heads = settings.get("num_attention_heads"), getattr(plain, "num_key_value_heads", None)
    if heads and key_heads and heads % key_heads:
        found["num_key_value_heads"] = heads
    vocabulary = settings.get("vocab_size", getattr(plain, "vocab_size", None))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(plain, name, None)
        if isinstance(token, int) and isinstance(vocabulary, int) and token >= vocabulary:
            found[name] = None
    positions = getattr(plain, "max_position_embeddings", None)
    if isinstance(positions, int) and positions < seq:
        found["max_position_embeddings"] = seq
    return found


def _setting(text: str) -> tuple[str, Any]:
    key, found, value = text.partition("=")
    if not found or not key:
        raise UsageError(f"--set {text!r} is not KEY=VALUE, as in --set tie_word_embeddings=true")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _class_of(name: str) -> str:
    from transformers.models.auto import modeling_auto

    for listed, made_by in _TASKS.items():
        if name in getattr(modeling_auto, listed):
            return made_by
    raise UsageError(f"{name} has no loss that is known here (causal, masked, seq2seq, image): {OWN_FILE}")


def _inputs(model: Any, batch: int, seq: int) -> dict[str, Any]:
    """Inputs with labels for one call: tokens [batch, seq], or pictures as the configuration has them."""
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        pixels = torch.randn(batch, config.num_channels, height, width, dtype=model.dtype)
        return {"pixel_values": pixels, "labels": torch.randint(0, config.num_labels, (batch,))}
    tokens = torch.randint(0, config.vocab_size, (batch, seq))
    return {"input_ids": tokens, "labels": tokens.clone()}
