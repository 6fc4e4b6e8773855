"""What holds on every route, outermost first: UnreadBodies, RequestIds, Cors, Keys.

Plain ASGI, so that a handler hears of its client's leaving.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api_keys import ApiKeys
from serve.errors import EngineFailure, Unauthorized
from serve.metrics import Metrics, Protocol, Route
from serve.request_tracker import trace_parent
from serve.rest import errors, playground
from serve.rest.request_id import HEADER, RequestId
from serve.rest.respond import refuse

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics"})
_PAGE_METHODS = ("GET", "HEAD")  # POST / is a request
_EXPOSED_HEADERS = f"{HEADER}, retry-after"
_CORS_MAX_AGE_SECONDS = 600
_UNREAD_SECONDS = 2.0  # how long a client may go on sending a body that was refused


class RequestIds:
    """Names every response, and answers 500 where nobody else caught an error.

    Args:
        is_draining: while it says so, every response closes its connection: what the client sends next then goes to
            another server behind the same name, not to one that refuses it.
    """

    def __init__(self, app: ASGIApp, *, is_draining: Callable[[], bool]) -> None:
        self._app = app
        self._is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = RequestId.of(scope)
        has_begun = False

        async def send_named(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                message["headers"] = [*message.get("headers", ()), (HEADER.encode(), request_id.value.encode())]
                # A refused client may or may not send the body it asked leave for: what comes next is anybody's guess.
                is_unclear = message["status"] >= 400 and "expect" in Headers(scope=scope)
                if is_unclear or self._is_draining():
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except Exception:
            logger.exception("a REST request failed")
            if has_begun:
                raise
            await refuse(send_named, EngineFailure("internal error"))


class UnreadBodies:
    """Reads to its end what a refused client still sends, where the connection closes after the response.

    A socket that is closed with bytes unread is reset, and the client may never see why it was refused. On a connection
    that stays open uvicorn reads them by itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _closes(scope):
            await self._app(scope, receive, send)
            return
        is_read = False

        async def receive_noted() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = is_read or not message.get("more_body", False)
            return message

        async def send_and_read(message: Message) -> None:
            is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if not is_last or is_read:
                await send(message)
                return
            await send({**message, "more_body": True})
            # Cancelled: the server exits.
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(_UNREAD_SECONDS):
                    while not is_read:
                        await receive_noted()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, receive_noted, send_and_read)


def _closes(scope: Scope) -> bool:
    """Whether the client asked to close the connection after this request."""
    asked = Headers(scope=scope).get("connection", "").lower()
    return "close" in asked or (scope["http_version"] == "1.0" and "keep-alive" not in asked)


class Cors:
    """Lets pages of the given origins call the server: answers their preflights, and marks every response, refusals
    too, or the browser would hide why it was refused. Others' requests pass unmarked. Never with cookies."""

    def __init__(self, app: ASGIApp, origins: Iterable[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        origin = headers.get("origin")
        if origin is None or not ("*" in self._origins or origin in self._origins):
            await self._app(scope, receive, send)
            return
        shown = "*" if "*" in self._origins else origin

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                marked = MutableHeaders(scope=message)
                marked["access-control-allow-origin"] = shown
                marked["access-control-expose-headers"] = _EXPOSED_HEADERS
                marked.add_vary_header("origin")
            await send(message)

        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await self._answer_preflight(headers, send_marked)
        else:
            await self._app(scope, receive, send_marked)

    async def _answer_preflight(self, headers: Headers, send: Send) -> None:
        allowed: errors.Headers = [
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-max-age", b"%d" % _CORS_MAX_AGE_SECONDS),
        ]
        asked = headers.get("access-control-request-headers")
        if asked is not None:
            allowed.append((b"access-control-allow-headers", asked.encode("latin-1")))
        await send({"type": "http.response.start", "status": 204, "headers": allowed})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Keys:
    """Refuses what comes without a valid `Authorization: Bearer KEY`, but for probes, scrapes and the playground.

    A browser cannot send the header when it opens a page, and the page's files hold no data: it asks for the key itself
    and sends it with its requests.

    Args:
        keys: what is accepted.
        routes: the paths that count as requests when posted to; a refused one is counted.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], routes: Mapping[str, Route], metrics: Metrics) -> None:
        self._app = app
        self._keys = ApiKeys(keys)
        self._routes = routes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope) or self._accepts(scope):
            await self._app(scope, receive, send)
            return
        error = Unauthorized("a valid API key is needed: Authorization: Bearer KEY")
        route = self._routes.get(scope["path"]) if scope["method"] == "POST" else None
        if route is not None:
            tracker = self._metrics.track(Protocol.REST, route)
            tracker.request_id = RequestId.of(scope).value
            tracker.facts.parent = trace_parent(Headers(scope=scope).get)
            tracker.fail(error)
        await refuse(send, error, to_body=errors.to_tgi_body if route is Route.TGI else errors.to_body)

    def _accepts(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return self._keys.accept(given)


def _is_open(scope: Scope) -> bool:
    path = scope["path"]
    return path in OPEN_PATHS or (
        scope["method"] in _PAGE_METHODS and (path == "/" or path.startswith(playground.STATIC_PATH))
    )
