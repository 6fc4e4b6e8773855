"""grpc.health.v1: the same state as `/readyz`, read from the service whenever somebody asks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE_NAMES = ("", "flan.v1.FlanService")
WATCH_INTERVAL_SECONDS = 0.1  # how late a watcher may learn of a change

_Status = health_pb2.HealthCheckResponse.ServingStatus
_Context = grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """Health of the whole server ("") and of FlanService, which are one.

    Args:
        readiness: None when ready, else why not (Service.readiness).
        stopping: set when the server goes away; watchers are told and let go.
    """

    def __init__(self, readiness: Callable[[], str | None], stopping: asyncio.Event) -> None:
        self._readiness = readiness
        self._stopping = stopping

    async def Check(self, request: health_pb2.HealthCheckRequest, context: _Context) -> health_pb2.HealthCheckResponse:
        if request.service not in SERVICE_NAMES:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def List(self, request: health_pb2.HealthListRequest, context: _Context) -> health_pb2.HealthListResponse:
        statuses = {name: health_pb2.HealthCheckResponse(status=self._status(name)) for name in SERVICE_NAMES}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: _Context) -> None:
        """Write the status now and at every change, until the watcher leaves or the server stops."""
        told = None
        while True:
            stopping = self._stopping.is_set()
            status = self._status(request.service)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            if stopping:
                return
            try:
                await asyncio.wait_for(self._stopping.wait(), WATCH_INTERVAL_SECONDS)
            except TimeoutError:
                continue

    def _status(self, service: str) -> _Status:
        if service not in SERVICE_NAMES:
            return _Status.SERVICE_UNKNOWN
        if self._stopping.is_set() or self._readiness() is not None:
            return _Status.NOT_SERVING
        return _Status.SERVING
