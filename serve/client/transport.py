"""What a transport is: it carries one call over the wire, and raises serve.errors classes whatever goes wrong there."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from typing import Protocol

from serve.client.wire import Call, Json

CONNECT_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for TLS: the authority to trust instead of the system's, and the client's own certificate and key."""

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
    api_key: str | None
    tls: TlsFiles
    max_body_bytes: int

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers, or gRPC metadata, of every call."""
        return {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}


class Transport(Protocol):
    """For FlanClient. Safe to use from several threads."""

    def send(self, call: Call) -> Json:
        """The response's fields."""

    def stream(self, call: Call) -> Generator[Json]:
        """Events: `{"delta": ...}` and at the end one `{"final": ...}`. Closing the iterator cancels the call."""

    def ready(self) -> bool: ...

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """For AsyncFlanClient."""

    async def send(self, call: Call) -> Json: ...

    def stream(self, call: Call) -> AsyncGenerator[Json]: ...

    async def ready(self) -> bool: ...

    async def close(self) -> None: ...
