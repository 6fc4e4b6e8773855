"""A pool's rows where each is read by its address: every row has memory of its own.

Growing and shrinking copy nothing, and neither does a row that moves into a hole: its memory changes hands.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from serve.engine.cache_tensors import RowShape
from serve.engine.spare_memory import SpareMemory


class RowTensors:
    """One pool's rows by capacity: implements serve.engine.cache_tensors.Rows."""

    def __init__(self, shape: RowShape, *, spare: SpareMemory) -> None:
        self._shape = shape
        self._spare = spare
        self._rows: dict[int, list[Tensor]] = {}
        self.addresses: dict[int, list[int]] = {}  # where the rows of a capacity are, in their order

    @property
    def allocated_bytes(self) -> int:
        return sum(len(rows) * capacity * self._shape.bytes_per_token for capacity, rows in self._rows.items())

    def row(self, capacity: int, row: int) -> Tensor:
        """One row: [layers, 2, heads, capacity, d_kv]."""
        self.reserve(capacity, row + 1)
        return self._rows[capacity][row]

    def steps(self, capacity: int) -> tuple[int, int, int]:
        """Numbers from a row's layer, kind and head to the next one."""
        head = capacity * self._shape.d_kv
        layer_kind = self._shape.heads * head
        return 2 * layer_kind, layer_kind, head

    def reserve(self, capacity: int, rows: int) -> None:
        """Have at least `rows` rows of `capacity`."""
        present = self._rows.setdefault(capacity, [])
        while len(present) < rows:
            present.append(self._made(capacity))
            self.addresses.setdefault(capacity, []).append(present[-1].data_ptr())

    def move(self, capacity: int, source: int, target: int) -> None:
        """Put the row `source` in the place of `target`, whose memory takes the other's."""
        self.reserve(capacity, max(source, target) + 1)
        rows, addresses = self._rows[capacity], self.addresses[capacity]
        rows[source], rows[target] = rows[target], rows[source]
        addresses[source], addresses[target] = addresses[target], addresses[source]

    def settle(self, used_rows: Mapping[int, int]) -> None:
        """Have just the rows that are in use (capacity -> rows)."""
        for capacity, present in list(self._rows.items()):
            used = used_rows.get(capacity, 0)
            while len(present) > used:
                self._spare.give(present.pop().view(-1).view(torch.uint8))
                self.addresses[capacity].pop()
            if used == 0:
                del self._rows[capacity]
                self.addresses.pop(capacity, None)
        for capacity, rows in used_rows.items():
            self.reserve(capacity, rows)

    def _made(self, capacity: int) -> Tensor:
        row = self._shape
        memory = self._spare.take(capacity * row.bytes_per_token)
        return memory.view(row.dtype).view(row.layers, 2, row.heads, capacity, row.d_kv)
