"""Every way to ask for a text over the wire, with one face: a native body in, an `Answer` or a `Refused` out.

Nothing of the product's client is used: bodies, events and messages are read as any client would read them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import httpx
import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from google.rpc import error_details_pb2, status_pb2

from protos.flan.v1 import generation_pb2 as pb
from protos.flan.v1.generation_pb2_grpc import FlanServiceStub

Json = dict[str, Any]

_CODES = {
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline",  # grpc's own, where the client's clock ends the call
    grpc.StatusCode.RESOURCE_EXHAUSTED: "too_large",
}
_INTEGERS_AS_TEXT = ("created", "max_tokens")  # protobuf's JSON has 64-bit integers as strings


@dataclass
class Answer:
    """What a response says, under the native names; an edge fills in what it shows.

    `outputs`: by index. `said`: the rest, without what differs from call to call.
    """

    outputs: list[Json]
    usage: Json = field(default_factory=dict)
    said: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    kind: str
    field: str | None
    message: str
    mid_stream: bool = False


class Edge(Protocol):
    def can_say(self, body: Json) -> bool: ...

    def ask(self, body: Json, timeout_ms: int | None = None) -> Answer | Refused: ...


def events_of(text: str) -> list[Any]:
    """The data of server-sent events: parsed JSON, or "[DONE]"."""
    data = [line[5:].strip() for line in text.split("\n") if line.startswith("data:")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def post(http: httpx.Client, path: str, body: Json, timeout_ms: int | None) -> httpx.Response:
    headers = {"content-type": "application/json"}
    if timeout_ms is not None:
        headers["x-request-timeout-ms"] = str(timeout_ms)
    return http.post(path, content=json.dumps(body).encode(), headers=headers)


def refused(response: httpx.Response) -> Refused:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return Refused(error["code"], error["param"], error["message"])


def broken_off(frames: list[Any]) -> Refused | None:
    """The error frame of a stream, which must be its last one."""
    errors = [frame["error"] for frame in frames if frame != "[DONE]" and "error" in frame]
    if not errors:
        assert frames[-1] == "[DONE]"
        return None
    assert frames[-1] == {"error": errors[0]}
    return Refused(errors[0]["code"], errors[0]["param"], errors[0]["message"], mid_stream=True)


def native_output(output: Json) -> Json:
    """One output with every key that the native protocols have; its log-probabilities as columns."""
    tokens = output.get("logprobs") or []
    return {
        "index": output.get("index", 0),
        "text": output.get("text", ""),
        "finish_reason": output["finish_reason"].removeprefix("FINISH_REASON_").lower(),
        "stop_reason": output.get("stop_reason"),
        "rationale": output.get("rationale"),
        "answer": output.get("answer"),
        "token_ids": [token.get("token_id", 0) for token in tokens],
        "token_texts": [token.get("text", "") for token in tokens],
        "logprobs": [token.get("logprob", 0.0) for token in tokens],
        "top_ids": [[top.get("token_id", 0) for top in token.get("top", [])] for token in tokens],
        "tops": [by_text(token.get("text", ""), token.get("logprob", 0.0), token.get("top", [])) for token in tokens],
    }


def by_text(text: str, logprob: float, tops: list[Json], name: str = "text") -> dict[str, float]:
    """A token and its alternatives as OpenAI's completions have them: the first of a text counts."""
    found = {text: logprob}
    for top in tops:
        found.setdefault(top.get(name, ""), top.get("logprob", 0.0))
    return found


def native_answer(whole: Json, outputs: list[Json]) -> Answer:
    said = {name: value for name, value in whole.items() if value is not None}
    assert said.pop("created") > 1_700_000_000
    assert said.pop("request_id")
    timings = said.pop("timings")
    assert 0 <= timings["queue_ms"] <= timings["first_token_ms"] <= timings["total_ms"]
    for name in ("outputs", "usage", "rationale"):
        said.pop(name, None)
    if not said.get("stop"):
        said.pop("stop", None)  # an empty list is nothing in a message
    return Answer([native_output(output) for output in outputs], whole["usage"], said)


class Rest:
    """POST /v1/generate."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def can_say(self, body: Json) -> bool:
        return True

    def ask(self, body: Json, timeout_ms: int | None = None) -> Answer | Refused:
        response = post(self.http, "/v1/generate", body, timeout_ms)
        if response.status_code != 200:
            return refused(response)
        whole = response.json()
        return native_answer(whole, whole["outputs"])


class RestStream(Rest):
    """The same with `stream`; the answer is put together from its frames."""

    def ask(self, body: Json, timeout_ms: int | None = None) -> Answer | Refused:
        response = post(self.http, "/v1/generate", {**body, "stream": True}, timeout_ms)
        if response.status_code != 200:
            return refused(response)
        assert response.headers["cache-control"] == "no-cache"
        frames = events_of(response.text)
        broken = broken_off(frames)
        if broken is not None:
            return broken
        *pieces, last, _ = frames
        outputs = joined(pieces)
        if body.get("mode") == "cot":
            assert [output["text"] for output in last["outputs"]] == [output["text"] for output in outputs]
            outputs = [{**whole, "logprobs": o["logprobs"]} for whole, o in zip(last["outputs"], outputs, strict=True)]
        return native_answer(last, outputs)


def joined(pieces: list[Json]) -> list[Json]:
    """The outputs that a stream's pieces make; nothing may come behind an output's last one."""
    outputs: dict[int, Json] = {}
    for piece in pieces:
        output = outputs.setdefault(piece.get("index", 0), {"text": "", "logprobs": []})
        assert "finish_reason" not in output, "a piece after the output's last one"
        assert "\ufffd" not in piece.get("text", "")
        output["index"] = piece.get("index", 0)
        output["text"] += piece.get("text", "")
        output["logprobs"] += piece.get("logprobs", [])
        for name in ("finish_reason", "stop_reason"):
            if name in piece:
                output[name] = piece[name]
    return [outputs[index] for index in sorted(outputs)]


def to_message(body: Json, kind: Any = pb.GenerateRequest) -> Any:
    """A native body as a message, by protobuf's own JSON mapping."""
    said = dict(body)
    if "mode" in said:
        said["mode"] = f"MODE_{said['mode'].upper()}"
    if "answer_format" in said:
        said["answer_format"] = f"ANSWER_FORMAT_{said['answer_format'].upper()}"
    if isinstance(said.get("stop"), str):
        said["stop"] = [said["stop"]]
    return ParseDict({name: _number(value) for name, value in said.items()}, kind())


def _number(value: Any) -> Any:
    """JSON has no words for NaN and infinity; protobuf's mapping wants them as strings."""
    if isinstance(value, Mapping):
        return {name: _number(item) for name, item in value.items()}
    is_finite = not isinstance(value, float) or value - value == 0
    return value if is_finite else {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]


def from_message(message: Any) -> Json:
    said: Json = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    for name in _INTEGERS_AS_TEXT:
        if name in said:
            said[name] = int(said[name])
    if "mode" in said:
        said["mode"] = said["mode"].removeprefix("MODE_").lower()
    if not said.get("votes"):
        said.pop("votes", None)
    said |= {"votes": [{"answer": None, **vote} for vote in said["votes"]]} if "votes" in said else {}
    return said


def refused_call(error: Any) -> Refused:
    """What a call's status and its details say."""
    reason = name = None
    raw = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    for detail in status_pb2.Status.FromString(raw).details:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad):
            name = bad.field_violations[0].field
    return Refused(_CODES[error.code()] if reason is None else reason, name, error.details())


class Rpc:
    """Generate."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = FlanServiceStub(channel)

    def can_say(self, body: Json) -> bool:
        return True

    def ask(self, body: Json, timeout_ms: int | None = None) -> Answer | Refused:
        message, seconds = to_message(body), None if timeout_ms is None else timeout_ms / 1000
        try:
            return self._ask(message, seconds)
        except grpc.RpcError as error:
            return refused_call(error)

    def _ask(self, message: Any, seconds: float | None) -> Answer | Refused:
        whole = from_message(self.stub.Generate(message, timeout=seconds))
        return native_answer(whole, whole["outputs"])


class RpcStream(Rpc):
    """GenerateStream; the answer is put together from its deltas and compared with `final`."""

    def _ask(self, message: Any, seconds: float | None) -> Answer | Refused:
        *pieces, last = self.stub.GenerateStream(message, timeout=seconds)
        outputs = joined([from_message(piece.delta) for piece in pieces])
        whole = from_message(last.final)
        for output, piece in zip(whole["outputs"], outputs, strict=True):
            same = ("index", "text", "finish_reason", "stop_reason", "logprobs")
            assert {name: output.get(name) for name in same} == {name: piece.get(name) for name in same}
        return native_answer(whole, whole["outputs"])


class RpcMany(Rpc):
    """GenerateMany with one request."""

    def _ask(self, message: Any, seconds: float | None) -> Answer | Refused:
        def requests() -> Iterator[Any]:
            yield message

        (result,) = self.stub.GenerateMany(requests(), timeout=seconds)
        return from_many(result)


def from_many(result: Any) -> Answer | Refused:
    if result.WhichOneof("result") == "error":
        return Refused(result.error.kind, result.error.field or None, result.error.message)
    whole = from_message(result.response)
    assert result.request_id == whole["request_id"]
    return native_answer(whole, whole["outputs"])


def close(value: Any) -> Any:
    """The value with room for the last bits of its floats: steps of different batches add in different orders."""
    if isinstance(value, dict):
        return {key: close(item) for key, item in value.items()}
    if isinstance(value, list):
        return [close(item) for item in value]
    return pytest.approx(value, abs=1e-3) if isinstance(value, float) else value
