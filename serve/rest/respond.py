"""Whole responses, written to ASGI's `send`."""

from __future__ import annotations

from starlette.types import Send

from serve.errors import ServeError
from serve.rest import errors
from serve.rest.json_text import dump_ascii

JSON_TYPE = b"application/json"


async def respond(send: Send, status: int, body: bytes, headers: errors.Headers) -> None:
    """A response with its length, in one piece."""
    fields = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def refuse(send: Send, error: ServeError, headers: errors.Headers | None = None) -> None:
    """The error as a response."""
    fields = [(b"content-type", JSON_TYPE), *errors.to_headers(error), *([] if headers is None else headers)]
    await respond(send, errors.to_status(error), dump_ascii(errors.to_body(error)), fields)
