"""serve.engine.shortlist_head in one call: a greedy step's head, which reads its real weights for few tokens only."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from serve.engine.native.library import HeadScratchTable, HeadTable, Kind, address, level, loaded
from serve.engine.native.linear import NativeLinear, room_for_quantized
from serve.engine.shortlist_head import BLOCK, MAX_CANDIDATES, block_bounds


class NativeShortlistHead:
    """As ShortlistHead: logits that are exact for every token that could be the best, lower for all others.

    What it returns holds until the next call.
    """

    def __init__(self, weight: Tensor) -> None:
        """`weight` [vocabulary, width], the head's own numbers, in float32 or float16; `width` a multiple of 16."""
        self._weight = weight.contiguous()
        self._vocabulary, self._width = weight.shape
        self._lost, self._norms = block_bounds(weight)
        self._blocks = len(self._lost)
        padded = torch.zeros(self._blocks * BLOCK, self._width)
        padded[: self._vocabulary] = weight
        self._product = NativeLinear(padded, Kind.INT8)
        self._table = HeadTable(
            self._product.table, address(self._weight), address(self._lost), address(self._norms),
            weight.dtype is torch.float16, self._vocabulary, self._blocks * BLOCK, MAX_CANDIDATES,
        )  # fmt: skip
        self._rows = 0
        self._make_room(1)

    def __call__(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [rows, vocabulary] of states [rows, width], and which rows [rows] have too many candidates.

        The latter must be computed in full; so must rows that are not finite, which have none.
        """
        rows, threads = states.shape[0], torch.get_num_threads()
        self._make_room(rows)
        states = states.contiguous()
        candidates = torch.empty(threads, rows, dtype=torch.int64)
        table, norm, loss, best, bound = self._places
        scratch = HeadScratchTable(table, norm, loss, best, bound, address(candidates))
        loaded().flan_shortlist(
            level(), threads, ctypes.byref(self._table), states.data_ptr(), rows, ctypes.byref(scratch),
            self._logits.data_ptr(),
        )  # fmt: skip
        counts = candidates.sum(0)
        return self._logits[:rows, : self._vocabulary], (counts == 0) | (counts > MAX_CANDIDATES)

    def _make_room(self, rows: int) -> None:
        if rows <= self._rows:
            return
        self._rows = rows
        self._logits = torch.empty(rows, self._blocks * BLOCK)
        floats = torch.empty(rows * (2 + 2 * self._blocks))
        norm = address(floats)
        loss, best = norm + 4 * rows, norm + 8 * rows
        table, room = room_for_quantized(rows, self._width)
        self._places = (table, norm, loss, best, best + 4 * rows * self._blocks)
        self._room = (floats, room)
