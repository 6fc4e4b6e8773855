"""Every row of the error table, on the wire."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from serve import errors as kinds
from serve.errors import ServeError
from serve.metrics import Metrics
from serve.rest import errors
from serve.service import Service, ServiceSettings
from tests.rest.harness import Served, error_of, frames, http_post, served
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service
from tests.service.toy_tokenizers import byte_level

INFERENCE: dict[str, dict[str, Any]] = {
    "/v1/generate": {"instruction": "hello"},
    "/v1/score": {"instruction": "hello", "candidates": ["yes"]},
    "/v1/tokenize": {"text": "hello"},
    "/v1/completions": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
}


def test_every_kind_has_a_row_and_every_row_a_kind() -> None:
    classes = [value for value in vars(kinds).values() if isinstance(value, type) and issubclass(value, ServeError)]
    assert len(classes) >= 11
    assert {kind.kind for kind in classes} == set(errors.STATUSES)


@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "/static/",
        "/static/../app.py",
        "/generate/",
        "/v1",
        "/v1/generate/",
        "/v2/generate",
        "/v1/engines",
        "/%ff%00",
        "/v1/generate%0a",
        "/livez%0a",
        "/static/playground.js%0a",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_unknown_routes(method: str, path: str) -> None:
    async with served("yes") as server:
        response = await server.http.request(method, path)
        assert response.status_code == 404
        assert error_of(response)["code"] == "not_found"
        assert await server.outcomes() == {}


async def test_wrong_methods() -> None:
    async with served("yes") as server:
        for path in INFERENCE:
            for method in ("GET", "PUT", "DELETE", "OPTIONS", "PATCH"):
                response = await server.http.request(method, path)
                assert response.status_code == 405
                assert response.headers["allow"] == "POST"
                assert error_of(response)["code"] == "method_not_allowed"
        for path in ("/livez", "/readyz", "/health", "/metrics", "/v1/models", "/docs", "/openapi.json"):
            response = await server.http.post(path)
            assert response.status_code == 405
            assert "GET" in response.headers["allow"]
            assert (await server.http.head(path)).status_code == 200
        assert (await server.http.head("/v1/generate")).status_code == 405
        assert await server.outcomes() == {}


async def test_unknown_models() -> None:
    async with served("yes") as server:
        for path, body in INFERENCE.items():
            response = await server.post(path, {**body, "model": "gpt-4"})
            assert response.status_code == 404
            error = error_of(response)
            assert (error["param"], error["code"]) == ("model", "not_found")
            assert "scripted" in error["message"]
            for name in ("scripted", "default", "tgi", "dummy", None):
                assert (await server.post(path, {**body, "model": name})).status_code == 200


@pytest.mark.parametrize("path", INFERENCE)
async def test_every_route_has_a_deadline(path: str) -> None:
    async with served("yes") as server:
        late = await server.post(path, INFERENCE[path], x_request_timeout_ms="0")
        assert (late.status_code, error_of(late)["code"]) == (504, "deadline")
        wrong = await server.post(path, INFERENCE[path], x_request_timeout_ms="soon")
        assert (wrong.status_code, error_of(wrong)["param"]) == (400, "x-request-timeout-ms")
        assert (await server.post(path, INFERENCE[path], x_request_timeout_ms="60000")).status_code == 200
        assert await server.outcomes() == {"deadline": 1, "invalid": 1, "stop": 1}


FULL_CONTEXT: dict[str, tuple[str, dict[str, Any], str]] = {
    "an instruction": ("/v1/generate", {"mode": "raw", "instruction": "x" * 50}, "instruction"),
    "an input": ("/v1/generate", {"instruction": "x", "input": "y" * 50}, "input"),
    "a prompt of completions": ("/v1/completions", {"prompt": ["x", "y" * 50]}, "prompt"),
    "token ids": ("/v1/completions", {"prompt": [5] * 50}, "prompt"),
    "a chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 50}]}, "messages"),
    "a prompt to score": ("/v1/score", {"mode": "raw", "instruction": "x" * 50, "candidates": ["a"]}, "instruction"),
    "a candidate": ("/v1/score", {"mode": "raw", "instruction": "x", "candidates": ["a", "b" * 40]}, "candidates"),
}


@pytest.mark.parametrize("name", FULL_CONTEXT)
async def test_what_the_model_s_context_cannot_hold_is_the_client_s_mistake(name: str) -> None:
    path, body, field = FULL_CONTEXT[name]
    runtime = ScriptedRuntime([5, 1], is_encoder_decoder=False, context_length=40)
    service = scripted_service(runtime=runtime, tokenizer=byte_level())
    async with served(service=service, runtime=runtime) as server:
        response = await server.post(path, body)
        assert response.status_code == 400, response.text
        assert error_of(response)["param"] == field
        assert "context" in error_of(response)["message"]
        assert (runtime.requests, runtime.scores) == ([], [])


async def test_loading() -> None:
    async with served(service=Service(ServiceSettings(), Metrics())) as server:
        for path, body in INFERENCE.items():
            await check_unavailable(server, path, body)
        assert (await server.http.get("/livez")).status_code == 200
        for path in ("/readyz", "/health", "/v1/models"):
            response = await server.http.get(path)
            assert response.status_code == 503
            assert "loading" in error_of(response)["message"]
        assert (await server.http.get("/metrics")).status_code == 200
        assert await server.outcomes() == {"refused": len(INFERENCE)}


async def test_draining() -> None:
    async with served(runtime=ScriptedRuntime([5, 5, 5, 5, 1], pace_seconds=0.1)) as server:
        running = asyncio.create_task(server.stream("/v1/generate", instruction="hello"))
        await server.until_running()
        drained = asyncio.create_task(server.service.drain())
        await asyncio.sleep(0)
        for path, body in INFERENCE.items():
            await check_unavailable(server, path, body)
        assert (await server.http.get("/livez")).status_code == 200
        for path in ("/readyz", "/health"):
            response = await server.http.get(path)
            assert response.status_code == 503
            assert "draining" in error_of(response)["message"]
        for path in ("/livez", "/metrics", "/v1/models", "/nope"):  # so clients connect anew, elsewhere
            assert (await server.http.get(path)).headers["connection"] == "close"
        assert (await running)[-1] == "[DONE]"
        await drained


async def check_unavailable(server: Served, path: str, body: dict[str, Any]) -> None:
    response = await server.post(path, body)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert error_of(response)["code"] == "unavailable"


async def test_a_full_queue() -> None:
    runtime = ScriptedRuntime([5], max_running_sequences=1)
    runtime.freeze()
    limits = ServiceSettings(max_running_sequences=1, max_queued_requests=1)
    async with served(service=scripted_service(runtime=runtime, settings=limits), runtime=runtime) as server:
        await server.raw_open({"instruction": "hello"})
        waiting = asyncio.create_task(server.post("/v1/generate", {"instruction": "hello", "max_tokens": 2}))
        while server.service.requests_waiting < 2:  # the first one too: the frozen engine has not begun it
            await asyncio.sleep(0.005)
        for path, body in INFERENCE.items():
            if path == "/v1/tokenize":  # needs no place in the queue
                continue
            response = await server.post(path, body)
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert error_of(response)["code"] == "queue_full"
        runtime.thaw()
        assert (await waiting).status_code == 200


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/completions", "/v1/chat/completions"])
async def test_a_failing_engine(path: str) -> None:
    async with served("yes no yes", runtime=ScriptedRuntime(fail_at_step=1)) as server:
        response = await server.post(path, INFERENCE[path])
        assert response.status_code == 500
        assert error_of(response)["code"] == "engine_failure"
        assert (await server.http.get("/readyz")).status_code == 503
        assert "engine dead" in error_of(await server.http.get("/health"))["message"]
        assert (await server.http.get("/livez")).status_code == 200  # for a grace
        assert await server.outcomes() == {"error": 1}


async def test_a_dead_engine_is_not_alive_after_the_grace() -> None:
    runtime = ScriptedRuntime()
    service = scripted_service("yes", runtime=runtime, settings=ServiceSettings(dead_grace_seconds=0))
    async with served(service=service, runtime=runtime) as server:
        assert (await server.http.get("/livez")).status_code == 200
        runtime.ill = "the engine thread died"
        response = await server.http.get("/livez")
        assert response.status_code == 503
        assert error_of(response)["code"] == "unavailable"


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/completions", "/v1/chat/completions"])
async def test_a_failure_in_a_stream_is_its_last_frame_and_the_connection_closes(path: str) -> None:
    async with served("yes no yes no", runtime=ScriptedRuntime(fail_at_step=2, pace_seconds=0.01)) as server:
        body = json.dumps({**INFERENCE[path], "stream": True}).encode()
        answer = await server.raw(http_post(path, body), seconds=1)
        assert answer.endswith(b"\r\n0\r\n\r\n<closed>")  # a whole body: no client takes it for a broken pipe
        assert b"200 OK" in answer
        assert b"[DONE]" not in answer
        events = frames(answer.replace(b"\r\n", b"\n\n"))
        assert events[-1]["error"]["code"] == "engine_failure"
        assert len(events) >= 2
        assert not any("finish_reason" in event and event["finish_reason"] for event in events)


async def test_a_request_right_behind_a_failed_stream_is_answered_and_is_the_last() -> None:
    """The client had no sign that the connection would end; closed at once, it would lose what it is sending."""
    async with served("yes no yes no", runtime=ScriptedRuntime(fail_at_step=2, pace_seconds=0.01)) as server:
        failing = http_post("/v1/generate", json.dumps({"instruction": "hello", "stream": True}).encode())
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(failing)
        await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 1)  # to the end of the connection
        writer.close()
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b"connection: close" in answer.lower()


async def test_an_unexpected_error_is_500_and_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served("yes") as server:

        def broken(*_: Any) -> None:
            raise RuntimeError("a secret path /root/x")

        monkeypatch.setattr(server.service, "generate", broken)
        response = await server.post("/v1/generate", {"instruction": "hello"})
        assert response.status_code == 500
        assert error_of(response)["code"] == "engine_failure"
        assert "secret" not in response.text
        assert await server.outcomes() == {"error": 1}
        monkeypatch.setattr(server.service.metrics, "render", broken)
        assert error_of(await server.http.get("/metrics"))["code"] == "engine_failure"
