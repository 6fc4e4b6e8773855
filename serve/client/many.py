"""generate_many: requests are read as there is room, results come as they finish, each request gets one.

At most `max_in_flight` requests are under way: read from the caller's iterable, and not yet handed back as a result.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from serve.client import wire
from serve.client.loop_thread import LoopThread
from serve.client.retries import Retries
from serve.client.transport import Exchange
from serve.client.wire import Call
from serve.errors import DeadlineExceeded, InvalidRequest, ServeError
from serve.output import Completion
from serve.request import is_request_id, new_request_id

DEFAULT_MAX_IN_FLIGHT = 64
Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ManyResult:
    """What became of one request: either `completion` or `error` is there.

    `index` is the request's position in what was given, from 0; `request_id` its own name, else the one that it got.
    """

    index: int
    request_id: str
    completion: Completion | None = None
    error: ServeError | None = None


@dataclass(frozen=True, slots=True)
class ManyPlan:
    """How the requests of one call are sent. `expires`, of the call as a whole, is on time.monotonic's clock."""

    exchange: Exchange
    retries: Retries
    expires: float | None
    max_in_flight: int

    async def answer(self, index: int, fields: Fields) -> ManyResult:
        """Send one request, again where that makes sense; a mistake in it is its result, too."""
        given = fields.get("request_id") if isinstance(fields, Mapping) else None
        request_id = new_request_id() if given is None else given
        try:
            call = self._to_call(fields, request_id)
            data = await self.retries.run_async(call, lambda: self.exchange.send(call))
        except ServeError as error:
            return ManyResult(index, str(request_id), error=error)
        return ManyResult(index, request_id, completion=wire.to_completion(data))

    def _to_call(self, fields: Fields, request_id: Any) -> Call:
        if not isinstance(fields, Mapping):
            raise InvalidRequest(f"a request is a mapping of fields, not {type(fields).__name__}")
        if not (isinstance(request_id, str) and is_request_id(request_id)):
            raise InvalidRequest("request_id must be 1 to 128 characters of A-Z a-z 0-9 . _ : -", field="request_id")
        try:
            return wire.to_call("generate", self.expires, {**fields, "request_id": request_id})
        except wire.UnknownField as error:  # it may be one row of many
            raise InvalidRequest(str(error), field=error.name) from None


def check(requests: Iterable[Fields] | AsyncIterable[Fields], max_in_flight: int) -> None:
    """
    Raises:
        TypeError: `requests` is one request, not many.
        ValueError: no request could ever be sent.
    """
    if isinstance(requests, Mapping | str):
        raise TypeError("requests is an iterable of mappings; for one request there is `generate`")
    if max_in_flight < 1:
        raise ValueError(f"max_in_flight must be at least 1, not {max_in_flight}")


class ManyResults:
    """An iterator of ManyResult; see FlanClient.generate_many."""

    def __init__(self, requests: Iterable[Fields], plan: ManyPlan) -> None:
        self._results = _run(iter(requests), plan)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ManyResult:
        return next(self._results)

    def close(self) -> None:
        """Cancel what is still running."""
        self._results.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _run(requests: Iterable[Fields], plan: ManyPlan) -> Generator[ManyResult]:
    """The requests are read in the caller's thread, one before each result; the rest happens in another thread."""
    source = enumerate(requests)
    finished: queue.SimpleQueue[Future[ManyResult]] = queue.SimpleQueue()
    under_way = 0
    failure: Exception | None = None
    thread = LoopThread("flan-generate-many")
    try:
        while failure is None:
            try:
                wire.remaining_seconds(plan.expires)
                index, fields = next(source)
            except StopIteration:
                break
            except Exception as error:  # the caller's own, or the time is up: what is under way is still handed back
                failure = error
                break
            thread.start(plan.answer(index, fields)).add_done_callback(finished.put)
            under_way += 1
            if under_way == plan.max_in_flight or not finished.empty():
                under_way -= 1
                yield finished.get().result()
        for _ in range(under_way):
            yield finished.get().result()
    finally:
        thread.close(plan.exchange.close)
    if failure is not None:
        raise failure


class AsyncManyResults:
    """An asynchronous iterator of ManyResult; see AsyncFlanClient.generate_many."""

    def __init__(self, requests: Iterable[Fields] | AsyncIterable[Fields], plan: ManyPlan) -> None:
        self._results = _AsyncRun(_to_async(requests), plan).results()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ManyResult:
        return await anext(self._results)

    async def close(self) -> None:
        """Cancel what is still running."""
        await self._results.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class _AsyncRun:
    """One task reads the requests and starts a task for each."""

    def __init__(self, requests: AsyncGenerator[Fields], plan: ManyPlan) -> None:
        self._requests = requests
        self._plan = plan
        self._places = asyncio.Semaphore(plan.max_in_flight)
        self._tasks: set[asyncio.Task[ManyResult | None]] = set()  # whose result is not yet handed back
        self._finished: asyncio.Queue[asyncio.Task[ManyResult | None]] = asyncio.Queue()
        self._failure: Exception | None = None

    async def results(self) -> AsyncGenerator[ManyResult]:
        self._start(asyncio.create_task(self._read()))
        try:
            while self._tasks:
                task = await self._finished.get()
                self._tasks.discard(task)
                result = task.result()
                if result is not None:
                    self._places.release()
                    yield result
        finally:
            for task in self._tasks:
                task.cancel()
            try:
                await asyncio.gather(*self._tasks, return_exceptions=True)
                await self._requests.aclose()
            finally:
                await self._plan.exchange.close()
        if self._failure is not None:
            raise self._failure

    def _start(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._finished.put_nowait)

    async def _read(self) -> None:
        timeout = asyncio.timeout(None)
        try:
            async with timeout:
                timeout.reschedule(self._when_to_stop())
                await self._read_all()
        except Exception as error:  # the caller's own, or the time is up: what is under way is still handed back
            self._failure = DeadlineExceeded("the timeout passed") if timeout.expired() else error

    def _when_to_stop(self) -> float | None:
        remaining = wire.remaining_seconds(self._plan.expires)
        return None if remaining is None else asyncio.get_running_loop().time() + remaining

    async def _read_all(self) -> None:
        index = 0
        while True:
            await self._places.acquire()
            try:
                fields = await anext(self._requests)
            except StopAsyncIteration:
                return
            self._start(asyncio.create_task(self._plan.answer(index, fields)))
            index += 1


async def _to_async(requests: Iterable[Fields] | AsyncIterable[Fields]) -> AsyncGenerator[Fields]:
    if isinstance(requests, AsyncIterable):
        async for fields in requests:
            yield fields
    else:
        for fields in requests:
            yield fields
