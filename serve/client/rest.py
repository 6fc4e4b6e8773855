"""FlanClient over REST."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import AsyncGenerator, Generator, Mapping
from typing import Any

import httpx

from serve.client.retries import parse_retry_after
from serve.client.sse import EventDecoder, GenerationEvents
from serve.client.transport import CONNECT_TIMEOUT_SECONDS, Exchange, Server
from serve.client.wire import Call, Json, to_error
from serve.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    QueueFull,
    ServeError,
    TooLarge,
    Unauthorized,
    Unavailable,
)

_ROUTES = {
    "generate": ("POST", "/v1/generate"),
    "score": ("POST", "/v1/score"),
    "tokenize": ("POST", "/v1/tokenize"),
    "model": ("GET", "/v1/models"),
}
_STATUSES: Mapping[int, type[ServeError]] = {
    400: InvalidRequest,
    401: Unauthorized,
    404: NotFound,
    405: MethodNotAllowed,
    413: TooLarge,
    429: QueueFull,
    499: Cancelled,
    502: Unavailable,  # a proxy that has no server behind it
    503: Unavailable,
    504: DeadlineExceeded,
}
# The server ends a late request itself and says so; the socket's own timeout is only for a server that cannot.
_TIMEOUT_MARGIN_SECONDS = 2.0
_CLOCK_TOLERANCE_SECONDS = 0.05


class RestTransport:
    def __init__(self, server: Server) -> None:
        self._server = server
        self._http = httpx.Client(**_settings(server))

    def send(self, call: Call) -> Json:
        request = _to_request(self._http, self._server, call)
        try:
            response = self._http.send(request)
        except httpx.HTTPError as error:
            raise _transport_error(error, call) from error
        return _to_result(call, response)

    def stream(self, call: Call) -> Generator[Json]:
        request = _to_request(self._http, self._server, call, stream=True)
        events = GenerationEvents()
        try:
            response = self._http.send(request, stream=True)
            try:
                if not response.is_success:
                    response.read()
                    raise to_serve_error(response)
                decoder = EventDecoder()
                for chunk in response.iter_bytes():
                    for data in decoder.feed(chunk):
                        yield from events.feed(data)
            finally:
                response.close()
        except httpx.HTTPError as error:
            raise _transport_error(error, call) from error
        events.check_ended()

    def open_many(self) -> Exchange:
        return RestExchange(AsyncRestTransport(self._server), is_own=True)

    def ready(self) -> bool:
        try:
            return self._http.get("/readyz", timeout=CONNECT_TIMEOUT_SECONDS).is_success
        except httpx.HTTPError:
            return False

    def close(self) -> None:
        self._http.close()


class AsyncRestTransport:
    def __init__(self, server: Server) -> None:
        self._server = server
        self._http = httpx.AsyncClient(**_settings(server))

    async def send(self, call: Call) -> Json:
        request = _to_request(self._http, self._server, call)
        try:
            response = await self._http.send(request)
        except httpx.HTTPError as error:
            raise _transport_error(error, call) from error
        return _to_result(call, response)

    async def stream(self, call: Call) -> AsyncGenerator[Json]:
        request = _to_request(self._http, self._server, call, stream=True)
        events = GenerationEvents()
        try:
            response = await self._http.send(request, stream=True)
            try:
                if not response.is_success:
                    await response.aread()
                    raise to_serve_error(response)
                decoder = EventDecoder()
                async for chunk in response.aiter_bytes():
                    for data in decoder.feed(chunk):
                        for event in events.feed(data):
                            yield event
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            raise _transport_error(error, call) from error
        events.check_ended()

    def open_many(self) -> Exchange:
        return RestExchange(self, is_own=False)

    async def ready(self) -> bool:
        try:
            return (await self._http.get("/readyz", timeout=CONNECT_TIMEOUT_SECONDS)).is_success
        except httpx.HTTPError:
            return False

    async def close(self) -> None:
        await self._http.aclose()


class RestExchange:
    """generate_many over REST: a POST for each request.

    Args:
        is_own: whether `transport` ends with the exchange.
    """

    def __init__(self, transport: AsyncRestTransport, *, is_own: bool) -> None:
        self._transport = transport
        self._is_own = is_own

    async def send(self, call: Call) -> Json:
        return await self._transport.send(call)

    async def close(self) -> None:
        if self._is_own:
            await self._transport.close()


def _settings(server: Server) -> dict[str, Any]:
    verify: ssl.SSLContext | bool = True
    if server.secure and (server.tls.ca is not None or server.tls.cert is not None):
        verify = ssl.create_default_context(cafile=server.tls.ca)
        if server.tls.cert is not None:
            verify.load_cert_chain(server.tls.cert, server.tls.key)
    return {
        "base_url": f"{'https' if server.secure else 'http'}://{server.address}",
        "timeout": httpx.Timeout(None, connect=CONNECT_TIMEOUT_SECONDS),
        # The server's queue is the place to wait, not the client's connection pool.
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64),
        "verify": verify,
    }


def _to_request(
    http: httpx.Client | httpx.AsyncClient, server: Server, call: Call, *, stream: bool = False
) -> httpx.Request:
    verb, path = _ROUTES[call.method]
    headers = server.headers
    remaining = call.remaining_seconds()
    if remaining is not None:
        headers["x-request-timeout-ms"] = str(max(1, int(remaining * 1000)))
    content = None
    if verb == "POST":
        headers["content-type"] = "application/json"
        content = encode(call.body | {"stream": True} if stream else call.body)
        if len(content) > server.max_body_bytes:
            raise TooLarge(f"the request has {len(content)} bytes, the limit is {server.max_body_bytes}")
    request = http.build_request(verb, path, headers=headers, content=content)
    if remaining is not None:
        late = remaining + _TIMEOUT_MARGIN_SECONDS
        request.extensions["timeout"] |= {
            "read": late,
            "write": late,
            "connect": min(CONNECT_TIMEOUT_SECONDS, remaining),
        }
    return request


def encode(body: Json) -> bytes:
    """The body as JSON.

    Raises:
        InvalidRequest: naming the field that JSON cannot hold (NaN, a lone surrogate, an object).
    """
    try:
        return _dump(body)
    except (TypeError, ValueError):
        for name, value in body.items():
            try:
                _dump(value)
            except (TypeError, ValueError) as error:
                raise InvalidRequest(f"{name}: {error}", field=name) from None
        raise


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _to_result(call: Call, response: httpx.Response) -> Json:
    if not response.is_success:
        raise to_serve_error(response)
    try:
        data: Json = response.json()
    except ValueError as error:
        raise EngineFailure("the answer is not JSON: it is not from a flan-serve server") from error
    return data["data"][0] if call.method == "model" else data


def to_serve_error(response: httpx.Response) -> ServeError:
    """Our error for a refusal."""
    otherwise = _STATUSES.get(response.status_code, EngineFailure)
    seconds = parse_retry_after(response.headers.get("retry-after", ""))
    try:
        return to_error(response.json()["error"], otherwise, seconds)
    except (ValueError, KeyError, TypeError, AttributeError):  # a proxy's page; the status says what happened
        return otherwise(f"HTTP {response.status_code}", retry_after_seconds=seconds)


def _transport_error(error: httpx.HTTPError, call: Call) -> ServeError:
    is_late = call.expires is not None and time.monotonic() + _CLOCK_TOLERANCE_SECONDS >= call.expires
    if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout) or (
        isinstance(error, httpx.TimeoutException) and is_late
    ):
        return DeadlineExceeded("the timeout passed")
    return Unavailable(f"no answer from the server: {error}" if str(error) else "no answer from the server")
