"""A pool's rows side by side, as torch's products want them: one slab a capacity, rows dense from 0."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from serve.engine.cache_tensors import RowShape
from serve.engine.spare_memory import SpareMemory

_SHRINK_BELOW = 4  # a slab gives memory back when fewer than 1/4 of its rows are in use


class SlabLimit:
    """How much all slabs together may take before they stop doubling; and their memory between two uses."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.slabs: list[Slabs] = []
        self._spare = SpareMemory(max_bytes)

    def take(self, num_bytes: int, device: torch.device) -> Tensor:
        """Memory of at least `num_bytes` [bytes] uint8 with anything in it.

        On a CPU it is of a power of two, so that what one slab gives up fits the next; what is never touched of it
        takes no memory.
        """
        if device.type != "cpu":
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self._spare.take(1 << (num_bytes - 1).bit_length())

    def give(self, memory: Tensor) -> None:
        """What `take` gave is not used any more."""
        if memory.device.type == "cpu":
            self._spare.give(memory)

    @property
    def spare_bytes(self) -> int:
        return max(0, self.max_bytes - sum(slabs.allocated_bytes for slabs in self.slabs))


class Slabs:
    """One pool's rows: implements serve.engine.cache_tensors.Rows.

    capacity -> [layers, 2 (keys, values), rows, heads, capacity, d_kv]. In this order all rows' keys, and all their
    values, are a batch of matrices as they lie.

    A slab doubles when it is full, so that growing costs one copy a doubling, as long as both pools together stay
    below `limit.max_bytes`; beyond that it grows by an eighth.
    """

    def __init__(self, shape: RowShape, *, device: torch.device, limit: SlabLimit) -> None:
        self._shape = shape
        self._device = device
        self._limit = limit
        limit.slabs.append(self)
        self._slabs: dict[int, Tensor] = {}
        self._memory: dict[int, Tensor] = {}  # what each slab lies in

    @property
    def allocated_bytes(self) -> int:
        return sum(slab.nbytes for slab in self._slabs.values())

    def __getitem__(self, capacity: int) -> Tensor:
        """View of a capacity's slab by rows: [layers, rows, 2, heads, capacity, d_kv]."""
        return self._slabs[capacity].transpose(1, 2)

    def by_kind(self, capacity: int) -> Tensor:
        """A capacity's slab as it lies: [layers, 2, rows, heads, capacity, d_kv]."""
        return self._slabs[capacity]

    def row(self, capacity: int, row: int) -> Tensor:
        """View of one row: [layers, 2, heads, capacity, d_kv]."""
        self.reserve(capacity, row + 1)
        return self._slabs[capacity][:, :, row]

    def reserve(self, capacity: int, rows: int) -> None:
        """Make the slab of `capacity` hold at least `rows` rows."""
        present = self._slabs[capacity].shape[2] if capacity in self._slabs else 0
        if rows <= present:
            return
        spare = self._limit.spare_bytes // (capacity * self._shape.bytes_per_token)
        self._resize(capacity, max(rows, present + min(present, max(spare, present // 8))))

    def move(self, capacity: int, source: int, target: int) -> None:
        self.reserve(capacity, target + 1)
        self.row(capacity, target).copy_(self.row(capacity, source))

    def settle(self, used_rows: Mapping[int, int]) -> None:
        """Fit every slab to the rows in use (capacity -> rows): grow what is too small, shrink what is far too big."""
        for capacity in list(self._slabs):
            used, present = used_rows.get(capacity, 0), self._slabs[capacity].shape[2]
            if used == 0:
                del self._slabs[capacity]
                self._limit.give(self._memory.pop(capacity))
            elif used * _SHRINK_BELOW < present:
                self._resize(capacity, 2 * used)
        for capacity, rows in used_rows.items():
            self.reserve(capacity, rows)

    def _resize(self, capacity: int, rows: int) -> None:
        row = self._shape
        num_bytes = rows * capacity * row.bytes_per_token
        memory = self._limit.take(num_bytes, self._device)
        slab = memory[:num_bytes].view(row.dtype).view(row.layers, 2, rows, row.heads, capacity, row.d_kv)
        old = self._slabs.get(capacity)
        kept = 0 if old is None else min(rows, old.shape[2])
        if old is not None:
            slab[:, :, :kept] = old[:, :, :kept]
        # A masked position takes part in attention's product with its weight of 0, and 0 times garbage may be NaN.
        slab[:, :, kept:] = 0
        if old is not None:
            self._limit.give(self._memory[capacity])
        self._slabs[capacity], self._memory[capacity] = slab, memory
