"""Logs: one line for each request and each event of the server, as JSON or as text.

Fields come from closed lists (`RequestRecord` has no place for a prompt, an output or a key), and nothing here logs
a client's words: what a client sent is named by field, not quoted. An exception that came up where a request's text is
at hand may quote it, so its traceback has every frame and type, and no message.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, TextIO

from serve.request_tracker import Outcome, RequestRecord
from serve.tracing import TraceIds, Tracing

_ROOTS = ("flan", "serve")  # named loggers, and those that modules name after themselves
_LIBRARIES = ("uvicorn", "grpc", "asyncio", "opentelemetry")  # what they complain of comes as lines of ours
# Loggers of code that has a client's words at hand. The engine and its runtimes have only token ids.
_NEAR_CLIENTS = (
    *("serve.rest", "serve.rpc", "serve.service", "serve.response_stream", "serve.scoring", "serve.prepare"),
    *_LIBRARIES,
)
# OpenTelemetry's reader of header variables quotes what it cannot read, which is a collector's key as a rule.
_READS_HEADERS = ("opentelemetry.util.re",)
_BAD_HEADERS = (
    "OTEL_EXPORTER_OTLP_HEADERS is not a list of key=value with URL-encoded values; what is wrong is left out"
)
_NOT_LOGGED = frozenset({"facts"})
_requests = logging.getLogger("flan.requests")
_events = logging.getLogger("flan.events")
_FIELDS = "flan_fields"  # where a record carries its fields


def configure(log_format: str = "auto", stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send the server's logs to `stream` (default: standard error) as "json", "text" or "auto": text on a terminal,
    else JSON.

    Called once, by the composition root. The libraries that carry requests write there too, what is a warning or
    worse; others' loggers stay as they are.
    """
    target = sys.stderr if stream is None else stream
    as_text = log_format == "text" or (log_format == "auto" and target.isatty())
    handler = logging.StreamHandler(target)
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    for name in _ROOTS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
    for name in _LIBRARIES:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(max(level, logging.WARNING))
        logger.propagate = False


def on_request_end(tracing: Tracing | None) -> Callable[[RequestRecord], None]:
    """What `Metrics` is to call at each request's end: the spans, where tracing is on, and the line."""
    if tracing is None:
        return log_request
    return lambda record: log_request(record, tracing.record(record))


def log_request(record: RequestRecord, trace: TraceIds | None = None) -> None:
    """One line for a finished request, with its place in a trace where there is one."""
    said = {spec.name: getattr(record, spec.name) for spec in fields(record) if spec.name not in _NOT_LOGGED}
    if trace is not None:
        said |= {"trace_id": trace.trace_id, "span_id": trace.span_id}
    line = {name: _rounded(value) for name, value in said.items() if value is not None}
    level = logging.ERROR if record.outcome is Outcome.ERROR else logging.INFO
    _requests.log(level, "request", extra={_FIELDS: line})


def log_event(message: str, level: int = logging.INFO, **fields: Any) -> None:
    """One line for an event of the server (started, draining, …); `fields` must never hold a prompt or a key."""
    _events.log(level, message, extra={_FIELDS: fields})


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **_fields(record),
        }
        if record.exc_info is not None and record.exc_info[0] is not None:
            line["traceback"] = _traceback(record.name, record.exc_info[1])
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """For eyes: `12:00:01.250 INFO request outcome=stop total_ms=12.5`."""

    def format(self, record: logging.LogRecord) -> str:
        clock = _timestamp(record.created)[11:23]
        parts = [clock, record.levelname, _message(record)]
        parts += [f"{name}={_shown(value)}" for name, value in _fields(record).items()]
        line = " ".join(parts)
        if record.exc_info is not None and record.exc_info[0] is not None:
            line += "\n" + _traceback(record.name, record.exc_info[1])
        return line


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, _FIELDS, {})
    return fields


def _message(record: logging.LogRecord) -> str:
    """The message; of a library's only the first line: asyncio's go on with the lost exception, quoted."""
    if _is_of(record.name, _READS_HEADERS):
        return _BAD_HEADERS
    message = record.getMessage()
    return message.strip().partition("\n")[0] if _is_of(record.name, _LIBRARIES) else message


def _traceback(logger: str, error: BaseException | None) -> str:
    """The error's traceback; without any exception's message where that may quote a client."""
    if error is None:
        return ""
    if not _is_of(logger, _NEAR_CLIENTS):
        return "".join(traceback.format_exception(error)).rstrip("\n")
    return "\n".join(_frames(error, set()))


def _frames(error: BaseException, seen: set[int]) -> Iterator[str]:
    """Frames and type of the error, those that led to it first, those in a group last."""
    seen.add(id(error))
    before = error.__cause__ if error.__cause__ is not None or error.__suppress_context__ else error.__context__
    if before is not None and id(before) not in seen:
        yield from _frames(before, seen)
        yield "then:"
    yield "Traceback (most recent call last):"
    yield "".join(traceback.format_tb(error.__traceback__)).rstrip("\n")
    yield f"{type(error).__module__}.{type(error).__qualname__}"
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield "in it:"
            yield from _frames(one, seen)


def _is_of(logger: str, roots: tuple[str, ...]) -> bool:
    return any(logger == root or logger.startswith(root + ".") for root in roots)


def _timestamp(seconds: float) -> str:
    """UTC with milliseconds, e.g. 2026-11-25T12:00:01.250Z."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"


def _rounded(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


def _shown(value: Any) -> str:
    """A value on a text line; quoted where it has spaces or could break the line."""
    text = str(value)
    return text if text and text.isprintable() and " " not in text else json.dumps(text)
