"""Who has which row of the cache: arithmetic only. The tensors, and the copying, are in slabs.py.

Each of the two pools (self, cross) keeps its rows by capacity, in tokens: 16, 32, 64, ... A row of a capacity is
always below the number of rows in use there: whoever leaves, the last row moves into the hole. So a decode step can see
each capacity as one dense block, and a sequence that outgrows its row moves to the next capacity (one copy a
doubling). Rows are given for what a sequence holds now, never for what it may still produce.

Decisions are made here at once; what they mean for the tensors is written down as operations, in order, and carried
out by the runner before it computes anything.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

MIN_CAPACITY = 16  # tokens; the smallest row


def capacity_for(length: int) -> int:
    """The smallest capacity that holds `length` tokens."""
    return max(MIN_CAPACITY, 1 << (length - 1).bit_length())


@dataclass(slots=True)
class Slot:
    """A row that somebody holds; `row` changes when the row moves."""

    capacity: int
    row: int


class Holder(Protocol):
    """Whoever holds a row."""

    slot: Slot | None


H = TypeVar("H", bound=Holder)


@dataclass(frozen=True, slots=True)
class CopyRow:
    """Copy all that fits of one row to another, in the same pool; capacities may differ (a row that grows).

    Whoever was at the source leaves it.
    """

    pool: str
    source: tuple[int, int]  # (capacity, row)
    target: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ClearRow:
    """Zero a row: it held numbers that are not finite, which not even a masked position may keep."""

    pool: str
    capacity: int
    row: int


@dataclass(frozen=True, slots=True)
class SaveRow:
    """Put a cross row's first `length` positions aside under `key`."""

    key: tuple[int, ...]
    capacity: int
    row: int
    length: int


@dataclass(frozen=True, slots=True)
class RestoreRow:
    """Put back what was saved under `key`, and forget it there."""

    key: tuple[int, ...]
    capacity: int
    row: int


@dataclass(frozen=True, slots=True)
class ForgetSaved:
    key: tuple[int, ...]


CacheOperation = CopyRow | ClearRow | SaveRow | RestoreRow | ForgetSaved


@dataclass(slots=True)
class Room:
    """The bytes that both pools share, and the operations that wait to be carried out."""

    total_bytes: int
    used_bytes: int = 0
    operations: list[CacheOperation] = field(default_factory=list)

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.used_bytes


class Pool(Generic[H]):
    """The rows of one pool by capacity, and their holders in row order."""

    def __init__(self, name: str, bytes_per_token: int, room: Room) -> None:
        self.name = name
        self._bytes_per_token = bytes_per_token
        self._room = room
        self._holders: dict[int, list[H]] = {}
        self.used_bytes = 0

    def row_bytes(self, length: int) -> int:
        """Bytes of a row that holds `length` tokens."""
        return capacity_for(length) * self._bytes_per_token

    def exact_bytes(self, length: int) -> int:
        """Bytes of `length` tokens without a row's slack."""
        return length * self._bytes_per_token

    def rows(self) -> dict[int, tuple[H, ...]]:
        """The holders of each capacity in use, in row order."""
        return {capacity: tuple(holders) for capacity, holders in sorted(self._holders.items()) if holders}

    def can_grow(self, holder: H) -> bool:
        """Whether a holder can have a row of twice its capacity instead of its own."""
        return _slot(holder).capacity * self._bytes_per_token <= self._room.free_bytes

    def allocate(self, holder: H, length: int) -> None:
        """Give `holder` a row for `length` tokens; there must be room."""
        capacity = capacity_for(length)
        holders = self._holders.setdefault(capacity, [])
        holder.slot = Slot(capacity, len(holders))
        holders.append(holder)
        self._account(capacity)

    def grow(self, holder: H) -> None:
        """Move `holder` to a row of twice the capacity; there must be room."""
        old = _slot(holder)
        self.allocate(holder, old.capacity * 2)
        new = _slot(holder)
        self._room.operations.append(CopyRow(self.name, (old.capacity, old.row), (new.capacity, new.row)))
        self._vacate(old)

    def free(self, holder: H, *, clear: bool = False) -> None:
        """Take back the row; `clear` it when what it held is not finite."""
        slot = _slot(holder)
        holder.slot = None
        if clear:
            self._room.operations.append(ClearRow(self.name, slot.capacity, slot.row))
        self._vacate(slot)

    def _vacate(self, slot: Slot) -> None:
        """Close the hole at `slot`: the last row of the capacity moves there."""
        holders = self._holders[slot.capacity]
        last = holders.pop()
        if slot.row < len(holders):
            source = (slot.capacity, len(holders))
            self._room.operations.append(CopyRow(self.name, source, (slot.capacity, slot.row)))
            holders[slot.row] = last
            _slot(last).row = slot.row
        self._account(-slot.capacity)

    def _account(self, tokens: int) -> None:
        self.used_bytes += tokens * self._bytes_per_token
        self._room.used_bytes += tokens * self._bytes_per_token


class SavedPrompts:
    """Which prompts' keys and values are kept although no sequence uses them; the least recently used go first."""

    def __init__(self, max_bytes: int, room: Room) -> None:
        self._max_bytes = max_bytes
        self._room = room
        self._bytes: OrderedDict[tuple[int, ...], int] = OrderedDict()
        self.used_bytes = 0

    def __contains__(self, key: tuple[int, ...]) -> bool:
        return key in self._bytes

    def save(self, key: tuple[int, ...], slot: Slot, num_bytes: int) -> None:
        """Keep the row at `slot` as `key`, if the budget allows it at all."""
        if num_bytes > self._max_bytes:
            return
        while self.used_bytes + num_bytes > self._max_bytes:
            oldest, oldest_bytes = self._bytes.popitem(last=False)
            self.used_bytes -= oldest_bytes
            self._room.operations.append(ForgetSaved(oldest))
        self._bytes[key] = num_bytes
        self.used_bytes += num_bytes
        self._room.operations.append(SaveRow(key, slot.capacity, slot.row, len(key)))

    def restore(self, key: tuple[int, ...], slot: Slot) -> None:
        """Bring `key` back into the row at `slot`."""
        self.used_bytes -= self._bytes.pop(key)
        self._room.operations.append(RestoreRow(key, slot.capacity, slot.row))


def _slot(holder: Holder) -> Slot:
    if holder.slot is None:
        raise ValueError("this holder has no row")
    return holder.slot
