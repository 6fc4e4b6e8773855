"""GenerateMany calls that end in odd ways: a scripted server in place of ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from protos.flan.v1 import generation_pb2 as pb
from serve.client import AsyncFlanClient, FlanClient, ManyResult
from serve.errors import Cancelled, EngineFailure, InvalidRequest, ServeError, Unavailable
from tests.client.harness import twins

Handler = Callable[[AsyncIterator[bytes], "grpc.aio.ServicerContext[bytes, bytes]"], Awaitable[None]]


@asynccontextmanager
async def scripted(handler: Handler) -> AsyncIterator[str]:
    """A server whose every method is `handler`; gives its URL."""
    server = grpc.aio.server()
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        name: grpc.stream_stream_rpc_method_handler(handler) for name in ("GenerateMany", "Generate", "GenerateStream")
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("flan.v1.FlanService", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        await server.stop(0)


def answer(raw: bytes) -> bytes:
    name = pb.GenerateRequest.FromString(raw).request_id
    response = pb.GenerateResponse(request_id=name, mode=pb.MODE_RAW, usage=pb.Usage(), timings=pb.Timings())
    return pb.GenerateManyResponse(request_id=name, response=response).SerializeToString()


async def ask(url: str, twin: str, number: int = 10, **options: Any) -> list[ManyResult]:
    requests = ({"instruction": "x"} for _ in range(number))
    if twin == "sync":

        def synchronous() -> list[ManyResult]:
            with FlanClient(url, **options) as client:
                return list(client.generate_many(requests, max_in_flight=4))

        return await asyncio.to_thread(synchronous)
    async with AsyncFlanClient(url, **options) as client:
        return [result async for result in client.generate_many(requests, max_in_flight=4)]


@twins
async def test_a_server_that_goes_away_in_the_middle(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has not answered is asked of the next one; nothing comes twice."""
    monkeypatch.setattr("serve.client.retries._FIRST_DELAY_SECONDS", 0.01)
    calls = 0

    async def three_at_a_time(messages: AsyncIterator[bytes], context: Any) -> None:
        nonlocal calls
        calls += 1
        for _ in range(3):
            await context.write(answer(await anext(messages)))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "going")

    async with scripted(three_at_a_time) as url:
        results = await ask(url, twin, 9, max_retries=100)
    assert sorted(result.index for result in results) == list(range(9))
    assert [result.error for result in results] == [None] * 9
    assert calls == 3


@twins
@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.INTERNAL, EngineFailure),
        (grpc.StatusCode.CANCELLED, Cancelled),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.OK, EngineFailure),  # an end without answers
    ],
)
async def test_a_call_that_fails_is_the_error_of_each(
    twin: str, code: grpc.StatusCode, error: type[ServeError]
) -> None:
    async def refuse(messages: AsyncIterator[bytes], context: Any) -> None:
        await anext(messages)
        if code is not grpc.StatusCode.OK:
            await context.abort(code, "no")

    async with scripted(refuse) as url:
        results = await ask(url, twin, max_retries=0)
    assert sorted(result.index for result in results) == list(range(10))
    assert {type(result.error) for result in results} == {error}
    assert len({id(result.error) for result in results}) == 10


@twins
async def test_answers_that_say_nothing_or_are_nobodys(twin: str) -> None:
    async def odd(messages: AsyncIterator[bytes], context: Any) -> None:
        async for raw in messages:
            await context.write(
                pb.GenerateManyResponse(request_id="who", response=pb.GenerateResponse()).SerializeToString()
            )
            name = pb.GenerateRequest.FromString(raw).request_id
            await context.write(pb.GenerateManyResponse(request_id=name).SerializeToString())
            await context.write(answer(raw))  # a second answer

    async with scripted(odd) as url:
        results = await ask(url, twin)
    assert {type(result.error) for result in results} == {EngineFailure}
    assert len(results) == 10


@twins
async def test_a_server_that_never_says_goodbye(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.client.rpc_many._GOODBYE_SECONDS", 0.05)
    ended = asyncio.Event()

    async def lingering(messages: AsyncIterator[bytes], context: Any) -> None:
        try:
            async for raw in messages:
                await context.write(answer(raw))
            await asyncio.sleep(60)
        finally:
            ended.set()

    async with scripted(lingering) as url:
        results = await ask(url, twin)
        assert [result.error for result in results] == [None] * 10
        await asyncio.wait_for(ended.wait(), 5)


async def test_a_cancelled_call_is_no_cancelled_task() -> None:
    async def cancel(messages: AsyncIterator[bytes], context: Any) -> None:
        await context.abort(grpc.StatusCode.CANCELLED, "no")

    async with scripted(cancel) as url, AsyncFlanClient(url) as client:
        with pytest.raises(Cancelled):
            await client.generate("x")
        with pytest.raises(Cancelled):
            await anext(client.stream("x"))
