"""Traces over real sockets: both protocols into memory, and a server process that exports to a collector."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

pytest.importorskip("opentelemetry.sdk", reason="the telemetry extra is not installed")

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.trace import StatusCode

from protos.flan.v1 import generation_pb2 as pb
from protos.flan.v1.generation_pb2_grpc import FlanServiceStub
from serve.metrics import Metrics
from serve.telemetry import on_request_end
from tests.client.harness import Served, is_idle, served
from tests.server.process import ServerProcess
from tests.service.recorded_spans import Recorded, recorded
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
CANARY = "crimson-heron"
KEY = "sesame-lock"
ASKED = {"instruction": CANARY, "stop": [CANARY], "input": CANARY, "options": [CANARY]}
POSTS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "/v1/generate": ("text_completion scripted", ASKED, ["queue", "encode", "decode"]),
    "/v1/score": ("score scripted", {"instruction": CANARY, "candidates": [CANARY]}, ["queue", "score"]),
    "/v1/tokenize": ("tokenize scripted", {"text": CANARY}, []),
    "/v1/completions": (
        "text_completion default",
        {"model": "default", "prompt": CANARY},
        ["queue", "encode", "decode"],
    ),
    "/v1/chat/completions": (
        "chat scripted",
        {"messages": [{"role": "user", "content": CANARY}]},
        ["queue", "encode", "decode"],
    ),
    "/generate": ("text_completion scripted", {"inputs": CANARY}, ["queue", "encode", "decode"]),
}


@asynccontextmanager
async def traced(
    *texts: str, runtime: ScriptedRuntime | None = None, **settings: Any
) -> AsyncIterator[tuple[Served, Recorded]]:
    spans = recorded()
    runtime = ScriptedRuntime() if runtime is None else runtime
    metrics = Metrics(on_request_end=on_request_end(spans.tracing))
    service = scripted_service(*texts, runtime=runtime, metrics=metrics)
    async with served(runtime=runtime, service=service, **settings) as s:
        yield s, spans


def is_below_the_client(spans: Recorded) -> bool:
    server = spans.server()
    assert server.context is not None
    return (
        server.context.trace_id == int(TRACE, 16)
        and server.parent is not None
        and server.parent.span_id == int(PARENT, 16)
    )


@pytest.mark.parametrize("path", POSTS)
async def test_every_route_of_rest_is_a_span_below_its_clients(path: str) -> None:
    name, body, stages = POSTS[path]
    async with traced("yes no") as (s, spans), httpx.AsyncClient(base_url=s.urls["http"], trust_env=False) as http:
        for more in ({}, {"stream": True}) if "decode" in stages and path != "/generate" else ({},):
            spans.clear()
            response = await http.post(path, json={**body, **more}, headers={**TRACEPARENT, "x-request-id": "mine"})
            assert response.status_code == 200, response.text
            server = spans.server()
            attributes = dict(server.attributes or {})
            assert server.name == name
            assert is_below_the_client(spans)
            assert attributes["gen_ai.response.model"] == "scripted"
            assert attributes["gen_ai.response.id"] == "mine"
            assert attributes["flan.protocol"] == "rest"
            assert [span.name for span in spans.children()] == stages
            if "decode" in stages:
                assert attributes["gen_ai.response.finish_reasons"] == ("stop",)
                assert attributes["gen_ai.usage.output_tokens"] == 3
                assert attributes["gen_ai.usage.input_tokens"]
            assert CANARY not in spans.text()


async def test_every_method_of_grpc_is_a_span_below_its_clients() -> None:
    async with traced("yes no") as (s, spans), grpc.aio.insecure_channel(s.urls["grpc"][7:]) as channel:
        stub = FlanServiceStub(channel)
        request = pb.GenerateRequest(instruction=CANARY, stop=[CANARY])
        metadata = tuple({**TRACEPARENT, "x-request-id": "mine"}.items())
        score = pb.ScoreRequest(instruction=CANARY, candidates=[CANARY])
        for call, name, stages in (
            (partial(stub.Generate, request), "text_completion", ["queue", "encode", "decode"]),
            (partial(stub.Score, score), "score", ["queue", "score"]),
            (partial(stub.Tokenize, pb.TokenizeRequest(text=CANARY)), "tokenize", []),
        ):
            await call(metadata=metadata)
            assert spans.server().name == f"{name} scripted"
            assert is_below_the_client(spans)
            assert (spans.server().attributes or {})["gen_ai.response.id"] == "mine"
            assert (spans.server().attributes or {})["flan.protocol"] == "grpc"
            assert [span.name for span in spans.children()] == stages
            assert CANARY not in spans.text()
            spans.clear()
        assert [event async for event in stub.GenerateStream(request, metadata=metadata)]
        assert is_below_the_client(spans)


async def test_each_request_of_generate_many_is_a_span() -> None:
    async with traced("yes") as (s, spans), grpc.aio.insecure_channel(s.urls["grpc"][7:]) as channel:

        async def requests() -> AsyncIterator[pb.GenerateRequest]:
            for number in range(3):
                yield pb.GenerateRequest(instruction="x", request_id=f"r{number}")
            yield pb.GenerateRequest(instruction="x", request_id="hot", temperature=9)

        results = FlanServiceStub(channel).GenerateMany(requests(), metadata=tuple(TRACEPARENT.items()))
        assert len([result async for result in results]) == 4
        servers = {(span.attributes or {})["gen_ai.response.id"]: span for span in spans.servers()}
        assert set(servers) == {"r0", "r1", "r2", "hot"}
        for name, server in servers.items():
            assert server.context is not None
            assert server.context.trace_id == int(TRACE, 16)
            stages = [] if name == "hot" else ["queue", "encode", "decode"]
            assert [span.name for span in spans.children(server)] == stages


async def test_a_client_that_leaves_ends_its_span() -> None:
    async with traced(runtime=ScriptedRuntime([5], pace_seconds=0.01)) as (s, spans):
        async with httpx.AsyncClient(base_url=s.urls["http"], trust_env=False) as http:
            body = {"instruction": "x", "stream": True, "ignore_eos": True, "max_tokens": 512}
            async with http.stream("POST", "/v1/generate", json=body) as response:
                pieces = response.aiter_bytes()
                await anext(pieces)
                await pieces.aclose()  # type: ignore[attr-defined]
        async with grpc.aio.insecure_channel(s.urls["grpc"][7:]) as channel:
            call = FlanServiceStub(channel).Generate(pb.GenerateRequest(instruction="x", max_tokens=512))
            while s.runtime.num_running == 0 or len(s.runtime.requests) < 2:
                await asyncio.sleep(0.005)
            call.cancel()
            await is_idle(s)
        for server in spans.servers():
            assert (server.attributes or {})["flan.outcome"] == "cancelled"
            assert server.status.status_code is StatusCode.UNSET
            assert server.end_time is not None
        assert {(server.attributes or {})["flan.protocol"] for server in spans.servers()} == {"rest", "grpc"}


async def test_refusals_and_failures_are_spans_without_the_clients_words() -> None:
    runtime = ScriptedRuntime([5], fail_at_step=0)
    async with traced(runtime=runtime, api_keys=(KEY,)) as (s, spans):
        async with httpx.AsyncClient(base_url=s.urls["http"], headers=TRACEPARENT, trust_env=False) as http:
            bearer = {"authorization": f"Bearer {KEY}"}
            for body, key, outcome in (
                ({"instruction": "x"}, {"authorization": f"Bearer {CANARY}"}, "unauthorized"),
                ({"instruction": "x", CANARY: 1}, bearer, "invalid"),
                ({"instruction": "x", "model": CANARY}, bearer, "invalid"),
                ({"instruction": CANARY}, bearer, "error"),
            ):
                spans.clear()
                await http.post("/v1/generate", json=body, headers=key)
                server = spans.server()
                assert is_below_the_client(spans)
                assert (server.attributes or {})["flan.outcome"] == outcome
                assert server.status.status_code is (StatusCode.ERROR if outcome == "error" else StatusCode.UNSET)
                assert CANARY not in spans.text()
                assert KEY not in spans.text()
        async with grpc.aio.insecure_channel(s.urls["grpc"][7:]) as channel:
            spans.clear()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await FlanServiceStub(channel).Generate(pb.GenerateRequest(), metadata=tuple(TRACEPARENT.items()))
            assert is_below_the_client(spans)
            told = dict(caught.value.initial_metadata() or ())["x-request-id"]
            assert (spans.server().attributes or {})["gen_ai.response.id"] == told


class Collector:
    """Takes OTLP over gRPC and over HTTP."""

    def __init__(self) -> None:
        self.requests: list[trace_service_pb2.ExportTraceServiceRequest] = []

    def Export(self, request: Any, context: Any) -> trace_service_pb2.ExportTraceServiceResponse:  # noqa: N802
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[trace_pb2.Span]:
        found = [resource for request in self.requests for resource in request.resource_spans]
        return [span for resource in found for scope in resource.scope_spans for span in scope.spans]

    def service_names(self) -> set[str]:
        found = [resource.resource for request in self.requests for resource in request.resource_spans]
        return {a.value.string_value for resource in found for a in resource.attributes if a.key == "service.name"}


@contextmanager
def listening(collector: Collector, protocol: str) -> Iterator[str]:
    """The collector on a free port: its URL."""
    if protocol == "grpc":
        server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"http://127.0.0.1:{port}"
        server.stop(0).wait()
        return

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            collector.Export(trace_service_pb2.ExportTraceServiceRequest.FromString(body), None)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_server_exports_to_a_collector_and_flushes_at_its_end(checkpoint_folder: Path, protocol: str) -> None:
    collector = Collector()
    with listening(collector, protocol) as url:
        env = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_SERVICE_NAME": "flan-under-test",
            "OTEL_BSP_SCHEDULE_DELAY": "60000",  # so it is the end that exports
        }
        with ServerProcess("--model", str(checkpoint_folder), "--log-format", "json", env=env) as server:
            body = {"instruction": CANARY, "max_tokens": 4, "ignore_eos": True}
            headers = {**TRACEPARENT, "x-request-id": "over-rest"}
            assert (
                httpx.post(server.rest_url + "/v1/generate", json=body, headers=headers, timeout=30).status_code == 200
            )
            with grpc.insecure_channel(server.grpc_target) as channel:
                metadata = (*TRACEPARENT.items(), ("x-request-id", "over-grpc"))
                FlanServiceStub(channel).Generate(pb.GenerateRequest(instruction="the cat"), metadata=metadata)
            server.signal(signal.SIGTERM)
            code, seconds = server.exit_code(10)
    assert code == 0
    assert seconds < 5
    assert collector.service_names() == {"flan-under-test"}
    servers = [span for span in collector.spans() if span.kind == trace_pb2.Span.SPAN_KIND_SERVER]
    assert [span.parent_span_id.hex() for span in servers] == [PARENT, PARENT]
    assert {span.trace_id.hex() for span in collector.spans()} == {TRACE}
    assert sorted(span.name for span in collector.spans() if span not in servers) == sorted(
        2 * ["queue", "encode", "decode"]
    )
    lines = [json.loads(line) for line in server.lines if line.startswith("{")]
    logged = {line["request_id"]: line for line in lines if line["message"] == "request"}
    assert {line["trace_id"] for line in logged.values()} == {TRACE}
    assert {line["span_id"] for line in logged.values()} == {span.span_id.hex() for span in servers}
    assert set(logged) == {"over-rest", "over-grpc"}
    assert CANARY not in "".join(str(request) for request in collector.requests)


def test_a_collector_that_is_not_there_holds_up_nothing(checkpoint_folder: Path) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    argv = ("--model", str(checkpoint_folder), "--shutdown-grace-seconds", "1", "--log-format", "json")
    with ServerProcess(*argv, env=env) as server:
        body = {"instruction": "the cat", "max_tokens": 4}
        assert httpx.post(server.rest_url + "/v1/generate", json=body, timeout=30).status_code == 200
        server.signal(signal.SIGTERM)
        code, seconds = server.exit_code(10)
    assert code == 0
    assert seconds < 3
    for line in server.lines:  # what OpenTelemetry complains of comes as lines of ours
        assert line.startswith(("{", "ready "))
