"""Streams of text with the whole at the end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from types import TracebackType
from typing import Self

from serve.client import wire
from serve.client.wire import Json
from serve.errors import EngineFailure
from serve.output import Completion, TextDelta


class _Fold:
    """Takes events; keeps the final one."""

    def __init__(self) -> None:
        self._completion: Completion | None = None

    @property
    def completion(self) -> Completion:
        """The whole, as `generate` returns it; there once the stream has ended.

        Raises:
            RuntimeError: it has not.
        """
        if self._completion is None:
            raise RuntimeError("the stream has not ended")
        return self._completion

    def _take(self, event: Json) -> TextDelta | None:
        if "final" in event:
            self._completion = wire.to_completion(event["final"])
            return None
        return wire.to_delta(event["delta"])

    def _check_ended(self) -> None:
        if self._completion is None:
            raise EngineFailure("the stream ended early")


class CompletionStream(_Fold):
    """An iterator of TextDelta; see FlanClient.stream."""

    def __init__(self, events: Generator[Json]) -> None:
        super().__init__()
        self._deltas = self._fold(events)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TextDelta:
        return next(self._deltas)

    def close(self) -> None:
        """Cancel what is still running."""
        self._deltas.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _fold(self, events: Generator[Json]) -> Generator[TextDelta]:
        try:
            for event in events:
                delta = self._take(event)
                if delta is not None:
                    yield delta
        finally:
            events.close()
        self._check_ended()


class AsyncCompletionStream(_Fold):
    """An asynchronous iterator of TextDelta; see AsyncFlanClient.stream."""

    def __init__(self, events: AsyncGenerator[Json]) -> None:
        super().__init__()
        self._deltas = self._fold(events)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TextDelta:
        return await anext(self._deltas)

    async def close(self) -> None:
        """Cancel what is still running."""
        await self._deltas.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _fold(self, events: AsyncGenerator[Json]) -> AsyncGenerator[TextDelta]:
        try:
            async for event in events:
                delta = self._take(event)
                if delta is not None:
                    yield delta
        finally:
            await events.aclose()
        self._check_ended()
