"""grpc.health.v1 over the life of a server, and reflection."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.generate import tool
from serve.metrics import Metrics
from serve.rpc.health import SERVICE_NAMES
from serve.runtimes.base import Runtime
from serve.service import Service, ServiceSettings
from tests.rpc.harness import Served, served
from tests.rpc.statuses import refusal
from tests.service.scripted_runtime import ScriptedRuntime
from tests.service.toy_tokenizers import t5_like

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def health(s: Served) -> Any:
    return health_pb2_grpc.HealthStub(s.channel)


def ask(service: str = "") -> Any:
    return health_pb2.HealthCheckRequest(service=service)


async def statuses(s: Served) -> set[int]:
    return {(await health(s).Check(ask(name))).status for name in SERVICE_NAMES}


async def test_check_follows_readiness() -> None:
    service = Service(ServiceSettings(), Metrics())
    async with served(service=service) as s:
        assert await statuses(s) == {NOT_SERVING}  # loading
        runtime: Runtime = ScriptedRuntime()
        service.attach(runtime, t5_like())
        assert await statuses(s) == {SERVING}
        listed = await health(s).List(health_pb2.HealthListRequest())
        assert {name: item.status for name, item in listed.statuses.items()} == dict.fromkeys(SERVICE_NAMES, SERVING)
        await service.drain()
        assert await statuses(s) == {NOT_SERVING}
        assert s.requests() == {}


async def test_a_dead_engine_is_not_serving_at_once() -> None:
    async with served("yes") as s:
        assert await statuses(s) == {SERVING}
        s.runtime.kill()
        assert await statuses(s) == {NOT_SERVING}


async def test_unknown_services() -> None:
    async with served("yes") as s:
        assert (await refusal(health(s).Check(ask("other")))).code is grpc.StatusCode.NOT_FOUND
        watch = health(s).Watch(ask("other"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


async def test_watch_tells_each_change_and_lets_go() -> None:
    service = Service(ServiceSettings(), Metrics())
    async with served(service=service) as s:
        watches = [health(s).Watch(ask(name)) for name in SERVICE_NAMES]

        async def told() -> list[int]:
            answers = await asyncio.wait_for(asyncio.gather(*(watch.read() for watch in watches)), 5)
            return [answer.status for answer in answers]

        assert await told() == [NOT_SERVING, NOT_SERVING]
        service.attach(ScriptedRuntime(), t5_like())
        assert await told() == [SERVING, SERVING]
        await service.drain()
        assert await told() == [NOT_SERVING, NOT_SERVING]
        await asyncio.wait_for(s.server.stop(30), 5)  # does not wait for watchers
        assert [await watch.read() for watch in watches] == [grpc.aio.EOF, grpc.aio.EOF]


async def test_reflection_lists_the_services() -> None:
    async with served("yes") as s:

        async def ask_list() -> AsyncIterator[Any]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            yield reflection_pb2.ServerReflectionRequest(file_containing_symbol="flan.v1.FlanService")

        stub: Any = reflection_pb2_grpc.ServerReflectionStub(s.channel)
        listed, file = [answer async for answer in stub.ServerReflectionInfo(ask_list())]
        names = {service.name for service in listed.list_services_response.service}
        assert {"flan.v1.FlanService", "grpc.health.v1.Health"} < names
        assert b"GenerateMany" in file.file_descriptor_response.file_descriptor_proto[0]


async def test_a_generic_client_needs_only_reflection() -> None:
    async with served("Paris is it") as s:
        command = [tool("buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", "@-"]
        done = await asyncio.to_thread(
            subprocess.run,
            [*command, f"http://{s.address}/flan.v1.FlanService/Generate"],
            input='{"instruction": "Where?", "temperature": 0, "logit_bias": {"3": -1.5}}',
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stderr == ""
        assert json.loads(done.stdout)["outputs"][0]["text"] == "Paris is it"
