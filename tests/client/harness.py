"""One scripted service behind real servers: REST and gRPC, each on a free port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pytest

from serve.client import AsyncFlanClient
from serve.config import Settings
from serve.output import Completion, Scores, Timings
from serve.rest.server import RestServer
from serve.rpc import RpcServer
from serve.service import Service
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service

T = TypeVar("T", Completion, Scores)
TRANSPORTS = ("http", "grpc")


@dataclass
class Served:
    urls: dict[str, str]  # by scheme
    service: Service
    runtime: ScriptedRuntime
    rest: RestServer
    rpc: RpcServer


@asynccontextmanager
async def served(
    *texts: str, runtime: ScriptedRuntime | None = None, service: Service | None = None, **settings: Any
) -> AsyncIterator[Served]:
    """
    Args:
        texts: what the sequences say (cyclic).
        settings: fields of `Settings`.
    """
    runtime = ScriptedRuntime() if runtime is None else runtime
    service = scripted_service(*texts, runtime=runtime) if service is None else service
    chosen = Settings(port=0, grpc_port=0, **settings)
    rest, rpc = RestServer(service, settings=chosen), RpcServer(service, settings=chosen)
    secure = "" if chosen.tls_cert is None else "s"
    urls = {
        "http": f"http{secure}://127.0.0.1:{await rest.start()}",
        "grpc": f"grpc{secure}://127.0.0.1:{await rpc.start()}",
    }
    try:
        yield Served(urls, service, runtime, rest, rpc)
    finally:
        await rest.stop(0)
        await rpc.stop(0)
        await service.close()


def timeless(result: T) -> T:
    """The result without what differs between two calls of the same request."""
    if isinstance(result, Completion):
        return replace(result, created=0, timings=Timings())
    return replace(result, timings=Timings())


def async_client(s: Served, transport: str, **options: Any) -> AsyncFlanClient:
    return AsyncFlanClient(s.urls[transport], **options)


async def is_idle(s: Served) -> None:
    for _ in range(200):
        if s.runtime.num_running == s.service.requests_running == s.service.requests_waiting == 0:
            return
        await asyncio.sleep(0.01)
    pytest.fail("something still runs")
