"""Every refusal and failure as OpenAI's clients type it, what they retry, and what is left when they give up."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest

from serve.config import Settings
from serve.metrics import Metrics
from serve.service import Service, ServiceSettings
from tests.rest.harness import Served, served
from tests.server.openai_clients import Client
from tests.server.process import ServerProcess
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service

KEY = "sk-of-this-test"
ROUTES: dict[str, dict[str, Any]] = {
    "completions.create": {"model": "default", "prompt": "Where do cows live?"},
    "chat.completions.create": {"model": "default", "messages": [{"role": "user", "content": "Where do cows live?"}]},
}
NAMES: dict[str, str] = {"completions.create": "prompt", "chat.completions.create": "messages"}


@pytest.fixture(scope="module")
def demo() -> Iterator[ServerProcess]:
    with ServerProcess("--api-key", KEY, "--max-body-mib", "1") as process:
        yield process


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def client(demo: ServerProcess, kind: str) -> AsyncIterator[Client]:
    async with Client(kind, demo.rest_url, key=KEY) as made:
        yield made


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def client_of(kind: str, server: Served, **options: Any) -> Client:
    return Client(kind, f"http://127.0.0.1:{server.port}", **options)


async def refusal(client: Client, route: str, expected: type[openai.APIStatusError], **fields: Any) -> Any:
    """The exception, after a look at what every one carries; a stream is refused as the whole is."""
    for stream in (True, False):
        with pytest.raises(openai.APIStatusError) as caught:
            await client.ask(route, **{**ROUTES[route], **fields, "stream": stream})
        assert type(caught.value) is expected, (type(caught.value), caught.value)
        assert caught.value.request_id == caught.value.response.headers["x-request-id"]
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["message"] in str(caught.value)
    return caught.value


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"temperature": 2.5}, "temperature"),
    "top_p": ({"top_p": 0}, "top_p"),
    "n": ({"n": 65}, "n"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens"),
    "seed": ({"seed": 2**63}, "seed"),
    "empty stop": ({"stop": ""}, "stop"),
    "17 stops": ({"stop": ["x"] * 17}, "stop"),
    "penalty": ({"presence_penalty": 1}, "presence_penalty"),
    "logit_bias": ({"logit_bias": {"999999": 1}}, "logit_bias"),
    "a wrong type": ({"temperature": "hot"}, "temperature"),
    "top_k": ({"extra_body": {"top_k": -5}}, "top_k"),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_request_names_the_field(client: Client, route: str, name: str) -> None:
    fields, field = BAD[name]
    error = await refusal(client, route, openai.BadRequestError, **fields)
    assert (error.status_code, error.type, error.param, error.code) == (400, "invalid_request_error", field, "invalid")


async def test_empty_prompts_and_messages_are_bad_requests(client: Client) -> None:
    prompts: list[Any] = ["", " \n ", [], [""], [[]], ["x", ""]]
    contents: list[Any] = [[], [{"role": "user", "content": ""}], [{"role": "wizard", "content": "x"}]]
    for route, values in (("completions.create", prompts), ("chat.completions.create", contents)):
        for value in values:
            error = await refusal(client, route, openai.BadRequestError, **{NAMES[route]: value})
            assert error.param == NAMES[route]
            assert (await client.ask(route, **ROUTES[route])).choices[0].finish_reason == "stop"


async def test_echo_with_logprobs_points_to_the_score_route(client: Client) -> None:
    error = await refusal(client, "completions.create", openai.BadRequestError, echo=True, logprobs=1)
    assert "/v1/score" in error.message


async def test_a_wrong_key(demo: ServerProcess, kind: str, route: str) -> None:
    for key in ("wrong", "sk-of-this-test2", "sk"):
        async with Client(kind, demo.rest_url, key=key) as client:
            error = await refusal(client, route, openai.AuthenticationError)
            assert (error.status_code, error.code) == (401, "unauthorized")
            assert error.response.headers["www-authenticate"] == "Bearer"
            assert key not in error.response.text.replace("API key", "")
            with pytest.raises(openai.AuthenticationError):
                await client.ask("models.list")


async def test_an_unknown_model_or_route(client: Client, route: str) -> None:
    error = await refusal(client, route, openai.NotFoundError, model="gpt-4")
    assert (error.status_code, error.param, error.code) == (404, "model", "not_found")
    with pytest.raises(openai.NotFoundError):
        await client.ask("embeddings.create", model="default", input="x")


async def test_a_body_over_the_limit(client: Client, route: str) -> None:
    long = "cow " * 300_000
    value = long if route == "completions.create" else [{"role": "user", "content": long}]
    error = await refusal(client, route, openai.APIStatusError, **{NAMES[route]: value})
    assert (error.status_code, error.code) == (413, "too_large")


async def test_a_deadline_is_a_server_error_of_status_504(client: Client, route: str) -> None:
    fields: dict[str, Any] = {**ROUTES[route], "n": 64, "max_tokens": 512, "extra_body": {"ignore_eos": True}}
    fields["extra_headers"] = {"x-request-timeout-ms": "30"}
    with pytest.raises(openai.InternalServerError) as caught:
        await client.ask(route, **fields)
    assert (caught.value.status_code, caught.value.code) == (504, "deadline")
    with pytest.raises(openai.APIError) as broken:
        await client.chunks(route, **fields)  # the stream may have begun: then the error is its last frame
    assert broken.value.code == "deadline"


async def test_a_full_queue_is_a_rate_limit(kind: str, route: str) -> None:
    limits = ServiceSettings(max_running_sequences=1, max_queued_requests=0)
    runtime = ScriptedRuntime([5] * 4, pace_seconds=0.05)
    async with served(service=scripted_service(runtime=runtime, settings=limits), runtime=runtime) as server:
        await server.raw_open({"instruction": "x", "max_tokens": 500})
        async with client_of(kind, server) as client:
            error = await refusal(client, route, openai.RateLimitError)
        assert (error.status_code, error.type, error.code) == (429, "rate_limit_error", "queue_full")
        assert int(error.response.headers["retry-after"]) >= 1


async def test_loading_is_a_server_error_of_status_503(kind: str, route: str) -> None:
    async with served(service=Service(ServiceSettings(), Metrics())) as server, client_of(kind, server) as client:
        error = await refusal(client, route, openai.InternalServerError)
        assert (error.status_code, error.code) == (503, "unavailable")
        assert int(error.response.headers["retry-after"]) >= 1


async def test_an_engine_failure_is_a_server_error(kind: str, route: str) -> None:
    runtime = ScriptedRuntime(fail_sequences={0: 1})
    async with served("yes no yes", runtime=runtime) as server, client_of(kind, server) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.ask(route, **ROUTES[route])
        assert (caught.value.status_code, caught.value.code) == (500, "engine_failure")
        stream = await client.ask(route, **ROUTES[route], stream=True)
        assert (await client.first(stream)).choices
        with pytest.raises(openai.APIError) as broken:
            await client.rest(stream)
        assert broken.value.code == "engine_failure"


@pytest.mark.parametrize(("max_retries", "asked"), [(0, 1), (2, 3)])
async def test_what_is_worth_another_try_is_tried_again_and_nothing_else(
    kind: str, max_retries: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """429, 500, 503 and 504 are; a caller's mistake is asked once, however patient the client."""
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.01)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    route = "completions.create"
    async with served("yes", runtime=ScriptedRuntime(fail_sequences={0: 0})) as server:
        async with client_of(kind, server, max_retries=max_retries) as client:
            with pytest.raises(openai.InternalServerError):
                await client.ask(route, **ROUTES[route])
            assert await server.outcomes() == {"error": asked}
            for fields in ({"temperature": 3}, {"model": "gpt-4"}):
                with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
                    await client.ask(route, **{**ROUTES[route], **fields})
        assert await server.outcomes() == {"error": asked, "invalid": 2}


async def test_a_full_queue_is_waited_out(kind: str, route: str) -> None:
    """The client obeys Retry-After and has its answer without the caller's doing."""
    limits = ServiceSettings(max_running_sequences=1, max_queued_requests=0)
    runtime = ScriptedRuntime([5, 6, 7, 1], pace_seconds=0.1)
    async with served(service=scripted_service(runtime=runtime, settings=limits), runtime=runtime) as server:
        await server.raw_open({"instruction": "x"})
        async with client_of(kind, server, max_retries=3) as client:
            assert (await client.ask(route, **ROUTES[route])).choices[0].finish_reason == "stop"
        assert (await server.outcomes())["refused"] >= 1


async def test_a_client_that_gives_up_frees_its_slot(kind: str, route: str) -> None:
    async with served(runtime=ScriptedRuntime([5] * 4, pace_seconds=0.02)) as server:
        async with client_of(kind, server, timeout=0.3) as client:
            with pytest.raises(openai.APITimeoutError):
                await client.ask(route, **ROUTES[route], max_tokens=500)
            await server.until_idle()
            stream = await client.ask(route, **ROUTES[route], max_tokens=500, stream=True)
            await client.first(stream)
            await client.close(stream)
            await server.until_idle()
        assert await server.outcomes() == {"cancelled": 2}
        assert server.runtime.tokens_made < 100


async def test_silence_with_comments_does_not_disturb_a_stream(kind: str, route: str) -> None:
    settings, runtime = Settings(port=0, keepalive_seconds=0.1), ScriptedRuntime(start_seconds=0.5)
    async with served("yes no", runtime=runtime, settings=settings) as server, client_of(kind, server) as client:
        chunks = await client.chunks(route, **ROUTES[route])
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_nobody_there(kind: str, route: str) -> None:
    async with Client(kind, "http://127.0.0.1:1") as client:
        with pytest.raises(openai.APIConnectionError):
            await client.ask(route, **ROUTES[route])


async def test_draining_finishes_what_runs_and_refuses_the_rest_with_503() -> None:
    with ServerProcess("--shutdown-grace-seconds", "60") as process:
        async with Client("async", process.rest_url) as client:
            route = "completions.create"
            fields = {**ROUTES[route], "max_tokens": 400, "n": 2, "extra_body": {"ignore_eos": True}}
            stream = await client.ask(route, **fields, stream=True)
            await client.first(stream)
            process.signal(signal.SIGTERM)
            while httpx.get(f"{process.rest_url}/readyz").status_code == 200:
                await asyncio.sleep(0.005)
            await refusal(client, route, openai.InternalServerError)
            chunks = await client.rest(stream)
        finished = {c.index for chunk in chunks for c in chunk.choices if c.finish_reason == "length"}
        assert finished == {0, 1}
        assert process.exit_code(10)[0] == 0
