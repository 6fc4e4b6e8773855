from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
from collections.abc import Iterator

import pytest

from serve import telemetry
from serve.metrics import Outcome, Protocol, RequestRecord, Route
from serve.tracing import TraceIds
from tests.service.loggers import kept_loggers

RECORD = RequestRecord(
    Protocol.REST, Route.GENERATE, "cot", Outcome.STOP, 12.34567, request_id="r 1", prompt_tokens=3, queue_ms=0.0
)


CANARY = "a client's words"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored_loggers() -> Iterator[None]:
    with kept_loggers():
        yield


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
        logging.getLogger("serve.runtimes.torch_runtime").exception("request %s failed", "r1")
    fields = json.loads(stream.getvalue())
    assert (fields["level"], fields["message"]) == ("error", "request r1 failed")
    assert "ValueError: inner" in fields["traceback"]


def raise_with_words(words: str) -> None:
    """An error with a cause and a group, each of which quotes `words`."""
    try:
        try:
            raise KeyError(words)
        except KeyError as error:
            raise ValueError(f"cannot read {words}") from error
    except ValueError as error:
        raise ExceptionGroup(f"about {words}", [error, TypeError(words)]) from None


@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.parametrize("logger", ["serve.rest.endpoint", "serve.rpc.handlers", "serve.service", "uvicorn.error"])
def test_near_clients_a_traceback_has_frames_and_types_and_no_words(logger: str, log_format: str) -> None:
    stream = io.StringIO()
    telemetry.configure(log_format, stream)
    try:
        raise_with_words(CANARY)
    except ExceptionGroup:
        logging.getLogger(logger).exception("a handler failed")
    text = stream.getvalue()
    assert CANARY not in text
    for word in ("builtins.ExceptionGroup", "builtins.ValueError", "builtins.KeyError", "builtins.TypeError"):
        assert word in text
    assert "in raise_with_words" in text


async def test_what_asyncio_lost_is_told_without_its_words() -> None:
    stream = io.StringIO()
    telemetry.configure("json", stream)

    async def fail() -> None:
        raise ValueError(CANARY)

    task = asyncio.create_task(fail())
    await asyncio.wait([task])
    del task
    gc.collect()
    [line] = stream.getvalue().splitlines()
    assert json.loads(line)["message"] == "Task exception was never retrieved"
    assert "builtins.ValueError" in line
    assert CANARY not in line


def test_libraries_are_heard_from_warnings_on() -> None:
    stream = io.StringIO()
    telemetry.configure("json", stream)
    logging.getLogger("opentelemetry.exporter").warning("no collector\nsecond line")
    logging.getLogger("uvicorn.error").info("connected")
    [line] = stream.getvalue().splitlines()
    assert (json.loads(line)["logger"], json.loads(line)["message"]) == ("opentelemetry.exporter", "no collector")


def test_a_request_in_a_trace_says_which() -> None:
    stream = io.StringIO()
    telemetry.configure("json", stream)
    telemetry.log_request(RECORD, TraceIds("a" * 32, "b" * 16))
    fields = json.loads(stream.getvalue())
    assert (fields["trace_id"], fields["span_id"]) == ("a" * 32, "b" * 16)


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
