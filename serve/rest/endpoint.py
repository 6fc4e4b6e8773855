"""A handler as an ASGI application: makes its Call, counts it, and answers whatever goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping

from starlette.types import Receive, Scope, Send

from serve.config import Settings
from serve.errors import EngineFailure, ServeError, Unavailable
from serve.metrics import Metrics, Protocol, RequestTracker, Route
from serve.request_tracker import trace_parent
from serve.rest import errors
from serve.rest.call import Call

logger = logging.getLogger(__name__)

_LAST_WORDS_SECONDS = 0.5  # how long a client may take to read that the server has gone

Handler = Callable[[Call], Awaitable[None]]
TrackedHandler = Callable[[Call, RequestTracker], Awaitable[None]]


class Endpoint:
    """What a route leads to. `to_error_body`: how the route's schema words an error."""

    def __init__(self, handler: Handler, settings: Settings, to_error_body: errors.ToBody = errors.to_body) -> None:
        self._handler = handler
        self._settings = settings
        self._to_error_body = to_error_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(scope, receive, send, self._settings, self._to_error_body)
        try:
            await self._handler(call)
        except ServeError as error:
            await call.refuse(error)
        except asyncio.CancelledError:  # nobody but the exiting server cancels a request
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_SECONDS):
                    await call.refuse(Unavailable("the server is shutting down"))
        except Exception:
            logger.exception("a REST handler failed")
            await call.refuse(EngineFailure("internal error"))


class ByMethod:
    """What one path leads to, by method; the router lets no others in."""

    def __init__(self, endpoints: Mapping[str, Endpoint]) -> None:
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        await self._endpoints[method](scope, receive, send)


def tracked(route: Route, metrics: Metrics, handler: TrackedHandler) -> Handler:
    """The handler with a tracker, which gets exactly one outcome, also where the body cannot be read."""

    async def handle(call: Call) -> None:
        with metrics.track(Protocol.REST, route) as tracker:
            tracker.request_id = call.request_id.value
            tracker.facts.parent = trace_parent(call.headers.get)
            await handler(call, tracker)

    return handle
