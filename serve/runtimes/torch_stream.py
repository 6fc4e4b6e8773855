"""The deltas of one request on their way from the engine thread to one consumer in the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Protocol

from serve.errors import EngineFailure
from serve.output import TokenDelta


class EngineCommands(Protocol):
    """What a stream asks of the engine; callable from any thread."""

    def abort(self, key: str) -> None: ...

    def finish(self, key: str, index: int) -> None: ...


class TorchStream:
    """The deltas of one request, from the engine to one consumer; see serve.runtimes.base.TokenStream.

    Memory is bounded by the request itself (sequences x max_tokens): a slow consumer finds what has piled up of a
    sequence as one delta. A stream that nobody holds any more aborts its request.
    """

    def __init__(self, engine: EngineCommands, key: str, num_sequences: int) -> None:
        self._engine = engine
        self._key = key
        self._open = set(range(num_sequences))  # sequences whose last delta has not been taken
        self._pending: dict[int, TokenDelta] = {}  # by index, in the order they are to be taken
        self._news = asyncio.Event()
        self._begun = asyncio.Event()
        self._begun_at = 0.0
        self._failure: str | None = None
        self._running = set(range(num_sequences))  # sequences that the engine still works on

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        return self

    async def __anext__(self) -> TokenDelta:
        while True:
            if not self._open:
                raise StopAsyncIteration
            if self._pending:
                index = next(iter(self._pending))
                delta = self._pending.pop(index)
                if delta.finish_reason is not None:
                    self._open.discard(index)
                return delta
            if self._failure is not None:
                raise EngineFailure(self._failure)
            self._news.clear()
            await self._news.wait()

    async def started(self) -> float:
        await self._begun.wait()
        if self._failure is not None:
            raise EngineFailure(self._failure)
        return self._begun_at

    def finish(self, index: int) -> None:
        if index not in self._open:
            return
        self._open.discard(index)
        self._pending.pop(index, None)
        if index in self._running:
            self._running.discard(index)
            self._engine.finish(self._key, index)
        self._note_end()

    async def aclose(self) -> None:
        self._open.clear()
        self._pending.clear()
        self._abort()
        self._note_end()

    def begin(self, at: float | None = None) -> None:
        """The engine has taken the request in, `at` a time that has passed already (`time.monotonic`; default: now)."""
        if not self._begun.is_set():
            self._begun_at = time.monotonic() if at is None else at
            self._begun.set()

    def put(self, deltas: list[TokenDelta]) -> None:
        """New deltas from the engine."""
        self.begin()  # a request that is refused never starts otherwise
        for delta in deltas:
            if delta.finish_reason is not None:
                self._running.discard(delta.index)
            if delta.index in self._open:
                earlier = self._pending.get(delta.index)
                self._pending[delta.index] = delta if earlier is None else _joined(earlier, delta)
        self._news.set()

    def fail(self, message: str) -> None:
        """The engine is gone."""
        self._running.clear()
        self._failure = message
        self.begin()
        self._news.set()

    def _note_end(self) -> None:
        if not self._open:
            self.begin()
            self._news.set()

    def _abort(self) -> None:
        if self._running:
            self._running.clear()
            self._engine.abort(self._key)

    def __del__(self) -> None:
        self._abort()


def _joined(first: TokenDelta, second: TokenDelta) -> TokenDelta:
    return TokenDelta(
        index=first.index,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        finish_reason=second.finish_reason,
        error=second.error,
    )
