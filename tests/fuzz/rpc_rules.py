"""What every answer of the gRPC server must be, whatever was sent."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from protos.flan.v1 import generation_pb2 as pb
from tests.fuzz.rpc_cases import NO_METHOD, RpcAnswer, RpcCase

# What counts as a request, and its label.
ROUTES = {
    "Generate": "generate",
    "GenerateStream": "generate",
    "GenerateMany": "generate_many",
    "Score": "score",
    "Tokenize": "tokenize",
}
REQUESTS: Mapping[str, type[Message]] = {
    "Generate": pb.GenerateRequest,
    "GenerateStream": pb.GenerateRequest,
    "GenerateMany": pb.GenerateRequest,
    "Score": pb.ScoreRequest,
    "Tokenize": pb.TokenizeRequest,
    "GetModel": pb.GetModelRequest,
}
RESPONSES: Mapping[str, type[Message]] = {
    "Generate": pb.GenerateResponse,
    "GenerateStream": pb.GenerateStreamResponse,
    "GenerateMany": pb.GenerateManyResponse,
    "Score": pb.ScoreResponse,
    "Tokenize": pb.TokenizeResponse,
    "GetModel": pb.GetModelResponse,
}
OUTCOMES = {
    grpc.StatusCode.OK: "served",
    grpc.StatusCode.INVALID_ARGUMENT: "invalid",
    grpc.StatusCode.NOT_FOUND: "invalid",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "invalid",
}
# The contract's ranges; a value outside is the client's mistake.
_IN_RANGE: Mapping[str, Callable[[float], bool]] = {
    "max_tokens": lambda value: value >= 1,
    "min_tokens": lambda value: value >= 0,
    "temperature": lambda value: 0 <= value <= 2,
    "top_p": lambda value: 0 < value <= 1,
    "top_k": lambda value: value >= 0,
    "repetition_penalty": lambda value: 0 < value < math.inf,
    "n": lambda value: 1 <= value <= 64,
    "samples": lambda value: 1 <= value <= 64,
    "logprobs": lambda value: 0 <= value <= 20,
    "mode": lambda value: 0 <= value <= 4,
    "answer_format": lambda value: 0 <= value <= 2,
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_UNSURE = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


def check(case: RpcCase, answer: RpcAnswer, *, max_message_bytes: int) -> list[str]:
    """The outcome of each request of the call, one of GenerateMany's messages each; empty where none was counted,
    or nobody knows.

    Raises:
        AssertionError: the answer is not what the contract says.
    """
    if not case.is_sure and answer.code in _UNSURE:
        return []
    if not case.has_key:
        assert answer.code is grpc.StatusCode.UNAUTHENTICATED
        return ["unauthorized"]
    if case.method == NO_METHOD:
        assert answer.code is grpc.StatusCode.UNIMPLEMENTED
        return []
    name = answer.headers.get("x-request-id", "")
    assert isinstance(name, str)
    is_too_large = any(len(message) > max_message_bytes for message in case.messages)
    assert _REQUEST_ID.fullmatch(name) or is_too_large, f"no valid x-request-id: {answer}"
    asked = next((value for key, value in case.metadata if key == "x-request-id"), "")
    if isinstance(asked, str) and _REQUEST_ID.fullmatch(asked) and not is_too_large:
        assert name == asked
    if is_too_large and len(case.messages) > 1:  # which comes first, the answer to one or the refusal of the other?
        assert answer.code in OUTCOMES
        return []
    if case.method == "GenerateMany":
        return _check_many(case, answer, is_too_large=is_too_large)
    return [_check_one(case, answer, is_too_large=is_too_large)]


def _check_one(case: RpcCase, answer: RpcAnswer, *, is_too_large: bool) -> str:
    """A call with one request."""
    if not case.messages or (is_too_large and len(case.messages) == 1):
        assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        return "invalid"
    request = parsed(REQUESTS[case.method], case.messages[0])
    if request is None:
        assert answer.code is grpc.StatusCode.INVALID_ARGUMENT, f"{answer.code} for what is no message"
        return "invalid"
    kinds = {grpc.StatusCode.INVALID_ARGUMENT: "invalid", grpc.StatusCode.NOT_FOUND: "not_found"}
    assert answer.code is grpc.StatusCode.OK or answer.code in kinds, f"{answer.code}: {answer.message}"
    if answer.code is not grpc.StatusCode.OK:
        assert len(answer.message.encode()) <= 1100
        reason, field = _details(answer)
        assert reason == kinds[answer.code]
        _check_field(request, field)
        return OUTCOMES[answer.code]
    assert is_in_range(request)
    responses = [RESPONSES[case.method].FromString(raw) for raw in answer.responses]
    for response in responses:
        check_finite(response)
    if case.method != "GenerateStream":
        assert len(responses) == 1
        return "served"
    kinds_of_event = [response.WhichOneof("event") for response in responses]
    assert kinds_of_event == ["delta"] * (len(responses) - 1) + ["final"]
    return "served"


def _check_many(case: RpcCase, answer: RpcAnswer, *, is_too_large: bool) -> list[str]:
    """Each message of GenerateMany has its own answer."""
    if is_too_large:
        assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        return []
    assert answer.code is grpc.StatusCode.OK, f"{answer.code}: {answer.message}"
    responses = [pb.GenerateManyResponse.FromString(raw) for raw in answer.responses]
    assert len(responses) == len(case.messages)
    requests = [parsed(pb.GenerateRequest, raw) for raw in case.messages]
    for response in responses:
        assert response.WhichOneof("result") is not None
        check_finite(response)
        kinds = ("", "invalid", "not_found", *([] if case.seconds is None else ["deadline"]))
        assert response.error.kind in kinds, response.error
    num_invalid = sum(response.HasField("error") for response in responses)
    assert num_invalid >= sum(request is None or not is_in_range(request) for request in requests)
    outcomes = {"": "served", "invalid": "invalid", "not_found": "invalid", "deadline": "deadline"}
    return [outcomes[response.error.kind] for response in responses]


def parsed(message_class: type[Message], raw: bytes) -> Message | None:
    try:
        return message_class.FromString(raw)
    except DecodeError:
        return None


def is_in_range(request: Message) -> bool:
    """Whether every number that the request says is in the contract's range."""
    said = {item.name: value for item, value in request.ListFields()}
    for name in [item.name for item in request.DESCRIPTOR.fields if item.has_presence]:
        if request.HasField(name):
            said[name] = getattr(request, name)
    return all(is_good(said[name]) for name, is_good in _IN_RANGE.items() if name in said)


def check_finite(message: Message) -> None:
    """No NaN and no Infinity, however deep."""
    for item, value in message.ListFields():
        values = value if item.is_repeated else [value]
        for part in values:
            if item.type == FieldDescriptor.TYPE_MESSAGE:
                check_finite(part)
            elif item.type == FieldDescriptor.TYPE_DOUBLE:
                assert math.isfinite(part), item.full_name


def _details(answer: RpcAnswer) -> tuple[str, str]:
    """(reason, field) of a refusal."""
    raw = answer.trailers["grpc-status-details-bin"]
    assert isinstance(raw, bytes)
    status = status_pb2.Status.FromString(raw)
    assert (status.code, status.message) == (answer.code.value[0], answer.message)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    return info.reason, bad.field_violations[0].field if bad.field_violations else ""


def _check_field(request: Message, field: str) -> None:
    assert field in {item.name for item in request.DESCRIPTOR.fields}, f"{field!r} is no field of the request"
