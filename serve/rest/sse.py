"""Server-sent events: data frames, comments while there is silence, an end that the schema chooses."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from starlette.types import Send

from serve.rest.errors import Headers
from serve.rest.json_text import Json, dump_ascii

HEADERS: Headers = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect frames
]
_KEEPALIVE = b": keepalive\n\n"
# Stands before the first frame after a comment. Some clients (`vllm bench serve`) strip each chunk that they receive,
# so the comment's own end is lost on them, and without this one they would take the frames behind it for its rest.
_COMMENT_END = b":\n\n"


@dataclass(frozen=True, slots=True)
class EventForm:
    """How a schema writes its events: what stands before each frame's JSON, and what comes behind the last frame.

    >>> DONE_TERMINATED.to_event({"index": 0, "text": "é"})
    b'data: {"index":0,"text":"\\\\u00e9"}\\n\\n'
    """

    prefix: bytes
    end: bytes

    def to_event(self, frame: Json) -> bytes:
        return b"%s%s\n\n" % (self.prefix, dump_ascii(frame))


DONE_TERMINATED = EventForm(b"data: ", b"data: [DONE]\n\n")


class EventStream:
    """The response to one streaming request.

    async with EventStream(send, keepalive_seconds=15) as events:   # the head is sent: the request is accepted
        await events.send(frame)                                    # waits while the client does not read
        await events.end(last_frame)

    Left with an exception, the response stays open for the error frame.
    """

    def __init__(self, send: Send, *, keepalive_seconds: float, form: EventForm = DONE_TERMINATED) -> None:
        self._send = send
        self._form = form
        self._keepalive_seconds = keepalive_seconds
        self._last_write = 0.0
        self._is_in_comment = False
        self._keeper: asyncio.Task[None] | None = None
        self._is_over = False

    async def __aenter__(self) -> Self:
        await self._send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
        self._last_write = asyncio.get_running_loop().time()
        self._keeper = asyncio.create_task(self._keep_alive())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop_keeper()

    async def send(self, frame: Json) -> None:
        await self._write(self._behind_comment(self._form.to_event(frame)))

    async def end(self, frame: Json | None = None) -> None:
        """The last frame, if there is one, and the form's end."""
        last = b"" if frame is None else self._form.to_event(frame)
        await self._finish(last + self._form.end)

    async def fail(self, frame: Json) -> None:
        """The error frame, without the form's end; nothing where the stream is over already."""
        if not self._is_over:
            await self._finish(self._form.to_event(frame))

    async def _finish(self, last: bytes) -> None:
        self._stop_keeper()
        self._is_over = True
        await self._send({"type": "http.response.body", "body": self._behind_comment(last), "more_body": False})

    async def _write(self, data: bytes) -> None:
        self._last_write = asyncio.get_running_loop().time()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    def _behind_comment(self, data: bytes) -> bytes:
        was_in_comment, self._is_in_comment = self._is_in_comment, False
        return _COMMENT_END + data if was_in_comment and data else data

    async def _keep_alive(self) -> None:
        now = asyncio.get_running_loop().time
        while True:
            silence = now() - self._last_write
            if silence < self._keepalive_seconds:
                await asyncio.sleep(self._keepalive_seconds - silence)
            else:
                self._is_in_comment = True
                await self._write(_KEEPALIVE)

    def _stop_keeper(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            self._keeper = None
