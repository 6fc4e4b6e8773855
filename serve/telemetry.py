"""Logs: one line for each request and each event of the server, as JSON or as text.

Fields come from closed lists (`RequestRecord` has no place for a prompt, an output or a key), and nothing here logs
a client's words: what a client sent is named by field, not quoted.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TextIO

from serve.metrics import Outcome, RequestRecord

_ROOTS = ("flan", "serve")  # named loggers, and those that modules name after themselves
_requests = logging.getLogger("flan.requests")
_events = logging.getLogger("flan.events")
_FIELDS = "flan_fields"  # where a record carries its fields


def configure(log_format: str = "auto", stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send the server's logs to `stream` (default: standard error) as "json", "text" or "auto": text on a terminal,
    else JSON.

    Called once, by the composition root; other libraries' loggers stay as they are.
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


def log_request(record: RequestRecord) -> None:
    """One line for a finished request; given to `Metrics` as `on_request_end`."""
    fields = {name: _rounded(value) for name, value in asdict(record).items() if value is not None}
    level = logging.ERROR if record.outcome is Outcome.ERROR else logging.INFO
    _requests.log(level, "request", extra={_FIELDS: fields})


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
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info is not None and record.exc_info[0] is not None:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """For eyes: `12:00:01.250 INFO request outcome=stop total_ms=12.5`."""

    def format(self, record: logging.LogRecord) -> str:
        clock = _timestamp(record.created)[11:23]
        parts = [clock, record.levelname, record.getMessage()]
        parts += [f"{name}={_shown(value)}" for name, value in _fields(record).items()]
        line = " ".join(parts)
        if record.exc_info is not None and record.exc_info[0] is not None:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, _FIELDS, {})
    return fields


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
