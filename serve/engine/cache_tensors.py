"""The cache's memory: carries out, on the rows of both pools, the operations that cache.py writes down.

How a pool's rows lie in memory is slabs.py's (side by side, for torch) or row_tensors.py's (each alone, for kernels
that read addresses).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from serve.engine.cache import CacheOperation, ClearRow, CopyRow, ForgetSaved, RestoreRow, SaveRow


@dataclass(frozen=True, slots=True)
class RowShape:
    """What every row of a model's cache has, of either pool: keys and values of `layers` layers, by head."""

    layers: int
    heads: int
    d_kv: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.layers * 2 * self.heads * self.d_kv * self.dtype.itemsize


class Rows(Protocol):
    """One pool's tensors: its rows by capacity, numbered from 0."""

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
