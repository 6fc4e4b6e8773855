"""Rows side by side: what grows keeps its rows, and memory that was used before shows nothing of it."""

from __future__ import annotations

import pytest
import torch

from serve.engine.cache_tensors import RowShape
from serve.engine.slabs import SlabLimit, Slabs

LAYERS, HEADS, D_KV = 2, 3, 16
TOKEN_BYTES = LAYERS * 2 * HEADS * D_KV * 4


def slabs_of(limit: SlabLimit) -> Slabs:
    return Slabs(RowShape(LAYERS, HEADS, D_KV, torch.float32), device=torch.device("cpu"), limit=limit)


def test_a_slab_that_grows_or_shrinks_keeps_its_rows() -> None:
    slabs = slabs_of(SlabLimit(1 << 30))
    slabs.settle({16: 2})
    for number in range(2):
        slabs.row(16, number).fill_(number + 1)
    assert slabs.allocated_bytes == 2 * 16 * TOKEN_BYTES
    for used in ({16: 3}, {16: 40}, {16: 2, 32: 1}):
        slabs.settle(used)
        assert slabs[16].shape[1] >= used[16]
        assert [float(slabs.row(16, number).amin()) for number in range(2)] == [1.0, 2.0]
        assert [float(slabs.row(16, number).amax()) for number in range(2)] == [1.0, 2.0]
    assert slabs[16].shape[1] == 4, "it gave memory back"
    slabs.settle({})
    assert slabs.allocated_bytes == 0


@pytest.mark.parametrize(("max_rows", "grown"), [(1000, 16), (10, 10), (8, 9)])
def test_a_slab_doubles_while_the_budget_lasts_and_then_grows_by_an_eighth(max_rows: int, grown: int) -> None:
    slabs = slabs_of(SlabLimit(max_rows * 16 * TOKEN_BYTES))
    slabs.settle({16: 8})
    slabs.settle({16: 9})
    assert slabs[16].shape[1] == grown


def test_memory_that_goes_from_one_slab_to_the_next_is_clean() -> None:
    limit = SlabLimit(1 << 30)
    own, cross = slabs_of(limit), slabs_of(limit)
    own.settle({16: 4})
    own.row(16, 3).fill_(float("nan"))
    place = own.by_kind(16).data_ptr()
    own.settle({})
    cross.settle({16: 4})
    assert cross.by_kind(16).data_ptr() == place
    assert (cross.by_kind(16) == 0).all()
