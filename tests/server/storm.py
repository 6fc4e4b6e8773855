"""Both servers over one service with a scripted runtime, crowds of clients, and the account of what became of them."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx

from protos.flan.v1 import generation_pb2 as pb
from protos.flan.v1.generation_pb2_grpc import FlanServiceStub
from serve.metrics import Metrics
from serve.service import Service, ServiceSettings
from tests.rest.harness import Served as RestServed
from tests.rest.harness import http_post
from tests.rest.harness import served as rest_served
from tests.rpc.harness import Served as RpcServed
from tests.rpc.harness import served as rpc_served
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service
from tests.service.test_metrics import value

GAUGES = (
    *("flan_requests_running", "flan_requests_waiting", "flan_sequences_running"),
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
)
STAY = 0.3  # share of the clients that wait for the end


@dataclass
class Storm:
    rest: RestServed
    rpc: RpcServed
    service: Service
    runtime: ScriptedRuntime
    chance: random.Random
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)  # (protocol, route), counted by the clients

    @property
    def metrics(self) -> Metrics:
        return self.service.metrics

    def counted(self) -> Counter[tuple[str, str]]:
        """`flan_requests_total` by (protocol, route)."""
        counts: Counter[tuple[str, str]] = Counter()
        for (protocol, route, _, _), count in self.rest.requests().items():
            counts[protocol, route] += count
        return counts

    def outcomes(self) -> dict[str, int]:
        return self.rpc.outcomes()

    async def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)

    async def settled(self) -> dict[str, int]:
        """Wait until all is over; every request sent has one outcome and nothing is held. Returns the outcomes."""
        await self.until(lambda: self.counted().total() >= self.sent.total() and not self.service._running)
        await self.until(lambda: self.runtime.num_running == 0 and self.service.requests_waiting == 0)
        assert self.counted() == self.sent
        assert self.runtime.open_streams == set()
        assert {name: value(self.metrics, name) for name in GAUGES} == dict.fromkeys(GAUGES, 0)
        assert self.service.admission._preparing == 0
        assert value(self.metrics, "flan_request_duration_seconds_count") == self.sent.total()
        return self.outcomes()

    async def post(self, path: str, body: dict[str, Any], route: str, **headers: str) -> httpx.Response:
        self.sent["rest", route] += 1
        return await self.rest.post(path, body, **headers)

    async def rest_client_that_leaves(self, *, stream: bool) -> None:
        """Sends a request, or most of it, and goes away: at once, while it waits or runs, or at its end."""
        ways: list[tuple[str, str, dict[str, Any]]] = [
            ("/v1/generate", "generate", {"instruction": "hello"}),
            ("/v1/completions", "completions", {"prompt": "hello"}),
            ("/v1/chat/completions", "chat", {"messages": [{"role": "user", "content": "hello"}]}),
            ("/generate_stream" if stream else "/generate", "tgi", {"inputs": "hello"}),
        ]
        path, route, body = self.chance.choice(ways)
        raw = http_post(
            path, json.dumps({**body, "stream": stream} if route != "tgi" else body).encode(), "Connection: close"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", self.rest.port)
        stays = self.chance.random() < STAY
        writer.write(raw if stays or self.chance.random() < 0.9 else raw[: -self.chance.randint(1, 10)])
        await writer.drain()
        self.sent["rest", route] += 1
        await read_for(reader, None if stays else self.chance.choice([0.0, self.chance.random() * 0.3]))
        writer.close()

    async def grpc_client_that_leaves(self, *, stream: bool, channel: grpc.aio.Channel | None = None) -> None:
        """Counts its call once the server has named it, then cancels it, or closes its connection."""
        stub = self.rpc.stub if channel is None else FlanServiceStub(channel)
        method: Any = stub.GenerateStream if stream else stub.Generate
        call = method(pb.GenerateRequest(instruction="hello"))
        await call.initial_metadata()
        self.sent["grpc", "generate"] += 1
        reading = asyncio.ensure_future(read_all(call) if stream else call)
        stays = self.chance.random() < STAY
        await asyncio.wait({reading}, timeout=None if stays else self.chance.choice([0.0, self.chance.random() * 0.3]))
        if channel is None:
            call.cancel()
        else:
            await channel.close()
        await asyncio.gather(reading, return_exceptions=True)


async def read_for(reader: asyncio.StreamReader, seconds: float | None) -> None:
    """Read what comes for so long (None: without limit), or until the server has said all it says."""
    try:
        async with asyncio.timeout(seconds):
            while await reader.read(65536):
                pass
    except TimeoutError:
        pass


async def read_all(call: Any) -> list[Any]:
    return [event async for event in call]


async def at_random_times(storm: Storm, clients: Iterable[Awaitable[None]], seconds: float) -> None:
    """Let the clients begin within so long, and wait for all."""

    async def begin(client: Awaitable[None]) -> None:
        await asyncio.sleep(storm.chance.random() * seconds)
        await client

    await asyncio.gather(*(begin(client) for client in clients))


@asynccontextmanager
async def storm(
    runtime: ScriptedRuntime, *, running: int, queued: int, dead_grace_seconds: float = 5.0
) -> AsyncIterator[Storm]:
    """
    Args:
        running: slots of the gate.
        queued: requests that may wait.
    """
    settings = ServiceSettings(
        served_model_names=("scripted",),
        max_running_sequences=running,
        max_queued_requests=queued,
        dead_grace_seconds=dead_grace_seconds,
    )
    metrics = Metrics()
    runtime.on_step = metrics.observe_step
    service = scripted_service(runtime=runtime, settings=settings, metrics=metrics)
    async with (
        rest_served(service=service, runtime=runtime) as rest,
        rpc_served(service=service, runtime=runtime) as rpc,
    ):
        yield Storm(rest, rpc, service, runtime, random.Random(11))
