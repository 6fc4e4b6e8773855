"""The cache's tensors: one slab a capacity, rows dense from 0; carries out the operations that cache.py writes down.

Where rows need not lie side by side, row_tensors.py has them instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from serve.engine.cache import CacheOperation, ClearRow, CopyRow, ForgetSaved, RestoreRow, SaveRow


class Rows(Protocol):
    """One pool's tensors: its rows by capacity, numbered from 0."""

    @property
    def bytes_per_token(self) -> int: ...

    @property
    def allocated_bytes(self) -> int: ...

    def row(self, capacity: int, row: int) -> Tensor:
        """One row [layers, 2 (keys, values), heads, capacity, d_kv], made if it is not there."""
        ...

    def reserve(self, capacity: int, rows: int) -> None:
        """Have at least `rows` rows of `capacity`."""
        ...

    def move(self, capacity: int, source: int, target: int) -> None:
        """Put the row `source` in the place of `target`, after which anything may be at `source`."""
        ...

    def settle(self, used_rows: Mapping[int, int]) -> None:
        """Fit memory to the rows in use (capacity -> rows)."""
        ...


_SHRINK_BELOW = 4  # a slab gives memory back when fewer than 1/4 of its rows are in use


_KEPT_SHARE, _MOST_KEPT = 8, 128 << 20  # bytes that are kept although no slab uses them: 1/8 of the budget, or less


class SlabLimit:
    """How much all slabs together may take before they stop doubling; and their memory between two uses.

    Fresh memory is slow: the system clears it, page by page, as it is touched, which for a slab takes as long as some
    decode steps. So what a slab gives up is kept, within bounds, for the next one, on a CPU.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.slabs: list[Slabs] = []
        self._kept: list[Tensor] = []  # uint8, the ones given last at the end

    def take(self, num_bytes: int, device: torch.device) -> Tensor:
        """Memory of at least `num_bytes` [bytes] uint8 with anything in it: some that is kept, else new.

        On a CPU it is of a power of two, so that what one slab gives up fits the next; what is never touched of it
        takes no memory.
        """
        if device.type != "cpu":
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        size = 1 << (num_bytes - 1).bit_length()
        for place in reversed(range(len(self._kept))):
            if self._kept[place].nbytes == size:
                return self._kept.pop(place)
        return torch.empty(size, dtype=torch.uint8)

    def give(self, memory: Tensor) -> None:
        """Keep what `take` gave, and forget what has been kept longest where it becomes too much."""
        if memory.device.type != "cpu":
            return
        self._kept.append(memory)
        while self.kept_bytes > min(self.max_bytes // _KEPT_SHARE, _MOST_KEPT):
            self._kept.pop(0)

    @property
    def kept_bytes(self) -> int:
        return sum(kept.nbytes for kept in self._kept)

    @property
    def spare_bytes(self) -> int:
        return max(0, self.max_bytes - sum(slabs.allocated_bytes for slabs in self.slabs))


class Slabs:
    """The tensors of one pool: capacity -> [layers, 2 (keys, values), rows, heads, capacity, d_kv].

    In this order all rows' keys, and all their values, are a batch of matrices as they lie.

    A slab doubles when it is full, so that growing costs one copy a doubling, as long as both pools together stay
    below `limit.max_bytes`; beyond that it grows by an eighth.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        d_kv: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        limit: SlabLimit,
    ) -> None:
        self._shape = (layers, heads, d_kv)
        self._device = device
        self._dtype = dtype
        self._limit = limit
        limit.slabs.append(self)
        self._slabs: dict[int, Tensor] = {}
        self._memory: dict[int, Tensor] = {}  # what each slab lies in

    @property
    def bytes_per_token(self) -> int:
        layers, heads, d_kv = self._shape
        return layers * 2 * heads * d_kv * self._dtype.itemsize

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
        spare = self._limit.spare_bytes // (capacity * self.bytes_per_token)
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
        layers, heads, d_kv = self._shape
        shape = (layers, 2, rows, heads, capacity, d_kv)
        num_bytes = math.prod(shape) * self._dtype.itemsize
        memory = self._limit.take(num_bytes, self._device)
        slab = memory[:num_bytes].view(self._dtype).view(shape)
        old = self._slabs.get(capacity)
        kept = 0 if old is None else min(rows, old.shape[2])
        if old is not None:
            slab[:, :, :kept] = old[:, :, :kept]
        # A masked position takes part in attention's product with its weight of 0, and 0 times garbage may be NaN.
        slab[:, :, kept:] = 0
        if old is not None:
            self._limit.give(self._memory[capacity])
        self._slabs[capacity], self._memory[capacity] = slab, memory


R = TypeVar("R", bound=Rows)


class CacheTensors(Generic[R]):
    """Both pools' rows, and the keys and values of prompts kept aside."""

    def __init__(self, self_rows: R, cross_rows: R) -> None:
        self.self_rows = self_rows
        self.cross_rows = cross_rows
        self._pools = {"self": self_rows, "cross": cross_rows}
        self._saved: dict[tuple[int, ...], Tensor] = {}  # [layers, 2, heads, length, d_kv]

    @property
    def saved_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._saved.values())

    def reserve(self, self_rows: Mapping[int, int], cross_rows: Mapping[int, int]) -> None:
        """Make room for rows in use (capacity -> rows) in one go."""
        for pool, rows_by_capacity in ((self.self_rows, self_rows), (self.cross_rows, cross_rows)):
            for capacity, rows in rows_by_capacity.items():
                pool.reserve(capacity, rows)

    def apply(self, operations: Iterable[CacheOperation]) -> None:
        """Carry out the operations, in order."""
        for operation in operations:
            match operation:
                case CopyRow(pool, source, target) if source[0] == target[0]:  # whoever was at the source leaves it
                    self._pools[pool].move(source[0], source[1], target[1])
                case CopyRow(pool, source, target):
                    rows = self._pools[pool]
                    tokens = min(source[0], target[0])
                    rows.reserve(target[0], target[1] + 1)  # before any view: it may replace the slab
                    rows.row(*target)[..., :tokens, :] = rows.row(*source)[..., :tokens, :]
                case ClearRow(pool, capacity, row):
                    self._pools[pool].row(capacity, row).zero_()
                case SaveRow(key, capacity, row, length):
                    self._saved[key] = self.cross_rows.row(capacity, row)[..., :length, :].clone()
                case RestoreRow(key, capacity, row):
                    saved = self._saved.pop(key)
                    self.cross_rows.row(capacity, row)[..., : saved.shape[-2], :] = saved
                case ForgetSaved(key):
                    del self._saved[key]

    def settle(self, self_rows: Mapping[int, int], cross_rows: Mapping[int, int]) -> None:
        self.self_rows.settle(self_rows)
        self.cross_rows.settle(cross_rows)
