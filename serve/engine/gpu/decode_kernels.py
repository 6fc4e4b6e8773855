"""Triton kernels of a decode step: one query a sequence against the paged cache, for self- and cross-attention.

Every shape and address depends on the batch bucket alone, so that a CUDA graph can hold the launches; what differs
from step to step (which pages, how many keys) is read from index tensors at fixed addresses. A row reads its own
true number of keys and no more. Scores are not scaled, and all arithmetic is float32 whatever the cache holds.

Where there are few rows, each row's keys are split over several programs whose results a second kernel joins
(flash-decoding), or most of the card would idle.
"""

# A kernel's arguments are what they are, and its compile-time ones are written large, as in Triton's own.
# ruff: noqa: N803, PLR0913, PLR0917

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS_A_TURN = 64
MAX_SPLITS = 16


@dataclass(frozen=True, slots=True)
class CachedKeys:
    """Where each row's keys and values are: all int32.

    pages [any]: numbers of pages, those of one holder one after the other; first [rows]: where a row's pages begin
    in `pages`; stored [rows]: how many keys it has there. Rows may share pages (sequences of one prompt).
    """

    pages: Tensor
    first: Tensor
    stored: Tensor


@triton.jit
def _fold(best, weight, total, score, value):  # type: ignore[no-untyped-def]
    """Take scores [keys] and values [keys, width] into a running softmax: its maximum, its sum, its weighted sum."""
    top = tl.maximum(best, tl.max(score, axis=0))
    share = tl.exp(score - top)
    shrink = tl.exp(best - top)
    return top, weight * shrink + tl.sum(share, axis=0), total * shrink + tl.sum(share[:, None] * value, axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    cache,
    table,
    pages,
    first,
    stored,
    out,
    part_totals,
    part_scales,
    stride_q,
    stride_kv,
    SELF: tl.constexpr,
    LAST: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    TURN: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Program (row, head, split): softmax(q k + bias) v over the split's share of the row's keys.

    `cache` [pages, 2, HEADS, PAGE, WIDTH]. With SELF the row's own key and value are stored behind its `stored` ones
    and attended to out of registers, so no program waits for another's write, and table [HEADS, LAST + 1] is the bias
    by distance. Without, a row of 0 keys (padding) gets 0.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    count = tl.load(stored + row)
    my_pages = pages + tl.load(first + row)
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    q = tl.load(query + row.to(tl.int64) * stride_q + head * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    best = tl.full((), -float("inf"), tl.float32)
    weight = tl.full((), 0.0, tl.float32)
    total = tl.zeros((PADDED,), dtype=tl.float32)
    if SELF:
        mine = column < tl.where(split == 0, WIDTH, 0)
        own = row.to(tl.int64) * stride_kv + head * WIDTH + column
        own_key = tl.load(key + own, mask=inside, other=0.0)
        own_value = tl.load(value + own, mask=mine, other=0.0)
        own_page = tl.load(my_pages + count // PAGE).to(tl.int64)
        own_place = cache + ((own_page * 2 * HEADS + head) * PAGE + count % PAGE) * WIDTH + column
        tl.store(own_place, own_key, mask=mine)
        tl.store(own_place + HEADS * PAGE * WIDTH, own_value, mask=mine)
        own_score = tl.sum(q * own_key.to(tl.float32), axis=0) + tl.load(table + head * (LAST + 1))
        best = tl.where(split == 0, own_score, best)
        weight = tl.where(split == 0, 1.0, weight)
        total = own_value.to(tl.float32)
    span = tl.cdiv(tl.cdiv(count, SPLITS), TURN) * TURN
    begin = split * span
    end = tl.minimum(begin + span, count)
    for start in range(begin, end, TURN):
        position = start + tl.arange(0, TURN)
        real = position < end
        page = tl.load(my_pages + position // PAGE, mask=real, other=0).to(tl.int64)
        place = ((page * 2 * HEADS + head) * PAGE + position % PAGE) * WIDTH
        places = cache + place[:, None] + column[None, :]
        both = real[:, None] & inside[None, :]
        k = tl.load(places, mask=both, other=0.0).to(tl.float32)
        v = tl.load(places + HEADS * PAGE * WIDTH, mask=both, other=0.0).to(tl.float32)
        score = tl.sum(q[None, :] * k, axis=1)
        if SELF:
            score += tl.load(table + head * (LAST + 1) + tl.minimum(count - position, LAST), mask=real, other=0.0)
        best, weight, total = _fold(best, weight, total, tl.where(real, score, -float("inf")), v)
    at = row.to(tl.int64) * HEADS + head
    if SPLITS == 1:
        result = total / tl.where(weight > 0.0, weight, 1.0)
        tl.store(out + at * WIDTH + column, result.to(out.dtype.element_ty), mask=inside)
    else:
        at = at * SPLITS + split
        tl.store(part_totals + at * WIDTH + column, total, mask=inside)
        tl.store(part_scales + at * 2, best)
        tl.store(part_scales + at * 2 + 1, weight)


@triton.jit  # type: ignore[untyped-decorator]
def _join(  # type: ignore[no-untyped-def]
    part_totals,
    part_scales,
    out,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Program (row, head): one softmax out of its splits'. A split without keys has a maximum of -inf."""
    at = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    split = at * SPLITS + tl.arange(0, SPLITS)
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    best = tl.load(part_scales + split * 2)
    weight = tl.load(part_scales + split * 2 + 1)
    total = tl.load(part_totals + split[:, None] * WIDTH + column[None, :], mask=inside[None, :], other=0.0)
    top = tl.max(best, axis=0)
    share = tl.exp(best - tl.where(top == -float("inf"), 0.0, top))
    everything = tl.sum(weight * share, axis=0)
    result = tl.sum(total * share[:, None], axis=0) / tl.where(everything > 0.0, everything, 1.0)
    tl.store(out + at * WIDTH + column, result.to(out.dtype.element_ty), mask=inside)


def splits_for(rows: int, heads: int, processors: int) -> int:
    """Programs a row's keys are split over: a power of two that gives each processor about two programs."""
    wanted = max(1, min(MAX_SPLITS, 2 * processors // (rows * heads)))
    return 1 << (wanted.bit_length() - 1)


def self_attention(
    q: Tensor, keys_values: Tensor, cache: Tensor, table: Tensor, keys: CachedKeys, *, splits: int
) -> Tensor:
    """Store this step's keys and values, and attend over them and all before: [rows, heads, width].

    Args:
        q: [rows, heads, width], any stride of rows.
        keys_values: [rows, 2, heads, width], any stride of rows; stored as position `keys.stored` of its row.
        cache: [pages, 2, heads, page, width], contiguous: one layer.
        table: [heads, max_distance + 1] float32, the bias by distance, saturating.
        keys: what was stored before this step.
    """
    return _launch(q, keys_values, cache, table, keys, splits)


def cross_attention(q: Tensor, cache: Tensor, keys: CachedKeys, *, splits: int) -> Tensor:
    """Attend over each row's prompt, without bias: [rows, heads, width]. Arguments as of `self_attention`."""
    return _launch(q, None, cache, None, keys, splits)


def _launch(
    q: Tensor, keys_values: Tensor | None, cache: Tensor, table: Tensor | None, keys: CachedKeys, splits: int
) -> Tensor:
    rows, heads, width = q.shape
    out = torch.empty((rows, heads, width), device=q.device, dtype=q.dtype)
    parts = (rows, heads, splits) if splits > 1 else (0, 0, 0)
    totals = torch.empty((*parts, width), device=q.device, dtype=torch.float32)
    scales = torch.empty((*parts, 2), device=q.device, dtype=torch.float32)
    both = q if keys_values is None else keys_values
    key, value = (q, q) if keys_values is None else keys_values.unbind(1)
    bias = scales if table is None else table
    padded = triton.next_power_of_2(width)
    _attend[(rows, heads, splits)](
        q, key, value, cache, bias, keys.pages, keys.first, keys.stored, out, totals, scales,
        q.stride(0), both.stride(0),
        SELF=table is not None, LAST=0 if table is None else table.shape[1] - 1, HEADS=heads, PAGE=cache.shape[3],
        WIDTH=width, PADDED=padded, TURN=KEYS_A_TURN, SPLITS=splits, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        _join[(rows, heads)](
            totals, scales, out, HEADS=heads, WIDTH=width, PADDED=padded, SPLITS=splits, enable_fp_fusion=True
        )
    return out
