"""Self-attention within texts that lie one after the other, nothing padded."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from serve.engine.native.library import TextsTable, address, level, loaded


class NativeRaggedAttention:
    """Implements serve.engine.attention.RaggedAttend for `lengths` texts, for all layers of one stack."""

    def __init__(self, lengths: Sequence[int], line: Tensor) -> None:
        """`line` [heads, 2 * longest - 1]: the bias of a key at distance 1 - longest ... longest - 1 from the query."""
        self._lengths = torch.tensor(list(lengths), dtype=torch.int64)
        self._line = line.contiguous()
        self._longest = max(lengths)
        self._room = torch.empty(0)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: [tokens, heads, d_kv], whose last two dimensions are dense -> [tokens, heads, d_kv]."""
        heads, d_kv = q.shape[1:]
        steps = {x.stride() for x in (q, k, v)}
        if len(steps) != 1 or q.stride()[1:] != (d_kv, 1):
            raise ValueError("the kernels read q, k and v of one layout, with dense heads")
        library, threads = loaded(), torch.get_num_threads()
        room = library.flan_attention_room(self._longest, d_kv)
        if self._room.numel() < threads * room:
            self._room = torch.empty(threads * room)
        out = torch.empty(q.shape)
        table = TextsTable(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), address(out), q.stride(0), heads, d_kv, len(self._lengths),
            self._longest, 0, address(self._lengths), address(self._line), address(self._room), room,
        )  # fmt: skip
        library.flan_attention(level(), threads, ctypes.byref(table))
        return out
