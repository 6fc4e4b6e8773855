"""Memory of the cache between two uses."""

from __future__ import annotations

import torch
from torch import Tensor

_KEPT_SHARE, _MOST_KEPT = 8, 128 << 20  # bytes that are kept although nobody uses them: 1/8 of the budget, or less


class SpareMemory:
    """What rows and slabs on a CPU give up, kept within bounds for the next ones, of any pool.

    Fresh memory is slow: the system clears it, page by page, as it is touched, which for a slab takes as long as some
    decode steps.
    """

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` is the budget of the whole cache."""
        self._most_bytes = min(max_bytes // _KEPT_SHARE, _MOST_KEPT)
        self._kept: dict[int, list[Tensor]] = {}  # by size, the size that was given last at the end; none is empty
        self.kept_bytes = 0

    def take(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 with anything in it: what is kept of just this size, else new."""
        kept = self._kept.get(num_bytes)
        if kept is None:
            return torch.empty(num_bytes, dtype=torch.uint8)
        self.kept_bytes -= num_bytes
        memory = kept.pop()
        if not kept:
            del self._kept[num_bytes]
        return memory

    def give(self, memory: Tensor) -> None:
        """Keep what `take` gave, if it is not more than may be kept; sizes that nobody gave for longest make room."""
        if memory.nbytes > self._most_bytes:
            return
        kept = self._kept.pop(memory.nbytes, [])
        kept.append(memory)
        self._kept[memory.nbytes] = kept
        self.kept_bytes += memory.nbytes
        while self.kept_bytes > self._most_bytes:
            oldest = next(iter(self._kept))
            self.take(oldest)
