"""Refusals and failures as `huggingface_hub`'s clients type them: by the word in the body, whole and streamed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import (
    GenerationError,
    InferenceTimeoutError,
    OverloadedError,
    UnknownError,
    ValidationError,
)

from serve.config import Settings
from serve.metrics import Metrics
from serve.service import Service, ServiceSettings
from tests.rest.harness import Served, served
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the Hub is told to be offline, its client would not ask a local server either."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


class Client:
    """Either client, asked for the whole text or for the joined pieces of a stream."""

    def __init__(self, kind: str, server: Served, **options: Any) -> None:
        self._is_async = kind == "async"
        make: Callable[..., Any] = AsyncInferenceClient if self._is_async else InferenceClient
        self.inference = make(f"http://127.0.0.1:{server.port}", **options)

    async def text(self, prompt: str = "hello", *, stream: bool = False, **fields: Any) -> str:
        if self._is_async:
            answer = await self.inference.text_generation(prompt, stream=stream, **fields)
            return "".join([piece async for piece in answer]) if stream else answer
        return await asyncio.to_thread(lambda: "".join(self.inference.text_generation(prompt, stream=stream, **fields)))

    async def close(self) -> None:
        if self._is_async:
            await self.inference.close()


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["whole", "stream"])
def stream(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def caught(client: Client, expected: type[Exception], match: str | None = None, **fields: Any) -> None:
    try:
        with pytest.raises(expected, match=match) as error:
            await client.text(**fields)
        assert type(error.value) is expected
    finally:
        await client.close()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": " "}, "inputs must not be blank"),
    ({"temperature": 0.0}, "temperature must be above 0"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ({"stop": [""]}, "stop must not contain an empty string"),
    ({"top_n_tokens": 21}, "top_n_tokens must be between"),
    ({"typical_p": 0.5}, "typical_p is not supported"),
    ({"prompt": "hello " * 3000}, "the limit is 2048"),
]


async def test_a_callers_mistake_is_a_validation_error(kind: str, stream: bool) -> None:
    async with served("yes no") as server:
        for fields, message in BAD:
            await caught(Client(kind, server), ValidationError, message, stream=stream, **fields)
        client = Client(kind, server)
        assert await client.text(stream=stream) == "yes no"
        await client.close()


async def test_a_wrong_key_is_an_unknown_error_with_its_reason(kind: str, stream: bool) -> None:
    async with served("yes", settings=Settings(port=0, api_keys=("right",))) as server:
        await caught(Client(kind, server, token="wrong"), UnknownError, "API key", stream=stream)


async def test_a_full_queue_and_a_loading_server_are_overloaded(kind: str, stream: bool) -> None:
    limits = ServiceSettings(max_running_sequences=1, max_queued_requests=0)
    runtime = ScriptedRuntime([5] * 4, pace_seconds=0.05)
    async with served(service=scripted_service(runtime=runtime, settings=limits), runtime=runtime) as server:
        await server.raw_open({"instruction": "x", "max_tokens": 500})
        await caught(Client(kind, server), OverloadedError, "queue", stream=stream)
    async with served(service=Service(ServiceSettings(), Metrics())) as server:
        await caught(Client(kind, server), OverloadedError, "loading", stream=stream)


async def test_an_engine_failure_is_a_generation_error_also_in_the_middle_of_a_stream(kind: str, stream: bool) -> None:
    async with served("yes no yes", runtime=ScriptedRuntime(fail_sequences={0: 2})) as server:
        await caught(Client(kind, server), GenerationError, stream=stream)


async def test_a_client_that_gives_up_has_its_timeout_and_frees_its_slot(kind: str) -> None:
    async with served(runtime=ScriptedRuntime([5] * 4, start_seconds=30)) as server:
        await caught(Client(kind, server, timeout=0.3), InferenceTimeoutError, max_new_tokens=500)
        await server.until_idle()
        assert await server.outcomes() == {"cancelled": 1}


async def test_comments_in_silence_do_not_disturb_a_stream(kind: str) -> None:
    settings = Settings(port=0, keepalive_seconds=0.05)
    async with served("yes no", runtime=ScriptedRuntime(start_seconds=0.3), settings=settings) as server:
        client = Client(kind, server)
        assert await client.text(stream=True) == "yes no"
        await client.close()
