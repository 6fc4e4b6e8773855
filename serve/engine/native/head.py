"""serve.engine.shortlist_head in one call: a greedy step's head, which reads its real weights for few tokens only."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from serve.engine.native.library import HeadScratchTable, HeadTable, Kind, address, level, loaded
from serve.engine.native.linear import NativeLinear, room_for_quantized
from serve.engine.shortlist_head import BLOCK, MAX_CANDIDATES, Shortlisted, block_bounds

_CHOICE = 3  # numbers of types.h's Choice: token, candidates, logit (float64)


class NativeShortlistHead:
    """As ShortlistHead: the token of each state's largest logit, exactly, and that logit."""

    def __init__(self, weight: Tensor) -> None:
        """`weight` [vocabulary, width], the head's own numbers, in float32 or float16; `width` a multiple of 16."""
        self._weight = weight.contiguous()
        vocabulary, self._width = weight.shape
        self._lost, self._norms = block_bounds(weight)
        padded = torch.zeros(len(self._lost) * BLOCK, self._width)
        padded[:vocabulary] = weight
        self._product = NativeLinear(padded, Kind.INT8)
        self._table = HeadTable(
            self._product.table, address(self._weight), address(self._lost), address(self._norms),
            weight.dtype is torch.float16, vocabulary, len(padded), MAX_CANDIDATES,
        )  # fmt: skip
        self._fits = (0, 0)  # rows and threads that there is room for
        self._scratch = HeadScratchTable()
        self._room: tuple[Tensor, ...] = ()

    def __call__(self, states: Tensor) -> Shortlisted:
        """Of states [rows, width]."""
        rows, threads = states.shape[0], torch.get_num_threads()
        self._make_room(rows, threads)
        states = states.contiguous()
        choices = torch.empty(rows, _CHOICE, dtype=torch.int64)
        loaded().flan_shortlist(
            level(), threads, ctypes.byref(self._table), states.data_ptr(), rows, ctypes.byref(self._scratch),
            choices.data_ptr(),
        )  # fmt: skip
        token_ids, candidates = choices[:, 0], choices[:, 1]
        crowded = (candidates == 0) | (candidates > MAX_CANDIDATES)
        return Shortlisted(token_ids, choices.view(torch.float64)[:, 2].float(), crowded)

    def _make_room(self, rows: int, threads: int) -> None:
        if rows <= self._fits[0] and threads <= self._fits[1]:
            return
        rows, threads = max(rows, self._fits[0]), max(threads, self._fits[1])
        table, room = room_for_quantized(rows, self._width)
        each = threads * rows
        sizes = (rows, rows, each * BLOCK, each, each * 2 * MAX_CANDIDATES, each * 2 * MAX_CANDIDATES)
        numbers = torch.empty(sum(sizes))  # of 4 bytes each; what is not written takes no memory
        choices = torch.empty(each, _CHOICE, dtype=torch.int64)
        places = [address(numbers)]
        for size in sizes[:-1]:
            places.append(places[-1] + 4 * size)
        self._scratch = HeadScratchTable(table, *places, address(choices))
        self._room = (room, numbers, choices)
        self._fits = (rows, threads)
