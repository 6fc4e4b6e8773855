"""uvicorn's HTTP protocol with what ASGI cannot say: a bound on the head, JSON for what is no HTTP, closing."""

from __future__ import annotations

import secrets
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serve.errors import InvalidRequest
from serve.rest.errors import to_body, to_status
from serve.rest.json_text import dump_ascii

MAX_HEAD_BYTES = 65536  # of the request line and all headers; the parser itself has no bound
CLOSE_AFTER_RESPONSE = "close_after_response"  # key in the scope's state: call it and the connection ends with the response


def new_request_id() -> str:
    return f"req-{secrets.token_hex(12)}"


class RestProtocol(HttpToolsProtocol):
    """One client connection."""

    _head_bytes = 0

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        # The application starts in the next turn of the loop, so it sees this.
        state: dict[str, Any] = self.scope["state"]
        state[CLOSE_AFTER_RESPONSE] = partial(setattr, self.cycle, "keep_alive", False)

    def send_400_response(self, msg: str) -> None:
        """What the parser refuses gets our error body. The connection ends: nobody knows where a next request begins."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            error = InvalidRequest("this is no valid HTTP/1.1 request, or its head is too large")
            body = dump_ascii(to_body(error))
            head = [
                STATUS_LINE[to_status(error)],
                b"content-type: application/json\r\n",
                b"content-length: %d\r\n" % len(body),
                b"x-request-id: %s\r\n" % new_request_id().encode(),
                b"connection: close\r\n\r\n",
            ]
            self.transport.write(b"".join([*head, body]))
        self.transport.close()

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("the head is too large")  # the parser reports it as a parse error
