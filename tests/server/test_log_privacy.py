"""No log line of any level holds a client's words or a key, whatever goes wrong; and each request has one line."""

from __future__ import annotations

import asyncio
import io
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from protos.flan.v1 import generation_pb2 as pb
from protos.flan.v1.generation_pb2_grpc import FlanServiceStub
from serve import telemetry
from serve.metrics import Metrics
from serve.response_stream import ResponseStream
from serve.rest.sse import EventStream
from tests.client.harness import Served, is_idle, served
from tests.rest.harness import http_post
from tests.service.loggers import everything_logged, hear_libraries
from tests.service.scripted_runtime import ScriptedRuntime, ScriptedStream, scripted_service

CANARY = "crimson-heron"
OUTPUT = "hello world yes"  # what the model says
KEY, WRONG_KEY = "sesame-lock", "sesame-wrong"
SECRETS = (CANARY, OUTPUT, "sesame")
PLAIN: dict[str, dict[str, Any]] = {
    "/v1/generate": {"instruction": CANARY, "input": CANARY, "options": [CANARY], "stop": [CANARY], "debug": True},
    "/v1/score": {"instruction": CANARY, "candidates": [CANARY]},
    "/v1/tokenize": {"text": CANARY},
    "/v1/completions": {"prompt": CANARY},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": CANARY}]},
    "/generate": {"inputs": CANARY},
    "/": {"inputs": CANARY},
    "/generate_stream": {"inputs": CANARY},
}
MISTAKES: dict[str, bytes] = {
    "no JSON": f'{{"instruction": "{CANARY}'.encode(),
    "an unknown field": json.dumps({"instruction": CANARY, "inputs": CANARY, "prompt": CANARY, CANARY: 1}).encode(),
    "a field twice": f'{{"{CANARY}": 1, "{CANARY}": 2}}'.encode(),
    "an unknown inner field": json.dumps({"mode": "few_shot", "exemplars": [{CANARY: CANARY}]}).encode(),
    "a wrong type": json.dumps({"instruction": [CANARY], "text": 1, "candidates": CANARY}).encode(),
    "an unknown model": json.dumps({"instruction": "x", "text": "x", "prompt": "x", "model": CANARY}).encode(),
    "an unknown mode": json.dumps({"instruction": "x", "mode": CANARY}).encode(),
    "an exemplar set": json.dumps({"instruction": "x", "mode": "few_shot", "exemplar_set": CANARY}).encode(),
    "a request id": json.dumps({"instruction": "x", "request_id": f"{CANARY} {CANARY}"}).encode(),
    "no UTF-8": CANARY.encode() + b"\xff",
    "a NUL": json.dumps({"instruction": f"{CANARY}\0", "text": f"{CANARY}\0", "prompt": f"{CANARY}\0"}).encode(),
    "a long prompt": json.dumps({"instruction": f"{CANARY} " * 5000, "prompt": f"{CANARY} " * 5000}).encode(),
    "a large body": f'{{"instruction": "{CANARY * 20_000}"}}'.encode(),
}


def lines_of(log: io.StringIO) -> list[dict[str, Any]]:
    """The request lines."""
    lines = [json.loads(line) for line in log.getvalue().splitlines() if line.startswith("{")]
    return [line for line in lines if line["message"] == "request"]


def check_private(log: io.StringIO) -> None:
    text = log.getvalue()
    assert text
    for secret in SECRETS:
        where = text.find(secret)
        assert where < 0, text[max(0, where - 500) : where + 100]


async def send(s: Served, data: bytes) -> bytes:
    """Bytes to the REST port; all that came back, up to the connection's end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(s.urls["http"].rpartition(":")[2]))
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def post(path: str, body: bytes, key: str = KEY) -> bytes:
    return http_post(path, body, f"Authorization: Bearer {key}", f"X-Words: {CANARY}", "Connection: close")


def get(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n".encode()


def logging_service(runtime: ScriptedRuntime, *texts: str) -> Any:
    return scripted_service(*texts, runtime=runtime, metrics=Metrics(on_request_end=telemetry.log_request))


@pytest.mark.parametrize("log_format", ["json", "text"])
async def test_every_route_of_rest_and_every_mistake(log_format: str) -> None:
    runtime = ScriptedRuntime()
    with everything_logged(log_format) as log:
        service = logging_service(runtime, OUTPUT)
        async with served(runtime=runtime, service=service, api_keys=(KEY,), max_body_mib=0.2) as s:
            hear_libraries()
            counted: Counter[str] = Counter()
            for path, body in PLAIN.items():
                for more in ({}, {"stream": True}):
                    if more and path in ("/v1/score", "/v1/tokenize"):
                        continue  # they have no such field
                    raw = json.dumps({**body, **more}).encode()
                    assert b" 200 OK" in await send(s, post(f"{path}?words={CANARY}", raw)), path
                    counted["stop"] += 1
                assert b" 401 " in await send(s, post(path, b"{}", WRONG_KEY))
                counted["unauthorized"] += 1
                for name, mistake in MISTAKES.items():
                    answer = await send(s, post(path, mistake))
                    assert answer, (path, name)
                    counted["stop" if b" 200 OK" in answer else "invalid"] += 1
            assert counted["invalid"] > 60
            for path in (f"/v1/models/{CANARY}", f"/{CANARY}", f"/livez?{CANARY}", "/docs", "/", "/info", "/metrics"):
                await send(s, get(path))
                await send(s, get(path, "DELETE"))
            assert b" 400 " in await send(s, f"{CANARY} {KEY}\r\n\r\n".encode())
        check_private(log)
        if log_format == "json":
            lines = lines_of(log)
            assert Counter(line["outcome"] for line in lines) == counted
            assert all(line["request_id"] and line["total_ms"] >= 0 and line["protocol"] == "rest" for line in lines)
            assert {line.get("field") for line in lines} >= {None, "instruction", "model"}


async def test_every_method_of_grpc_and_every_mistake() -> None:
    runtime = ScriptedRuntime()
    with everything_logged() as log:
        service = logging_service(runtime, OUTPUT)
        async with (
            served(runtime=runtime, service=service, api_keys=(KEY,), max_body_mib=0.2) as s,
            grpc.aio.insecure_channel(s.urls["grpc"][7:]) as channel,
        ):
            hear_libraries()
            stub = FlanServiceStub(channel)
            plain = pb.GenerateRequest(instruction=CANARY, stop=[CANARY], debug=True)
            calls: dict[str, Callable[..., Any]] = {
                "Generate": lambda m: stub.Generate(plain, metadata=m),
                "GenerateStream": lambda m: collect(stub.GenerateStream(plain, metadata=m)),
                "Score": lambda m: stub.Score(pb.ScoreRequest(instruction=CANARY, candidates=[CANARY]), metadata=m),
                "Tokenize": lambda m: stub.Tokenize(pb.TokenizeRequest(text=CANARY), metadata=m),
                "GetModel": lambda m: stub.GetModel(pb.GetModelRequest(), metadata=m),
                "large": lambda m: stub.Generate(pb.GenerateRequest(instruction=CANARY * 20_000), metadata=m),
                "model": lambda m: stub.Generate(pb.GenerateRequest(instruction="x", model=CANARY), metadata=m),
                "id": lambda m: stub.Generate(pb.GenerateRequest(instruction="x", request_id=f"{CANARY} "), metadata=m),
                "NUL": lambda m: stub.Tokenize(pb.TokenizeRequest(text=f"{CANARY}\0"), metadata=m),
                "no message": lambda m: raw_call(channel, "Generate", CANARY.encode(), m),
                "no method": lambda m: raw_call(channel, CANARY, b"", m),
            }
            outcomes = {}
            for key in (KEY, WRONG_KEY):
                metadata = (("authorization", f"Bearer {key}"), ("x-words", CANARY), ("words-bin", CANARY.encode()))
                for name, call in calls.items():
                    try:
                        await call(metadata)
                        outcomes[key, name] = grpc.StatusCode.OK
                    except grpc.aio.AioRpcError as error:
                        outcomes[key, name] = error.code()
            assert {outcomes[WRONG_KEY, name] for name in calls} == {grpc.StatusCode.UNAUTHENTICATED}
            good = [name for name in calls if outcomes[KEY, name] is grpc.StatusCode.OK]
            assert good == ["Generate", "GenerateStream", "Score", "Tokenize", "GetModel"]
            await many(stub, plain)
            await is_idle(s)
        check_private(log)
        lines = lines_of(log)
        # An unknown method and GetModel are no requests.
        assert Counter(line["outcome"] for line in lines) == {"stop": 5, "invalid": 7, "unauthorized": 9}
        assert all(line["request_id"] and line["total_ms"] >= 0 and line["protocol"] == "grpc" for line in lines)


async def collect(call: Any) -> list[Any]:
    return [event async for event in call]


def raw_call(channel: grpc.aio.Channel, method: str, message: bytes, metadata: Any) -> Any:
    call: Any = channel.unary_unary(f"/flan.v1.FlanService/{method}")
    return call(message, metadata=metadata)


async def many(stub: Any, plain: pb.GenerateRequest) -> None:
    async def requests() -> AsyncIterator[pb.GenerateRequest]:
        yield plain
        yield pb.GenerateRequest(instruction="x", model=CANARY)
        yield pb.GenerateRequest(instruction="x", request_id=f"{CANARY} ")

    metadata = (("authorization", f"Bearer {KEY}"),)
    assert len([result async for result in stub.GenerateMany(requests(), metadata=metadata)]) == 3


class Quoting(ScriptedStream):
    """A token stream whose faults quote the request."""

    async def __anext__(self) -> Any:
        raise ValueError(f"cannot continue {CANARY}")

    async def aclose(self) -> None:
        await super().aclose()
        raise KeyError(CANARY)


class QuotingRuntime(ScriptedRuntime):
    def generate(self, request: Any) -> ScriptedStream:
        return Quoting(self, request)


def fail(*arguments: Any, **options: Any) -> Any:
    try:
        raise LookupError(CANARY)
    except LookupError as error:
        raise ValueError(f"no {CANARY} with {KEY}") from error


async def use(s: Served) -> None:
    """A request on each path, without a look at what comes."""
    for path, body in PLAIN.items():
        await send(s, post(path, json.dumps(body).encode()))
        await send(s, post(path, json.dumps({**body, "stream": True}).encode()))
    async with grpc.aio.insecure_channel(s.urls["grpc"][7:]) as channel:
        stub = FlanServiceStub(channel)
        plain = pb.GenerateRequest(instruction=CANARY)
        await asyncio.gather(
            stub.Generate(plain),
            stub.GenerateStream(plain).read(),
            stub.Score(pb.ScoreRequest(instruction=CANARY, candidates=[CANARY])),
            stub.Tokenize(pb.TokenizeRequest(text=CANARY)),
            stub.GenerateMany(iter([plain])).read(),
            return_exceptions=True,
        )


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("serve.service.prepare", ("serve.rest.endpoint", "serve.rpc.handlers", "serve.rpc.generate_many")),
        ("serve.tokenizer.Tokenizer.encode", ("serve.rest.endpoint", "serve.rpc.handlers", "serve.rpc.generate_many")),
        ("serve.rest.codec.to_request", ("serve.rest.endpoint",)),
        ("serve.rpc.codec.to_response", ("serve.rpc.handlers",)),
        ("serve.rpc.codec.to_many_response", ("serve.rpc.handlers",)),
        ("serve.rest.respond.dump_ascii", ("serve.rest.middleware",)),
    ],
)
@pytest.mark.parametrize("log_format", ["json", "text"])
async def test_faults_that_quote_the_client(
    where: str, told: tuple[str, ...], log_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = ScriptedRuntime()
    with everything_logged(log_format) as log:
        service = logging_service(runtime, OUTPUT)
        async with served(runtime=runtime, service=service) as s:
            hear_libraries()
            monkeypatch.setattr(where, fail)
            if where.endswith("dump_ascii"):
                await send(s, post("/v1/generate", b"{"))
            await use(s)
            monkeypatch.undo()
        check_private(log)
        assert "builtins.ValueError" in log.getvalue()
        assert "builtins.LookupError" in log.getvalue()
        if log_format == "json":
            loggers = {json.loads(line)["logger"] for line in log.getvalue().splitlines() if '"traceback"' in line}
            assert loggers >= set(told)


@pytest.mark.parametrize("log_format", ["json", "text"])
async def test_a_runtimes_faults_in_the_middle_of_an_answer(log_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = QuotingRuntime()
    with everything_logged(log_format) as log:
        service = logging_service(runtime, OUTPUT)
        async with served(runtime=runtime, service=service) as s:
            hear_libraries()
            await use(s)
            monkeypatch.setattr(EventStream, "fail", fail)  # no frame can tell it: the connection's fault is uvicorn's
            await send(s, post("/v1/generate", json.dumps({"instruction": CANARY, "stream": True}).encode()))
            monkeypatch.setattr(ResponseStream, "aclose", fail)
            await use(s)
            monkeypatch.undo()
        check_private(log)
        if log_format == "json":
            loggers = {json.loads(line)["logger"] for line in log.getvalue().splitlines() if '"traceback"' in line}
            assert loggers >= {"serve.response_stream", "serve.rest.middleware", "uvicorn.error"}


async def test_the_line_of_a_cancelled_and_of_a_refused_request() -> None:
    runtime = ScriptedRuntime([5], pace_seconds=0.01)
    with everything_logged() as log:
        service = logging_service(runtime)
        async with (
            served(runtime=runtime, service=service) as s,
            grpc.aio.insecure_channel(s.urls["grpc"][7:]) as channel,
        ):
            port = int(s.urls["http"].rpartition(":")[2])
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            body = json.dumps({"instruction": CANARY, "max_tokens": 512, "request_id": "left"}).encode()
            writer.write(http_post("/v1/generate", body))
            stub = FlanServiceStub(channel)
            call = stub.Generate(pb.GenerateRequest(instruction=CANARY, max_tokens=512, request_id="hung-up"))
            late = stub.Generate(pb.GenerateRequest(instruction=CANARY, max_tokens=512, request_id="late"), timeout=0.2)
            async with asyncio.timeout(5):
                while len(runtime.requests) < 3:
                    await asyncio.sleep(0.005)
            with pytest.raises(grpc.aio.AioRpcError):
                await late
            writer.close()
            call.cancel()
            await is_idle(s)
            service.admission.drain()
            assert b" 503 " in await send(
                s, http_post("/v1/generate", body.replace(b"left", b"shut"), "Connection: close")
            )
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Generate(pb.GenerateRequest(instruction=CANARY, request_id="shut-too"))
        check_private(log)
        assert {(line["request_id"], line["outcome"], line["error"]) for line in lines_of(log)} == {
            ("left", "cancelled", "cancelled"),
            ("hung-up", "cancelled", "cancelled"),
            ("late", "deadline", "deadline"),
            ("shut", "refused", "unavailable"),
            ("shut-too", "refused", "unavailable"),
        }
        assert len(lines_of(log)) == 5
