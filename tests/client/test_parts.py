"""The client's parts by themselves: events, retries, foreign answers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.flan.v1 import generation_pb2 as pb
from serve.client.messages import fill, to_json, to_serve_error
from serve.client.rest import to_serve_error as to_rest_error
from serve.client.retries import Retries
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
        (httpx.Response(503, headers={"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}), Unavailable, None),
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


@dataclass
class Status:
    """A status that somebody else than our server made."""

    status: grpc.StatusCode
    trailers: tuple[tuple[str, bytes], ...] = ()

    def code(self) -> grpc.StatusCode:
        return self.status

    def details(self) -> str:
        return ""

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self.trailers


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, TooLarge),
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
    soon = Call("model", {}, expires=time.monotonic() + 1.0)
    assert retries.delay_seconds(QueueFull("x", retry_after_seconds=2.0), 0, soon) is None


def test_the_client_needs_neither_a_model_nor_a_server() -> None:
    code = "import sys, serve.client; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"serve", "grpc", "httpx"} <= loaded
    assert not loaded & {"torch", "transformers", "tokenizers", "fastapi", "starlette", "uvicorn", "prometheus_client"}
