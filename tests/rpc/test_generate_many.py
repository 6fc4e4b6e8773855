"""GenerateMany: results as they finish, one error does not stop the others, memory is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from protos.flan.v1 import generation_pb2 as pb
from serve.config import Settings
from serve.service import ServiceSettings
from tests.rpc.harness import is_idle, served, until
from tests.rpc.statuses import refusal
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service

SMALL = Settings(grpc_port=0, max_running_sequences=4, max_queued_requests=8)


async def requests(number: int) -> AsyncIterator[pb.GenerateRequest]:
    for n in range(number):
        yield pb.GenerateRequest(instruction="x", request_id=f"r{n}")


async def test_each_request_gets_its_result() -> None:
    runtime = ScriptedRuntime()
    async with served("hello world", runtime=runtime, settings=SMALL) as s:
        alone = await s.stub.Generate(pb.GenerateRequest(instruction="x"))
        results = [result async for result in s.stub.GenerateMany(requests(50))]
        assert sorted(result.request_id for result in results) == sorted(f"r{n}" for n in range(50))
        for result in results:
            assert result.response.request_id == result.request_id
            assert result.response.outputs == alone.outputs
        assert runtime.most_running <= 4
        assert s.requests()["grpc", "generate_many", "instruction", "stop"] == 50


async def test_results_come_as_they_finish() -> None:
    runtime = ScriptedRuntime([5], pace_seconds=0.01)

    async def long_then_short() -> AsyncIterator[pb.GenerateRequest]:
        yield pb.GenerateRequest(instruction="x", request_id="long", max_tokens=60)
        yield pb.GenerateRequest(instruction="x", request_id="short", max_tokens=2)

    async with served(runtime=runtime) as s:
        results = [result.request_id async for result in s.stub.GenerateMany(long_then_short())]
        assert results == ["short", "long"]


async def test_a_request_that_fails_leaves_the_others() -> None:
    async def mixed() -> AsyncIterator[pb.GenerateRequest]:
        yield pb.GenerateRequest(instruction="x", request_id="good")
        yield pb.GenerateRequest(instruction="x", request_id="hot", temperature=9)
        yield pb.GenerateRequest(instruction="x", request_id="lost", model="other")
        yield pb.GenerateRequest(instruction="x", request_id="bad id")
        yield pb.GenerateRequest(instruction="x")

    async with served("yes") as s:
        results = {result.request_id: result async for result in s.stub.GenerateMany(mixed())}
        named = {name: result for name, result in results.items() if not name.startswith("req-")}
        assert set(named) == {"good", "hot", "lost", "bad id"}
        assert len(results) == 5  # the one without a name has got one
        errors = {name: (r.error.kind, r.error.field) for name, r in results.items() if r.HasField("error")}
        assert errors == {
            "hot": ("invalid", "temperature"),
            "lost": ("not_found", "model"),
            "bad id": ("invalid", "request_id"),
        }
        assert all(r.error.message for r in results.values() if r.HasField("error"))
        assert s.outcomes() == {"stop": 2, "invalid": 3}


async def test_bytes_that_are_no_message_are_one_failed_request() -> None:
    async with served("yes") as s:
        method: Any = s.channel.stream_stream("/flan.v1.FlanService/GenerateMany")

        async def raw() -> AsyncIterator[bytes]:
            yield b"\xff\xff"
            yield pb.GenerateRequest(instruction="x", request_id="good").SerializeToString()

        results = [pb.GenerateManyResponse.FromString(item) async for item in method(raw())]
        assert sorted((r.request_id, r.error.kind) for r in results) == [("", "invalid"), ("good", "")]


async def test_nothing_asked_nothing_returned() -> None:
    async with served("yes") as s:
        assert [result async for result in s.stub.GenerateMany(requests(0))] == []
        assert s.requests() == {}


async def test_no_more_is_read_than_is_worked_on() -> None:
    """A client that only sends is not read from: what is unread waits in the transport, whose window is bounded."""
    runtime = ScriptedRuntime([5])
    async with served(runtime=runtime, settings=SMALL) as s:
        runtime.freeze()
        call = s.stub.GenerateMany()
        sent = 0

        async def send() -> None:
            nonlocal sent
            for n in range(2000):
                await call.write(pb.GenerateRequest(instruction="x" + " " * 50_000, request_id=str(n)))
                sent += 1

        sending = asyncio.ensure_future(send())
        await until(lambda: len(runtime.requests) == 4)
        await asyncio.sleep(0.3)
        assert len(runtime.requests) == s.service.requests_running + s.service.requests_waiting == 4
        assert sent < 1000  # of 100 MB most is still with the client
        sending.cancel()
        call.cancel()
        await is_idle(s)
        assert s.outcomes() == {"cancelled": 4}


async def test_results_that_nobody_reads_stop_the_work() -> None:
    runtime = ScriptedRuntime([5])
    async with served(runtime=runtime, settings=SMALL) as s:
        call = s.stub.GenerateMany()

        async def send() -> None:
            for n in range(3000):
                await call.write(pb.GenerateRequest(instruction="x", request_id=str(n), logprobs=20, max_tokens=32))

        sending = asyncio.ensure_future(send())
        done = -1
        while done != len(runtime.requests):
            done = len(runtime.requests)
            await asyncio.sleep(0.5)
        assert done < 2000  # about 12 KB each: the transport's window, not all 36 MB
        sending.cancel()
        call.cancel()
        await is_idle(s)


async def test_cancelling_the_call_frees_everything() -> None:
    runtime = ScriptedRuntime([5], pace_seconds=0.01)
    async with served(runtime=runtime, settings=SMALL) as s:
        call = s.stub.GenerateMany(requests(20))
        await until(lambda: runtime.num_running == 4)
        call.cancel()
        await is_idle(s)
        assert s.outcomes() == {"cancelled": 4}


async def test_one_call_is_not_refused_for_its_own_sake() -> None:
    """A queue shorter than what runs: the call keeps so few requests in progress that none finds it full."""
    runtime = ScriptedRuntime([5], pace_seconds=0.001)
    service = scripted_service(
        runtime=runtime,
        settings=ServiceSettings(served_model_names=("m",), max_running_sequences=4, max_queued_requests=2),
    )
    settings = Settings(grpc_port=0, max_running_sequences=4, max_queued_requests=2)

    async def wide() -> AsyncIterator[pb.GenerateRequest]:
        for n in range(30):
            yield pb.GenerateRequest(instruction="x", request_id=f"r{n}", n=4, max_tokens=3)

    async with served(service=service, runtime=runtime, settings=settings) as s:
        results = [result async for result in s.stub.GenerateMany(wide())]
        assert [result for result in results if result.HasField("error")] == []
        assert len(results) == 30


async def test_a_draining_server_answers_what_runs_and_refuses_the_rest() -> None:
    runtime = ScriptedRuntime([5], pace_seconds=0.01)
    async with served(runtime=runtime) as s:
        call = s.stub.GenerateMany()
        await call.write(pb.GenerateRequest(instruction="x", request_id="runs", max_tokens=30))
        await until(lambda: runtime.num_running == 1)
        draining = asyncio.ensure_future(s.service.drain())
        await asyncio.sleep(0)
        await call.write(pb.GenerateRequest(instruction="x", request_id="late"))
        results = aiter(call)
        late, runs = await anext(results), await anext(results)
        assert (late.request_id, late.error.kind) == ("late", "unavailable")
        assert (runs.request_id, runs.WhichOneof("result")) == ("runs", "response")
        await draining


async def test_stopping_the_server_ends_an_idle_call_at_once() -> None:
    async with served("yes") as s:
        call = s.stub.GenerateMany()
        await call.write(pb.GenerateRequest(instruction="x", request_id="one"))
        results = aiter(call)
        assert (await anext(results)).request_id == "one"
        await asyncio.wait_for(s.server.stop(30), 5)
        assert (await refusal(anext(results))).code is grpc.StatusCode.UNAVAILABLE


async def test_a_bug_is_an_error_of_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError

    async with served("yes") as s:
        monkeypatch.setattr(s.service, "generate", broken)
        (result,) = [result async for result in s.stub.GenerateMany(requests(1))]
        assert (result.error.kind, result.error.message) == ("engine_failure", "internal error")
        assert s.outcomes() == {"error": 1}
