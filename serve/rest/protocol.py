"""uvicorn's HTTP protocol with what ASGI cannot say: a bound on the head, JSON for what is no HTTP, closing,
and no drop of a body behind an offer of HTTP/2."""

from __future__ import annotations

import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serve.errors import InvalidRequest
from serve.request import new_request_id
from serve.rest.errors import to_body, to_status
from serve.rest.json_text import dump_ascii

MAX_HEAD_BYTES = 65536  # of the request line and all headers; the parser itself has no bound
# Key in the scope's state of a function without arguments: after it was called the connection ends with the response.
CLOSE_AFTER_RESPONSE = "close_after_response"
_LINGER_SECONDS = 0.5
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)


class RestProtocol(HttpToolsProtocol):
    """One client connection."""

    _head_bytes = 0
    _in_message = False
    _is_ending = False

    def data_received(self, data: bytes) -> None:
        if not self._in_message:
            data = _without_upgrade(data)
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        self._in_message = True
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self._in_message = False
        super().on_message_complete()

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
        state[CLOSE_AFTER_RESPONSE] = self._end_soon
        if self._is_ending:
            self.cycle.keep_alive = False  # with the header that says so

    def send_400_response(self, msg: str) -> None:
        """What the parser refuses gets our error body. Then the connection ends: where would a next request begin?"""
        in_response = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not in_response:
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

    def _end_soon(self) -> None:
        """Close once the connection is idle for a moment, not with the response that is under way.

        Its head promised a connection that can be used again, so the client may be sending its next request by now.
        That one is answered, and told that it was the last.
        """
        self._is_ending = True
        self.timeout_keep_alive = _LINGER_SECONDS  # type: ignore[assignment] # uvicorn's options are whole seconds

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("the head is too large")  # the parser reports it as a parse error


def _without_upgrade(data: bytes) -> bytes:
    """The beginning of a request without its offer of another protocol.

    Java's client offers HTTP/2 in every request. A server may pass over that, but the parser would take the body for
    the other protocol and drop it.

    >>> _without_upgrade(b"POST / HTTP/1.1\\r\\nUpgrade: h2c\\r\\nHost: x\\r\\n\\r\\nupgrade: body")
    b'POST / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\nupgrade: body'
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"", head) + end + rest if end and _UPGRADE.search(head) else data
