"""One scripted service behind real servers: REST and gRPC, each on a free port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pytest

from serve.client import AsyncFlanClient, FlanClient, ManyResult
from serve.config import Settings
from serve.output import Completion, Scores, Timings
from serve.rest.server import RestServer
from serve.rpc import RpcServer
from serve.service import Service
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service

T = TypeVar("T", Completion, Scores)
TRANSPORTS = ("http", "grpc")
both = pytest.mark.parametrize("transport", TRANSPORTS)
twins = pytest.mark.parametrize("twin", ["async", "sync"])


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


def outcomes(s: Served) -> dict[str, int]:
    counts: dict[str, int] = {}
    for family in s.service.metrics.registry.collect():
        for name, labels, value, *_ in family.samples:
            if name == "flan_requests_total":
                counts[labels["outcome"]] = counts.get(labels["outcome"], 0) + int(value)
    return counts


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it does not become true")


async def ask(
    s: Served,
    transport: str,
    twin: str,
    requests: Iterable[Any],
    *,
    many: dict[str, Any] | None = None,
    take: int | None = None,
    into: list[ManyResult] | None = None,
    **options: Any,
) -> list[ManyResult]:
    """The results, or the first `take` of them.

    Args:
        many: options of generate_many.
        into: gets the results, also those before an error.
        options: of the client.
    """
    chosen = {} if many is None else many
    results: list[ManyResult] = [] if into is None else into

    def is_enough() -> bool:
        return take is not None and len(results) == take

    def synchronous() -> list[ManyResult]:
        with FlanClient(s.urls[transport], **options) as client, client.generate_many(requests, **chosen) as stream:
            for result in stream:
                results.append(result)
                if is_enough():
                    break
        return results

    if twin == "sync":
        return await asyncio.to_thread(synchronous)
    async with async_client(s, transport, **options) as client, client.generate_many(requests, **chosen) as stream:
        async for result in stream:
            results.append(result)
            if is_enough():
                break
    return results


def rows(number: int, **fields: Any) -> Iterator[dict[str, Any]]:
    for n in range(number):
        yield {"instruction": "x", "request_id": f"r{n}"} | fields
