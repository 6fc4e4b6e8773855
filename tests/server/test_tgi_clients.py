"""`huggingface_hub`'s client, as its users use it, against the really started server with the bundled demo."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import huggingface_hub.constants
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import ValidationError

from tests.server.process import ServerProcess

PROMPT = "Is this review positive or negative?\n\nI loved the story, it was charming."
LETTERS = "Take the last letters of Paul Maria and join them. Let's think step by step."
KEY = "hf_key-of-this-test"


@pytest.fixture(scope="module")
def demo() -> Iterator[ServerProcess]:
    with ServerProcess("--api-key", KEY) as process:
        yield process


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the Hub is told to be offline, its client would not ask a local server either."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def client(demo: ServerProcess) -> InferenceClient:
    return InferenceClient(demo.rest_url, token=KEY)


def test_text(client: InferenceClient) -> None:
    assert client.text_generation(PROMPT) == "positive"
    full = client.text_generation(PROMPT, return_full_text=True, max_new_tokens=8)
    assert full == PROMPT + "positive"


def test_a_stream_joins_to_the_text(client: InferenceClient) -> None:
    text = client.text_generation(LETTERS, max_new_tokens=60)
    pieces = list(client.text_generation(LETTERS, max_new_tokens=60, stream=True))
    assert len(pieces) > 5
    assert "".join(pieces) == text


def test_details_whole_and_streamed(client: InferenceClient) -> None:
    whole = client.text_generation(PROMPT, details=True, top_n_tokens=3)
    assert whole.generated_text == "positive"
    assert whole.details is not None
    assert whole.details.finish_reason == "eos_token"
    assert whole.details.generated_tokens == len(whole.details.tokens)
    assert [token.special for token in whole.details.tokens] == [False] * (len(whole.details.tokens) - 1) + [True]
    assert whole.details.top_tokens is not None
    assert all(len(top) == 3 for top in whole.details.top_tokens)
    events = list(client.text_generation(PROMPT, details=True, stream=True))
    assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]
    assert [event.token.text for event in events] == [token.text for token in whole.details.tokens]
    for event, token in zip(events, whole.details.tokens, strict=True):
        assert event.token.logprob == pytest.approx(token.logprob, abs=1e-3)
    assert events[-1].generated_text == "positive"
    assert events[-1].details is not None
    assert events[-1].details.finish_reason == "eos_token"


def test_sampling_is_repeatable_by_the_seed_that_details_tell(client: InferenceClient) -> None:
    drawn = client.text_generation(PROMPT, details=True, do_sample=True, temperature=1.5, max_new_tokens=20)
    assert drawn.details is not None
    assert drawn.details.seed is not None
    again = client.text_generation(PROMPT, do_sample=True, temperature=1.5, max_new_tokens=20, seed=drawn.details.seed)
    assert again == drawn.generated_text
    assert isinstance(client.text_generation(PROMPT, do_sample=True, best_of=3, max_new_tokens=5), str)


def test_stop_text_is_not_returned(client: InferenceClient) -> None:
    answer = client.text_generation(PROMPT, details=True, stop=["tive"])
    assert answer.generated_text == "posi"
    assert answer.details is not None
    assert answer.details.finish_reason == "stop_sequence"
    assert "".join(client.text_generation(PROMPT, stop=["tive"], stream=True)) == "posi"
    events = list(client.text_generation(PROMPT, stop=["tive", "never said"], details=True, stream=True))
    assert "".join(event.token.text for event in events) == events[-1].generated_text == "posi"
    assert events[-1].details is not None
    assert events[-1].details.finish_reason == "stop_sequence"


def test_a_limit_is_told_as_length(client: InferenceClient) -> None:
    whole = client.text_generation(LETTERS, details=True, max_new_tokens=3)
    assert whole.details is not None
    assert (whole.details.finish_reason, whole.details.generated_tokens) == ("length", 3)
    events = list(client.text_generation(LETTERS, details=True, max_new_tokens=3, stream=True))
    assert len(events) == 3
    assert "".join(event.token.text for event in events) == events[-1].generated_text == whole.generated_text
    assert events[-1].details is not None
    assert (events[-1].details.finish_reason, events[-1].details.generated_tokens) == ("length", 3)


def test_a_seed_repeats_a_stream(client: InferenceClient) -> None:
    fields: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 20}
    drawn = list(client.text_generation(LETTERS, details=True, stream=True, **fields))
    assert drawn[-1].details is not None
    seed = drawn[-1].details.seed
    assert seed is not None
    again = "".join(client.text_generation(LETTERS, stream=True, seed=seed, **fields))
    assert again == drawn[-1].generated_text == client.text_generation(LETTERS, seed=seed, **fields)
    assert len({client.text_generation(LETTERS, seed=other, **fields) for other in range(seed, seed + 4)}) > 1


def test_a_prompt_is_cut_where_the_caller_says(client: InferenceClient) -> None:
    cut = client.text_generation("cow " * 50 + PROMPT, truncate=24, details=True, stream=True)
    assert list(cut)[-1].generated_text == "positive"


async def test_the_asynchronous_client_says_the_same(client: InferenceClient, demo: ServerProcess) -> None:
    async with AsyncInferenceClient(demo.rest_url, token=KEY) as other:
        assert await other.text_generation(LETTERS) == client.text_generation(LETTERS)
        ours = client.text_generation(LETTERS, details=True)
        whole = await other.text_generation(LETTERS, details=True)
        assert whole.details is not None
        assert ours.details is not None
        assert [token.id for token in whole.details.tokens] == [token.id for token in ours.details.tokens]
        pieces = [piece async for piece in await other.text_generation(LETTERS, stream=True)]
        assert "".join(pieces) == ours.generated_text
        with pytest.raises(ValidationError, match="temperature must be above 0"):
            await other.text_generation(PROMPT, temperature=0.0)


def test_errors_become_the_clients_own(client: InferenceClient, demo: ServerProcess) -> None:
    with pytest.raises(ValidationError, match="top_k must be"):
        client.text_generation(PROMPT, top_k=-1)
    with pytest.raises(ValidationError, match="temperature must be in"):
        list(client.text_generation(PROMPT, temperature=3.0, stream=True))
    assert httpx.post(demo.rest_url, json={"inputs": PROMPT}).status_code == 401


def test_endpoint_info_and_health(demo: ServerProcess) -> None:
    client = InferenceClient(demo.rest_url, provider="hf-inference", token=KEY)  # only so it asks for these two
    assert client.text_generation(PROMPT) == "positive"
    info = client.get_endpoint_info()
    assert info["model_id"] == "flan-demo"
    assert info["max_total_tokens"] > info["max_input_tokens"] > 0
    assert client.health_check()


def test_chat_completion_with_the_served_name(client: InferenceClient) -> None:
    answer = client.chat_completion([{"role": "user", "content": PROMPT}], max_tokens=8, temperature=0)
    assert answer.choices[0].message.content == "positive"
