"""One HTTP request in progress: its body, its name, its deadline, whether its client is still there."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from serve.config import Settings
from serve.errors import Cancelled, InvalidRequest, ServeError, TooLarge
from serve.rest import errors
from serve.rest.json_text import Json, parse_object
from serve.rest.protocol import CLOSE_AFTER_RESPONSE
from serve.rest.request_id import RequestId
from serve.rest.respond import JSON_TYPE, refuse, respond
from serve.rest.sse import DONE_TERMINATED, EventForm, EventStream

TIMEOUT_HEADER = "x-request-timeout-ms"
_TIMEOUT = re.compile(r"[0-9]{1,12}")
# A longer body is read in a thread, so that probes and streams go on meanwhile.
_INLINE_BODY_BYTES = 256 * 1024

T = TypeVar("T")


class Call:
    """Reads one request and writes its response.

    Args:
        settings: `max_body_mib` and `keepalive_seconds` of it.
        to_error_body: the schema's form of an error.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        settings: Settings,
        to_error_body: errors.ToBody = errors.to_body,
    ) -> None:
        self.scope = scope
        self.headers = Headers(scope=scope)
        self.request_id: RequestId = RequestId.of(scope)
        self._receive = receive
        self._send = send
        self._to_error_body = to_error_body
        self._max_body_bytes = int(settings.max_body_mib * 2**20)
        self._keepalive_seconds = settings.keepalive_seconds
        self._has_replied = False
        self._events: EventStream | None = None

    async def read(self, to_request: Callable[[Json], T]) -> T:
        """The body, parsed and given to `to_request`.

        Raises:
            InvalidRequest, TooLarge, Cancelled
        """
        raw = await self._read_body()
        if len(raw) <= _INLINE_BODY_BYTES:
            return to_request(parse_object(raw))
        return await asyncio.to_thread(lambda: to_request(parse_object(raw)))

    def timeout_seconds(self) -> float | None:
        """The client's deadline, from now on; None = it has none.

        Raises:
            InvalidRequest: the header is no number of milliseconds.
        """
        text = self.headers.get(TIMEOUT_HEADER)
        if text is None:
            return None
        if not _TIMEOUT.fullmatch(text):
            raise InvalidRequest(f"{TIMEOUT_HEADER} must be a whole number of milliseconds", field=TIMEOUT_HEADER)
        return int(text) / 1000

    async def while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns; it is cancelled when the client goes away, and has ended when this returns.

        Raises:
            Cancelled: the client went away. And what `work` raises.
        """
        task = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(self._client_leaves())
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise Cancelled("the client has gone")
        finally:
            leaving.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
                if not task.cancelled():
                    task.exception()  # of nobody's interest any more, but asyncio reports one that is never looked at

    async def reply(
        self, body: bytes, *, content_type: bytes = JSON_TYPE, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        self._has_replied = True
        await respond(self._send, 200, body, [(b"content-type", content_type), *headers])

    def events(self, form: EventForm = DONE_TERMINATED) -> EventStream:
        """Begin an event stream; `refuse` knows how to end it."""
        self._events = EventStream(self._send, keepalive_seconds=self._keepalive_seconds, form=form)
        return self._events

    async def refuse(self, error: ServeError) -> None:
        """Tell the client of the error: as a response, or as the last frame of a stream, whose connection then ends."""
        if self._events is not None:
            close_after_response: Callable[[], None] | None = self.scope.get("state", {}).get(CLOSE_AFTER_RESPONSE)
            if close_after_response is not None:
                close_after_response()
            await self._events.fail(self._to_error_body(error))
        elif not self._has_replied:
            self._has_replied = True
            await refuse(self._send, error, to_body=self._to_error_body)

    async def _read_body(self) -> bytes:
        declared = self.headers.get("content-length")
        if declared is not None and int(declared) > self._max_body_bytes:
            raise self._too_large()
        chunks, size, more = [], 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Cancelled("the client has gone")
            chunk: bytes = message.get("body", b"")
            size += len(chunk)
            if size > self._max_body_bytes:
                raise self._too_large()  # what still comes is read and dropped, so the connection stays usable
            chunks.append(chunk)
            more = message.get("more_body", False)
        return b"".join(chunks)

    async def _client_leaves(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is larger than {self._max_body_bytes} bytes, the most that this server takes")
