"""generate_many over gRPC: requests share one GenerateMany call, and each waits for its own result.

The call is opened with the first request, and again where it has ended before all were answered. What is written to
it waits in a queue of ours, at most `max_in_flight` messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import Message

from serve.client.messages import to_json, to_serve_error
from serve.client.wire import ERRORS, Call, Json
from serve.errors import EngineFailure, ServeError, TooLarge

METHOD = "GenerateMany"
_GOODBYE_SECONDS = 1.0  # for the server to end a call that has nothing left to say

Open = Callable[[float | None], "Stream"]


class CallEnded(Exception):
    """The call that carried a request has ended without an answer to it."""

    def __init__(self, error: ServeError) -> None:
        super().__init__(error.message)
        self.error = error


class RpcExchange:
    """
    Args:
        open_stream: makes a GenerateMany call with so many seconds to live.
        to_request: a call's message.
    """

    def __init__(self, open_stream: Open, to_request: Callable[[Call], Message]) -> None:
        self._open = open_stream
        self._to_request = to_request
        self._shared: Stream | None = None
        self._streams: set[Stream] = set()  # that are not closed

    async def send(self, call: Call) -> Json:
        request, request_id = self._to_request(call), call.body["request_id"]
        seconds = call.remaining_seconds()
        try:
            return await (await self._free_of(request_id, seconds)).ask(request, request_id)
        except CallEnded as ended:
            # grpc ends the call for one message that is too large for the server, and does not say which it was.
            if not isinstance(ended.error, TooLarge):
                raise ended.error from None
        alone = self._new(call.remaining_seconds())
        try:
            return await alone.ask(request, request_id)
        except CallEnded as ended:
            raise ended.error from None
        finally:
            await self._close(alone)

    async def close(self) -> None:
        for stream in tuple(self._streams):
            await self._close(stream)

    async def _free_of(self, request_id: str, seconds: float | None) -> Stream:
        """The shared call, once no other request of that name waits there: names are what results are told by."""
        while self._shared is not None and (other := self._shared.waiting.get(request_id)) is not None:
            await asyncio.wait((other,))
        ended = self._shared
        if ended is not None and ended.has_ended:
            self._shared = None
            await self._close(ended)
            return await self._free_of(request_id, seconds)
        if self._shared is None:
            self._shared = self._new(seconds)
        return self._shared

    def _new(self, seconds: float | None) -> Stream:
        stream = self._open(seconds)
        self._streams.add(stream)
        return stream

    async def _close(self, stream: Stream) -> None:
        self._streams.discard(stream)
        await stream.close()


class Stream:
    """One GenerateMany call. `waiting` has the answers that are still to come, by request id.

    It is a call of grpc's synchronous kind, also for AsyncFlanClient: where a server ends a call while a message is
    being written, grpc.aio forgets the server's status and says INTERNAL.

    Args:
        open_call: makes the call from the iterator of its requests.
    """

    def __init__(self, open_call: Callable[[Iterator[Message]], Any]) -> None:
        self.waiting: dict[str, asyncio.Future[Json]] = {}
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._is_forsaken = False  # whether somebody has stopped waiting
        self._requests: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._call = open_call(iter(self._requests.get, None))
        self._reader = threading.Thread(target=self._read, name="flan-generate-many-reader", daemon=True)
        self._reader.start()

    @property
    def has_ended(self) -> bool:
        return self._over.is_set()

    async def ask(self, request: Message, request_id: str) -> Json:
        """
        Raises:
            ServeError: the server's answer to this request.
            CallEnded: there was none.
        """
        answer = asyncio.get_running_loop().create_future()
        self.waiting[request_id] = answer
        try:
            self._requests.put(request)
            result: Json = await answer
        except asyncio.CancelledError:
            self._is_forsaken = True
            raise
        finally:
            del self.waiting[request_id]
        if "response" in result:
            response: Json = result["response"]
            return response
        if "error" not in result:
            raise EngineFailure("the result is empty")
        error = result["error"]
        raise ERRORS.get(error["kind"], EngineFailure)(error["message"], field=error["field"] or None)

    async def close(self) -> None:
        """End the call: in peace where all is answered, else by cancelling it."""
        self._requests.put(None)
        try:
            if not self.waiting and not self._is_forsaken:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._over.wait(), _GOODBYE_SECONDS)
        finally:
            self._call.cancel()
        await self._over.wait()
        self._reader.join()

    def _read(self) -> None:
        """In a thread, until the call ends."""
        error: ServeError = EngineFailure("the call ended early")
        try:
            for message in self._call:
                self._loop.call_soon_threadsafe(self._take, message)
        except grpc.RpcError as refusal:
            error = to_serve_error(refusal)
        self._loop.call_soon_threadsafe(self._end, error)

    def _take(self, message: Any) -> None:
        answer = self.waiting.get(message.request_id)
        if answer is not None and not answer.done():
            answer.set_result(to_json(message))

    def _end(self, error: ServeError) -> None:
        self._over.set()
        self._requests.put(None)
        for answer in self.waiting.values():
            if not answer.done():  # one error each: an exception carries the traceback of who raised it
                own = type(error)(error.message, field=error.field, retry_after_seconds=error.retry_after_seconds)
                answer.set_exception(CallEnded(own))
