"""Which pages of the arena belong to which row of the pools: arithmetic only. The tensors are in paged_cache.py.

The scheduler deals in rows of a capacity (cache.py). On a device of fixed addresses a row is a list of pages of
PAGE tokens that may lie anywhere: no room is lost between rows, and to move a row or let it grow is to hand over its
pages; no key is copied. Capacities are multiples of PAGE, so the bytes that the scheduler books are the pages
that are taken, and whatever it lets in has its pages.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from serve.engine.cache import MIN_CAPACITY

PAGE = MIN_CAPACITY  # tokens
Place = tuple[int, int]  # (capacity, row)
Numbers = npt.NDArray[np.int32]

_NONE: Numbers = np.empty(0, dtype=np.int32)


class PageTable:
    """The pages of every row of the pools "self" and "cross". Page 0 is nobody's: rows of padding write there.

    `flat` holds page 0 and then the pages of all rows in use, by pool, capacity and row: what the kernels read.
    """

    def __init__(self, pages: int) -> None:
        """`pages` can be taken; they are numbered from 1."""
        self.pages = pages
        self._free = list(range(pages, 0, -1))
        self._rows: dict[str, dict[Place, Numbers]] = {"self": {}, "cross": {}}
        self._used: dict[str, dict[int, int]] = {"self": {}, "cross": {}}
        self._first: dict[tuple[str, int], int] = {}  # where a pool's rows of a capacity begin in `flat`
        self._moved = False
        self.flat: Numbers = np.zeros(1, dtype=np.int32)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def of(self, pool: str, place: Place) -> Numbers:
        """Pages of a row that has them."""
        return self._rows[pool][place]

    def first(self, pool: str, capacity: int, row: int) -> int:
        """Where the pages of a row begin in `flat`."""
        return self._first[pool, capacity] + row * (capacity // PAGE)

    def move(self, pool: str, source: Place, target: Place) -> None:
        """What `source` held is now at `target`; whatever was there is nobody's any more."""
        rows = self._rows[pool]
        self._take_back(rows.pop(target, _NONE))
        rows[target] = rows.pop(source)
        self._moved = True

    def settle(self, self_rows: Mapping[int, int], cross_rows: Mapping[int, int]) -> bool:
        """Give every row in use (capacity -> rows) the pages of its capacity, and take back all others.

        Returns whether `flat` is another than before.
        """
        used = {"self": dict(self_rows), "cross": dict(cross_rows)}
        if used == self._used and not self._moved:
            return False
        self._used, self._moved = used, False
        for pool, rows in self._rows.items():
            for place in [place for place in rows if place[1] >= used[pool].get(place[0], 0)]:
                self._take_back(rows.pop(place))
        parts: list[Numbers] = [np.zeros(1, dtype=np.int32)]
        filled = 1
        for pool, rows in self._rows.items():
            for capacity, count in used[pool].items():
                self._first[pool, capacity] = filled
                filled += count * (capacity // PAGE)
                parts += [self._fill(rows, (capacity, row)) for row in range(count)]
        self.flat = np.concatenate(parts)
        return True

    def _fill(self, rows: dict[Place, Numbers], place: Place) -> Numbers:
        """The row's pages, made as many as its capacity asks for."""
        present = rows.get(place, _NONE)
        missing = place[0] // PAGE - len(present)
        if missing > 0:
            if missing > len(self._free):
                raise ValueError(f"{missing} pages are wanted and {len(self._free)} are free: the books are wrong")
            taken = self._free[-missing:]
            del self._free[-missing:]
            present = np.concatenate((present, np.array(taken, dtype=np.int32)))
            rows[place] = present
        return present

    def _take_back(self, pages: Numbers) -> None:
        self._free += pages.tolist()
