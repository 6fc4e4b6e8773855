from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from serve import telemetry
from serve.metrics import Outcome, Protocol, RequestRecord, Route

RECORD = RequestRecord(
    Protocol.REST, Route.GENERATE, "cot", Outcome.STOP, 12.34567, request_id="r 1", prompt_tokens=3, queue_ms=0.0
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored_loggers() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("flan", "serve")]
    kept = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, handlers, level, propagate in kept:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_a_request_as_json() -> None:
    stream = io.StringIO()
    telemetry.configure("json", stream)
    telemetry.log_request(RECORD)
    [line] = stream.getvalue().splitlines()
    fields = json.loads(line)
    assert fields.pop("time").endswith("Z")
    assert fields == {
        "level": "info",
        "logger": "flan.requests",
        "message": "request",
        "protocol": "rest",
        "route": "generate",
        "mode": "cot",
        "outcome": "stop",
        "total_ms": 12.346,
        "request_id": "r 1",
        "queue_ms": 0.0,
        "prompt_tokens": 3,
        "completion_tokens": 0,
    }


def test_a_request_as_text_is_one_line_whatever_its_id_holds() -> None:
    stream = io.StringIO()
    telemetry.configure("text", stream)
    telemetry.log_request(RECORD)
    telemetry.log_request(RequestRecord(Protocol.GRPC, Route.SCORE, "none", Outcome.ERROR, 1.0, request_id="a\nb"))
    first, second = stream.getvalue().splitlines()
    assert 'outcome=stop total_ms=12.346 request_id="r 1"' in first
    assert " ERROR request protocol=grpc" in second
    assert 'request_id="a\\nb"' in second


@pytest.mark.parametrize(("stream", "is_json"), [(io.StringIO(), True), (Terminal(), False)])
def test_auto_is_text_on_a_terminal_else_json(stream: io.StringIO, is_json: bool) -> None:
    telemetry.configure("auto", stream)
    telemetry.log_event("ready", port=8000)
    line = stream.getvalue()
    assert line.startswith("{") == is_json
    assert ('"port": 8000' if is_json else "port=8000") in line


def test_modules_that_log_under_their_own_name_come_too() -> None:
    stream = io.StringIO()
    telemetry.configure("json", stream)
    try:
        raise ValueError("inner")
    except ValueError:
        logging.getLogger("serve.service").exception("request %s failed", "r1")
    fields = json.loads(stream.getvalue())
    assert (fields["level"], fields["message"]) == ("error", "request r1 failed")
    assert "ValueError: inner" in fields["traceback"]


def test_a_traceback_as_text() -> None:
    stream = io.StringIO()
    telemetry.configure("text", stream)
    try:
        raise ValueError("inner")
    except ValueError:
        logging.getLogger("flan.x").exception("oops")
    assert "ValueError: inner" in stream.getvalue()


def test_configuring_twice_writes_once() -> None:
    stream = io.StringIO()
    telemetry.configure("json", stream)
    telemetry.configure("json", stream)
    telemetry.log_event("ready")
    assert len(stream.getvalue().splitlines()) == 1
