"""The OpenAI routes, through OpenAI's own client and by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from serve.config import Settings
from serve.output import TokenLogprob
from serve.service import ServiceSettings
from tests.rest.harness import Served, error_of, served, text_of
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service
from tests.service.toy_tokenizers import byte_level, t5_like

ANSWER = "The answer is 4."
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}


@asynccontextmanager
async def client_of(server: Served, key: str = "none", max_retries: int = 0) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1",
        api_key=key,
        max_retries=max_retries,
        http_client=DefaultAsyncHttpxClient(trust_env=False),
    ) as client:
        yield client


async def test_completions() -> None:
    async with served(ANSWER) as server, client_of(server) as client:
        raw = await client.completions.with_raw_response.create(model="scripted", prompt="hello", seed=5)
        completion = raw.parse()
        assert completion.object == "text_completion"
        assert completion.id == f"cmpl-{raw.headers['x-request-id']}"
        assert completion.model == "scripted"
        [choice] = completion.choices
        assert (choice.text, choice.finish_reason, choice.logprobs) == (ANSWER, "stop", None)
        assert completion.usage is not None
        assert completion.usage.completion_tokens == len(server.runtime.tokens_of(server.runtime.requests[0], 0))
        assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
        sampling = server.runtime.requests[0].sampling
        assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed) == (1.0, 1.0, 256, 5)


async def test_chat() -> None:
    async with served(ANSWER) as server, client_of(server) as client:
        completion = await client.chat.completions.create(
            model="scripted",
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "text", "text": "and two?"}]},
            ],
            max_completion_tokens=9,
            max_tokens=99,
            extra_body={"debug": True},
        )
        assert completion.object == "chat.completion"
        assert completion.id.startswith("chatcmpl-")
        [choice] = completion.choices
        assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
        assert server.runtime.requests[0].sampling.max_tokens == 9
        assert (completion.model_extra or {})["prompt"] == "Be brief.\n\ntwo\nand two?"


async def test_a_conversation_has_visible_labels() -> None:
    async with served("yes") as server:
        turns = [("developer", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")]
        body = {"messages": [{"role": role, "content": text, "name": "x"} for role, text in turns], "debug": True}
        response = await server.post("/v1/chat/completions", body)
        assert response.json()["prompt"] == "Be brief.\n\nUser: Hi\n\nAssistant: Hello.\n\nUser: Bye\n\nAssistant:"


STREAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two outputs": {"n": 2},
    "stop": {"stop": "is"},
    "length": {"max_tokens": 2},
    "usage": {"stream_options": {"include_usage": True}},
    "usage with a stop and two outputs": {"n": 2, "stop": ["4"], "stream_options": {"include_usage": True}},
}


@pytest.mark.parametrize("name", STREAMS)
async def test_completion_streams_equal_the_whole(name: str) -> None:
    async with served(ANSWER, "no") as server, client_of(server) as client:
        fields = dict(STREAMS[name])
        options = fields.pop("stream_options", None)
        whole = await client.completions.create(model="default", prompt=["hello", "world"], logprobs=1, **fields)
        stream = await client.completions.create(
            model="default", prompt=["hello", "world"], logprobs=1, stream=True, stream_options=options, **fields
        )
        chunks = [chunk async for chunk in stream]
        usage = chunks.pop() if options else None
        assert len({chunk.id for chunk in chunks}) == 1
        for choice in whole.choices:
            own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
            assert "".join(piece.text for piece in own) == choice.text
            assert [piece.finish_reason for piece in own[:-1]] == [None] * (len(own) - 1)
            assert own[-1].finish_reason == choice.finish_reason
            for part in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                pieces = [item for c in own if c.logprobs is not None for item in getattr(c.logprobs, part)]
                assert pieces == getattr(choice.logprobs, part)
        if usage is not None:
            assert usage.choices == []
            assert usage.usage == whole.usage
        assert all(chunk.choices for chunk in chunks)


@pytest.mark.parametrize("name", STREAMS)
async def test_chat_streams_equal_the_whole(name: str) -> None:
    async with served(ANSWER, "no") as server, client_of(server) as client:
        fields = dict(STREAMS[name])
        options = fields.pop("stream_options", None)
        fields |= {"model": "default", "messages": [{"role": "user", "content": "hi"}]}
        fields |= {"logprobs": True, "top_logprobs": 2}
        whole = await client.chat.completions.create(**fields)
        stream = await client.chat.completions.create(**fields, stream=True, stream_options=options)
        chunks = [chunk async for chunk in stream]
        usage = chunks.pop() if options else None
        for choice in whole.choices:
            own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
            assert own[0].delta.role == "assistant"
            assert [piece.delta.role for piece in own[1:]] == [None] * (len(own) - 1)
            assert "".join(piece.delta.content or "" for piece in own) == choice.message.content
            assert own[-1].finish_reason == choice.finish_reason
            assert choice.logprobs is not None
            pieces = [item for c in own if c.logprobs is not None for item in c.logprobs.content or ()]
            assert pieces == choice.logprobs.content
            assert all(len(item.top_logprobs) == 2 for item in pieces)
        if usage is not None:
            assert usage.choices == []
            assert usage.usage == whole.usage


async def test_usage_only_where_it_was_asked_for() -> None:
    async with served("yes no") as server:
        for path, body in ROUTES.items():
            events = await server.stream(path, **body)
            assert events.pop() == "[DONE]"
            assert not any("usage" in event for event in events)
            assert all(event["choices"] for event in events)
            events = await server.stream(path, **body, stream_options={"include_usage": True, "x": 1})
            assert [event["usage"] for event in events[:-2]] == [None] * (len(events) - 2)
            assert events[-2]["choices"] == []
            assert set(events[-2]["usage"]) >= {"prompt_tokens", "completion_tokens", "total_tokens"}
            options = {"include_usage": True, "continuous_usage_stats": True}
            events = await server.stream(path, **body, stream_options=options)
            counts = [event["usage"]["completion_tokens"] for event in events[:-1]]
            assert counts == sorted(counts)
            assert counts[-1] == counts[-2]
            response = await server.post(path, {**body, "stream_options": {"include_usage": True}})
            assert (response.status_code, error_of(response)["param"]) == (400, "stream_options")


async def test_no_chunk_before_a_token_s_text() -> None:
    """A benchmark takes the first chunk with choices for the first token."""
    async with served(ANSWER, runtime=ScriptedRuntime(start_seconds=0.1)) as server:
        for path, body in ROUTES.items():
            events = await server.stream(path, **body, stop=["The answer was"])
            first = events[0]["choices"][0]
            assert first["text"] if "text" in first else first["delta"]["content"]


PROMPTS: dict[str, tuple[Any, list[str]]] = {
    "a string": ("the cat", ["the cat"]),
    "strings": (["the cat", "the dog"], ["the cat", "the dog"]),
    "a list of one": (["the cat"], ["the cat"]),
    "token ids": ("ids", ["the cat"]),
    "lists of token ids": ("lists", ["the cat", "the dog"]),
}


@pytest.mark.parametrize("name", PROMPTS)
async def test_every_form_of_a_prompt(name: str) -> None:
    given, texts = PROMPTS[name]
    ids = [list(t5_like().encode(text)) for text in texts]
    prompt = {"ids": ids[0], "lists": ids}.get(given if isinstance(given, str) else "", given)
    async with served("one", "two") as server:
        response = await server.post("/v1/completions", {"prompt": prompt, "n": 2, "echo": True})
        body = response.json()
        assert [list(prepared.token_ids) for prepared in server.runtime.requests[0].prompts] == ids
        # Grouped by prompt; the scripted sequences alternate.
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(texts)))
        ends = "</s>" if given in ("ids", "lists") else ""
        assert [choice["text"] for choice in body["choices"]] == [
            f"{text}{ends}{word}" for text in texts for word in ("one", "two")
        ]
        assert body["usage"]["prompt_tokens"] == sum(map(len, ids))


async def test_echo_in_a_stream_comes_once_before_the_text() -> None:
    async with served("one two") as server:
        events = await server.stream("/v1/completions", prompt=["the ", "cat"], echo=True)
        for index, prompt in enumerate(["the ", "cat"]):
            texts = [e["choices"][0]["text"] for e in events[:-1] if e["choices"][0]["index"] == index]
            assert "".join(texts) == f"{prompt}one two"
            assert texts[0].startswith(prompt)


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_echo_with_logprobs_of_an_encoder_decoder_points_to_the_scores(max_tokens: int) -> None:
    async with served("one") as server:
        body = {"prompt": [[5, 6]], "echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}
        response = await server.post("/v1/completions", body)
        assert response.status_code == 400
        assert error_of(response)["param"] == "echo"
        assert "/v1/score" in error_of(response)["message"]


class Causal(ScriptedRuntime):
    """A decoder-only model: its prompts have log-probabilities. Token i of a prompt has -i."""

    async def prompt_logprobs(
        self, request_id: str, token_ids: tuple[int, ...], count: int
    ) -> tuple[TokenLogprob, ...]:
        top = tuple((5 + rank, -0.5 - rank) for rank in range(count))
        return tuple(TokenLogprob(token_id, -float(place), top) for place, token_id in enumerate(token_ids[1:], 1))


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs_covers_the_prompt(max_tokens: int, stream: bool) -> None:
    """As lm-eval asks for it: lists of ids, the first token has null, text_offset runs through."""
    async with served("one", runtime=Causal(is_encoder_decoder=False)) as server:
        ids = [(await server.post("/v1/tokenize", {"text": text})).json()["token_ids"] for text in ("the cat", "hello")]
        body = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0, "n": 2}
        if stream:
            found: dict[int, dict[str, Any]] = {}
            for event in (await server.stream("/v1/completions", **body))[:-1]:
                choice = event["choices"][0]
                one = found.setdefault(choice["index"], {"text": "", "logprobs": {}})
                one["text"] += choice["text"]
                for name, values in (choice["logprobs"] or {}).items():
                    one["logprobs"].setdefault(name, []).extend(values)
            choices = [found[index] for index in range(4)]
        else:
            answer = (await server.post("/v1/completions", body)).json()
            choices = answer["choices"]
            assert answer["usage"]["completion_tokens"] == 4 * max_tokens
        for index, choice in enumerate(choices):
            prompt, logprobs = ids[index // 2], choice["logprobs"]
            assert logprobs["token_logprobs"][: len(prompt)] == [None, *(-float(i) for i in range(1, len(prompt)))]
            assert {len(values) for values in logprobs.values()} == {len(prompt) + max_tokens}
            assert logprobs["top_logprobs"][0] is None
            for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True):
                assert token in top
            assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
            assert logprobs["text_offset"][-1] <= len(choice["text"])


async def test_logprobs_in_both_shapes() -> None:
    async with served("the cat") as server:
        body: dict[str, Any] = {"prompt": "hello", "logprobs": 2}
        [choice] = (await server.post("/v1/completions", body)).json()["choices"]
        shape = choice["logprobs"]
        assert set(shape) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
        assert shape["tokens"][0] == " the"
        assert shape["tokens"][-1] == "</s>"
        assert shape["text_offset"][:2] == [0, 3]
        assert shape["text_offset"][-1] == len("the cat")
        for token, logprob, top in zip(shape["tokens"], shape["token_logprobs"], shape["top_logprobs"], strict=True):
            assert top[token] == logprob  # clients look the chosen token up
            assert list(top.values()) == sorted(top.values(), reverse=True)
        [choice] = (await server.post("/v1/completions", {**body, "logprobs": 0})).json()["choices"]
        assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"])
        body = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True}
        [choice] = (await server.post("/v1/chat/completions", body)).json()["choices"]
        assert choice["logprobs"]["content"][0] == {
            "token": " the", "logprob": -0.5, "bytes": list(b" the"), "top_logprobs": [],
        }  # fmt: skip
        response = await server.post("/v1/chat/completions", {**body, "logprobs": False, "top_logprobs": 2})
        assert (response.status_code, error_of(response)["param"]) == (400, "top_logprobs")


async def test_the_bytes_of_a_token_that_is_no_text() -> None:
    tokenizer = byte_level()
    runtime = ScriptedRuntime(eos_id=tokenizer.eos_id if tokenizer.eos_id is not None else -1)
    runtime.say(tokenizer, "é")
    async with served(service=scripted_service(runtime=runtime, tokenizer=tokenizer)) as server:
        body = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True}
        [choice] = (await server.post("/v1/chat/completions", body)).json()["choices"]
        assert choice["message"]["content"] == "é"
        entries = choice["logprobs"]["content"]
        assert bytes(entries[0]["bytes"] + entries[1]["bytes"]).decode() == "é"
        [choice] = (await server.post("/v1/completions", {"prompt": "hi", "logprobs": 0})).json()["choices"]
        assert choice["logprobs"]["text_offset"][:2] == [0, 0]


async def test_a_limit_inside_a_character_is_no_error_on_any_route() -> None:
    """A byte-level model, an emoji of four tokens: its beginning is not shown, the status stays 200, pieces join."""
    tokenizer = byte_level()
    runtime = ScriptedRuntime(eos_id=tokenizer.eos_id if tokenizer.eos_id is not None else -1)
    runtime.say(tokenizer, "ok 😀 é!")
    ids = runtime.tokens_of(None, 0)  # type: ignore[arg-type]  # a fixed script looks at no request
    async with served(service=scripted_service(runtime=runtime, tokenizer=tokenizer)) as server:
        for limit in range(1, len(ids)):
            expected = tokenizer.decode(ids[:limit]).rstrip("\ufffd")
            whole = await server.generate(max_tokens=limit)
            assert (whole["outputs"][0]["text"], whole["outputs"][0]["finish_reason"]) == (expected, "length")
            assert text_of(await server.stream("/v1/generate", instruction="hello", max_tokens=limit)) == expected
            for path, body in ROUTES.items():
                response = await server.post(path, {**body, "max_tokens": limit})
                assert response.status_code == 200
                [choice] = response.json()["choices"]
                assert expected == (choice["text"] if "text" in choice else choice["message"]["content"])
                events = await server.stream(path, **body, max_tokens=limit)
                pieces = [event["choices"][0] for event in events[:-1]]
                joined = "".join(piece.get("text") or piece.get("delta", {}).get("content") or "" for piece in pieces)
                assert (joined, pieces[-1]["finish_reason"]) == (expected, "length")


async def test_vllm_s_extras_count_and_other_fields_do_not() -> None:
    async with served("yes no yes") as server:
        extras: dict[str, Any] = {
            "top_k": -1,
            "min_tokens": 2,
            "ignore_eos": True,
            "repetition_penalty": 1.1,
            "max_tokens": 9,
        }
        extras |= {"skip_special_tokens": False, "truncate_prompt_tokens": 3}
        unknown: dict[str, Any] = {
            "user": "me",
            "store": True,
            "metadata": {"a": [1]},
            "best_of": None,
            "suffix": "",
            "x": {"y": 1},
        }
        unknown |= {"presence_penalty": 0, "frequency_penalty": 0.0, "tools": [], "tool_choice": "none"}
        unknown |= {"response_format": {"type": "text"}, "parallel_tool_calls": True, "service_tier": "auto"}
        body = {"prompt": "the cat the dog the cat", **extras, **unknown}
        response = await server.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        request = server.runtime.requests[0]
        assert (request.sampling.top_k, request.sampling.min_tokens, request.sampling.ignore_eos) == (0, 2, True)
        assert (request.sampling.repetition_penalty, request.sampling.skip_special_tokens) == (1.1, False)
        assert len(request.prompts[0].token_ids) == 3
        assert request.prompts[0].token_ids[-1] == 1
        assert response.json()["choices"][0]["text"].count("</s>") > 1
        assert response.json()["choices"][0]["finish_reason"] == "length"


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no prompt": ("completions", {"prompt": None}, "prompt"),
    "empty prompt": ("completions", {"prompt": ""}, "prompt"),
    "blank prompt": ("completions", {"prompt": " \n"}, "prompt"),
    "one blank of two": ("completions", {"prompt": ["a", ""]}, "prompt"),
    "no prompts": ("completions", {"prompt": []}, "prompt"),
    "no ids": ("completions", {"prompt": [[]]}, "prompt"),
    "mixed": ("completions", {"prompt": ["a", 5]}, "prompt"),
    "ids and lists": ("completions", {"prompt": [5, [6]]}, "prompt"),
    "true as id": ("completions", {"prompt": [5, True]}, "prompt"),
    "float id": ("completions", {"prompt": [5.0]}, "prompt"),
    "negative id": ("completions", {"prompt": [-1]}, "prompt"),
    "id beyond the vocabulary": ("completions", {"prompt": [100_000]}, "prompt"),
    "huge id": ("completions", {"prompt": [10**30]}, "prompt"),
    "object prompt": ("completions", {"prompt": {"text": "x"}}, "prompt"),
    "presence": ("completions", {"presence_penalty": 0.5}, "presence_penalty"),
    "frequency": ("chat/completions", {"frequency_penalty": -1}, "frequency_penalty"),
    "best_of": ("completions", {"best_of": 3}, "best_of"),
    "suffix": ("completions", {"suffix": "end"}, "suffix"),
    "logprobs as in chat": ("completions", {"logprobs": True}, "logprobs"),
    "logprobs as in completions": ("chat/completions", {"logprobs": 3}, "logprobs"),
    "too many logprobs": ("completions", {"logprobs": 21}, "logprobs"),
    "too many top_logprobs": ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "no tokens": ("completions", {"max_tokens": 0}, "max_tokens"),
    "no completion tokens": ("chat/completions", {"max_completion_tokens": 0}, "max_completion_tokens"),
    "top_k": ("completions", {"top_k": -2}, "top_k"),
    "truncate": ("completions", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    "stream": ("completions", {"stream": "true"}, "stream"),
    "stream_options": ("completions", {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
    "n": ("completions", {"n": 0}, "n"),
    "temperature": ("chat/completions", {"temperature": 2.1}, "temperature"),
    "tools": ("chat/completions", {"tools": [{"type": "function"}]}, "tools"),
    "tool_choice": ("chat/completions", {"tool_choice": "required"}, "tool_choice"),
    "functions": ("chat/completions", {"functions": [{"name": "f"}]}, "functions"),
    "json": ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
    "format": ("chat/completions", {"response_format": "text"}, "response_format"),
    "no messages": ("chat/completions", {"messages": []}, "messages"),
    "null messages": ("chat/completions", {"messages": None}, "messages"),
    "a string of messages": ("chat/completions", {"messages": "hi"}, "messages"),
    "empty content": ("chat/completions", {"messages": [{"role": "user", "content": ""}]}, "messages"),
    "no content": ("chat/completions", {"messages": [{"role": "user"}]}, "messages"),
    "no parts": ("chat/completions", {"messages": [{"role": "user", "content": []}]}, "messages"),
    "unknown role": ("chat/completions", {"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
    "tool role": ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages"),
    "no role": ("chat/completions", {"messages": [{"content": "x"}]}, "messages"),
    "an image": (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages",
    ),
    "a part that is text alone": ("chat/completions", {"messages": [{"role": "user", "content": ["x"]}]}, "messages"),
    "a message that is none": ("chat/completions", {"messages": ["x"]}, "messages"),
}


async def test_refused_requests_name_the_field() -> None:
    async with served("yes") as server:
        for name, (route, fields, param) in REFUSED.items():
            path = f"/v1/{route}"
            response = await server.post(path, {**ROUTES[path], **fields})
            assert response.status_code == 400, (name, response.text)
            error = error_of(response)
            assert (error["param"], error["code"]) == (param, "invalid"), (name, error)
            good = await server.post(path, ROUTES[path])
            assert good.status_code == 200
        outcomes = await server.outcomes()
        assert outcomes == {"invalid": len(REFUSED), "stop": len(REFUSED)}


async def test_the_client_s_exceptions() -> None:
    settings = Settings(port=0, api_keys=("secret",))
    async with served("yes", settings=settings) as server:
        async with client_of(server, "wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.completions.create(model="scripted", prompt="x")
        async with client_of(server, "secret") as client:
            with pytest.raises(openai.NotFoundError) as missing:
                await client.completions.create(model="gpt-4", prompt="x")
            assert (missing.value.param, missing.value.code) == ("model", "not_found")
            with pytest.raises(openai.BadRequestError) as bad:
                await client.chat.completions.create(model="scripted", messages=[])
            assert bad.value.param == "messages"
            assert bad.value.request_id is not None
            assert [model.id async for model in client.models.list()] == ["scripted"]
            assert (await client.models.retrieve("scripted")).id == "scripted"


async def test_the_client_retries_a_full_queue() -> None:
    runtime = ScriptedRuntime(pace_seconds=0.1, max_running_sequences=1)
    runtime.say(t5_like(), "yes")
    limits = ServiceSettings(served_model_names=("scripted",), max_running_sequences=1, max_queued_requests=0)
    async with served(service=scripted_service(runtime=runtime, settings=limits), runtime=runtime) as server:
        first = await server.raw_open({"instruction": "hello"})
        async with client_of(server, max_retries=3) as client:
            completion = await client.completions.create(model="scripted", prompt="x")
        assert completion.choices[0].text == "yes"
        first.close()
        assert (await server.outcomes())["refused"] >= 1


async def test_a_failed_output_is_an_error_and_no_finish_reason() -> None:
    async with served("yes no yes", runtime=ScriptedRuntime(fail_sequences={1: 2})) as server:
        for path, body in ROUTES.items():
            response = await server.post(path, {**body, "n": 2})
            assert (response.status_code, error_of(response)["code"]) == (500, "engine_failure")
            events = await server.stream(path, **body, n=2)
            assert events[-1]["error"]["code"] == "engine_failure"
        native = await server.generate(n=2)
        assert [output["finish_reason"] for output in native["outputs"]] == ["stop", "error"]


async def test_the_client_raises_on_an_error_in_a_stream() -> None:
    async with served("yes no yes", runtime=ScriptedRuntime(fail_at_step=2)) as server, client_of(server) as client:
        stream = await client.completions.create(model="scripted", prompt="x", stream=True)
        assert (await anext(stream)).choices[0].text
        with pytest.raises(openai.APIError, match=r"fail|death"):
            [chunk async for chunk in stream]
