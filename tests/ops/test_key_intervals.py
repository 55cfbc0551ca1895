"""fxopt::key_intervals against dense masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocations import allocated
from hypothesis import given
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from fxopt.ops.key_intervals import FORWARD, key_intervals
from fxopt.ops.registry import memory_of
from fxopt.testing.interval_masks import Arguments, dense, masks

TENSORS = ("documents", "keep", "rows", "lengths", "prefix")


def intervals_of(mask: Tensor) -> Tensor:
    """(first, last + 1, how many) of the true elements of each row of [B, Sq, Sk]; zeros of none."""
    found = torch.zeros(*mask.shape[:2], 3, dtype=torch.int64)
    for b, q in torch.cartesian_prod(*map(torch.arange, mask.shape[:2])).tolist():
        true = mask[b, q].nonzero().flatten()
        if len(true):
            found[b, q] = torch.stack([true[0], true[-1] + 1, torch.tensor(len(true))])
    return found


def positional(arguments: Arguments) -> tuple[Any, ...]:
    """The arguments of the operator."""
    return tuple(map(arguments.get, (*TENSORS, "lower", "upper", "batch", "queries", "keys")))


@given(masks())
def test_are_the_first_the_last_and_the_number_of_allowed_keys(arguments: Arguments) -> None:
    """Exactly, whatever is combined: for ids that come back, and holes in what is kept, too."""
    found = key_intervals(**arguments)
    assert found.dtype == torch.int64
    assert found.is_contiguous()
    assert torch.equal(found, intervals_of(dense(**arguments)))


@given(masks())
def test_one_batch_row_stands_for_all(arguments: Arguments) -> None:
    every = dict(arguments)
    for name in {*TENSORS} & {*arguments}:
        one = arguments[name]
        every[name] = one.expand(arguments["batch"], *one.shape[1:])
    assert torch.equal(key_intervals(**arguments), key_intervals(**every))


def test_ids_that_come_back() -> None:
    ids = torch.tensor([[7, 7, 3, 7, 3]])
    found = key_intervals(batch=1, queries=5, keys=5, documents=ids, upper=0)
    assert found.tolist() == [[[0, 1, 1], [0, 2, 2], [2, 3, 1], [0, 4, 3], [2, 5, 2]]]


@pytest.mark.parametrize("bound", [2**63 - 1, -(2**63)])
@pytest.mark.parametrize("name", ["lower", "upper"])
def test_bounds_at_the_ends_of_int64(name: str, bound: int) -> None:
    all_or_none = [0, 3, 3] if (bound > 0) == (name == "upper") else [0, 0, 0]
    found = key_intervals(batch=1, queries=2, keys=3, lengths=torch.tensor([9]), **{name: bound})
    assert found.tolist() == [[all_or_none] * 2]


@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 1, 1]])])
@pytest.mark.parametrize(("name", "bound"), [("lengths", 99), ("prefix", 99), ("lengths", -9), ("prefix", -9)])
def test_bounds_beyond_the_keys(name: str, bound: int, documents: Tensor | None) -> None:
    arguments = {"batch": 1, "queries": 4, "keys": 4, "documents": documents, "upper": 0, name: torch.tensor([bound])}
    assert torch.equal(key_intervals(**arguments), intervals_of(dense(**arguments)))


def test_strides_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, (7, 2), generator=generator).T
    keep = torch.randint(2, (2, 14), generator=generator).bool()[:, ::2]
    arguments = {"batch": 2, "queries": 7, "keys": 7, "documents": ids, "keep": keep, "prefix": torch.tensor(2)}
    assert torch.equal(key_intervals(**arguments), intervals_of(dense(**arguments)))


# --- how it is registered ----------------------------------------------------------------------------------------


def everything(batch: int, size: int) -> Arguments:
    """All tensors there can be, of [batch, size]."""
    generator = torch.Generator().manual_seed(size)
    return {
        "batch": batch, "queries": size, "keys": size, "lower": -size // 2, "upper": 0,
        "documents": torch.randint(3, (batch, size), generator=generator),
        "keep": torch.rand(batch, size, generator=generator) < 0.8,
        "rows": torch.rand(batch, size, generator=generator) < 0.8,
        "lengths": torch.randint(size, (batch,), generator=generator),
        "prefix": torch.tensor(2),
    }  # fmt: skip


@pytest.mark.parametrize("names", [TENSORS, *((name,) for name in TENSORS)])
def test_registration(names: tuple[str, ...]) -> None:
    arguments = {name: one for name, one in everything(2, 9).items() if name in names or name not in TENSORS}
    torch.library.opcheck(FORWARD, positional(arguments))


def test_meta_tensors() -> None:
    found = key_intervals(batch=4, queries=3, keys=5, keep=torch.ones(1, 5, dtype=torch.bool, device="meta"))
    assert (found.shape, found.dtype, found.device.type) == ((4, 3, 3), torch.int64, "meta")


def test_compiles_once_for_all_sizes() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def causal(documents: Tensor, keep: Tensor) -> Tensor:
        batch, size = documents.shape
        return key_intervals(batch=batch, queries=size, keys=size, documents=documents, keep=keep, upper=0) + 1

    fast = torch.compile(causal, backend=counter, dynamic=True, fullgraph=True)
    for batch, size in ((2, 9), (3, 5), (7, 30)):
        arguments = everything(batch, size)
        documents, keep = arguments["documents"], arguments["keep"]
        assert torch.equal(fast(documents, keep), causal(documents, keep))
    assert counter.frame_count == 1


# --- what it costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("names", [TENSORS, ("documents", "keep"), *((name,) for name in TENSORS)])
def test_memory_formula_bounds_what_is_allocated(names: tuple[str, ...], rows: int) -> None:
    arguments = {name: one for name, one in everything(4, 2048).items() if name in names or name not in TENSORS}
    for name in {"documents", "keep", "rows", "lengths"} & {*names}:
        arguments[name] = arguments[name][:rows]
    key_intervals(**arguments)
    most, end = allocated(lambda: key_intervals(**arguments))
    formula = memory_of(FORWARD, *positional(arguments))
    assert formula is not None
    assert formula.outputs == end
    assert most - end <= formula.workspace <= 2.5 * (most - end)


def test_flops_are_counted() -> None:
    def flops(**changes: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            key_intervals(batch=4, queries=64, keys=64, **changes)
        return counter.get_total_flops()

    lengths, documents = torch.ones(4, dtype=torch.int64), torch.ones(4, 64, dtype=torch.int64)
    assert flops(lengths=lengths) == 4 * 64 * 8
    assert flops(documents=documents) == 4 * 64 * (6 + 2 * 6 + 8)  # a sort, two searches, and eight for each query
    assert flops(documents=documents[:1]) * 4 == flops(documents=documents)
    assert flops(documents=documents) < flops(documents=documents, prefix=lengths)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (ValueError, "a band alone needs no intervals: give lower and upper to the attention", {}),
        (ValueError, "there are 4 queries and 6 keys", {"documents": torch.ones(2, 6, dtype=torch.int64)}),
        (ValueError, r"keep must be \[2, 6\] or \[1, 6\], not \[2, 4\]", {"keep": torch.ones(2, 4).bool()}),
        (ValueError, r"keep must be \[2, 6\] or \[1, 6\], not \[6\]", {"keep": torch.ones(6).bool()}),
        (ValueError, r"rows must be \[2, 4\] or \[1, 4\], not \[3, 4\]", {"rows": torch.ones(3, 4).bool()}),
        (ValueError, r"lengths must be \[2\] or \[1\], not \[\]", {"lengths": torch.tensor(3)}),
        (ValueError, r"prefix must be \[2\] or \[1\], not \[2, 1\]", {"prefix": torch.ones(2, 1, dtype=torch.int64)}),
        (TypeError, "keep is torch.int64, not torch.bool: compare it", {"keep": torch.ones(2, 6, dtype=torch.int64)}),
        (TypeError, "lengths is torch.float32, not of integers", {"lengths": torch.ones(2)}),
        (
            ValueError,
            "on one device are needed, not on cpu, meta",
            {"keep": torch.ones(2, 6).bool(), "lengths": torch.ones(2, dtype=torch.int64, device="meta")},
        ),
    ],
)
def test_what_does_not_fit_raises(error: type[Exception], words: str, change: dict[str, Tensor]) -> None:
    with pytest.raises(error, match=words):
        key_intervals(batch=2, queries=4, keys=6, upper=0, **change)
