"""Spans of finished requests, and which environment switches them on. Exporters are in memory."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the telemetry extra is not installed")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from serve import tracing
from serve.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    QueueFull,
    ServeError,
    Unauthorized,
    Unavailable,
)
from serve.metrics import Metrics, Protocol, RequestTracker, Route
from serve.request import Mode
from serve.telemetry import on_request_end
from tests.service.loggers import everything_logged
from tests.service.recorded_spans import Recorded, recorded

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
OTLP = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests before this one configured is no matter."""
    monkeypatch.setattr(logging.getLogger("flan"), "propagate", True)


def tracker(spans: Recorded, route: Route = Route.GENERATE) -> RequestTracker:
    """Of a request that was accepted, began after 10 ms and had its first token after 30."""
    made = Metrics(on_request_end=on_request_end(spans.tracing)).track(Protocol.REST, route)
    made.mode, made.request_id = Mode.COT, "r1"
    made.facts.served_model, made.facts.requested_model, made.facts.accepted = "flan", "default", True
    made.started -= 0.05
    made.facts.started_ns -= 50_000_000
    made.queue_seconds, made.first_token_seconds = 0.01, 0.03
    made.prompt_tokens, made.completion_tokens = 7, 3
    return made


def milliseconds(span: ReadableSpan, begin: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None
    assert span.end_time is not None
    assert begin.start_time is not None
    return (span.start_time - begin.start_time) / 1e6, (span.end_time - begin.start_time) / 1e6


def test_a_request_is_a_server_span_with_its_stages() -> None:
    spans = recorded()
    one = tracker(spans)
    one.facts.max_tokens, one.facts.temperature, one.facts.top_p, one.facts.top_k = 64, 0.5, 0.9, 4
    one.facts.num_sequences, one.facts.finish_reasons = 2, ("stop", "length")
    one.finish("length")
    server, (queue, encode, decode) = spans.server(), spans.children()
    assert (server.name, server.kind, server.parent) == ("text_completion default", SpanKind.SERVER, None)
    assert server.status.status_code is StatusCode.UNSET
    attributes = dict(server.attributes or {})
    total = attributes.pop("gen_ai.latency.e2e")
    assert isinstance(total, float)
    assert total >= 0.05
    assert attributes.pop("gen_ai.latency.time_in_model_decode") == pytest.approx(total - 0.03)
    assert attributes.pop("gen_ai.latency.time_in_model_prefill") == pytest.approx(0.02)
    assert attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "flan-serve",
        "gen_ai.request.model": "default",
        "gen_ai.response.model": "flan",
        "gen_ai.response.id": "r1",
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 4,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ("stop", "length"),
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.latency.time_in_queue": 0.01,
        "gen_ai.latency.time_to_first_token": 0.03,
        "flan.protocol": "rest",
        "flan.route": "generate",
        "flan.mode": "cot",
        "flan.outcome": "length",
    }
    assert [span.name for span in (queue, encode, decode)] == ["queue", "encode", "decode"]
    assert milliseconds(queue, server) == pytest.approx((0, 10), abs=0.01)
    assert milliseconds(encode, server) == pytest.approx((10, 30), abs=0.01)
    assert milliseconds(decode, server) == pytest.approx((30, 1000 * total), abs=0.01)
    assert server.start_time is not None
    assert abs(time.time_ns() - server.start_time) < 5e9


@pytest.mark.parametrize(
    ("error", "is_failure"),
    [
        (EngineFailure("CANARY"), True),
        (ValueError("CANARY"), True),
        (DeadlineExceeded("CANARY"), True),
        (Unavailable("CANARY"), True),
        (InvalidRequest("CANARY", field="top_p"), False),
        (Unauthorized("CANARY"), False),
        (QueueFull("CANARY"), False),
        (Cancelled("CANARY"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_failure_is_an_error_and_a_clients_doing_is_none(error: Exception, is_failure: bool) -> None:
    spans = recorded()
    tracker(spans).fail(error)
    server = spans.server()
    assert server.status.status_code is (StatusCode.ERROR if is_failure else StatusCode.UNSET)
    kind = error.kind if isinstance(error, ServeError) else "internal"
    assert (server.attributes or {})["error.type"] == kind
    assert server.status.description == (kind if is_failure else None)
    assert server.end_time is not None
    assert "CANARY" not in spans.text()


def test_stages_end_where_the_request_ended() -> None:
    spans = recorded()
    one = tracker(spans)
    one.first_token_seconds = None
    one.fail(Cancelled("gone"))
    assert [span.name for span in spans.children()] == ["queue", "encode"]
    assert spans.children()[-1].end_time == spans.server().end_time
    spans.clear()
    one = tracker(spans)
    one.queue_seconds = one.first_token_seconds = None
    one.fail(Cancelled("gone"))
    assert [span.name for span in spans.children()] == ["queue"]
    assert "gen_ai.usage.input_tokens" not in (spans.server().attributes or {})
    spans.clear()
    one = tracker(spans)
    one.queue_seconds = one.first_token_seconds = None
    one.facts.accepted = False
    one.fail(QueueFull("full"))
    assert spans.children() == []


def test_scoring_and_tokenizing() -> None:
    spans = recorded()
    one = tracker(spans, Route.SCORE)
    one.first_token_seconds = None
    one.finish("stop")
    assert spans.server().name == "score default"
    assert [span.name for span in spans.children()] == ["queue", "score"]
    spans.clear()
    Metrics(on_request_end=on_request_end(spans.tracing)).track(Protocol.GRPC, Route.TOKENIZE).finish("stop")
    assert (spans.server().name, spans.children()) == ("tokenize", [])


@pytest.mark.parametrize(
    ("flags", "is_recorded"),
    [("01", True), ("00", False)],
)
def test_the_clients_trace_goes_on_and_its_sampling_too(
    flags: str, is_recorded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flan.requests")
    spans = recorded()
    one = tracker(spans)
    one.facts.parent = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}", "tracestate": "a=b"}
    one.finish("stop")
    fields: dict[str, Any] = caplog.records[-1].__dict__["flan_fields"]
    assert fields["trace_id"] == TRACE
    assert len(spans.exporter.get_finished_spans()) == (4 if is_recorded else 0)
    if is_recorded:
        server = spans.server()
        assert server.parent is not None
        assert server.context is not None
        assert (server.context.trace_id, server.parent.span_id) == (int(TRACE, 16), int(PARENT, 16))
        assert fields["span_id"] == f"{server.context.span_id:016x}"
        assert server.context.trace_state.get("a") == "b"


@pytest.mark.parametrize("header", ["", "CANARY", "00-zz-zz-01", f"00-{'0' * 32}-{PARENT}-01"])
def test_no_valid_parent_begins_a_new_trace(header: str) -> None:
    spans = recorded()
    one = tracker(spans)
    one.facts.parent = {"traceparent": header}
    one.finish("stop")
    assert spans.server().parent is None
    assert "CANARY" not in spans.text()


@pytest.mark.parametrize(
    ("environ", "exporters"),
    [
        ({}, ()),
        ({"OTEL_SERVICE_NAME": "x"}, ()),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, ()),
        (OTLP, ("otlp",)),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://a:4317"}, ("otlp",)),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, ("otlp",)),
        ({"OTEL_TRACES_EXPORTER": "console, OTLP"}, ("console", "otlp")),
        ({**OTLP, "OTEL_TRACES_EXPORTER": "none"}, ()),
        ({**OTLP, "OTEL_SDK_DISABLED": "True"}, ()),
        ({**OTLP, "OTEL_SDK_DISABLED": "false"}, ("otlp",)),
    ],
)
def test_the_environment_switches_it_on(environ: dict[str, str], exporters: tuple[str, ...]) -> None:
    assert tracing.asked_exporters(environ) == exporters
    if not exporters:
        assert tracing.start(environ) is None


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER may be otlp, console or none, not 'zipkin'"),
        ({**OTLP, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "may be grpc or http/protobuf, not 'http/json'"),
        ({**OTLP, "OTEL_EXPORTER_OTLP_COMPRESSION": "lz"}, 'Invalid value "lz"'),
    ],
)
def test_what_there_is_not_is_said_and_the_server_goes_on(
    environ: dict[str, str], words: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    assert tracing.start(environ) is None
    assert words in caplog.text


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert tracing.start(OTLP) is None
    assert "pip install 'flan-serve[telemetry]'" in caplog.text


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, "flan-serve"),
        ({"OTEL_SERVICE_NAME": "mine"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "a=b,service.name=theirs"}, "theirs"),
    ],
)
def test_the_services_name(environ: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    exporter = InMemorySpanExporter()
    made = tracing.start({**OTLP, **environ}, lambda: [SimpleSpanProcessor(exporter)])
    assert made is not None
    Metrics(on_request_end=on_request_end(made)).track(Protocol.REST, Route.GENERATE).finish("stop")
    [span] = exporter.get_finished_spans()
    assert span.resource.attributes["service.name"] == name
    assert span.resource.attributes["service.version"]


async def test_the_end_exports_what_is_left_and_waits_no_longer_than_it_may() -> None:
    released = threading.Event()

    class Stuck(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            return SpanExportResult.SUCCESS

        def shutdown(self) -> None:
            released.wait(30)

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(Stuck()))
    begun = time.monotonic()
    await tracing.Tracing(provider).stop(0.2)
    assert time.monotonic() - begun < 2
    released.set()


async def test_a_collectors_key_that_cannot_be_read_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {**OTLP, "OTEL_EXPORTER_OTLP_HEADERS": "authorization Bearer sesame"}
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    with everything_logged() as log:
        made = tracing.start(environ)
        assert made is not None
        await made.stop(5)
    assert "OTEL_EXPORTER_OTLP_HEADERS is not a list" in log.getvalue()
    assert "sesame" not in log.getvalue()


def test_off_it_imports_nothing() -> None:
    code = "import sys, serve.__main__, serve.tracing; assert serve.tracing.start({}) is None; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = done.stdout.split()
    assert "serve.tracing" in names
    assert [name for name in names if name.startswith("opentelemetry")] == []
