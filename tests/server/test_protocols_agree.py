"""One table of requests through REST, SSE, gRPC unary, stream and many, OpenAI's and TGI's routes: the same of each.

Same texts, finish reasons, stop strings, log-probabilities, answers, votes and token counts; the same kind of error,
named field and, on the native protocols, the same words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields

import grpc
import httpx
import pytest

from protos.flan.v1.generation_pb2_grpc import FlanServiceStub
from serve.sampling_params import SamplingFields
from tests.server import foreign_edges as foreign
from tests.server import protocol_edges as native
from tests.server.process import ServerProcess
from tests.server.protocol_cases import (
    LETTERS,
    MAX_OUTPUT_TOKENS,
    MISTAKES,
    NOT_FINITE,
    ONLY_JSON,
    ONLY_NATIVE_JSON,
    REQUESTS,
    REVIEW,
    SUM,
    Mistake,
)
from tests.server.protocol_edges import Answer, Edge, Json, Refused, close, from_many, post, to_message

COLUMNS = ("token_ids", "token_texts", "logprobs", "top_ids", "tops")
OVER_REST: dict[str, Callable[[httpx.Client], Edge]] = {
    "REST": native.Rest,
    "SSE": native.RestStream,
    "completions": foreign.Completions,
    "completions stream": foreign.CompletionsStream,
    "chat": foreign.Chat,
    "chat stream": foreign.ChatStream,
    "TGI": foreign.Tgi,
    "TGI stream": foreign.TgiStream,
}
OVER_GRPC: dict[str, Callable[[grpc.Channel], Edge]] = {
    "gRPC": native.Rpc,
    "gRPC stream": native.RpcStream,
    "gRPC many": native.RpcMany,
}
SAMPLING_NAMES = tuple(field.name for field in fields(SamplingFields))
NATIVE = ("REST", "SSE", *OVER_GRPC)
OPENAI = ("completions", "completions stream", "chat", "chat stream")
TGI = ("TGI", "TGI stream")


@pytest.fixture(scope="module")
def edges(talking: ServerProcess) -> Iterator[dict[str, Edge]]:
    options = (("grpc.max_send_message_length", 2**24),)
    with (
        httpx.Client(base_url=talking.rest_url, timeout=30, trust_env=False) as http,
        grpc.insecure_channel(talking.grpc_target, options) as channel,
    ):
        over_rest = {name: make(http) for name, make in OVER_REST.items()}
        yield over_rest | {name: make(channel) for name, make in OVER_GRPC.items()}


Alone = Callable[[Json], Answer | Refused]


@pytest.fixture(scope="module")
def alone(edges: dict[str, Edge]) -> Alone:
    """What REST answers to a body, asked once."""
    answers: dict[str, Answer | Refused] = {}

    def ask(body: Json) -> Answer | Refused:
        key = json.dumps(body)
        if key not in answers:
            answers[key] = edges["REST"].ask(body)
        return answers[key]

    return ask


def answered(edge: Edge, body: Json) -> Answer:
    answer = edge.ask(body)
    assert isinstance(answer, Answer), answer
    return answer


def check_same(name: str, got: Answer, expected: Answer, body: Json) -> None:
    """What an edge shows is what REST shows; which keys it shows is part of the comparison."""
    assert len(got.outputs) == len(expected.outputs)
    for one, other in zip(got.outputs, expected.outputs, strict=True):
        wanted = {**other, "is_stopped": other["stop_reason"] is not None}
        if "logprobs" not in body:  # some edges show them unasked
            one = {key: value for key, value in one.items() if key not in COLUMNS}
        elif name not in NATIVE:
            wanted["top_ids"] = [ids[: body["logprobs"]] for ids in other["top_ids"]]
        assert one == close({key: wanted[key] for key in one})
        assert set(one) >= {"text", "finish_reason"} | ({"logprobs"} if "logprobs" in body else set())
    if name in NATIVE:
        assert (got.usage, got.said) == (expected.usage, close(expected.said))
        assert all(set(output) == set(expected.outputs[0]) for output in got.outputs)
    elif name in OPENAI:
        assert got.usage == expected.usage
        assert got.said == {key: expected.said[key] for key in ("model", "prompt") if key in expected.said}
        assert all("stop_reason" in output for output in got.outputs)
    else:
        assert got.usage == {key: expected.usage[key] for key in ("prompt_tokens", "completion_tokens")}


@pytest.mark.parametrize("case", REQUESTS)
def test_the_same_request_has_the_same_answer_everywhere(edges: dict[str, Edge], alone: Alone, case: str) -> None:
    body = REQUESTS[case]
    expected = alone(body)
    assert isinstance(expected, Answer), expected
    for name, edge in edges.items():
        if name != "REST" and edge.can_say(body):
            check_same(name, answered(edge, body), expected, body)


def test_the_table_is_worth_something(edges: dict[str, Edge]) -> None:
    """Every edge takes part; answers, votes, stop strings and both reasons to end come up."""
    asked = {name: sum(edge.can_say(body) for body in REQUESTS.values()) for name, edge in edges.items()}
    assert asked == {**dict.fromkeys(NATIVE, len(REQUESTS)), **dict.fromkeys(OPENAI, 73), **dict.fromkeys(TGI, 42)}
    answers = [answered(edges["REST"], body) for body in (SUM, {**SUM, "samples": 5, "seed": 3}, REVIEW, LETTERS)]
    assert answers[0].said["answer"] == answers[0].outputs[0]["answer"]
    assert len(answers[1].said["votes"]) > 1
    assert [answer.outputs[0]["finish_reason"] for answer in answers[2:]] == ["stop", "length"]


def _ask_all(edges: dict[str, Edge], names: tuple[str, ...], mistake: Mistake) -> dict[str, Refused]:
    refused = {}
    for name in names:
        if edges[name].can_say(mistake.body):
            answer = edges[name].ask(mistake.body)
            assert isinstance(answer, Refused), f"{name} served it: {answer}"
            assert (name, answer.kind, answer.field) == (name, mistake.kind, mistake.field)
            assert not answer.mid_stream, name
            refused[name] = answer
    return refused


@pytest.mark.parametrize("case", MISTAKES)
def test_the_same_mistake_is_the_same_error_everywhere(edges: dict[str, Edge], case: str) -> None:
    refused = _ask_all(edges, (*NATIVE, *OPENAI, *TGI), MISTAKES[case])
    assert set(refused) >= set(NATIVE)
    assert len({refused[name].message for name in NATIVE}) == 1
    assert len({refused[name].message for name in OPENAI[:2] if name in refused}) <= 1


@pytest.mark.parametrize("case", NOT_FINITE)
def test_numbers_that_are_none_are_the_clients_mistake(edges: dict[str, Edge], case: str) -> None:
    _ask_all(edges, tuple(OVER_GRPC), NOT_FINITE[case])
    for name in OVER_REST:
        if edges[name].can_say(NOT_FINITE[case].body):
            answer = edges[name].ask(NOT_FINITE[case].body)
            assert isinstance(answer, Refused), name
            assert answer.kind == "invalid", name


@pytest.mark.parametrize("case", [*ONLY_JSON, *ONLY_NATIVE_JSON])
def test_what_only_json_can_say_wrongly_is_named_on_every_route(edges: dict[str, Edge], case: str) -> None:
    names = ("REST", "SSE") if case in ONLY_NATIVE_JSON else ("REST", "SSE", *OPENAI, *TGI)
    refused = _ask_all(edges, names, {**ONLY_JSON, **ONLY_NATIVE_JSON}[case])
    assert refused["REST"] == refused["SSE"]


def test_all_of_the_table_in_one_call_is_what_each_is_alone(alone: Alone, talking: ServerProcess) -> None:
    """Whatever runs beside it: good requests and mistakes come back as they do by themselves."""
    bodies = {f"good-{n}": body for n, body in enumerate(REQUESTS.values()) if "request_id" not in body}
    bodies |= {f"bad-{n}": wrong.body for n, wrong in enumerate(MISTAKES.values()) if "request_id" not in wrong.body}
    with grpc.insecure_channel(talking.grpc_target) as channel:
        messages = (to_message({**body, "request_id": name}) for name, body in bodies.items())
        results = {result.request_id: from_many(result) for result in FlanServiceStub(channel).GenerateMany(messages)}
    assert set(results) == set(bodies)
    for name, got in results.items():
        expected = alone(bodies[name])
        if isinstance(expected, Refused):
            assert got == expected
        else:
            assert isinstance(got, Answer), got
            check_same("gRPC many", got, expected, bodies[name])


@pytest.mark.parametrize("timeout_ms", [0, 1, 20])
def test_a_deadline_is_the_same_error_everywhere(edges: dict[str, Edge], timeout_ms: int) -> None:
    long = {**LETTERS, "max_tokens": MAX_OUTPUT_TOKENS, "repetition_penalty": 0.5, "temperature": 0.5, "seed": 1}
    for name, edge in edges.items():
        many = {**long, "n": 64, "ignore_eos": True}
        answer = edge.ask(many if edge.can_say(many) else long, timeout_ms=timeout_ms if name not in TGI else 0)
        assert isinstance(answer, Refused), name
        assert (name, answer.kind, answer.field) == (name, "deadline", None)
        assert not answer.mid_stream or timeout_ms > 0


def test_more_than_the_server_reads_is_too_large_everywhere(edges: dict[str, Edge]) -> None:
    body = {"mode": "raw", "instruction": "cat " * 300_000}
    for name in (*NATIVE, *OPENAI):
        answer = edges[name].ask(body)
        assert isinstance(answer, Refused), name
        assert (name, answer.kind, answer.field) == (name, "too_large", None)


def test_null_is_absent_and_only_the_native_routes_mind_what_they_do_not_know(
    edges: dict[str, Edge], talking: ServerProcess
) -> None:
    nulls = dict.fromkeys((*SAMPLING_NAMES, "input", "options", "exemplars", "samples", "model", "request_id", "debug"))
    expected = answered(edges["REST"], REVIEW)
    for name in ("REST", "SSE"):
        check_same(name, answered(edges[name], {**nulls, **REVIEW}), expected, REVIEW)
    http, nulls = httpx.Client(base_url=talking.rest_url, trust_env=False), dict.fromkeys(SAMPLING_NAMES)
    prompt = {"model": "flan", "temperature": 0}
    bodies = {
        "/v1/completions": {**nulls, **prompt, "prompt": REVIEW["instruction"], "unheard_of": 1},
        "/v1/chat/completions": {
            **nulls, **prompt, "messages": [{"role": "user", "content": REVIEW["instruction"]}], "unheard_of": 1,
        },
        "/generate": {"inputs": REVIEW["instruction"], "parameters": {**nulls, "unheard_of": 1}, "unheard_of": 1},
    }  # fmt: skip
    with http:
        texts = {path: post(http, path, body, None).json() for path, body in bodies.items()}
    assert texts["/v1/completions"]["choices"][0]["text"] == expected.outputs[0]["text"]
    assert texts["/v1/chat/completions"]["choices"][0]["message"]["content"] == expected.outputs[0]["text"]
    assert texts["/generate"]["generated_text"] == expected.outputs[0]["text"]
