"""What is refused, with which code, and what the status details say."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable
from typing import Any

import grpc
import pytest

from protos.flan.v1 import generation_pb2 as pb
from serve import errors as kinds
from serve.config import Settings
from serve.errors import EngineFailure, QueueFull, ServeError, Unavailable
from serve.metrics import Metrics
from serve.rest.errors import to_headers
from serve.rpc.errors import CODES, to_message, to_trailers
from serve.service import Service, ServiceSettings
from tests.rpc.harness import served
from tests.rpc.statuses import Refusal, refusal
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service
from tests.service.toy_tokenizers import byte_level

Code = grpc.StatusCode


def test_every_kind_has_a_code() -> None:
    classes = [value for value in vars(kinds).values() if isinstance(value, type) and issubclass(value, ServeError)]
    assert len(classes) >= 11
    assert {error.kind for error in classes} == set(CODES)


async def test_what_the_model_s_context_cannot_hold_is_the_client_s_mistake() -> None:
    runtime = ScriptedRuntime([5, 1], is_encoder_decoder=False, context_length=40)
    service = scripted_service(runtime=runtime, tokenizer=byte_level())
    long: dict[str, Any] = {"mode": pb.MODE_RAW, "instruction": "x" * 50}
    async with served(service=service, runtime=runtime) as s:
        calls: list[tuple[Awaitable[Any], str]] = [
            (s.stub.Generate(pb.GenerateRequest(**long)), "instruction"),
            (s.stub.Generate(pb.GenerateRequest(instruction="x", input="y" * 50)), "input"),
            (s.stub.Score(pb.ScoreRequest(**long, candidates=["a"])), "instruction"),
            (s.stub.Score(pb.ScoreRequest(instruction="x", candidates=["a", "b" * 40])), "candidates"),
        ]
        for call, field in calls:
            refused = await refusal(call)
            assert (refused.code, refused.field) == (Code.INVALID_ARGUMENT, field)
        assert (runtime.requests, runtime.scores) == ([], [])


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "instruction"),
        ({"instruction": "  \n "}, "instruction"),
        ({"instruction": "a\0b"}, "instruction"),
        ({"mode": 99}, "mode"),
        ({"answer_format": 7}, "answer_format"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {10**9: 1.0}}, "logit_bias"),
        ({"logit_bias": {3: math.nan}}, "logit_bias"),
        ({"samples": 2}, "samples"),
        ({"mode": pb.MODE_COT, "samples": 65}, "samples"),
        ({"mode": pb.MODE_FEW_SHOT, "exemplars": [pb.Exemplar(input="x")]}, "exemplars"),
        ({"mode": pb.MODE_FEW_SHOT, "exemplar_set": "none"}, "exemplar_set"),
        ({"request_id": "a b"}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
    ],
    ids=str,
)
async def test_a_clients_mistake_names_the_field(fields: dict[str, Any], field: str) -> None:
    async with served("yes") as s:
        request = pb.GenerateRequest(**({"instruction": "x"} | fields if fields else {}))
        for call in (s.stub.Generate(request), s.stub.GenerateStream(request).read()):
            refused = await refusal(call)
            assert (refused.code, refused.reason, refused.field) == (Code.INVALID_ARGUMENT, "invalid", field)
            assert refused.message
        assert s.outcomes() == {"invalid": 2}
        assert s.runtime.requests == []


async def test_max_tokens_above_the_limit_is_clamped() -> None:
    async with served("yes") as s:
        response = await s.stub.Generate(pb.GenerateRequest(instruction="x", max_tokens=2**63 - 1))
        assert response.max_tokens == 512


async def test_other_methods_name_the_field() -> None:
    async with served() as s:
        refused = await refusal(s.stub.Score(pb.ScoreRequest(instruction="x")))
        assert (refused.code, refused.field) == (Code.INVALID_ARGUMENT, "candidates")
        unknown_mode: Any = 9
        refused = await refusal(s.stub.Score(pb.ScoreRequest(instruction="x", candidates=["a"], mode=unknown_mode)))
        assert (refused.code, refused.field) == (Code.INVALID_ARGUMENT, "mode")
        refused = await refusal(s.stub.Tokenize(pb.TokenizeRequest()))
        assert (refused.code, refused.field) == (Code.INVALID_ARGUMENT, "text")
        assert s.outcomes() == {"invalid": 3}


async def test_unknown_model() -> None:
    async with served("yes") as s:
        for call in (
            s.stub.Generate(pb.GenerateRequest(instruction="x", model="other")),
            s.stub.Score(pb.ScoreRequest(instruction="x", candidates=["a"], model="other")),
            s.stub.Tokenize(pb.TokenizeRequest(text="x", model="other")),
        ):
            refused = await refusal(call)
            assert (refused.code, refused.reason, refused.field) == (Code.NOT_FOUND, "not_found", "model")
        await s.stub.Generate(pb.GenerateRequest(instruction="x", model="default"))


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x12\x02\xff\xfe", b"\x12\xff"], ids=["no message", "utf-8", "cut"])
async def test_bytes_that_are_no_message(raw: bytes) -> None:
    async with served("yes") as s:
        for method in ("Generate", "GenerateStream", "Score", "Tokenize"):
            refused = await refusal(s.raw(method)(raw))
            assert (refused.code, refused.reason) == (Code.INVALID_ARGUMENT, "invalid")
        assert s.outcomes() == {"invalid": 4}


async def test_a_call_without_a_message_ends() -> None:
    async def nothing() -> Any:
        return
        yield

    async with served("yes") as s:
        call: Any = s.channel.stream_unary("/flan.v1.FlanService/Generate")(nothing())
        refused = await refusal(asyncio.wait_for(call, 5))
        assert refused.code is Code.RESOURCE_EXHAUSTED


async def test_unknown_fields_of_a_newer_client_are_ignored() -> None:
    async with served("yes") as s:
        raw = pb.GenerateRequest(instruction="x").SerializeToString() + b"\xf8\x7f\x01"  # field 2047, varint 1
        response = await s.raw("Generate")(raw)
        assert pb.GenerateResponse.FromString(response).outputs[0].text == "yes"


async def test_unknown_method() -> None:
    async with served() as s:
        refused = await refusal(s.raw("Nothing")(b""))
        assert refused.code is Code.UNIMPLEMENTED


async def test_queue_full_says_when_to_come_again() -> None:
    runtime = ScriptedRuntime(max_running_sequences=1)
    settings = ServiceSettings(served_model_names=("scripted",), max_running_sequences=1, max_queued_requests=0)
    service = scripted_service("yes", runtime=runtime, settings=settings)
    async with served(service=service) as s:
        runtime.freeze()
        running = s.stub.GenerateStream(pb.GenerateRequest(instruction="x"))
        await running.initial_metadata()
        while not service.requests_running + service.requests_waiting:
            await asyncio.sleep(0.01)
        for call in (
            s.stub.Generate(pb.GenerateRequest(instruction="x")),
            s.stub.Score(pb.ScoreRequest(instruction="x", candidates=["a"])),
        ):
            refused = await refusal(call)
            assert (refused.code, refused.reason) == (Code.RESOURCE_EXHAUSTED, "queue_full")
            assert refused.retry_seconds == 1.0
        running.cancel()


async def test_loading_and_draining() -> None:
    service = Service(ServiceSettings(), Metrics())
    async with served(service=service) as s:
        calls = (
            lambda: s.stub.Generate(pb.GenerateRequest(instruction="x")),
            lambda: s.stub.GenerateStream(pb.GenerateRequest(instruction="x")).read(),
            lambda: s.stub.Score(pb.ScoreRequest(instruction="x", candidates=["a"])),
            lambda: s.stub.Tokenize(pb.TokenizeRequest(text="x")),
            lambda: s.stub.GetModel(pb.GetModelRequest()),
        )
        for call in calls:
            refused = await refusal(call())
            assert (refused.code, refused.reason) == (Code.UNAVAILABLE, "unavailable")
            assert refused.retry_seconds is not None
        await service.drain()
        for call in calls:
            assert (await refusal(call())).code is Code.UNAVAILABLE
        assert s.outcomes() == {"refused": 8}


async def test_a_handler_bug_is_internal_and_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret")

    async with served("yes") as s:
        for name in ("open", "generate", "score", "tokenize"):
            monkeypatch.setattr(s.service, name, broken)
        with caplog.at_level(logging.ERROR):
            for call in (
                s.stub.Generate(pb.GenerateRequest(instruction="x")),
                s.stub.GenerateStream(pb.GenerateRequest(instruction="x")).read(),
                s.stub.Score(pb.ScoreRequest(instruction="x")),
                s.stub.Tokenize(pb.TokenizeRequest(text="x")),
            ):
                assert await refusal(call) == Refusal(Code.INTERNAL, "internal error", "engine_failure")
        assert caplog.text.count("ZeroDivisionError: secret") == 4
        assert s.outcomes() == {"error": 4}


async def test_engine_failure_in_the_middle_of_a_stream() -> None:
    runtime = ScriptedRuntime(fail_at_step=2)
    async with served("hello world yes no", runtime=runtime) as s:
        call = s.stub.GenerateStream(pb.GenerateRequest(instruction="x"))
        events = aiter(call)
        assert [(await anext(events)).WhichOneof("event") for _ in range(2)] == ["delta", "delta"]
        assert (await refusal(anext(events))).code is Code.INTERNAL
        assert s.outcomes() == {"error": 1}


async def test_a_faulty_sequence_leaves_the_others_whole() -> None:
    runtime = ScriptedRuntime(fail_sequences={1: 1})
    async with served("hello world yes", runtime=runtime) as s:
        response = await s.stub.Generate(pb.GenerateRequest(instruction="x", n=3))
        reasons = [output.finish_reason for output in response.outputs]
        assert reasons == [pb.FINISH_REASON_STOP, pb.FINISH_REASON_ERROR, pb.FINISH_REASON_STOP]
        assert response.outputs[0].text == response.outputs[2].text == "hello world yes"


async def test_a_long_message_fits_into_the_trailers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object) -> None:
        raise QueueFull("\N{GRINNING FACE}" * 5000, field="f" * 50, retry_after_seconds=0.25)

    async with served() as s:
        monkeypatch.setattr(s.service, "generate", refuse)
        refused = await refusal(s.stub.Generate(pb.GenerateRequest(instruction="x")))
        assert (refused.code, refused.field, refused.retry_seconds) == (Code.RESOURCE_EXHAUSTED, "f" * 50, 0.25)
        assert 200 < len(refused.message) < 1000


def test_message_and_trailers_of_odd_errors() -> None:
    assert to_message(Unavailable("lone \ud800 surrogate")) == "lone ? surrogate"
    ((key, raw),) = to_trailers(Unavailable("x", retry_after_seconds=0.0))
    assert key == "grpc-status-details-bin"
    assert b"RetryInfo" in raw


@pytest.mark.parametrize("error", [QueueFull("x"), Unavailable("x")], ids=["queue full", "unavailable"])
async def test_a_refusal_that_does_not_say_when_says_so_as_rest_does(
    error: ServeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise error

    async with served() as s:
        monkeypatch.setattr(s.service, "generate", refuse)
        refused = await refusal(s.stub.Generate(pb.GenerateRequest(instruction="x")))
        assert refused.retry_seconds == 1.0
        assert dict(to_headers(error)) == {b"retry-after": b"1"}
    assert b"RetryInfo" not in dict(to_trailers(EngineFailure("x")))["grpc-status-details-bin"]


async def test_a_port_that_is_taken_is_an_os_error(capfd: pytest.CaptureFixture[str]) -> None:
    async with served() as s:
        with pytest.raises(OSError, match=str(s.port)):
            async with served(settings=Settings(grpc_port=s.port)):
                pass
    capfd.readouterr()  # grpc writes to standard error by itself
