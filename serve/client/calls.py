"""What both clients are made of but the waiting: where the server is, and what each call says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from serve.client.fields import GenerateFields, PromptFields
from serve.client.transport import Server, TlsFiles
from serve.client.wire import Call, to_call, to_expires

DEFAULT_MAX_BODY_MIB = 8.0  # the server's own default
DEFAULT_MAX_RETRIES = 2
_DEFAULT_PORTS = {"http": 80, "https": 443, "grpc": 50051, "grpcs": 50051}


def parse_url(url: str, api_key: str | None, max_body_mib: float, tls: TlsFiles | None) -> tuple[Server, bool]:
    """Where a URL points to, and whether gRPC is spoken there.

    Raises:
        ValueError: not a URL of a server, TLS files without TLS, or a key that cannot be sent.
    """
    parts = urlsplit(url)
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname or parts.path not in ("", "/"):
        raise ValueError(f"{url!r} is none of http://HOST:PORT, https://…, grpc://…, grpcs://…")
    secure = parts.scheme in ("https", "grpcs")
    if tls is not None and tls != TlsFiles() and not secure:
        raise ValueError(f"{url!r} is not TLS, so the files of `tls` would not be used")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise ValueError("api_key must be printable ASCII: neither HTTP nor gRPC can send another")
    server = Server(
        host=parts.hostname,
        port=_DEFAULT_PORTS[parts.scheme] if parts.port is None else parts.port,
        secure=secure,
        api_key=api_key,
        max_body_bytes=int(max_body_mib * 2**20),
        tls=TlsFiles() if tls is None else tls,
    )
    return server, parts.scheme in ("grpc", "grpcs")


class Calls:
    """The calls as data. `timeout` None takes the client's."""

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._are_over = False

    def close(self) -> None:
        """Make no more calls."""
        self._are_over = True

    def generate(self, instruction: str | None, timeout: float | None, fields: GenerateFields) -> Call:
        return to_call("generate", self.expires(timeout), {"instruction": instruction, **fields})

    def score(
        self, instruction: str | None, candidates: Sequence[str], timeout: float | None, fields: PromptFields
    ) -> Call:
        said: dict[str, Any] = {"instruction": instruction, "candidates": candidates, **fields}
        return to_call("score", self.expires(timeout), said)

    def tokenize(self, text: str, add_special_tokens: bool, model: str | None, timeout: float | None) -> Call:
        said = {"text": text, "add_special_tokens": add_special_tokens, "model": model}
        return to_call("tokenize", self.expires(timeout), said)

    def model(self, timeout: float | None) -> Call:
        return to_call("model", self.expires(timeout), {})

    def expires(self, timeout: float | None) -> float | None:
        """When a call that begins now has to be over, on time.monotonic's clock.

        Raises:
            RuntimeError: the client is closed.
        """
        if self._are_over:
            raise RuntimeError("the client is closed")
        return to_expires(self._timeout if timeout is None else timeout)
