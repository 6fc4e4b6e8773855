"""API keys: every call but a health check needs one, where the server has any."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any

import grpc

from serve.api_keys import ApiKeys
from serve.errors import Unauthorized
from serve.metrics import Metrics, Protocol, Route
from serve.request_tracker import trace_parent
from serve.rpc.call import REQUEST_ID_KEY, first_values, request_id_of
from serve.rpc.errors import abort

HEALTH_PREFIX = "/grpc.health.v1.Health/"


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a valid `authorization: Bearer KEY`.

    Args:
        keys: what is accepted.
        routes: the methods that count as requests, full name to route; a refused call of one is counted.
    """

    def __init__(self, keys: Iterable[str], routes: Mapping[str, Route], metrics: Metrics) -> None:
        self._keys = ApiKeys(keys)
        self._routes = routes
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        if method.startswith(HEALTH_PREFIX) or self._accepts(handler_call_details.invocation_metadata):
            return await continuation(handler_call_details)
        metadata = first_values(handler_call_details.invocation_metadata)
        request_id, _ = request_id_of(metadata)
        if method in self._routes:
            tracker = self._metrics.track(Protocol.GRPC, self._routes[method])
            tracker.request_id, tracker.facts.parent = request_id, trace_parent(metadata.get)
            tracker.fail(_unauthorized())
        return grpc.stream_stream_rpc_method_handler(partial(_refuse, request_id))

    def _accepts(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        given = next((value for key, value in metadata if key == "authorization"), "")
        return self._keys.accept(given if isinstance(given, bytes) else given.encode())


async def _refuse(request_id: str, _: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    # A stream handler ends the call before any message is read, and fits every kind of method.
    await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
    await abort(context, _unauthorized())


def _unauthorized() -> Unauthorized:
    return Unauthorized("a valid API key is needed: metadata authorization: Bearer KEY")
