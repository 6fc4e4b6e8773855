"""Cancelled calls, deadlines and messages too large: what they held is free at once, and others do not notice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable

import grpc
import pytest

from protos.flan.v1 import generation_pb2 as pb
from protos.flan.v1.generation_pb2_grpc import FlanServiceStub
from serve.config import Settings
from serve.service import ServiceSettings
from tests.rpc.harness import Served, is_idle, served, until
from tests.rpc.statuses import refusal
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service

Code = grpc.StatusCode
ENDLESS = pb.GenerateRequest(instruction="x", max_tokens=512)


def slow() -> ScriptedRuntime:
    """Says one token for ever, a hundred a second."""
    return ScriptedRuntime([5], pace_seconds=0.01)


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_cancelling_the_call_frees_its_slot(method: str) -> None:
    async with served(runtime=slow()) as s:
        call = getattr(s.stub, method)(ENDLESS)
        await until(lambda: s.runtime.tokens_made > 3)
        call.cancel()
        await is_idle(s)
        made = s.runtime.tokens_made
        await asyncio.sleep(0.1)
        assert s.runtime.tokens_made == made
        assert s.outcomes() == {"cancelled": 1}


async def test_a_client_that_disconnects_frees_its_slot() -> None:
    async with served(runtime=slow()) as s:
        channel = grpc.aio.insecure_channel(s.address)
        call = FlanServiceStub(channel).Generate(ENDLESS)
        await until(lambda: s.runtime.tokens_made > 3)
        await channel.close()
        await is_idle(s)
        assert call.done()
        assert s.outcomes() == {"cancelled": 1}


async def test_a_queued_request_that_is_cancelled_never_runs() -> None:
    runtime = slow()
    settings = ServiceSettings(served_model_names=("scripted",), max_running_sequences=1)
    async with served(service=scripted_service(runtime=runtime, settings=settings), runtime=runtime) as s:
        first = s.stub.Generate(ENDLESS)
        await until(lambda: runtime.tokens_made > 0)
        second = s.stub.Generate(ENDLESS)
        await until(lambda: s.service.requests_waiting == 1)
        second.cancel()
        await until(lambda: s.service.requests_waiting == 0)
        first.cancel()
        await is_idle(s)
        assert len(runtime.requests) == 1


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_the_deadline_of_the_call_is_the_requests(method: str) -> None:
    async with served(runtime=slow()) as s:
        call = getattr(s.stub, method)(ENDLESS, timeout=0.2)
        refused = await refusal(call if method == "Generate" else collect(call))
        assert refused.code is Code.DEADLINE_EXCEEDED
        await is_idle(s)
        assert s.runtime.tokens_made < 60
        assert s.outcomes() == {"deadline": 1}
        timeout = s.runtime.requests[0].timeout_seconds
        assert timeout is not None
        assert 0 < timeout < 0.2


async def collect(call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateStreamResponse]) -> list[str | None]:
    return [event.WhichOneof("event") async for event in call]


async def test_a_request_whose_deadline_passes_in_the_queue_never_runs() -> None:
    runtime = slow()
    settings = ServiceSettings(served_model_names=("scripted",), max_running_sequences=1)
    async with served(service=scripted_service(runtime=runtime, settings=settings), runtime=runtime) as s:
        first = s.stub.Generate(ENDLESS)
        await until(lambda: runtime.tokens_made > 0)
        assert (await refusal(s.stub.Generate(ENDLESS, timeout=0.1))).code is Code.DEADLINE_EXCEEDED
        first.cancel()
        await is_idle(s)
        assert len(runtime.requests) == 1


async def test_scoring_is_cancelled_too() -> None:
    async with served(runtime=ScriptedRuntime(score_seconds=30)) as s:
        request = pb.ScoreRequest(instruction="x", candidates=["a"])
        assert (await refusal(s.stub.Score(request, timeout=0.1))).code is Code.DEADLINE_EXCEEDED
        call = s.stub.Score(request)
        await until(lambda: len(s.runtime.scores) == 2)
        call.cancel()
        await is_idle(s)
        await until(lambda: s.outcomes() == {"deadline": 1, "cancelled": 1})


async def test_clients_that_come_and_go_leave_nothing() -> None:
    """Every call that reached the server has one outcome, and nothing is held."""
    runtime = ScriptedRuntime(pace_seconds=0.002)
    randomness = random.Random(7)

    async def visit(s: Served, number: int) -> None:
        if number % 3 == 0:
            work: Awaitable[object] = collect(s.stub.GenerateStream(pb.GenerateRequest(instruction="x")))
        else:
            timeout = 0.01 if number % 3 == 1 else None
            work = s.stub.Generate(pb.GenerateRequest(instruction="x"), timeout=timeout)
        call = asyncio.ensure_future(work)
        await asyncio.wait([call], timeout=randomness.random() * 0.05)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    async with served("hello world yes no the answer is 5.", runtime=runtime) as s:
        await asyncio.gather(*(visit(s, number) for number in range(90)))
        await is_idle(s)
        outcomes = s.outcomes()
        assert set(outcomes) <= {"stop", "cancelled", "deadline"}
        assert sum(outcomes.values()) <= 90
        assert (await s.stub.Generate(pb.GenerateRequest(instruction="x"))).outputs[0].text


async def test_a_message_over_the_limit_is_refused_while_other_streams_live() -> None:
    async with served(runtime=slow(), settings=Settings(grpc_port=0, max_body_mib=0.05)) as s:
        stream = s.stub.GenerateStream(ENDLESS)
        events = aiter(stream)
        await anext(events)
        big = pb.GenerateRequest(instruction="x" * 60_000)
        assert (await refusal(s.stub.Generate(big))).code is Code.RESOURCE_EXHAUSTED
        assert (await refusal(s.stub.GenerateStream(big).read())).code is Code.RESOURCE_EXHAUSTED
        await anext(events)  # on the same connection
        stream.cancel()
        await is_idle(s)
        await until(lambda: s.outcomes() == {"invalid": 2, "cancelled": 1})


async def test_the_limit_is_where_the_setting_says() -> None:
    """Five MiB pass grpc's own limit of four; just over eight do not."""
    options = (("grpc.max_send_message_length", -1),)
    async with served("yes", options=options) as s:
        text = "hello " * (5 * 2**20 // 6)
        response = await s.stub.Tokenize(pb.TokenizeRequest(text=text[: 4 * 2**20 + 100]))
        assert response.num_tokens > 500_000
        refused = await refusal(s.stub.Tokenize(pb.TokenizeRequest(text="x" * (8 * 2**20))))
        assert refused.code is Code.RESOURCE_EXHAUSTED


async def test_a_response_over_the_limit_says_so() -> None:
    async with served(runtime=ScriptedRuntime([5]), settings=Settings(grpc_port=0, max_body_mib=0.02)) as s:
        request = pb.GenerateRequest(instruction="x", max_tokens=100, logprobs=20)
        refused = await refusal(s.stub.Generate(request))
        assert (refused.code, refused.reason) == (Code.RESOURCE_EXHAUSTED, "too_large")
        assert "logprobs" in refused.message
        assert (await s.stub.Generate(pb.GenerateRequest(instruction="x", max_tokens=100))).outputs[0].text


async def test_a_slow_reader_holds_up_only_itself() -> None:
    runtime = ScriptedRuntime([5], tokens_per_delta=8)
    async with served(runtime=runtime) as s:
        stalled = s.stub.GenerateStream(pb.GenerateRequest(instruction="x", max_tokens=512, logprobs=20, n=32))
        await until(lambda: runtime.tokens_made > 0)
        response = await asyncio.wait_for(s.stub.Generate(pb.GenerateRequest(instruction="x", max_tokens=8)), 10)
        assert response.outputs[0].text
        stalled.cancel()
        await is_idle(s)
