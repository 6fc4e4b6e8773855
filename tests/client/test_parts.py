"""The client's parts by themselves: events, retries, foreign answers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.flan.v1 import generation_pb2 as pb
from serve.client import FlanClient
from serve.client.calls import parse_url
from serve.client.messages import fill, to_json, to_serve_error
from serve.client.rest import to_serve_error as to_rest_error
from serve.client.retries import Retries, parse_retry_after
from serve.client.sse import EventDecoder, GenerationEvents
from serve.client.wire import ERRORS, Call
from serve.errors import (
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    NotFound,
    QueueFull,
    ServeError,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from serve.rpc.errors import to_trailers


@settings(max_examples=50)
@given(st.lists(st.text(max_size=20), max_size=10), st.integers(1, 9))
def test_events_survive_any_cut(texts: list[str], size: int) -> None:
    raw = b"".join(
        b"data: " + json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n: keepalive\n\n"
        for text in texts
    )
    decoder = EventDecoder()
    data = [item for start in range(0, len(raw), size) for item in decoder.feed(raw[start : start + size])]
    expected = [text.encode("utf-8", "replace").decode() for text in texts]
    assert [json.loads(item)["text"] for item in data] == expected


def feed(events: GenerationEvents, *frames: dict[str, Any] | str) -> list[dict[str, Any]]:
    return [event for frame in frames for event in events.feed(frame if isinstance(frame, str) else json.dumps(frame))]


def test_frames_become_deltas_and_a_final() -> None:
    events = GenerationEvents()
    made = feed(
        events,
        {"index": 1, "text": "a", "logprobs": [1]},
        {"index": 0, "text": "x", "finish_reason": "length"},
        {"index": 1, "text": "b", "logprobs": [2], "finish_reason": "stop", "stop_reason": "c"},
        {"usage": {}, "outputs": [{"index": 0, "text": "x", "answer": None}]},
        "[DONE]",
    )
    assert [list(event) for event in made] == [["delta"], ["delta"], ["delta"], ["final"]]
    assert made[-1]["final"]["outputs"] == [
        {"index": 0, "text": "x", "logprobs": [], "finish_reason": "length", "answer": None},
        {"index": 1, "text": "ab", "logprobs": [1, 2], "finish_reason": "stop", "stop_reason": "c"},
    ]
    events.check_ended()


def test_a_stream_that_ends_in_silence_is_a_failure() -> None:
    events = GenerationEvents()
    feed(events, {"index": 0, "text": "a"})
    with pytest.raises(EngineFailure, match="early"):
        events.check_ended()


def test_an_error_frame_raises() -> None:
    frame = {"error": {"message": "late", "type": "t", "param": None, "code": "deadline"}}
    with pytest.raises(DeadlineExceeded, match="late"):
        feed(GenerationEvents(), frame)


@pytest.mark.parametrize(
    ("response", "error", "retry"),
    [
        (httpx.Response(502, text="<html>bad gateway</html>"), Unavailable, None),
        (httpx.Response(503, json=["odd"], headers={"retry-after": "7"}), Unavailable, 7.0),
        (httpx.Response(503, headers={"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}), Unavailable, None),
        (httpx.Response(503, headers={"retry-after": "0.5"}), Unavailable, 0.5),
        (httpx.Response(301, headers={"location": "https://elsewhere"}), EngineFailure, None),
        (httpx.Response(413, text=""), TooLarge, None),
        (httpx.Response(401, json={"error": "who?"}), Unauthorized, None),
        (httpx.Response(404, json={"detail": "Not Found"}), NotFound, None),
        (httpx.Response(500, text="boom"), EngineFailure, None),
        (
            httpx.Response(400, json={"error": {"message": "no", "param": "n", "code": "new_kind"}}),
            InvalidRequest,
            None,
        ),
    ],
)
def test_answers_of_proxies(response: httpx.Response, error: type[ServeError], retry: float | None) -> None:
    made = to_rest_error(response)
    assert (type(made), made.retry_after_seconds) == (error, retry)


@pytest.mark.parametrize(
    "text", ["", "soon", "-1", "0", "nan", "inf", "1e999", "Wed, 21 Oct", "Wed, 99 Oct 2015 07:28:00 GMT"]
)
def test_a_retry_after_that_says_nothing(text: str) -> None:
    assert parse_retry_after(text) is None


@pytest.mark.parametrize("zone", ["GMT", "-0000", "+0000"])
def test_a_retry_after_that_is_a_date(zone: str) -> None:
    date = datetime.now(UTC) + timedelta(seconds=60)
    seconds = parse_retry_after(f"{date:%a, %d %b %Y %H:%M:%S} {zone}")
    assert seconds is not None
    assert 55 < seconds <= 60


async def test_an_answer_that_is_not_json() -> None:
    """A page of something in between, under status 200."""
    page = httpx.MockTransport(lambda request: httpx.Response(200, html="<html>log in</html>"))
    with FlanClient("http://nowhere") as client, mounted(client, httpx.Client(transport=page, base_url="http://x")):
        with pytest.raises(EngineFailure, match="not JSON"):
            client.generate("x")
        with pytest.raises(EngineFailure, match="early"):
            list(client.stream("x"))


def test_what_a_deadline_says_to_the_socket() -> None:
    """Nobody waits ten seconds for a connection in a call that may take one."""
    seen: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append({**request.extensions["timeout"], "header": int(request.headers.get("x-request-timeout-ms", 0))})
        return httpx.Response(200, json={"token_ids": [], "unknown_tokens": 0})

    http = httpx.Client(
        transport=httpx.MockTransport(answer), base_url="http://x", timeout=httpx.Timeout(None, connect=9)
    )
    with FlanClient("http://nowhere") as client, mounted(client, http):
        client.tokenize("x", timeout=1.0)
        client.tokenize("x")
    limited, unlimited = seen
    assert 900 <= limited["header"] <= 1000
    assert 0.9 <= limited["connect"] <= 1.0
    assert 2.9 <= limited["read"] == limited["write"] <= 3.0
    assert unlimited == {"connect": 9, "read": None, "write": None, "pool": None, "header": 0}


@pytest.mark.parametrize(
    ("failure", "timeout", "error"),
    [
        (httpx.ConnectTimeout("x"), 0.02, DeadlineExceeded),
        (httpx.ConnectTimeout("x"), 60, Unavailable),
        (httpx.ConnectError("x"), 60, Unavailable),
        (httpx.ReadTimeout("x"), 60, DeadlineExceeded),
        (httpx.WriteTimeout("x"), 60, DeadlineExceeded),
        (httpx.RemoteProtocolError("x"), None, Unavailable),
    ],
)
def test_what_a_socket_that_fails_means(
    failure: httpx.HTTPError, timeout: float | None, error: type[ServeError]
) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise failure

    http = httpx.Client(transport=httpx.MockTransport(fail), base_url="http://x")
    with FlanClient("http://nowhere", max_retries=0) as client, mounted(client, http):
        with pytest.raises(error):
            client.generate("x", timeout=timeout)
        with pytest.raises(error):
            list(client.stream("x", timeout=timeout))


@contextmanager
def mounted(client: FlanClient, http: httpx.Client) -> Iterator[None]:
    """The client over another HTTP client."""
    transport: Any = client._transport
    transport.close()
    transport._http = http
    yield


def test_the_key_is_not_shown() -> None:
    server, _ = parse_url("http://host", "sesame", 8, None)
    assert "sesame" not in repr(server)
    assert server.headers == {"authorization": "Bearer sesame"}


@dataclass
class Status:
    """A status that somebody else than our server made."""

    status: grpc.StatusCode
    trailers: tuple[tuple[str, str | bytes], ...] = ()
    text: str = ""

    def code(self) -> grpc.StatusCode:
        return self.status

    def details(self) -> str:
        return self.text

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self.trailers


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, QueueFull),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.INTERNAL, EngineFailure),
        (grpc.StatusCode.UNKNOWN, EngineFailure),
        (grpc.StatusCode.PERMISSION_DENIED, EngineFailure),
    ],
)
def test_statuses_of_proxies(code: grpc.StatusCode, error: type[ServeError]) -> None:
    assert type(to_serve_error(Status(code))) is error
    assert type(to_serve_error(Status(code, (("grpc-status-details-bin", b"\xff\xff"),)))) is error
    assert code.name in to_serve_error(Status(code)).message


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("SERVER: Received message larger than max (60004 vs. 52428)", TooLarge),
        ("Sent message larger than max (9 vs. 8)", TooLarge),
        ("gRPC message exceeds maximum size 4194304: 5000000", TooLarge),
        ("received trailing metadata size exceeds hard limit", TooLarge),
        ("rate limited", QueueFull),
        ("the rate exceeds the quota", QueueFull),
    ],
)
def test_an_exhausted_resource_is_a_size_or_a_rate(text: str, error: type[ServeError]) -> None:
    assert type(to_serve_error(Status(grpc.StatusCode.RESOURCE_EXHAUSTED, text=text))) is error


def test_a_gateways_retry_after() -> None:
    made = to_serve_error(Status(grpc.StatusCode.UNAVAILABLE, (("retry-after", "7"),)))
    assert (type(made), made.retry_after_seconds) == (Unavailable, 7.0)
    details = dict(to_trailers(QueueFull("full", retry_after_seconds=3.0)))
    made = to_serve_error(Status(grpc.StatusCode.RESOURCE_EXHAUSTED, (("retry-after", "7"), *details.items())))
    assert (type(made), made.retry_after_seconds) == (QueueFull, 3.0)


def test_every_kind_of_error_can_be_read() -> None:
    known = {error.kind for error in ServeError.__subclasses__()} | {"too_large", "method_not_allowed"}
    assert set(ERRORS) == known


def test_messages_to_json_and_back() -> None:
    body = {
        "mode": "few_shot",
        "instruction": "x",
        "options": ["a", "b"],
        "exemplars": [{"input": "i", "output": ""}],
        "answer_format": "number",
        "debug": False,
        "max_tokens": 2**62,
        "temperature": 0.0,
        "stop": ["s"],
    }
    message = pb.GenerateRequest()
    fill(message, body)
    assert to_json(message) == body | {"logit_bias": []}
    fill(message, {"stop": "one", "logit_bias": {3: -1.5}})
    assert (list(message.stop), dict(message.logit_bias)) == (["s", "one"], {3: -1.5})


def test_retries() -> None:
    retries, call = Retries(2), Call("model", {})
    assert retries.delay_seconds(InvalidRequest("x"), 0, call) is None
    assert retries.delay_seconds(EngineFailure("x"), 0, call) is None
    for error in (QueueFull("x"), Unavailable("x")):
        first, second = (retries.delay_seconds(error, made, call) for made in (0, 1))
        assert first is not None
        assert second is not None
        assert 0.25 <= first <= 0.3125
        assert 0.5 <= second <= 0.625
        assert retries.delay_seconds(error, 2, call) is None
    asked = retries.delay_seconds(QueueFull("x", retry_after_seconds=2.0), 0, call)
    assert asked is not None
    assert 2.0 <= asked <= 2.5
    most = retries.delay_seconds(Unavailable("x", retry_after_seconds=3600.0), 0, call)
    assert most is not None
    assert most <= 12.5
    patient = Retries(10**6).delay_seconds(QueueFull("x"), 10**6 - 1, call)
    assert patient is not None
    assert 10.0 <= patient <= 12.5
    soon = Call("model", {}, expires=time.monotonic() + 1.0)
    assert retries.delay_seconds(QueueFull("x", retry_after_seconds=2.0), 0, soon) is None


def test_the_client_needs_neither_a_model_nor_a_server() -> None:
    code = "import sys, serve.client; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"serve", "grpc", "httpx"} <= loaded
    assert not loaded & {"torch", "transformers", "tokenizers", "fastapi", "starlette", "uvicorn", "prometheus_client"}
