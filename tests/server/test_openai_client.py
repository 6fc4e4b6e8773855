"""OpenAI's own clients, blocking and asynchronous, against the really started server with the bundled demo."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletion

from tests.server.openai_clients import Client
from tests.server.process import ServerProcess

KEY = "sk-of-this-test"
REVIEW = "Is this review positive or negative? I loved the story, it was charming."
LETTERS = "Take the last letters of Paul Maria and join them. Let's think step by step."
COMPLETIONS: dict[str, Any] = {"model": "flan-demo", "prompt": LETTERS, "temperature": 0}
CHAT: dict[str, Any] = {
    "model": "flan-demo", "messages": [{"role": "user", "content": LETTERS}], "temperature": 0,
}  # fmt: skip
LONG_CHAT: dict[str, Any] = {**CHAT, "extra_body": {"min_tokens": 200}}  # a busy machine streams 20 tokens as one piece
ROUTES = {"completions.create": COMPLETIONS, "chat.completions.create": CHAT}


@pytest.fixture(scope="module")
def demo() -> Iterator[ServerProcess]:
    with ServerProcess("--api-key", KEY, "--max-body-mib", "1") as process:
        yield process


@pytest.fixture(params=["sync", "async"])
async def client(demo: ServerProcess, request: pytest.FixtureRequest) -> AsyncIterator[Client]:
    async with Client(request.param, demo.rest_url, key=KEY) as made:
        yield made


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def text_of(choice: Any) -> str:
    """Of a choice of either route, whole or a chunk's."""
    if hasattr(choice, "text"):
        return str(choice.text)
    return (choice.message if hasattr(choice, "message") else choice.delta).content or ""


async def test_a_response_is_the_clients_own_type(client: Client, route: str) -> None:
    began = int(time.time())
    raw = await client.ask(f"{route.removesuffix('.create')}.with_raw_response.create", **ROUTES[route])
    response = raw.parse()
    kinds: dict[str, tuple[Any, str, str]] = {
        "completions.create": (Completion, "text_completion", "cmpl-"),
        "chat.completions.create": (ChatCompletion, "chat.completion", "chatcmpl-"),
    }
    kind, name, prefix = kinds[route]
    assert type(response) is kind
    kind.model_validate(response.model_dump(), strict=True)
    assert (response.object, response.model) == (name, "flan-demo")
    assert began - 1 <= response.created <= time.time() + 1
    assert response.id == prefix + raw.headers["x-request-id"]
    assert response._request_id == raw.request_id == raw.headers["x-request-id"]
    [choice] = response.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert "The answer is la." in text_of(choice)
    assert isinstance(response.usage, CompletionUsage)
    assert response.usage.total_tokens == response.usage.prompt_tokens + response.usage.completion_tokens > 20


async def test_a_request_keeps_the_id_that_the_caller_gave(client: Client, route: str) -> None:
    response = await client.ask(route, **ROUTES[route], max_tokens=1, extra_headers={"x-request-id": "mine-1"})
    assert response._request_id == "mine-1"
    assert response.id.endswith("-mine-1")
    with pytest.raises(openai.BadRequestError) as bad:
        await client.ask(route, **{**ROUTES[route], "temperature": 3}, extra_headers={"x-request-id": "mine-2"})
    assert bad.value.request_id == "mine-2"


STREAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "two sampled outputs": {"n": 2, "temperature": 1.2, "seed": 5},
    "a stop": {"stop": ["answer"]},
    "a limit": {"max_tokens": 3},
}


@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_joins_to_the_whole_with_its_usage(client: Client, route: str, name: str) -> None:
    fields = {**ROUTES[route], **STREAMS[name]}
    whole = await client.ask(route, **fields)
    plain = await client.chunks(route, **fields)
    *chunks, last = await client.chunks(route, **fields, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(chunk.usage is None for chunk in (*plain, *chunks))
    for made in (plain, chunks):
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in made}) == 1
        assert {chunk.object for chunk in made} == {
            "text_completion" if "prompt" in fields else "chat.completion.chunk"
        }
        for choice in whole.choices:
            own = [piece for chunk in made for piece in chunk.choices if piece.index == choice.index]
            assert "".join(map(text_of, own)) == text_of(choice)
            assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + [choice.finish_reason]


async def test_outputs_are_n_and_a_seed_repeats_them(client: Client, route: str) -> None:
    fields = {**ROUTES[route], "n": 4, "temperature": 1.5, "seed": -(2**63), "max_tokens": 30}
    first, again = await client.ask(route, **fields), await client.ask(route, **fields)
    texts = [text_of(choice) for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert [text_of(choice) for choice in again.choices] == texts
    del fields["seed"]
    unseeded = [text_of(choice) for _ in range(2) for choice in (await client.ask(route, **fields)).choices]
    assert len(set(unseeded)) > 4


async def test_every_form_of_a_prompt_says_the_same(client: Client, demo: ServerProcess) -> None:
    def ids_of(text: str) -> list[int]:
        headers = {"authorization": f"Bearer {KEY}"}
        asked = httpx.post(f"{demo.rest_url}/v1/tokenize", json={"text": text}, headers=headers)
        ids: list[int] = asked.json()["token_ids"]
        return ids

    async def ask(prompt: Any, **fields: Any) -> Any:
        return await client.ask("completions.create", **{**COMPLETIONS, "prompt": prompt, **fields})

    one, other = await ask(REVIEW), await ask(LETTERS)
    texts, tokens = [one.choices[0].text, other.choices[0].text], one.usage.prompt_tokens + other.usage.prompt_tokens
    assert texts[0] == "positive"
    assert (await ask(ids_of(REVIEW))).choices[0].text == texts[0]
    assert (await ask(ids_of(REVIEW)[:-1])).usage.prompt_tokens == one.usage.prompt_tokens  # the end is added
    for prompts in ([REVIEW, LETTERS], [ids_of(REVIEW), ids_of(LETTERS)]):
        whole = await ask(prompts)
        assert [choice.text for choice in whole.choices] == texts
        assert whole.usage.prompt_tokens == tokens
        twice = await ask(prompts, n=2)
        assert [(choice.index, choice.text) for choice in twice.choices] == list(
            enumerate([texts[0], texts[0], texts[1], texts[1]])
        )


async def test_logprobs_of_completions(client: Client) -> None:
    response = await client.ask("completions.create", **{**COMPLETIONS, "prompt": REVIEW}, logprobs=3)
    [choice] = response.choices
    told = choice.logprobs
    assert "".join(told.tokens).removesuffix("</s>").strip() == choice.text == "positive"
    assert len(told.tokens) == response.usage.completion_tokens == len(told.text_offset)
    for token, value, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert value == top[token] == max(top.values()) <= 0
        assert len(top) == 3
    chunks = await client.chunks("completions.create", **{**COMPLETIONS, "prompt": REVIEW}, logprobs=3)
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for piece in pieces for token in piece.tokens] == told.tokens
    assert [offset for piece in pieces for offset in piece.text_offset] == told.text_offset
    values = [value for piece in pieces for value in piece.token_logprobs]
    assert values == pytest.approx(told.token_logprobs, abs=1e-4)


async def test_logprobs_of_chat(client: Client) -> None:
    fields = {**CHAT, "messages": [{"role": "user", "content": REVIEW}], "logprobs": True, "top_logprobs": 2}
    response = await client.ask("chat.completions.create", **fields)
    [choice] = response.choices
    entries = choice.logprobs.content
    assert len(entries) == response.usage.completion_tokens
    assert b"".join(bytes(entry.bytes) for entry in entries[:-1]).decode().strip() == choice.message.content
    for entry in entries:
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )
        assert entry.top_logprobs[0].token == entry.token
        assert len(entry.top_logprobs) == 2
    chunks = await client.chunks("chat.completions.create", **fields)
    tokens = [entry.token for chunk in chunks for entry in chunk.choices[0].logprobs.content]
    assert tokens == [entry.token for entry in entries]


async def test_the_end_is_told_as_it_came(client: Client, route: str) -> None:
    """`length` where the limit cut, also exactly before EOS; `stop` for EOS and for a stop string, never shown."""
    whole = await client.ask(route, **ROUTES[route])
    made = whole.usage.completion_tokens
    for limit, reason in ((made - 2, "length"), (made - 1, "length"), (made, "stop"), (made + 1, "stop")):
        cut = await client.ask(route, **ROUTES[route], max_tokens=limit)
        assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == (reason, min(limit, made))
    text = text_of(whole.choices[0])
    stopped = await client.ask(route, **ROUTES[route], stop=["answer is", "no such words"])
    assert text_of(stopped.choices[0]) == text[: text.index("answer is")]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].model_extra["stop_reason"] == "answer is"


async def test_chat_takes_a_conversation_in_every_form_of_its_parts(client: Client) -> None:
    parts = [{"type": "text", "text": "Is this review positive or negative?"}]
    parts += [{"type": "text", "text": "I loved the story, it was charming."}]
    response = await client.ask(
        "chat.completions.create",
        model="flan-demo",
        messages=[{"role": "user", "content": parts}],
        temperature=0,
        max_completion_tokens=8,
    )
    assert response.choices[0].message.role == "assistant"
    assert response.choices[0].message.content == "positive"
    assert response.choices[0].message.refusal is None
    assert response.choices[0].message.tool_calls is None
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hello."), ("user", REVIEW)]
    messages = [{"role": role, "content": text} for role, text in turns]
    chunks = await client.chunks("chat.completions.create", model="flan-demo", messages=messages, max_tokens=8)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])


async def test_the_client_gathers_a_stream_of_chat_by_its_own_rules(client: Client) -> None:
    """`chat.completions.stream` folds the chunks itself, and is strict about their order."""

    def gathered() -> Any:
        with client.openai.chat.completions.stream(**LONG_CHAT) as events:
            kinds = [event.type for event in events]
            return kinds, events.get_final_completion()

    if isinstance(client.openai, openai.AsyncOpenAI):
        async with client.openai.chat.completions.stream(**LONG_CHAT) as events:
            kinds = [event.type async for event in events]
            folded: Any = await events.get_final_completion()
    else:
        kinds, folded = await asyncio.to_thread(gathered)
    whole = await client.ask("chat.completions.create", **LONG_CHAT)
    assert folded.choices[0].message.content == whole.choices[0].message.content
    assert folded.choices[0].finish_reason == "stop"
    assert kinds.count("content.delta") > 1
    assert kinds.count("content.done") == 1


async def test_models(client: Client) -> None:
    listed = await client.ask("models.list")
    assert [(model.id, model.object, model.owned_by) for model in listed.data] == [("flan-demo", "model", "flan-serve")]
    assert (await client.ask("models.retrieve", "flan-demo")).id == "flan-demo"
    with pytest.raises(openai.NotFoundError):
        await client.ask("models.retrieve", "gpt-4")
