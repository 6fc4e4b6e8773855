"""A real gRPC server on a free port over a scripted runtime."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from protos.flan.v1.generation_pb2_grpc import FlanServiceStub
from serve.config import Settings
from serve.rpc import RpcServer
from serve.service import Service
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service

if TYPE_CHECKING:
    from protos.flan.v1.generation_pb2_grpc import FlanServiceAsyncStub  # there is no such class at run time


@dataclass
class Served:
    server: RpcServer
    port: int
    service: Service
    runtime: ScriptedRuntime
    channel: grpc.aio.Channel
    stub: FlanServiceAsyncStub

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def raw(self, method: str) -> Any:
        """A unary method that takes and gives bytes."""
        call: Any = self.channel.unary_unary(f"/flan.v1.FlanService/{method}")
        return call

    def outcomes(self) -> dict[str, int]:
        """How often each outcome was counted, over all labels."""
        counts: dict[str, int] = {}
        for labels, count in self.requests().items():
            counts[labels[3]] = counts.get(labels[3], 0) + count
        return counts

    def requests(self) -> dict[tuple[str, str, str, str], int]:
        """`flan_requests_total` by (protocol, route, mode, outcome)."""
        return {
            (labels["protocol"], labels["route"], labels["mode"], labels["outcome"]): int(value)
            for family in self.service.metrics.registry.collect()
            for name, labels, value, *_ in family.samples
            if name == "flan_requests_total"
        }


@asynccontextmanager
async def served(
    *texts: str,
    runtime: ScriptedRuntime | None = None,
    service: Service | None = None,
    settings: Settings | None = None,
    options: tuple[tuple[str, int], ...] = (),
) -> AsyncIterator[Served]:
    """
    Args:
        texts: what the sequences say (cyclic).
        service: instead of one made from `texts` and `runtime`.
        options: of the client's channel.
    """
    runtime = ScriptedRuntime() if runtime is None else runtime
    service = scripted_service(*texts, runtime=runtime) if service is None else service
    server = RpcServer(service, settings=Settings(grpc_port=0) if settings is None else settings)
    port = await server.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options)
    try:
        yield Served(server, port, service, runtime, channel, FlanServiceStub(channel))
    finally:
        await channel.close()
        await server.stop(0)
        await service.close()


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds
        await asyncio.sleep(0.005)


async def is_idle(s: Served) -> None:
    await until(lambda: s.runtime.num_running == s.service.requests_running == s.service.requests_waiting == 0)
