"""The cache as one tensor that never moves, in pages; carries out the operations that cache.py writes down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from serve.engine.cache import CacheOperation, ClearRow, CopyRow, ForgetSaved, RestoreRow, SaveRow
from serve.engine.gpu.page_table import PAGE, PageTable, Place
from serve.engine.sequence import Prompt, Sequence
from serve.engine.transfer import to_device

Key = tuple[int, ...]


class PagedCache:
    """Both pools in one arena [layers, pages, 2 (keys, values), heads, PAGE, d_kv], and the prompts kept aside.

    Nothing is ever cleared: the kernels read a row's own positions and no others, so what an earlier holder left,
    finite or not, is not seen.
    """

    def __init__(
        self, layers: int, heads: int, d_kv: int, *, cache_bytes: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Takes `cache_bytes` of the device at once, and one page more for rows of padding."""
        page_bytes = layers * 2 * heads * PAGE * d_kv * dtype.itemsize
        self.table = PageTable(cache_bytes // page_bytes)
        shape = (layers, self.table.pages + 1, 2, heads, PAGE, d_kv)
        self.arena = torch.empty(shape, device=device, dtype=dtype)
        self.page_numbers = torch.zeros(self.table.pages + 1, device=device, dtype=torch.int32)  # table.flat
        self._saved: dict[Key, Tensor] = {}  # [length, layers, 2, heads, d_kv]
        self._restored: dict[Place, Tensor] = {}  # saved prompts whose row has no pages yet

    @property
    def saved_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._saved.values())

    def apply(self, operations: Iterable[CacheOperation]) -> None:
        """Carry out the operations, in order. Rows that are new get their pages in `settle`."""
        for operation in operations:
            match operation:
                case CopyRow("cross", source, target) if source in self._restored:  # its keys are still aside
                    self._restored[target] = self._restored.pop(source)
                case CopyRow(pool, source, target):  # whoever is copied leaves its old row: pages change hands
                    self.table.move(pool, source, target)
                case ClearRow():
                    pass
                case SaveRow(key, capacity, row, length):
                    waiting = self._restored.pop((capacity, row), None)
                    self._saved[key] = self._gather((capacity, row), length) if waiting is None else waiting
                case RestoreRow(key, capacity, row):
                    self._restored[capacity, row] = self._saved.pop(key)
                case ForgetSaved(key):
                    del self._saved[key]

    def settle(self, self_rows: Mapping[int, int], cross_rows: Mapping[int, int]) -> None:
        """Give every row in use its pages, and fill those that come back from aside."""
        if self.table.settle(self_rows, cross_rows):
            flat = self.table.flat
            # A copy of its own each time: page-locked memory that is still being read must not be written.
            staged = torch.from_numpy(flat)
            staged = staged.pin_memory() if self.arena.is_cuda else staged
            self.page_numbers[: len(flat)].copy_(staged, non_blocking=True)
        for (capacity, row), saved in self._restored.items():
            if row < cross_rows.get(capacity, 0):
                pages, offsets = self._positions([(capacity, row)], [saved.shape[0]])
                self.arena[:, pages, :, :, offsets] = saved
        self._restored.clear()

    def positions(self, prompts: Iterable[Prompt]) -> tuple[Tensor, Tensor]:
        """(page, offset in it) of every token of `prompts`, one after the other: int64 [tokens] each."""
        listed = list(prompts)
        places = [(slot.capacity, slot.row) for prompt in listed if (slot := prompt.slot) is not None]
        return self._positions(places, [len(prompt.token_ids) for prompt in listed])

    def prompt(self, prompt: Prompt) -> Tensor:
        """A copy of a prompt's keys and values: [layers, 2, heads, length, d_kv]."""
        if prompt.slot is None:
            raise ValueError("only a prompt with a row can be used")
        place = (prompt.slot.capacity, prompt.slot.row)
        return self._gather(place, len(prompt.token_ids)).permute(1, 2, 3, 0, 4)

    def first(self, pool: str, holder: Prompt | Sequence | None) -> int:
        """Where a holder's pages begin in `page_numbers`."""
        if holder is None or holder.slot is None:
            raise ValueError("only holders of a row can be in a batch")
        return self.table.first(pool, holder.slot.capacity, holder.slot.row)

    def _gather(self, place: Place, length: int) -> Tensor:
        """A copy of a cross row's first positions: [length, layers, 2, heads, d_kv]."""
        pages, offsets = self._positions([place], [length])
        return self.arena[:, pages, :, :, offsets]

    def _positions(self, places: list[Place], lengths: list[int]) -> tuple[Tensor, Tensor]:
        """(page, offset in it) of the first `lengths` positions of cross rows, one row after the other."""
        pairs = list(zip(places, lengths, strict=True))
        pages = np.concatenate([self.table.of("cross", place).repeat(PAGE)[:length] for place, length in pairs])
        offsets = np.concatenate([np.arange(length) % PAGE for length in lengths])
        both = to_device(np.stack((pages, offsets)), self.arena.device, dtype=torch.int64)
        return both[0], both[1]
