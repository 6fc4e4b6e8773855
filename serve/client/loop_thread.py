"""An event loop in a thread of its own, for calls that are under way while their caller does something else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """
    >>> thread = LoopThread("example")
    >>> thread.start(asyncio.sleep(0, "done")).result()
    'done'
    >>> async def clean_up(): pass
    >>> thread.close(clean_up)
    """

    def __init__(self, name: str) -> None:
        started: Future[asyncio.AbstractEventLoop] = Future()
        self._stop = asyncio.Event()
        self._last: Callable[[], Awaitable[None]] | None = None
        self._thread = threading.Thread(target=asyncio.run, args=(self._main(started),), name=name, daemon=True)
        self._thread.start()
        self._loop = started.result()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self, last: Callable[[], Awaitable[None]]) -> None:
        """Cancel what runs there, then run `last` there, then end the thread."""
        self._last = last
        self._loop.call_soon_threadsafe(self._stop.set)
        if threading.current_thread() is not self._thread:  # there it is the garbage collector that closes
            self._thread.join()

    async def _main(self, started: Future[asyncio.AbstractEventLoop]) -> None:
        started.set_result(asyncio.get_running_loop())
        await self._stop.wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._last is not None:
            await self._last()
