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


async def refuse(send: Send, error: ServeError, *, to_body: errors.ToBody = errors.to_body) -> None:
    """The error as a response, its body in a schema's form."""
    fields = [(b"content-type", JSON_TYPE), *errors.to_headers(error)]
    await respond(send, errors.to_status(error), dump_ascii(to_body(error)), fields)
