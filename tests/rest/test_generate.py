"""The native routes: fields in, results out, streams that equal the whole."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from serve.config import Settings
from serve.request import Exemplar, Mode
from serve.rest.request_fields import GENERATE_FIELDS
from serve.service import ServiceSettings
from tests.rest.harness import error_of, frames, http_post, served, text_of
from tests.service.scripted_runtime import EOS, ScriptedRuntime, scripted_service
from tests.service.toy_tokenizers import byte_level, t5_like

CHAIN = "one and two. The answer is 12."


async def test_the_response_has_what_the_contract_names() -> None:
    async with served("Paris is it") as server:
        body = await server.generate(request_id="mine")
        assert set(body) == {
            *("request_id", "model", "mode", "created", "outputs", "max_tokens", "exemplars_used"),
            *("exemplars_dropped", "usage", "timings"),
        }
        assert body["outputs"] == [{"index": 0, "text": "Paris is it", "finish_reason": "stop"}]
        assert (body["request_id"], body["model"], body["mode"]) == ("mine", "scripted", "instruction")
        assert abs(body["created"] - time.time()) < 5
        assert body["max_tokens"] == 256
        assert body["usage"] == {
            "prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8, "unknown_tokens": 0,
        }  # fmt: skip
        assert set(body["timings"]) == {"queue_ms", "first_token_ms", "total_ms"}


async def test_every_field_reaches_the_service() -> None:
    async with served("yes") as server:
        fields: dict[str, Any] = {
            "mode": "few_shot",
            "instruction": "one",
            "input": "two",
            "options": ["yes", "no"],
            "exemplars": [{"input": "cat", "output": "dog", "rationale": None}],
            "model": "default",
            "max_tokens": 9,
            "min_tokens": 1,
            "temperature": 1,
            "top_p": 0.5,
            "top_k": 3,
            "seed": -(2**63),
            "repetition_penalty": 1.5,
            "n": 2,
            "stop": "zz",
            "logprobs": 0,
            "ignore_eos": False,
            "skip_special_tokens": False,
            "logit_bias": {"5": -100, "40": 0.5},
            "debug": True,
        }
        body = await server.generate(**fields)
        sampling = server.runtime.requests[0].sampling
        assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature) == (9, 1, 1.0)
        assert (sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 3, -(2**63))
        assert (sampling.repetition_penalty, sampling.n, sampling.stop, sampling.logprobs) == (1.5, 2, ("zz",), 0)
        assert (sampling.ignore_eos, sampling.skip_special_tokens) == (False, False)
        assert sampling.logit_bias == {5: -100.0, 40: 0.5}
        assert body["prompt"] == "one\n\nQ: cat\nA: dog\n\nQ: two\nOPTIONS:\n- yes\n- no\nA:"
        assert body["stop"] == ["zz"]
        assert body["exemplars_used"] == 1
        assert [output["index"] for output in body["outputs"]] == [0, 1]
        assert body["outputs"][0]["logprobs"][0] == {
            "token_id": server.runtime.tokens_of(server.runtime.requests[0], 0)[0],
            "text": " yes",
            "logprob": -0.5,
            "top": [],
        }


async def test_null_is_absent_and_a_stop_list_may_be_empty() -> None:
    async with served("yes") as server:
        nothing = dict.fromkeys(name for name in GENERATE_FIELDS if name != "instruction")
        assert (await server.generate(**nothing))["mode"] == "instruction"
        assert (await server.generate(stop=[], options=[], exemplars=[], logit_bias={}))["outputs"][0]["text"] == "yes"


async def test_exemplar_sets_by_name() -> None:
    sets = {"pets": (Exemplar("cat", "dog"), Exemplar("dog", "cat"))}
    settings = ServiceSettings(exemplar_sets=sets)
    async with served(service=scripted_service("yes", settings=settings)) as server:
        body = await server.generate(mode="few_shot", exemplar_set="pets", num_exemplars=1, debug=True)
        assert body["prompt"] == "Q: cat\nA: dog\n\nQ: hello\nA:"


async def test_chain_of_thought_and_votes() -> None:
    async with served(CHAIN, "so The answer is 4.", "The answer is 12.") as server:
        body = await server.generate(mode="cot")
        assert body["answer"] == "12"
        assert body["outputs"][0]["rationale"] == "one and two."
        assert body["outputs"][0]["answer"] == "12"
        assert "votes" not in body
        body = await server.generate(mode="cot", samples=3)
        assert (body["answer"], body["tie"]) == ("12", False)
        assert [(vote["answer"], vote["count"]) for vote in body["votes"]] == [("12", 2), ("4", 1)]
        [*_, final, done] = await server.stream("/v1/generate", instruction="hello", mode="cot", samples=3)
        assert done == "[DONE]"
        assert (final["answer"], final["tie"], final["rationale"]) == ("12", False, "one and two.")
        assert final["votes"] == body["votes"]
        assert [output["answer"] for output in final["outputs"]] == ["12", "4", "12"]


@pytest.mark.parametrize("exemplars", [[], [{"input": "1?", "output": "1", "rationale": "so 1."}]])
async def test_a_blank_line_in_a_rationale_ends_nothing(exemplars: list[dict[str, str]]) -> None:
    """What separates exemplars in the prompt is no stop string of ours; `debug` tells those that hold."""
    tokenizer = byte_level()
    runtime = ScriptedRuntime(eos_id=tokenizer.eos_id if tokenizer.eos_id is not None else -1, is_encoder_decoder=False)
    runtime.say(tokenizer, "two and two\n\nis four. The answer is 4.")
    async with served(service=scripted_service(runtime=runtime, tokenizer=tokenizer)) as server:
        body = await server.generate(mode="cot", exemplars=exemplars, debug=True)
        assert (body["answer"], body["outputs"][0]["rationale"]) == ("4", "two and two\n\nis four.")
        assert body["stop"] == []
        body = await server.generate(mode="cot", exemplars=exemplars, debug=True, stop=["\n\n"])
        assert (body["answer"], body["outputs"][0]["text"], body["stop"]) == (None, "two and two", ["\n\n"])


async def test_an_answer_that_is_not_there_is_null() -> None:
    async with served("I think 5") as server:
        body = await server.generate(mode="cot")
        assert body["answer"] is None
        assert body["outputs"][0]["answer"] is None
        final = (await server.stream("/v1/generate", instruction="hello", mode="cot"))[-2]
        assert final["answer"] is None
        assert (await server.generate(mode="cot", answer_format="number"))["answer"] == "5"


REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "raw": {"mode": "raw"},
    "three outputs": {"n": 3},
    "stop string": {"stop": ["The answer"]},
    "length": {"max_tokens": 3},
    "log-probabilities": {"logprobs": 2, "n": 2},
    "cot": {"mode": "cot", "logprobs": 1},
    "special tokens": {"skip_special_tokens": False, "ignore_eos": True, "max_tokens": 30},
    "debug": {"debug": True},
}


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("tokens_per_delta", [1, 3])
async def test_a_stream_equals_the_whole(name: str, tokens_per_delta: int) -> None:
    tokenizer = t5_like()
    runtime = ScriptedRuntime(tokens_per_delta=tokens_per_delta)
    runtime.say(tokenizer, CHAIN, "é ~ the cat's 7 dogs", "no")
    async with served(service=scripted_service(runtime=runtime)) as server:
        fields = REQUESTS[name]
        whole = await server.generate(**fields, request_id="same")
        events = await server.stream("/v1/generate", instruction="hello", **fields, request_id="same")
        *deltas, final, done = events
        assert done == "[DONE]"
        for output in whole["outputs"]:
            own = [delta for delta in deltas if delta["index"] == output["index"]]
            assert "".join(delta["text"] for delta in own) == output["text"]
            assert all(delta.get("finish_reason") is None for delta in own[:-1])
            assert own[-1]["finish_reason"] == output["finish_reason"]
            assert own[-1].get("stop_reason") == output.get("stop_reason")
            logprobs = [item for delta in own for item in delta.get("logprobs", [])]
            assert logprobs == output.get("logprobs", [])
        for key in set(whole) - {"outputs", "timings", "created"}:
            assert final[key] == whole[key], key
        assert set(final["timings"]) == set(whole["timings"])


async def test_frames_without_anything_to_show_are_not_sent() -> None:
    async with served("The answer is 4.") as server:
        events = await server.stream("/v1/generate", instruction="hello", stop=["The answer was"])
        assert text_of(events) == "The answer is 4."
        assert all(event["text"] or "finish_reason" in event for event in events[:-2])


async def test_the_stream_s_headers() -> None:
    async with served("yes") as server:
        response = await server.post("/v1/generate", {"instruction": "hello", "stream": True}, x_request_id="abc.1:-_")
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["x-request-id"] == "abc.1:-_"
        assert frames(response.content)[-2]["request_id"] == "abc.1:-_"


async def test_a_stream_is_ascii_on_the_wire() -> None:
    runtime = ScriptedRuntime()
    runtime.say(t5_like(), "é é")
    async with served(service=scripted_service(runtime=runtime)) as server:
        response = await server.post("/v1/generate", {"instruction": "hello", "stream": True})
        assert response.content.isascii()
        assert text_of(frames(response.content)) == "é é"
        whole = await server.post("/v1/generate", {"instruction": "hello"})
        assert "é é".encode() in whole.content


async def test_comments_break_the_silence_and_only_the_silence() -> None:
    runtime = ScriptedRuntime(start_seconds=0.35)
    settings = Settings(port=0, keepalive_seconds=0.1)
    async with served("yes no yes", runtime=runtime, settings=settings) as server:
        response = await server.post("/v1/generate", {"instruction": "hello", "stream": True})
        events = response.content.split(b"\n\n")
        *comments, end = (event for event in events if event.startswith(b":"))
        assert 2 <= len(comments) <= 4
        assert events[: len(comments)] == [b": keepalive"] * len(comments)
        assert (end, events[len(comments)]) == (b":", b":")  # for readers that lost the comments' own ends
        assert frames(response.content)[-1] == "[DONE]"


async def test_the_head_of_a_stream_comes_at_acceptance() -> None:
    async with served("yes", runtime=ScriptedRuntime(start_seconds=0.5)) as server:
        begun = time.monotonic()
        async with server.http.stream(
            "POST", "/v1/generate", json={"instruction": "hello", "stream": True}
        ) as response:
            assert response.status_code == 200
            assert time.monotonic() - begun < 0.3


async def test_the_first_piece_comes_before_the_last_is_made() -> None:
    async with served("yes no yes no", runtime=ScriptedRuntime(pace_seconds=0.05)) as server:
        async with server.http.stream(
            "POST", "/v1/generate", json={"instruction": "hello", "stream": True}
        ) as response:
            arrived = [time.monotonic() async for _ in response.aiter_bytes()]
        assert len(arrived) >= 4
        assert arrived[-1] - arrived[0] > 0.1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_from_the_header(stream: bool) -> None:
    async with served(runtime=ScriptedRuntime(script=[5], pace_seconds=0.02)) as server:
        body = {"instruction": "hello", "stream": stream, "ignore_eos": True}
        response = await server.post("/v1/generate", body, x_request_timeout_ms="120")
        if stream:
            *_, last = frames(response.content)
            assert last["error"]["code"] == "deadline"
        else:
            assert response.status_code == 504
            assert error_of(response)["code"] == "deadline"
        await server.until_idle()
        assert await server.outcomes() == {"deadline": 1}
        response = await server.post("/v1/generate", {"instruction": "hello"}, x_request_timeout_ms="0")
        assert response.status_code == 504


@pytest.mark.parametrize("value", ["-1", "1.5", "soon", "", "9" * 13, "1e3"])
async def test_a_deadline_that_is_none(value: str) -> None:
    async with served("yes") as server:
        response = await server.post("/v1/generate", {"instruction": "hello"}, x_request_timeout_ms=value)
        assert response.status_code == 400
        assert error_of(response)["param"] == "x-request-timeout-ms"


async def test_request_names() -> None:
    async with served("yes") as server:
        body = {"instruction": "hello", "request_id": "from-body"}
        response = await server.post("/v1/generate", body)
        assert response.headers["x-request-id"] == response.json()["request_id"] == "from-body"
        response = await server.post("/v1/generate", body, x_request_id="from-header")
        assert response.headers["x-request-id"] == response.json()["request_id"] == "from-header"
        for invalid in ("a b", "x" * 129, "é", 'q"'):
            raw = http_post("/v1/generate", b'{"instruction":"hello"}', f"x-request-id: {invalid}", "connection: close")
            answer = await server.raw(raw)
            assert b"x-request-id: req-" in answer
            assert b'"request_id":"req-' in answer
        response = await server.post("/v1/generate", {"instruction": "hello", "request_id": "a b"})
        assert (response.status_code, error_of(response)["param"]) == (400, "request_id")


async def test_scores() -> None:
    async with served(runtime=ScriptedRuntime(candidate_logprob=lambda ids: -float(len(ids)))) as server:
        body = {"instruction": "Is it?", "candidates": ["yes", "the cat"], "mode": "instruction"}
        response = await server.post("/v1/score", body, x_request_id="s1")
        scores = response.json()
        assert set(scores) == {"request_id", "model", "candidates", "best", "usage", "timings"}
        assert scores["request_id"] == "s1"
        assert scores["candidates"][0] == {
            "text": "yes",
            "logprob": -2.0,
            "num_tokens": 2,
            "logprob_per_token": -1.0,
            "probability": pytest.approx(1 / (1 + 2.718281828 ** (-1))),
        }
        assert scores["best"] == 0
        mistakes: list[tuple[dict[str, Any], str]] = [
            ({"candidates": []}, "candidates"),
            ({}, "candidates"),
            ({"candidates": ["x"], "stream": True}, "stream"),
        ]
        for wrong, field in mistakes:
            response = await server.post("/v1/score", {"instruction": "Is it?", **wrong})
            assert (response.status_code, error_of(response)["param"]) == (400, field)


@pytest.mark.parametrize("order", ["ABCD", "DCBA", "BDAC"])
async def test_candidates_that_score_alike_share_the_probability_in_any_order(order: str) -> None:
    """Then the first is the best: over orders or gold letters that is chance, not a preference for some letter."""
    async with served("yes", runtime=ScriptedRuntime(candidate_logprob=lambda ids: -3.0)) as server:
        body = (await server.post("/v1/score", {"instruction": "hello", "candidates": list(order)})).json()
    assert [candidate["text"] for candidate in body["candidates"]] == list(order)
    assert [candidate["probability"] for candidate in body["candidates"]] == pytest.approx([0.25] * 4)
    assert body["best"] == 0


async def test_tokenize_agrees_with_raw_mode() -> None:
    async with served("yes") as server:
        text = "the  cat ~ {x}"
        tokens = (await server.post("/v1/tokenize", {"text": text})).json()
        usage = (await server.generate(mode="raw", instruction=text))["usage"]
        assert tokens["num_tokens"] == len(tokens["token_ids"]) == usage["prompt_tokens"]
        assert tokens["unknown_tokens"] == usage["unknown_tokens"] > 0
        assert tokens["token_ids"][-1] == EOS
        bare = (await server.post("/v1/tokenize", {"text": text, "add_special_tokens": False})).json()
        assert bare["token_ids"] == tokens["token_ids"][:-1]
        response = await server.post("/v1/tokenize", {"text": "x", "model": "none"})
        assert (response.status_code, error_of(response)["param"]) == (404, "model")
        response = await server.post("/v1/tokenize", {"input": "x"})
        assert response.status_code == 400


async def test_models() -> None:
    settings = ServiceSettings(served_model_names=("google/flan", "flan"))
    async with served(service=scripted_service("yes", settings=settings)) as server:
        models = (await server.http.get("/v1/models")).json()
        assert models["object"] == "list"
        assert [model["id"] for model in models["data"]] == ["google/flan", "flan"]
        model = models["data"][0]
        assert (model["object"], model["owned_by"]) == ("model", "flan-serve")
        assert model["runtime"] == "scripted"
        assert model["dtype"] == "float32"
        assert model["architecture"] == "T5ForConditionalGeneration"
        assert (model["max_input_tokens"], model["max_output_tokens"]) == (2048, 512)
        assert model["modes"] == [mode.value for mode in Mode]
        assert (await server.http.get("/v1/models/google/flan")).json() == model
        response = await server.http.get("/v1/models/gpt-4")
        assert (response.status_code, error_of(response)["code"]) == (404, "not_found")


async def test_many_streams_at_once_keep_apart() -> None:
    def script(request: Any, index: int) -> list[int]:
        return [*t5_like().encode(f"{request.request_id} {index}", add_special_tokens=False), EOS]

    async with served(runtime=ScriptedRuntime(script=script, pace_seconds=0.001)) as server:
        names = [f"r{number}" for number in range(40)]
        streams = await asyncio.gather(
            *(server.stream("/v1/generate", instruction="hello", n=2, request_id=name) for name in names)
        )
        for name, events in zip(names, streams, strict=True):
            assert [text_of(events, index) for index in (0, 1)] == [f"{name} 0", f"{name} 1"]
        assert await server.outcomes() == {"stop": 40}
