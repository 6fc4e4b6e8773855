"""Triton kernels of the decoder's self-attention: write keys and values into the paged cache, and attend over it.

Imported on a GPU, or under TRITON_INTERPRET=1, only. Every query token is a row of its own with its number of keys,
so decoding, a forced prefix and a sequence that comes back after preemption are one case, and the grid of a batch has
a fixed size that a CUDA graph can hold.
"""

# A kernel's arguments are what they are, and its compile-time ones are written large, as in Triton's own.
# ruff: noqa: N803, PLR0913, PLR0917

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS_A_TURN = 64


@triton.jit  # type: ignore[untyped-decorator]
def _write(  # type: ignore[no-untyped-def]
    key,
    value,
    cache,
    slots,
    stride_k,
    stride_v,
    stride_block,
    stride_head,
    stride_slot,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Program (token, head): one key and one value to the token's slot; a slot of -1 is padding."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        column = tl.arange(0, PADDED)
        inside = column < WIDTH
        place = cache + (slot // BLOCK_SIZE) * stride_block + head * stride_head + (slot % BLOCK_SIZE) * stride_slot
        k = tl.load(key + token.to(tl.int64) * stride_k + head * WIDTH + column, mask=inside)
        v = tl.load(value + token.to(tl.int64) * stride_v + head * WIDTH + column, mask=inside)
        tl.store(place + column, k, mask=inside)
        tl.store(place + WIDTH + column, v, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query,
    cache,
    out,
    table,
    token_request,
    token_keys,
    pages,
    stride_q,
    stride_out,
    stride_block,
    stride_head,
    stride_slot,
    stride_pages,
    LAST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    TURN: tl.constexpr,
):
    """Program (token, head): softmax(q k + table[head, distance]) v in float32, online over TURN keys at a time.

    `table` [heads, LAST + 1]; `pages` [requests, blocks] are block numbers; a token with 0 keys is padding and gets 0.
    """
    token = tl.program_id(0)
    head = tl.program_id(1)
    keys = tl.load(token_keys + token)
    request = tl.load(token_request + token).to(tl.int64)
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    q = tl.load(query + token.to(tl.int64) * stride_q + head * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    best = -float("inf")
    weight = 0.0
    total = tl.zeros((PADDED,), dtype=tl.float32)
    for start in range(0, keys, TURN):
        position = start + tl.arange(0, TURN)
        real = position < keys
        block = tl.load(pages + request * stride_pages + position // BLOCK_SIZE, mask=real, other=0).to(tl.int64)
        place = block * stride_block + head * stride_head + (position % BLOCK_SIZE) * stride_slot
        both = real[:, None] & inside[None, :]
        k = tl.load(cache + place[:, None] + column[None, :], mask=both, other=0.0).to(tl.float32)
        v = tl.load(cache + place[:, None] + WIDTH + column[None, :], mask=both, other=0.0).to(tl.float32)
        distance = tl.minimum(tl.maximum(keys - 1 - position, 0), LAST)
        score = tl.sum(q[None, :] * k, axis=1) + tl.load(table + head * (LAST + 1) + distance)
        score = tl.where(real, score, -float("inf"))
        top = tl.maximum(best, tl.max(score, axis=0))
        share = tl.exp(score - top)
        shrink = tl.exp(best - top)
        weight = weight * shrink + tl.sum(share, axis=0)
        total = total * shrink + tl.sum(share[:, None] * v, axis=0)
        best = top
    result = total / tl.where(keys > 0, weight, 1.0)
    tl.store(
        out + token.to(tl.int64) * stride_out + head * WIDTH + column, result.to(out.dtype.element_ty), mask=inside
    )


def write_keys_values(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Write `key`, `value` [tokens, heads, width] into `cache` [blocks, heads, block size, 2 * width] at `slots`.

    Tokens beyond `slots` [n] are padding, as are slots of -1. The last axes of all must be contiguous.
    """
    tokens, heads, width = key.shape
    tokens = min(tokens, slots.shape[0])
    _write[(tokens, heads)](
        key, value, cache, slots, key.stride(0), value.stride(0), *cache.stride()[:3],
        BLOCK_SIZE=cache.shape[2], WIDTH=width, PADDED=triton.next_power_of_2(width),
    )  # fmt: skip


def attend(
    query: Tensor, cache: Tensor, table: Tensor, pages: Tensor, token_request: Tensor, token_keys: Tensor, out: Tensor
) -> None:
    """Write softmax(q k + bias) v of every row of `query` [tokens, heads, width] into `out`, of the same shape.

    Args:
        cache: [blocks, heads, block size, 2 * width], keys before values, any strides but 1 in the last axis.
        table: [heads, max_distance + 1] float32, the bias by distance.
        pages: [requests, blocks] block numbers.
        token_request, token_keys: [>= tokens] int32: each row's request and number of keys, its own included.
    """
    tokens, heads, width = query.shape
    assert table.dtype is torch.float32
    _attend[(tokens, heads)](
        query, cache, out, table, token_request, token_keys, pages,
        query.stride(0), out.stride(0), *cache.stride()[:3], pages.stride(0),
        LAST=table.shape[1] - 1, BLOCK_SIZE=cache.shape[2], WIDTH=width, PADDED=triton.next_power_of_2(width),
        TURN=KEYS_A_TURN,
    )  # fmt: skip
