"""One HTTP/1.1 connection that sends bytes as they are given and reads each answer whole."""

from __future__ import annotations

import http.client
import socket
import time
from dataclasses import dataclass

SECONDS = 10.0  # an answer that takes longer is a hang


@dataclass(frozen=True)
class Answer:
    """What came back. Header names are in lower case; of one that came twice both values stand in its list."""

    status: int
    headers: dict[str, list[str]]
    body: bytes
    seconds: float

    def header(self, name: str) -> str:
        """The one value, "" where there is none.

        Raises:
            AssertionError: it came twice.
        """
        found = self.headers.get(name, [])
        assert len(found) <= 1, f"{name} came {len(found)} times"
        return found[0] if found else ""


class Connection:
    """Keeps its connection as long as the server does.

    connection.exchange("GET", b"GET /livez HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._socket: socket.socket | None = None

    def exchange(self, method: str, request: bytes) -> Answer:
        """Send a whole request and read its answer.

        Raises:
            TimeoutError: it did not come, or not whole.
            http.client.HTTPException: it is not HTTP.
        """
        begun = time.monotonic()
        self._open().sendall(request)
        response = http.client.HTTPResponse(self._open(), method=method)
        try:
            response.begin()
            body = response.read()
            closes = response.will_close
        finally:
            response.close()
        headers: dict[str, list[str]] = {}
        for name, value in response.getheaders():
            headers.setdefault(name.lower(), []).append(value)
        if closes:
            self.close()
        return Answer(response.status, headers, body, time.monotonic() - begun)

    def expect_end(self) -> None:
        """
        Raises:
            TimeoutError: the server keeps the connection.
            AssertionError: it sends more.
        """
        if self._socket is not None:
            assert self._socket.recv(1) == b""
        self.close()

    def leave(self, request: bytes) -> None:
        """Send a whole request and hang up."""
        self._open().sendall(request)
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _open(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=SECONDS)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket
