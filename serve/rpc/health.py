"""grpc.health.v1: the same state as `/readyz`, read from the service whenever somebody asks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE_NAMES = ("", "flan.v1.FlanService")
WATCH_INTERVAL_SECONDS = 0.1  # how late a watcher may learn of a change

_Response: TypeAlias = health_pb2.HealthCheckResponse
_Context = grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, _Response]


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """Health of the whole server ("") and of FlanService, which are one.

    Args:
        readiness: None when ready, else why not (Service.readiness).
        stopping: set when the server goes away; watchers are told and let go.
    """

    def __init__(self, readiness: Callable[[], str | None], stopping: asyncio.Event) -> None:
        self._readiness = readiness
        self._stopping = stopping

    async def Check(self, request: health_pb2.HealthCheckRequest, context: _Context) -> _Response:  # noqa: N802
        if request.service not in SERVICE_NAMES:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return _Response(status=self._status(request.service))

    async def List(self, request: health_pb2.HealthListRequest, context: _Context) -> health_pb2.HealthListResponse:  # noqa: N802
        statuses = {name: _Response(status=self._status(name)) for name in SERVICE_NAMES}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: _Context) -> None:  # noqa: N802
        """Write the status now and at every change, until the watcher leaves or the server stops."""
        told = None
        while True:
            stopping = self._stopping.is_set()
            status = self._status(request.service)
            if status != told:
                await context.write(_Response(status=status))
                told = status
            if stopping:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), WATCH_INTERVAL_SECONDS)

    def _status(self, service: str) -> Any:
        """A HealthCheckResponse.ServingStatus."""
        if service not in SERVICE_NAMES:
            return _Response.SERVICE_UNKNOWN
        if self._stopping.is_set() or self._readiness() is not None:
            return _Response.NOT_SERVING
        return _Response.SERVING
