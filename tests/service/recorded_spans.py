"""Tracing into memory, and the spans of the one request that a test made."""

from __future__ import annotations

from dataclasses import dataclass

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from serve.tracing import Tracing


@dataclass
class Recorded:
    tracing: Tracing
    exporter: InMemorySpanExporter

    def servers(self) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.kind is SpanKind.SERVER]

    def server(self) -> ReadableSpan:
        """The one server span."""
        [span] = self.servers()
        return span

    def children(self, of: ReadableSpan | None = None) -> list[ReadableSpan]:
        """The children of a server span (default: the one), by their beginning."""
        parent = self.server() if of is None else of
        assert parent.context is not None
        own = parent.context.span_id
        spans = self.exporter.get_finished_spans()
        found = [span for span in spans if span.parent is not None and span.parent.span_id == own]
        return sorted(found, key=lambda span: (span.start_time or 0, span.end_time or 0))

    def text(self) -> str:
        """All that would be exported."""
        return "\n".join(span.to_json() for span in self.exporter.get_finished_spans())

    def clear(self) -> None:
        self.exporter.clear()


def recorded() -> Recorded:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Recorded(Tracing(provider), exporter)
