"""The encoder of a T5, and the keys and values that its decoder reads, in one call to the native kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engine.config import ModelConfig
from serve.engine.layers import RelativeBias
from serve.engine.native.library import (
    ACTIVATIONS,
    CachedTable,
    EncoderLayerTable,
    EncoderTable,
    LinearTable,
    ScratchTable,
    TextsTable,
    address,
    level,
    loaded,
)
from serve.engine.native.linear import NativeLinear, room_for_quantized, whole_blocks

_FEED_ROWS = 256  # as in types.h
_KEPT_BYTES = 64 << 20  # of room for the next call


@dataclass(frozen=True, slots=True)
class EncoderLayerWeights:
    """One encoder layer: its norms' weights and its linear layers, in types.h's order."""

    norms: tuple[Tensor, Tensor]  # of self-attention, feed-forward: [d_model] float32
    linears: tuple[NativeLinear, ...]  # qkv, out; wi with both halves of a gated one, wo


class NativeEncoder:
    """The encoder's weights by their addresses, and the room for a batch."""

    def __init__(
        self,
        config: ModelConfig,
        layers: list[EncoderLayerWeights],
        cross: list[NativeLinear],
        *,
        embedding: Tensor,
        bias: RelativeBias,
        final_norm: Tensor,
        cache_dtype: torch.dtype,
    ) -> None:
        """`cross`: keys and values [2 * inner, d_model] of each decoder layer. All float32 but the cache."""
        self._config = config
        self._bias = bias
        self._cache_dtype = cache_dtype
        self._kept = (layers, cross, embedding, final_norm)  # what the tables point to, too
        self._layers = (EncoderLayerTable * len(layers))(
            *(
                EncoderLayerTable(*(address(norm) for norm in layer.norms), *(linear.table for linear in layer.linears))
                for layer in layers
            )
        )
        self._cross = (LinearTable * len(cross))(*(linear.table for linear in cross))
        self._table = EncoderTable(
            len(layers),
            len(cross),
            config.num_heads,
            config.d_kv,
            config.d_model,
            ACTIVATIONS[config.activation],
            config.gated,
            cache_dtype is torch.float16,
            config.layer_norm_epsilon,
            address(embedding),
            address(final_norm),
            ctypes.cast(self._layers, ctypes.POINTER(EncoderLayerTable)),
            ctypes.cast(self._cross, ctypes.POINTER(LinearTable)),
        )
        self._room = torch.empty(0)

    def __call__(self, token_ids: Tensor, lengths: SequenceOf[int], rows: SequenceOf[Tensor] = ()) -> Tensor:
        """States [T, d_model] of texts' `token_ids` [T], one after the other, normalized.

        `rows`, one a text, are where their keys and values go: [layers, 2, heads, length, d_kv] of the cache's dtype,
        each head's positions one after the other.
        """
        config = self._config
        tokens, longest = len(token_ids), max(lengths)
        library, threads = loaded(), torch.get_num_threads()
        states = torch.empty(tokens, config.d_model)
        sizes = torch.tensor(list(lengths), dtype=torch.int64)
        line = self._bias.line(longest).contiguous()
        room = library.flan_attention_room(longest, config.d_kv)
        h_step, x_step = whole_blocks(config.d_model), max(whole_blocks(config.d_model), config.inner)
        y_step = whole_blocks(3 * config.inner)
        inside = whole_blocks(config.d_ff) * (2 if config.gated else 1)
        parts = (tokens * h_step, tokens * x_step, max(tokens * y_step, min(tokens, _FEED_ROWS) * inside))
        table, quantized = room_for_quantized(tokens, max(config.d_model, config.inner, config.d_ff))
        h, x, y, attention = self._make_room(*parts, threads * room)
        scratch = ScratchTable(h, x, y, 0, h_step, x_step, y_step, 0, 0, 0, table)
        part = 4 * config.inner
        texts = TextsTable(
            y, y + part, y + 2 * part, x, y_step, config.num_heads, config.d_kv, len(lengths), longest, 0,
            address(sizes), address(line), attention, room,
        )  # fmt: skip
        known = zip(rows, lengths, strict=True) if rows else ()
        places = (CachedTable * len(rows))(*(self._place(row, length) for row, length in known))
        ids = token_ids.contiguous()
        library.flan_encode(
            level(), threads, ctypes.byref(self._table), ids.data_ptr(), ctypes.byref(texts),
            ctypes.cast(places, ctypes.c_void_p) if rows else None, ctypes.byref(scratch), states.data_ptr(),
        )  # fmt: skip
        del quantized  # the table's memory, until here
        if self._room.nbytes > _KEPT_BYTES:
            self._room = torch.empty(0)
        return states

    def _make_room(self, *numbers: int) -> list[int]:
        """Addresses of so many float32 each."""
        if self._room.numel() < sum(numbers):
            self._room = torch.empty(sum(numbers))
        addresses = [address(self._room)]
        for number in numbers[:-1]:
            addresses.append(addresses[-1] + 4 * number)
        return addresses

    def _place(self, row: Tensor, length: int) -> CachedTable:
        shape = (len(self._cross), 2, self._config.num_heads, length, self._config.d_kv)
        layer, kind, head, position, last = row.stride()
        if row.shape != shape or row.dtype is not self._cache_dtype or (position, last) != (self._config.d_kv, 1):
            raise ValueError(f"a row of {shape} {self._cache_dtype} with dense heads is needed, not {tuple(row.shape)}")
        return CachedTable(row.data_ptr(), layer, kind, head, length)
