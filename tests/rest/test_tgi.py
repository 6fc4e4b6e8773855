"""Text Generation Inference's routes, by hand: every parameter, every bad input, streams, what all routes guarantee."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from serve.config import Settings
from serve.metrics import Metrics
from serve.service import Service, ServiceSettings
from tests.rest.harness import Served, http_post, served
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service
from tests.service.toy_tokenizers import byte_level

ANSWER = "The answer is 4."
ROUTES = ("/generate", "/generate_stream", "/")
EOS_EVENT_TOKEN = {"id": 1, "text": "", "logprob": -0.5, "special": True}


async def ask(server: Served, path: str = "/generate", inputs: Any = "hello", **parameters: Any) -> httpx.Response:
    return await server.post(path, {"inputs": inputs, "parameters": parameters})


def events_of(response: httpx.Response) -> list[Any]:
    """The events of a stream, after a look at their form: `data:` without a space, and no [DONE]."""
    assert response.headers["content-type"] == "text/event-stream"
    blocks = response.content.split(b"\n\n")
    assert blocks.pop() == b""
    assert all(block.startswith(b"data:{") for block in blocks)
    return [json.loads(block[5:]) for block in blocks]


def error_of(response: httpx.Response) -> tuple[str, str]:
    """(error, error_type) of a refusal, after a look at its form."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error", "error_type"}
    return body["error"], body["error_type"]


async def test_each_route_has_its_shape() -> None:
    async with served(ANSWER) as server:
        whole = {"generated_text": ANSWER}
        assert (await ask(server, "/generate")).json() == whole
        assert (await ask(server, "/")).json() == [whole]
        assert (await server.post("/", {"inputs": "hello", "stream": False})).json() == [whole]
        streamed = events_of(await ask(server, "/generate_stream"))
        assert events_of(await server.post("/", {"inputs": "hello", "stream": True})) == streamed
        assert (await server.post("/generate", {"inputs": "hello", "stream": True})).json() == whole
        assert server.requests() == {("rest", "tgi", "raw", "stop"): 6}
        assert all(request.sampling.greedy for request in server.runtime.requests)


async def test_a_stream_has_one_event_a_token() -> None:
    async with served(ANSWER) as server:
        response = await ask(server, "/generate_stream")
        assert response.headers["cache-control"] == "no-cache"
        events = events_of(response)
        ids = server.runtime.tokens_of(server.runtime.requests[0], 0)
        assert [event["token"]["id"] for event in events] == list(ids)
        assert [event["index"] for event in events] == list(range(1, len(ids) + 1))
        assert "".join(event["token"]["text"] for event in events) == ANSWER
        assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
        assert not any(event["token"]["special"] for event in events[:-1])
        assert events[-1]["token"] == EOS_EVENT_TOKEN
        assert events[-1]["generated_text"] == ANSWER
        length = server.runtime.requests[0].prompt_tokens
        ended = {"finish_reason": "eos_token", "generated_tokens": len(ids), "input_length": length, "seed": None}
        assert events[-1]["details"] == ended


@pytest.mark.parametrize(
    ("parameters", "text", "reason"),
    [
        ({}, ANSWER, "eos_token"),
        ({"max_new_tokens": 2}, None, "length"),
        ({"stop": ["answer"]}, "The ", "stop_sequence"),
        ({"stop": ["is 5", "4"]}, "The answer is ", "stop_sequence"),
        ({"stop": ["4.x"]}, ANSWER, "eos_token"),  # its beginning is held back until the end
        ({"return_full_text": True}, "hello" + ANSWER, "eos_token"),
        ({"return_full_text": True, "stop": [" is"], "top_n_tokens": 2}, "helloThe answer", "stop_sequence"),
    ],
)
@pytest.mark.parametrize("tokens_per_delta", [1, 3])
async def test_a_stream_equals_the_whole(
    parameters: dict[str, Any], text: str | None, reason: str, tokens_per_delta: int
) -> None:
    async with served(ANSWER, runtime=ScriptedRuntime(tokens_per_delta=tokens_per_delta)) as server:
        whole = (await ask(server, details=True, **parameters)).json()
        events = events_of(await ask(server, "/generate_stream", **parameters))
        assert text is None or whole["generated_text"] == text
        assert events[-1]["generated_text"] == whole["generated_text"]
        details, last = whole["details"], events[-1]["details"]
        assert (details["finish_reason"], details["seed"], details["prefill"]) == (reason, None, [])
        assert [event["token"] for event in events] == details["tokens"]
        assert [event.get("top_tokens") for event in events] == details.get("top_tokens", [None] * len(events))
        assert {key: last[key] for key in ("finish_reason", "generated_tokens", "seed")} == {
            key: details[key] for key in ("finish_reason", "generated_tokens", "seed")
        }
        made = "".join(token["text"] for token in details["tokens"])
        assert whole["generated_text"] == ("hello" if "return_full_text" in parameters else "") + made
        if reason == "eos_token":
            assert events[-1]["token"] == EOS_EVENT_TOKEN


async def test_bytes_of_a_character_are_several_tokens() -> None:
    tokenizer, runtime = byte_level(), ScriptedRuntime(eos_id=0)
    text = "a😀é b"
    ids = [token_id for character in text for token_id in tokenizer.encode(character, add_special_tokens=False)]
    assert len(ids) > len(text)
    runtime.script = [*ids, tokenizer.eos_id or 0]
    async with served(service=scripted_service(runtime=runtime, tokenizer=tokenizer), runtime=runtime) as server:
        events = events_of(await ask(server, "/generate_stream", max_new_tokens=len(ids)))
        pieces = [event["token"]["text"] for event in events]
        assert "".join(pieces) == text
        assert len(pieces) == len(ids)
        whole = (await ask(server, max_new_tokens=len(ids), details=True)).json()
        assert [token["text"] for token in whole["details"]["tokens"]] == pieces


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, {"temperature": 0.0, "max_tokens": 256, "seed": None}),
        ({"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "typical_p": 1.0}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0, "top_p": 1.0, "top_k": 0}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": 1e-9}, {"temperature": 0.0}),
        ({"top_k": 5}, {"temperature": 1.0, "top_k": 5}),
        ({"top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"do_sample": True, "seed": -3}, {"seed": -3}),
        ({"seed": 3}, {"temperature": 0.0}),
        ({"max_new_tokens": 7}, {"max_tokens": 7}),
        ({"max_new_tokens": 10**6}, {"max_tokens": 512}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop": "a"}, {"stop": ("a",)}),
        ({"stop": []}, {"stop": ()}),
        ({"details": True}, {"logprobs": 0}),
        ({"details": False, "top_n_tokens": 4}, {"logprobs": None}),
        ({"details": True, "top_n_tokens": 4}, {"logprobs": 4}),
        ({"best_of": 1, "seed": 1}, {"n": 1}),
        ({"best_of": 3, "do_sample": True}, {"n": 3, "logprobs": 0, "seed": None}),
        ({"frequency_penalty": 0.0, "watermark": False, "grammar": None, "adapter_id": None, "odd": 1}, {}),
        ({"do_sample": None, "temperature": None, "top_k": None, "stop": None, "seed": None}, {"temperature": 0.0}),
    ],
)
async def test_parameters(parameters: dict[str, Any], expected: dict[str, Any]) -> None:
    async with served(ANSWER) as server:
        response = await ask(server, **parameters)
        assert response.status_code == 200, response.text
        sampling = server.runtime.requests[0].sampling
        assert {name: getattr(sampling, name) for name in expected} == expected


async def test_truncate_keeps_the_end_of_the_prompt() -> None:
    async with served(ANSWER) as server:
        await ask(server, inputs="hello hello hello world")
        await ask(server, inputs="hello hello hello world", truncate=2)
        whole, cut = (request.prompts[0].token_ids for request in server.runtime.requests)
        assert cut == whole[-2:]


async def test_a_missing_seed_is_drawn_and_told() -> None:
    async with served(ANSWER) as server:
        seeds = [
            (await ask(server, details=True, do_sample=True)).json()["details"]["seed"],
            events_of(await ask(server, "/generate_stream", temperature=0.5))[-1]["details"]["seed"],
        ]
        assert [request.sampling.seed for request in server.runtime.requests] == seeds
        assert len(set(seeds)) == 2
        assert (await ask(server, details=True, do_sample=True, seed=5)).json()["details"]["seed"] == 5
        assert (await ask(server, details=True, seed=5)).json()["details"]["seed"] is None  # greedy: of no effect


async def test_best_of_returns_the_likeliest() -> None:
    runtime = ScriptedRuntime(logprob=lambda index: [-2.0, -0.1, -1.0][index])
    async with served("yes", "no", "the cat", runtime=runtime) as server:
        body = (await ask(server, best_of=3, do_sample=True, details=True)).json()
        assert body["generated_text"] == "no"
        others = body["details"]["best_of_sequences"]
        assert [other["generated_text"] for other in others] == ["the cat", "yes"]
        assert all(other["tokens"] and other["finish_reason"] == "eos_token" for other in others)
        assert (await ask(server, best_of=3, do_sample=True)).json() == {"generated_text": "no"}


async def test_prefill_is_for_decoder_only_models() -> None:
    async with served(ANSWER) as server:
        message, kind = error_of(await ask(server, decoder_input_details=True, details=True))
        assert kind == "validation"
        assert "/v1/score" in message
    runtime = ScriptedRuntime(is_encoder_decoder=False)
    async with served(ANSWER, runtime=runtime) as server:
        message, _ = error_of(await ask(server, "/generate_stream", decoder_input_details=True))
        assert message == "decoder_input_details must be false in a stream"


LONG = " ".join(["hello"] * 3000)
BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "inputs is required"),
    ({"inputs": None}, "inputs is required"),
    ({"inputs": ["hello"]}, "inputs must be a string, not a list"),
    ({"inputs": " "}, "inputs must not be blank"),
    ({"inputs": "a\x00b"}, "inputs "),
    ({"inputs": "\ud800"}, "inputs "),
    ({"inputs": LONG}, "the limit is 2048"),
    ({"inputs": "x", "parameters": []}, "parameters must be an object, not a list"),
    ({"inputs": "x", "parameters": "greedy"}, "parameters must be an object, not a string"),
]
BAD_PARAMETERS: list[tuple[str, Any, str]] = [
    ("max_new_tokens", 0, "max_new_tokens must be at least 1"),
    ("max_new_tokens", 1.5, "max_new_tokens must be an integer"),
    ("max_new_tokens", "9", "max_new_tokens must be an integer, not a string"),
    ("do_sample", "yes", "do_sample must be true or false, not a string"),
    ("temperature", 0, "temperature must be above 0"),
    ("temperature", -1, "temperature must be above 0"),
    ("temperature", 2.5, "temperature must be in"),
    ("top_k", -1, "top_k must be"),
    ("top_p", 0, "top_p must be in"),
    ("top_p", 1.1, "top_p must be in"),
    ("repetition_penalty", 0, "repetition_penalty must be in"),
    ("seed", 2**63, "seed must be a 64-bit integer"),
    ("seed", "1", "seed must be an integer"),
    ("stop", [""], "stop must not contain an empty string"),
    ("stop", ["x"] * 17, "stop takes at most 16"),
    ("stop", [1], "stop[0] must be a string"),
    ("truncate", 0, "truncate must be at least 1"),
    ("top_n_tokens", 21, "top_n_tokens must be between 0 and 20"),
    ("top_n_tokens", -1, "top_n_tokens must be between 0 and 20"),
    ("best_of", 0, "best_of must be between 1 and 64"),
    ("best_of", 65, "best_of must be between 1 and 64"),
    ("best_of", 2, "best_of needs sampling"),
    ("details", 1, "details must be true or false"),
    ("return_full_text", "no", "return_full_text must be true or false"),
    ("decoder_input_details", True, "decoder_input_details must be false"),
    ("typical_p", 0.5, "typical_p is not supported"),
    ("frequency_penalty", 0.1, "frequency_penalty is not supported"),
    ("watermark", True, "watermark is not supported"),
    ("grammar", {"type": "json", "value": {}}, "grammar is not supported"),
    ("adapter_id", "x", "adapter_id is not supported"),
]


@pytest.mark.parametrize("path", ROUTES)
async def test_bad_bodies(path: str) -> None:
    async with served(ANSWER) as server:
        for body, words in BAD:
            response = await server.http.post(path, content=json.dumps(body))
            message, kind = error_of(response)
            assert (response.status_code, kind) == (400, "validation"), body
            assert words in message
        for raw in (b"", b"{", b"[]", b'"x"', b"\xe9", b'{"inputs": NaN}', b'{"inputs":' + b"[" * 100 + b"]" * 100):
            response = await server.http.post(path, content=raw)
            assert (response.status_code, error_of(response)[1]) == (400, "validation"), raw
        assert (await server.outcomes()).keys() == {"invalid"}
        assert server.runtime.requests == []


@pytest.mark.parametrize("path", ROUTES)
async def test_bad_parameters(path: str) -> None:
    async with served(ANSWER) as server:
        for name, value, words in BAD_PARAMETERS:
            if path == "/generate_stream" and name == "best_of" and value == 2:
                words = "best_of must be 1 in a stream"
            response = await ask(server, path, **{name: value})
            message, kind = error_of(response)
            assert (response.status_code, kind) == (400, "validation"), (name, value)
            assert words in message, (name, value, message)
            assert "model_kwargs" not in message
        message, _ = error_of(await ask(server, best_of=2, do_sample=True, seed=1))
        assert message == "best_of and seed exclude each other"
    async with served(ANSWER) as server:
        message, kind = error_of(await server.post("/", {"inputs": "x", "stream": "false"}))
        assert (message, kind) == ("stream must be true or false, not a string", "validation")


async def test_info() -> None:
    async with served(ANSWER) as server:
        info = (await server.http.get("/info")).json()
        assert info["model_id"] == "scripted"
        assert info["model_pipeline_tag"] == "text2text-generation"
        assert (info["max_input_tokens"], info["max_total_tokens"]) == (2048, 2560)
        assert (info["max_best_of"], info["max_stop_sequences"], info["max_top_n_tokens"]) == (64, 16, 20)
        assert info["max_concurrent_requests"] == 64 + 256
        assert {"model_sha", "validation_workers", "max_client_batch_size", "router", "version", "sha"} <= set(info)
        assert server.requests() == {}


async def test_headers_of_a_whole_response() -> None:
    async with served(ANSWER) as server:
        response = await ask(server)
        tokens = server.runtime.requests[0].prompt_tokens
        made = len(server.runtime.tokens_of(server.runtime.requests[0], 0))
        assert int(response.headers["x-prompt-tokens"]) == tokens
        assert int(response.headers["x-generated-tokens"]) == made
        assert int(response.headers["x-compute-characters"]) == len(ANSWER)
        for name in ("compute-time", "total-time", "queue-time", "inference-time", "time-per-token", "validation-time"):
            assert int(response.headers[f"x-{name}"]) >= 0


@pytest.mark.parametrize("path", ROUTES)
async def test_a_refusal_names_the_field_though_the_schema_has_no_place_for_it(path: str) -> None:
    async with served(ANSWER, service=scripted_service(settings=ServiceSettings(max_input_tokens=10))) as server:
        response = await server.post(path, {"inputs": "cat " * 20})
        assert response.status_code == 400
        assert error_of(response)[0].startswith("inputs: the prompt has ")


async def test_other_refusals_have_the_common_statuses() -> None:
    keyed = Settings(port=0, api_keys=("first",), max_body_mib=0.01)
    async with served(ANSWER, settings=keyed) as server:
        for path in ROUTES:
            response = await server.post(path, {"inputs": "x"})
            assert (response.status_code, error_of(response)[1]) == (401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        assert {(labels[1], labels[3]): count for labels, count in server.requests().items()} == {
            ("tgi", "unauthorized"): 3
        }
        response = await server.post("/generate", {"inputs": "x" * 20000}, authorization="Bearer first")
        assert (response.status_code, error_of(response)[1]) == (413, "validation")
        assert (await server.http.get("/info")).status_code == 401
        assert (await server.post("/generate", {"inputs": "x"}, authorization="Bearer first")).status_code == 200
    async with served(service=Service(ServiceSettings(), Metrics())) as server:
        for path in ROUTES:
            response = await server.post(path, {"inputs": "x"})
            assert (response.status_code, error_of(response)[1]) == (503, "overloaded")
            assert int(response.headers["retry-after"]) >= 1
        assert (await server.http.get("/info")).status_code == 503


async def test_a_full_queue() -> None:
    runtime = ScriptedRuntime([5] * 4, pace_seconds=0.05)
    limits = ServiceSettings(max_running_sequences=1, max_queued_requests=0)
    service = scripted_service(runtime=runtime, settings=limits)
    async with served(service=service, runtime=runtime) as server:
        await server.raw_open({"inputs": "x", "parameters": {"max_new_tokens": 500}}, path="/generate")
        response = await ask(server)
        assert (response.status_code, error_of(response)[1]) == (429, "overloaded")
        assert int(response.headers["retry-after"]) >= 1


async def test_deadline() -> None:
    async with served(runtime=ScriptedRuntime([5] * 4, pace_seconds=0.05)) as server:
        body = {"inputs": "x", "parameters": {"max_new_tokens": 500}}
        response = await server.post("/generate", body, x_request_timeout_ms="120")
        assert (response.status_code, error_of(response)[1]) == (504, "timeout")
        events = events_of(await server.post("/generate_stream", body, x_request_timeout_ms="120"))
        assert events[-1] == {"error": "the request's time ran out", "error_type": "timeout"}
        assert "token" in events[0]
        assert await server.outcomes() == {"deadline": 2}
        response = await server.post("/generate", body, x_request_timeout_ms="soon")
        assert (response.status_code, error_of(response)[1]) == (400, "validation")


async def test_an_engine_failure() -> None:
    async with served(ANSWER, runtime=ScriptedRuntime(fail_sequences={0: 2})) as server:
        response = await ask(server)
        assert (response.status_code, error_of(response)[1]) == (500, "generation")
        events = events_of(await ask(server, "/generate_stream"))
        assert len(events) == 3
        assert set(events[-1]) == {"error", "error_type"}
        assert events[-1]["error_type"] == "generation"
        assert await server.outcomes() == {"error": 2}


async def test_a_client_that_leaves_frees_its_slot() -> None:
    async with served(runtime=ScriptedRuntime([5] * 4, pace_seconds=0.02)) as server:
        for path in ROUTES:
            writer = await server.raw_open({"inputs": "x", "parameters": {"max_new_tokens": 500}}, path=path)
            await asyncio.sleep(0.05)
            writer.transport.abort()
            await server.until_idle()
        assert await server.outcomes() == {"cancelled": 3}
        assert server.runtime.tokens_made < 150


async def test_a_request_has_its_name_and_silence_its_comments() -> None:
    settings = Settings(port=0, keepalive_seconds=0.1)
    async with served(ANSWER, runtime=ScriptedRuntime(start_seconds=0.35), settings=settings) as server:
        body = json.dumps({"inputs": "hello"}).encode()
        received = await server.raw(http_post("/generate_stream", body, "x-request-id: mine"), until=b"0\r\n\r\n")
        assert b"x-request-id: mine" in received
        assert b": keepalive" in received
        assert b'data:{"index":1' in received
        assert b"[DONE]" not in received


async def test_wrong_methods() -> None:
    async with served(ANSWER) as server:
        for path in ("/generate", "/generate_stream"):
            response = await server.http.get(path)
            assert (response.status_code, response.headers["allow"]) == (405, "POST")
        response = await server.http.put("/")
        assert response.status_code == 405
        assert set(response.headers["allow"].replace(" ", "").split(",")) == {"GET", "HEAD", "POST"}
        assert (await server.http.post("/info")).status_code == 405
