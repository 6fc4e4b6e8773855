"""The cache's tensors where each row is read by its address: every row has memory of its own.

Growing and shrinking copy nothing, and neither does a row that moves into a hole: its memory changes hands.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_KEPT_SHARE, _MOST_KEPT = 8, 128 << 20  # bytes that are kept although no row uses them: 1/8 of the budget, or less


class SpareRows:
    """Memory of rows that nobody uses, kept within bounds for the next ones, of any pool.

    Fresh memory is slow: the system clears it, page by page, as it is touched.
    """

    def __init__(self, layers: int, heads: int, d_kv: int, *, dtype: torch.dtype, max_bytes: int) -> None:
        """`max_bytes` is the budget of all rows."""
        self.shape = (layers, heads, d_kv)
        self.dtype = dtype
        self._most_bytes = min(max_bytes // _KEPT_SHARE, _MOST_KEPT)
        self._kept: dict[int, list[Tensor]] = {}  # by capacity, the one that was given last at the end
        self.kept_bytes = 0

    def take(self, capacity: int) -> Tensor:
        """A row [layers, 2 (keys, values), heads, capacity, d_kv] with anything in it."""
        kept = self._kept.get(capacity)
        if not kept:
            layers, heads, d_kv = self.shape
            return torch.empty(layers, 2, heads, capacity, d_kv, dtype=self.dtype)
        row = kept.pop()
        self.kept_bytes -= row.nbytes
        return row

    def give(self, row: Tensor) -> None:
        """Keep a row; capacities that nobody gave for longest make room for it."""
        capacity = row.shape[3]
        kept = self._kept.pop(capacity, [])
        kept.append(row)
        self._kept[capacity] = kept
        self.kept_bytes += row.nbytes
        while self.kept_bytes > self._most_bytes:
            oldest = next(iter(self._kept))
            if not self._kept[oldest]:
                del self._kept[oldest]
                continue
            self.kept_bytes -= self._kept[oldest].pop().nbytes


class RowTensors:
    """One pool's rows by capacity: implements serve.engine.slabs.Rows."""

    def __init__(self, spare: SpareRows) -> None:
        self._spare = spare
        self._rows: dict[int, list[Tensor]] = {}
        self.addresses: dict[int, list[int]] = {}  # where the rows of a capacity are, in their order

    @property
    def bytes_per_token(self) -> int:
        layers, heads, d_kv = self._spare.shape
        return layers * 2 * heads * d_kv * self._spare.dtype.itemsize

    @property
    def allocated_bytes(self) -> int:
        return sum(len(rows) * capacity * self.bytes_per_token for capacity, rows in self._rows.items())

    def row(self, capacity: int, row: int) -> Tensor:
        """One row: [layers, 2, heads, capacity, d_kv]."""
        self.reserve(capacity, row + 1)
        return self._rows[capacity][row]

    def steps(self, capacity: int) -> tuple[int, int, int]:
        """Numbers from a row's layer, kind and head to the next one."""
        _, heads, d_kv = self._spare.shape
        head = capacity * d_kv
        return 2 * heads * head, heads * head, head

    def reserve(self, capacity: int, rows: int) -> None:
        """Have at least `rows` rows of `capacity`."""
        present = self._rows.setdefault(capacity, [])
        while len(present) < rows:
            present.append(self._spare.take(capacity))
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
                self._spare.give(present.pop())
                self.addresses[capacity].pop()
            if used == 0:
                del self._rows[capacity]
                self.addresses.pop(capacity, None)
        for capacity, rows in used_rows.items():
            self.reserve(capacity, rows)
