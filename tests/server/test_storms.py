"""Crowds that leave, overflow, run late, do not read, or see the engine die: each request has one outcome, counted on
both sides, and afterwards nothing is held."""

from __future__ import annotations

import asyncio
import random
import string
import time
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.flan.v1 import generation_pb2 as pb
from protos.flan.v1.generation_pb2_grpc import FlanServiceStub
from serve.metrics import Outcome
from tests.rest.harness import error_of, frames, http_post
from tests.rpc.statuses import Refusal, read, refusal
from tests.server.storm import Storm, at_random_times, read_all, storm
from tests.service.scripted_runtime import ScriptedRuntime

CLIENTS = 500
Code = grpc.StatusCode


def talkative() -> ScriptedRuntime:
    """Each request says 1 to 80 tokens, 200 a second."""
    chance = random.Random(3)
    return ScriptedRuntime(lambda request, index: [5] * chance.randrange(80) + [1], pace_seconds=0.005)


@pytest.mark.parametrize("kind", ["rest stream", "rest unary", "grpc stream", "mixed"])
async def test_500_clients_that_leave_at_random_moments(kind: str) -> None:
    async with storm(talkative(), running=16, queued=CLIENTS) as s:

        def client(number: int) -> Any:
            way = (
                kind if kind != "mixed" else s.chance.choice(["rest stream", "rest unary", "grpc stream", "grpc unary"])
            )
            if way.startswith("rest"):
                return s.rest_client_that_leaves(stream=way == "rest stream")
            own = grpc.aio.insecure_channel(s.rpc.address) if number % 25 == 0 else None
            return s.grpc_client_that_leaves(stream=way == "grpc stream", channel=own)

        await at_random_times(s, [client(number) for number in range(CLIENTS)], 1.0)
        outcomes = await s.settled()
        assert s.sent.total() == CLIENTS
        assert set(outcomes) == {"stop", "cancelled"}
        assert min(outcomes.values()) > CLIENTS // 5
        assert len(s.runtime.requests) < CLIENTS  # who left the queue never ran
        assert (await s.rest.generate())["outputs"][0]["finish_reason"] == "stop"


async def test_calls_cancelled_before_the_server_names_them_leave_nothing_either() -> None:
    """Whether such a call reaches the server nobody can tell; it is counted at most once."""
    async with storm(talkative(), running=8, queued=CLIENTS) as s:

        async def visit() -> None:
            call = s.rpc.stub.GenerateStream(pb.GenerateRequest(instruction="hello"))
            await asyncio.sleep(s.chance.random() * 0.003)
            call.cancel()

        await at_random_times(s, [visit() for _ in range(CLIENTS)], 0.3)
        await s.until(lambda: not s.service._running and s.runtime.num_running == 0)
        assert set(s.outcomes()) <= {"cancelled", "stop"}
        assert s.counted().total() <= CLIENTS
        s.sent = s.counted()
        await s.settled()


async def filled(s: Storm, total: int) -> list[asyncio.Task[Any]]:
    """Requests that run or wait, one after the other, alternating over the four ways; named by their number."""
    tasks: list[asyncio.Task[Any]] = []
    for number in range(total):
        tasks.append(asyncio.create_task(asked(s, number, f"r{number}")))
        await s.until(lambda: len(s.service._running) == len(tasks))
    return tasks


async def asked(s: Storm, number: int, name: str, timeout_ms: int | None = None) -> httpx.Response | Refusal | str:
    """One request over one of the four ways; a response, a refusal, or "" for a call that ended well."""
    if number % 4 < 2:
        body = {"instruction": "hello", "request_id": name, "stream": number % 4 == 1}
        headers = {} if timeout_ms is None else {"x_request_timeout_ms": str(timeout_ms)}
        return await s.post("/v1/generate", body, "generate", **headers)
    s.sent["grpc", "generate"] += 1
    request = pb.GenerateRequest(instruction="hello", request_id=name)
    timeout = None if timeout_ms is None else timeout_ms / 1000
    try:
        if number % 4 == 2:
            await s.rpc.stub.Generate(request, timeout=timeout)
        else:
            await read_all(s.rpc.stub.GenerateStream(request, timeout=timeout))
    except grpc.aio.AioRpcError as error:
        return read(error)
    return ""


def is_whole(answer: httpx.Response | Refusal | str) -> bool:
    if isinstance(answer, httpx.Response):
        return answer.status_code == 200 and b'"finish_reason"' in answer.content and b'"error"' not in answer.content
    return answer == ""


def kind_of(answer: httpx.Response | Refusal | str) -> str:
    """The kind of error that an answer tells, in whatever form."""
    if isinstance(answer, Refusal):
        if answer.reason is None:
            assert answer.code is Code.DEADLINE_EXCEEDED  # the client's own clock
            return "deadline"
        return answer.reason
    assert isinstance(answer, httpx.Response), "it was served"
    if answer.status_code == 200:
        events = frames(answer.content)
        return str(events[-1]["error"]["code"])  # and no [DONE] behind it
    return str(error_of(answer)["code"])


async def test_a_queue_that_overflows_refuses_at_once_and_keeps_the_order() -> None:
    runtime = ScriptedRuntime([5, 1])
    async with storm(runtime, running=4, queued=40) as s:
        runtime.freeze()
        accepted = await filled(s, 44)
        begun = time.monotonic()
        refused = await asyncio.gather(*(asked(s, number, f"late-{number}") for number in range(160)))
        assert time.monotonic() - begun < 5  # all of them, on a busy machine
        assert [kind_of(answer) for answer in refused] == ["queue_full"] * 160
        for answer in refused:
            if isinstance(answer, httpx.Response):
                assert answer.status_code == 429
                assert int(answer.headers["retry-after"]) >= 1
            else:
                assert isinstance(answer, Refusal)
                assert answer.code is Code.RESOURCE_EXHAUSTED
                assert answer.retry_seconds is not None
                assert answer.retry_seconds >= 1
        assert not any(task.done() for task in accepted)
        runtime.thaw()
        assert all(map(is_whole, await asyncio.gather(*accepted)))
        assert [request.request_id for request in runtime.requests] == [f"r{number}" for number in range(44)]
        assert await s.settled() == {"stop": 44, "refused": 160}


async def test_what_is_late_in_the_queue_never_starts() -> None:
    runtime = ScriptedRuntime([5, 1])
    async with storm(runtime, running=4, queued=400) as s:
        runtime.freeze()
        blockers = await filled(s, 4)
        late = await asyncio.gather(*(asked(s, number, f"late-{number}", 1500 + number) for number in range(200)))
        assert [kind_of(answer) for answer in late] == ["deadline"] * 200
        assert {answer.status_code for answer in late[::4] if isinstance(answer, httpx.Response)} == {504}
        assert {answer.code for answer in late if isinstance(answer, Refusal)} == {Code.DEADLINE_EXCEEDED}
        runtime.thaw()
        assert all(map(is_whole, await asyncio.gather(*blockers)))
        assert len(runtime.requests) == 4
        assert await s.settled() == {"stop": 4, "deadline": 200}


async def test_what_is_late_while_it_runs_ends_and_makes_room() -> None:
    runtime = ScriptedRuntime([5], pace_seconds=0.02)
    async with storm(runtime, running=16, queued=400) as s:
        late = await asyncio.gather(*(asked(s, number, f"late-{number}", 1500 + number) for number in range(100)))
        assert [kind_of(answer) for answer in late] == ["deadline"] * 100
        assert await s.settled() == {"deadline": 100}
        assert 16 < len(runtime.requests) <= 100


async def test_the_engines_death_is_everybodys_and_told_by_its_kind() -> None:
    runtime = ScriptedRuntime([5], pace_seconds=0.01)
    async with storm(runtime, running=16, queued=400, dead_grace_seconds=0.5) as s:
        runtime.score_seconds = 30
        waiters = await filled(s, 100)

        async def many() -> list[Any]:
            requests = [pb.GenerateRequest(instruction="hello") for _ in range(10)]
            s.sent["grpc", "generate_many"] += 10
            return [result.error.kind async for result in s.rpc.stub.GenerateMany(iter(requests))]

        of_many = asyncio.create_task(many())
        await s.until(lambda: len(s.service._running) == 110)
        runtime.kill("device lost")
        died = time.monotonic()
        ready = await s.rest.http.get("/readyz")
        alive = await s.rest.http.get("/livez")
        health = health_pb2_grpc.HealthStub(s.rpc.channel)
        status = (await health.Check(health_pb2.HealthCheckRequest())).status
        seconds = time.monotonic() - died
        assert (ready.status_code, status) == (503, health_pb2.HealthCheckResponse.NOT_SERVING)
        assert alive.status_code == 200 or seconds > 0.5
        answers = await asyncio.wait_for(asyncio.gather(*waiters), 5)
        assert [kind_of(answer) for answer in answers] == ["engine_failure"] * 100
        assert {answer.status_code for answer in answers[::4]} == {500}
        assert {answer.code for answer in answers if isinstance(answer, Refusal)} == {Code.INTERNAL}
        assert await of_many == ["engine_failure"] * 10
        assert kind_of(await asked(s, 0, "new")) == kind_of(await asked(s, 2, "new")) == "engine_failure"
        await asyncio.sleep(max(0.0, 0.6 - (time.monotonic() - died)))
        assert (await s.rest.http.get("/livez")).status_code == 503
        assert await s.settled() == {"error": 112}
        assert b"flan_engine_up 0.0" in (await s.rest.http.get("/metrics")).content


async def test_readers_that_stall_stall_alone_and_cost_what_they_asked_for() -> None:
    runtime = ScriptedRuntime([5, 6, 7] * 170, tokens_per_delta=64)  # large frames fill buffers sooner
    async with storm(runtime, running=512, queued=100) as s:
        body = b'{"instruction": "x", "n": 32, "logprobs": 20, "stream": true, "ignore_eos": true, "max_tokens": 512}'
        narrow = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536))  # or it takes all off the server
        channel = grpc.aio.insecure_channel(s.rpc.address, narrow)
        stalled, calls = [], []
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", s.rest.port, limit=1024)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(http_post("/v1/generate", body))
            s.sent["rest", "generate"] += 1
            stalled.append((reader, writer))
            request = pb.GenerateRequest(instruction="x", n=32, logprobs=20, ignore_eos=True, max_tokens=512)
            calls.append(FlanServiceStub(channel).GenerateStream(request))
            s.sent["grpc", "generate"] += 1
        await s.until(lambda: len(runtime.requests) == 4)
        made = -1
        while made != runtime.tokens_made:  # until all buffers between are full
            made = runtime.tokens_made
            await asyncio.sleep(0.5)
        assert made < 4 * 32 * 512 / 2
        for number in range(40):
            assert is_whole(await asyncio.wait_for(asked(s, number, f"r{number}"), 5))
        assert len(runtime.open_streams) == 4
        for _, writer in stalled:
            writer.transport.abort()
        for call in calls:
            call.cancel()
        await channel.close()
        assert await s.settled() == {"length": 40, "cancelled": 4}


def series(text: str) -> set[str]:
    """The series of a scrape, by name and labels."""
    return {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}


async def test_names_that_nobody_knows_make_no_series() -> None:
    chance = random.Random(5)

    def word() -> str:
        return "".join(chance.choices(string.ascii_letters + string.digits + "._-", k=chance.randint(1, 60)))

    async with storm(talkative(), running=8, queued=100) as s:

        async def all_ways(model: str) -> None:
            bodies: dict[str, tuple[str, dict[str, Any]]] = {
                "/v1/generate": ("generate", {"instruction": "x"}),
                "/v1/score": ("score", {"instruction": "x", "candidates": ["a"]}),
                "/v1/tokenize": ("tokenize", {"text": "x"}),
                "/v1/completions": ("completions", {"prompt": "x"}),
                "/v1/chat/completions": ("chat", {"messages": [{"role": "user", "content": "x"}]}),
            }
            for path, (route, body) in bodies.items():
                response = await s.post(path, {**body, "model": model}, route)
                assert (response.status_code, error_of(response)["code"]) == (404, "not_found")
            s.sent["grpc", "generate"] += 1
            refused = await refusal(s.rpc.stub.Generate(pb.GenerateRequest(instruction="x", model=model)))
            assert refused.code is Code.NOT_FOUND

        async def nowhere(path: str) -> None:
            method = chance.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "X" + word()[:5].upper().replace(".", "")])
            response = await s.rest.http.request(method, path, content=b"{}")
            assert response.status_code in ((400,) if method.startswith("X") else (404, 405))

        await all_ways("first")
        mode = await s.post("/v1/generate", {"instruction": "x", "mode": "first"}, "generate")
        assert mode.status_code == 400
        before = series((await s.rest.http.get("/metrics")).text)
        for _ in range(160):
            await all_ways(word())
        for _ in range(40):
            assert (await s.post("/v1/generate", {"instruction": "x", "mode": word()}, "generate")).status_code == 400
        places = ("/{}", "/v1/{}", "/v1/models/{}", "/generate/{}", "/metrics/{}", "/v1/generate/{}?{}", "/%2e%2e/{}")
        for _ in range(1000):
            await nowhere(chance.choice(places).format(word(), word()))
        assert series((await s.rest.http.get("/metrics")).text) == before
        assert await s.settled() == {"invalid": s.sent.total()}
        assert set(s.outcomes()) <= {outcome.value for outcome in Outcome}
