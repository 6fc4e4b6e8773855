"""What a transport is: it carries one call over the wire, and raises serve.errors classes whatever goes wrong there."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass, field
from typing import Protocol

from serve.client.wire import Call, Json

CONNECT_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for TLS: the authority to trust instead of the system's, and the client's own certificate and key.

    `key` None: it is in the file of `cert`.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Server:
    """Where the server is and how to talk to it.

    Args:
        secure: TLS.
        max_body_bytes: largest message, either way.
    """

    host: str
    port: int
    secure: bool
    api_key: str | None = field(repr=False)
    tls: TlsFiles
    max_body_bytes: int

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers, or gRPC metadata, of every call."""
        return {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}


class Exchange(Protocol):
    """Carries the requests of one generate_many call, many at a time. It lives in the event loop that it is used in."""

    async def send(self, call: Call) -> Json:
        """The fields of the response to a call of generate; its body has a `request_id`."""

    async def close(self) -> None:
        """Give up what is still under way."""


class Transport(Protocol):
    """For FlanClient. Safe to use from several threads."""

    def send(self, call: Call) -> Json:
        """The response's fields."""

    def stream(self, call: Call) -> Generator[Json]:
        """Events: `{"delta": ...}` and at the end one `{"final": ...}`. Closing the iterator cancels the call."""

    def open_many(self) -> Exchange:
        """For generate_many; used in an event loop of its own, in another thread."""

    def ready(self) -> bool: ...

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """For AsyncFlanClient."""

    async def send(self, call: Call) -> Json: ...

    def stream(self, call: Call) -> AsyncGenerator[Json]: ...

    def open_many(self) -> Exchange: ...

    async def ready(self) -> bool: ...

    async def close(self) -> None: ...
