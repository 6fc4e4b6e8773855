"""Optional OpenTelemetry tracing: one server span a request, with a child for each stage, made when the request ends.

Configured as every OpenTelemetry program is, through the standard OTEL_* variables, and off unless one of them asks for
it; only then is `opentelemetry` (the `telemetry` extra) imported. A span is made of a RequestRecord, whose fields are a
closed list, so no prompt, output or key can get into one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from serve.request_tracker import RequestRecord, Route, TraceFacts

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

DEFAULT_SERVICE_NAME = "flan-serve"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_OPERATIONS = {Route.CHAT: "chat", Route.SCORE: "score", Route.TOKENIZE: "tokenize"}
_TEXT_COMPLETION = "text_completion"
# As HTTP's and gRPC's conventions have it for a server: what the client did wrong, or wanted no more, is no error.
_FAILURES = frozenset({"error", "internal", "engine_failure", "unavailable", "deadline"})
_log = logging.getLogger("flan.tracing")


@dataclass(frozen=True, slots=True)
class TraceIds:
    """A request's place in a trace, in hexadecimal as W3C writes it."""

    trace_id: str
    span_id: str


class Tracing:
    """Turns finished requests into spans.

    Args:
        provider: where spans go; ended by `stop`.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("flan-serve", _version())

    def record(self, record: RequestRecord) -> TraceIds:
        """Make the request's spans; costs microseconds, the export is another thread's."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        facts = TraceFacts(started_ns=0) if record.facts is None else record.facts
        operation = _OPERATIONS.get(record.route, _TEXT_COMPLETION)
        name = operation if facts.requested_model is None else f"{operation} {facts.requested_model}"
        span = self._tracer.start_span(
            name,
            context=TraceContextTextMapPropagator().extract(dict(facts.parent)),
            kind=trace.SpanKind.SERVER,
            attributes=_attributes(operation, record, facts),
            start_time=facts.started_ns,
        )
        if record.error in _FAILURES:
            span.set_status(trace.Status(trace.StatusCode.ERROR, record.error))
        if span.is_recording() and facts.accepted:
            self._add_stages(span, record, facts)
        span.end(_at(facts, record.total_ms))
        context = span.get_span_context()
        return TraceIds(trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id))

    async def stop(self, seconds: float) -> None:
        """Export what is still here, in at most `seconds`; what a collector does not take by then is lost."""
        done, loop = asyncio.Event(), asyncio.get_running_loop()

        def flush() -> None:
            try:
                self._provider.shutdown()
            finally:
                with contextlib.suppress(RuntimeError):  # nobody waits any more, and the loop is closed
                    loop.call_soon_threadsafe(done.set)

        # A daemon, because the loop's own threads would be waited for at exit, whatever a collector does.
        threading.Thread(target=flush, name="flush-traces", daemon=True).start()
        try:
            await asyncio.wait_for(done.wait(), seconds)
        except TimeoutError:
            _log.warning("traces could not be exported in %.1f s; the last ones are lost", seconds)

    def _add_stages(self, parent: Span, record: RequestRecord, facts: TraceFacts) -> None:
        """The children, one after the other: `queue`, then `encode` up to the first token and `decode`, or `score`."""
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(parent)
        for name, begin_ms, end_ms in _stages(record):
            child = self._tracer.start_span(name, context=context, start_time=_at(facts, begin_ms))
            child.end(_at(facts, end_ms))


def start(environ: Mapping[str, str], processors: Callable[[], list[SpanProcessor]] | None = None) -> Tracing | None:
    """Tracing as the environment asks for it; None when it does not, or cannot be had (a warning says why).

    OTEL_TRACES_EXPORTER (otlp, console, none; a list) or an OTLP endpoint switches it on, OTEL_SDK_DISABLED off.

    Args:
        processors: instead of the exporters that the environment names.
    """
    names = asked_exporters(environ)
    if not names:
        return None
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider

        made = _processors(names, environ) if processors is None else processors()
    except ImportError as error:
        _log.warning(
            "no traces: OTEL_* variables ask for them, but %s is not installed; pip install 'flan-serve[telemetry]'",
            error.name,
        )
        return None
    except Exception as error:  # a variable that says what OpenTelemetry does not take
        _log.warning("no traces: %s", error)
        return None
    attributes: dict[str, str] = {SERVICE_VERSION: _version()}
    if not environ.get("OTEL_SERVICE_NAME") and "service.name=" not in environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        attributes[SERVICE_NAME] = DEFAULT_SERVICE_NAME
    provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
    for processor in made:
        provider.add_span_processor(processor)
    _log.info("traces go to %s", ", ".join(names))
    return Tracing(provider)


def asked_exporters(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Where the environment wants traces to go; empty = tracing is off.

    >>> asked_exporters({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"})
    ('otlp',)
    >>> asked_exporters({"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "true"})
    ()
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ()
    asked = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if not asked:
        return ("otlp",) if any(environ.get(name, "").strip() for name in _ENDPOINTS) else ()
    names = tuple(name.strip().lower() for name in asked.split(",") if name.strip())
    return () if "none" in names else names


def _processors(names: tuple[str, ...], environ: Mapping[str, str]) -> list[SpanProcessor]:
    """
    Raises:
        ValueError: an exporter or protocol that there is not. ImportError: one that is not installed.
    """
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor

    made: list[SpanProcessor] = []
    for name in names:
        if name == "otlp":
            made.append(BatchSpanProcessor(_otlp_exporter(environ)))
        elif name == "console":
            made.append(SimpleSpanProcessor(ConsoleSpanExporter()))
        else:
            raise ValueError(f"OTEL_TRACES_EXPORTER may be otlp, console or none, not {name!r}")
    return made


def _otlp_exporter(environ: Mapping[str, str]) -> SpanExporter:
    """The exporter for OTEL_EXPORTER_OTLP_PROTOCOL; the rest of its variables it reads itself."""
    protocol = next((environ[name].strip() for name in _PROTOCOLS if environ.get(name, "").strip()), "grpc")
    if protocol == "grpc":  # what OpenTelemetry's own set-up for Python takes, too
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter()
    raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL may be grpc or http/protobuf, not {protocol!r}")


def _attributes(operation: str, record: RequestRecord, facts: TraceFacts) -> dict[str, Any]:
    """GenAI's semantic conventions, vLLM's names for latencies (in seconds), and `flan.*` for what neither has."""
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "flan-serve",
        "gen_ai.request.model": facts.requested_model,
        "gen_ai.response.model": facts.served_model,
        "gen_ai.response.id": record.request_id,
        "gen_ai.request.max_tokens": facts.max_tokens,
        "gen_ai.request.temperature": facts.temperature,
        "gen_ai.request.top_p": facts.top_p,
        "gen_ai.request.top_k": facts.top_k,
        "gen_ai.request.choice.count": facts.num_sequences,
        "gen_ai.latency.e2e": record.total_ms / 1000,
        "gen_ai.latency.time_in_queue": _seconds(record.queue_ms),
        "gen_ai.latency.time_to_first_token": _seconds(record.first_token_ms),
        "gen_ai.response.finish_reasons": facts.finish_reasons if facts.finish_reasons else None,
        "flan.protocol": record.protocol.value,
        "flan.route": record.route.value,
        "flan.mode": record.mode,
        "flan.outcome": record.outcome.value,
        "error.type": record.error,
    }
    if record.queue_ms is not None:  # it began to run
        found["gen_ai.usage.input_tokens"] = record.prompt_tokens
        found["gen_ai.usage.output_tokens"] = record.completion_tokens
    if record.queue_ms is not None and record.first_token_ms is not None:
        found["gen_ai.latency.time_in_model_prefill"] = (record.first_token_ms - record.queue_ms) / 1000
        found["gen_ai.latency.time_in_model_decode"] = (record.total_ms - record.first_token_ms) / 1000
    return {name: value for name, value in found.items() if value is not None}


def _stages(record: RequestRecord) -> list[tuple[str, float, float]]:
    """(name, begin, end) in milliseconds since arrival; a request that ended early has the stages that it reached."""
    queue, first, end = record.queue_ms, record.first_token_ms, record.total_ms
    if queue is None:
        return [("queue", 0.0, end)]
    stages = [("queue", 0.0, queue)]
    if record.route is Route.SCORE:
        return [*stages, ("score", queue, end)]
    if first is None:
        return [*stages, ("encode", queue, end)]
    return [*stages, ("encode", queue, first), ("decode", first, end)]


def _at(facts: TraceFacts, milliseconds: float) -> int:
    return facts.started_ns + int(milliseconds * 1e6)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _version() -> str:
    try:
        return version("flan-serve")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0.0.0"
