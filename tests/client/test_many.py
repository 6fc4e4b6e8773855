"""generate_many: each request gets its result, whatever becomes of the others, over both transports and clients."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serve.client import AsyncFlanClient, FlanClient
from serve.errors import InvalidRequest, NotFound, QueueFull, ServeError, TooLarge, Unauthorized
from serve.output import Completion
from serve.service import Service
from tests.client.harness import TRANSPORTS, ask, async_client, both, outcomes, rows, served, timeless, twins
from tests.service.scripted_runtime import ScriptedRuntime


async def test_the_results_are_those_of_generate_everywhere() -> None:
    requests: list[dict[str, Any]] = [
        {"instruction": "x", "request_id": "plain"},
        {"instruction": "x", "mode": "cot", "samples": 3, "logprobs": 1, "request_id": "votes"},
        {"instruction": "a ~ b", "mode": "raw", "n": 2, "debug": True, "stop": ["is"], "request_id": "raw"},
        {"instruction": "x", "max_tokens": 1, "model": "default", "input": None, "request_id": "short"},
    ]
    async with served("so the answer is 5. The answer is 5.", "The answer is 7. no") as s:
        async with async_client(s, "http") as client:
            expected = [timeless(await client.generate(**fields)) for fields in requests]
        for transport in TRANSPORTS:
            for twin in ("async", "sync"):
                results = sorted(await ask(s, transport, twin, requests), key=lambda result: result.index)
                assert [result.index for result in results] == [0, 1, 2, 3]
                assert [result.request_id for result in results] == ["plain", "votes", "raw", "short"]
                assert [result.error for result in results] == [None] * 4
                completions = [result.completion for result in results if result.completion is not None]
                assert [timeless(completion) for completion in completions] == expected


MISTAKES: list[tuple[Any, type[ServeError], str | None]] = [
    ({"instruction": " "}, InvalidRequest, "instruction"),
    ({"instruction": "x", "temperature": 9}, InvalidRequest, "temperature"),
    ({"instruction": "x", "temperature": "hot"}, InvalidRequest, "temperature"),
    ({"instruction": "x", "model": "other"}, NotFound, "model"),
    ({"instruction": "x", "max_new_tokens": 3}, InvalidRequest, "max_new_tokens"),
    ({"instruction": "lone \ud800"}, InvalidRequest, "instruction"),
    ({"instruction": b"bytes"}, InvalidRequest, "instruction"),
    ({"instruction": "x", "request_id": "bad id"}, InvalidRequest, "request_id"),
    ({"instruction": "x", "request_id": ""}, InvalidRequest, "request_id"),
    ({"instruction": "x", "request_id": 5}, InvalidRequest, "request_id"),
    ({"instruction": "y " * 2**22}, TooLarge, None),
    ("x", InvalidRequest, None),
    (None, InvalidRequest, None),
]


@both
@twins
async def test_a_mistake_is_that_requests_result(transport: str, twin: str) -> None:
    requests: list[Any] = []
    for wrong, _, _ in MISTAKES:
        requests += [wrong, {"instruction": "x"}]
    async with served("yes") as s:
        results = sorted(await ask(s, transport, twin, requests), key=lambda result: result.index)
        assert len(results) == len(requests)
        for (_, error, field), failed, good in zip(MISTAKES, results[::2], results[1::2], strict=True):
            assert failed.completion is None
            assert failed.error is not None
            assert (type(failed.error), failed.error.field) == (error, field)
            assert failed.error.message
            assert good.error is None
            assert good.completion is not None
            assert good.completion.outputs[0].text == "yes"
            assert good.completion.request_id == good.request_id
        assert results[14].request_id == "bad id"
        assert len({result.request_id for result in results}) == len(results)


@both
@twins
async def test_results_come_as_they_finish(transport: str, twin: str) -> None:
    runtime = ScriptedRuntime([5], pace_seconds=0.01)
    requests = [{"instruction": "x", "max_tokens": 60}, {"instruction": "x", "max_tokens": 2}]
    async with served(runtime=runtime) as s:
        assert [result.index for result in await ask(s, transport, twin, requests)] == [1, 0]


@both
@twins
async def test_one_name_for_all_is_no_mix_up(transport: str, twin: str) -> None:
    requests = [{"instruction": "x", "request_id": "same", "max_tokens": n} for n in range(1, 21)]
    async with served(runtime=ScriptedRuntime([5])) as s:
        results = await ask(s, transport, twin, requests)
        tokens = {r.index: r.completion.usage.completion_tokens for r in results if r.completion is not None}
        assert tokens == {n: n + 1 for n in range(20)}
        assert {result.request_id for result in results} == {"same"}


def refusing(monkeypatch: pytest.MonkeyPatch, service: Service, times: int) -> list[int]:
    """Each request is refused so often before it is served."""
    refused: dict[str, int] = {}
    generate, total = service.generate, [0]

    async def generate_later(request: Any, tracker: Any) -> Completion:
        if refused.setdefault(request.request_id, 0) < times:
            refused[request.request_id] += 1
            total[0] += 1
            raise QueueFull("full", retry_after_seconds=1.0)
        return await generate(request, tracker)

    monkeypatch.setattr(service, "generate", generate_later)
    return total


@both
@twins
async def test_refused_requests_are_sent_again(transport: str, twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.client.retries._MAX_DELAY_SECONDS", 0.01)
    async with served("yes") as s:
        total = refusing(monkeypatch, s.service, 2)
        results = await ask(s, transport, twin, rows(10), max_retries=2)
        assert [result.error for result in results] == [None] * 10
        assert total == [20]
        total = refusing(monkeypatch, s.service, 2)
        results = await ask(s, transport, twin, rows(10), max_retries=1)
        assert {type(result.error) for result in results} == {QueueFull}
        assert total == [20]


@both
@twins
async def test_a_message_above_the_servers_limit_is_one_failed_request(transport: str, twin: str) -> None:
    """grpc ends the whole call for it; the others are asked again, and never know."""
    requests = [{"instruction": "x " * (60_000 if n == 4 else 1), "mode": "raw"} for n in range(9)]
    async with served("yes", max_body_mib=0.05) as s:
        results = await ask(s, transport, twin, requests)
        assert sorted(result.index for result in results) == list(range(9))
        assert {result.index: type(result.error) for result in results if result.error is not None} == {4: TooLarge}


@both
@twins
async def test_a_wrong_key_is_each_requests_error(transport: str, twin: str) -> None:
    async with served("yes", api_keys=("secret",)) as s:
        results = await ask(s, transport, twin, rows(5), api_key="wrong", many={"max_in_flight": 2})
        assert [type(result.error) for result in results] == [Unauthorized] * 5
        results = await ask(s, transport, twin, rows(5), api_key="secret", many={"max_in_flight": 2})
        assert [result.error for result in results] == [None] * 5


@both
async def test_one_client_serves_several_at_a_time(transport: str) -> None:
    async with served("yes") as s:

        def synchronous(client: FlanClient) -> list[str]:
            return sorted(result.request_id for result in client.generate_many(rows(10)) if result.error is None)

        async def ask_once(client: AsyncFlanClient) -> list[str]:
            return sorted([r.request_id async for r in client.generate_many(rows(10)) if r.error is None])

        with FlanClient(s.urls[transport]) as twin:
            async with async_client(s, transport) as client:
                answers = await asyncio.gather(
                    *(ask_once(client) for _ in range(3)), *(asyncio.to_thread(synchronous, twin) for _ in range(3))
                )
        assert answers == [[f"r{n}" for n in range(10)]] * 6
        assert outcomes(s) == {"stop": 60}


@both
@twins
async def test_nothing_asked_nothing_returned(transport: str, twin: str) -> None:
    async with served("yes") as s:
        assert await ask(s, transport, twin, []) == []
        assert outcomes(s) == {}


def test_what_is_no_set_of_requests() -> None:
    with FlanClient("http://nowhere") as client:
        wrong: Any
        for wrong in ({"instruction": "x"}, "x", 3):
            with pytest.raises(TypeError):
                client.generate_many(wrong)
        with pytest.raises(ValueError, match="max_in_flight"):
            client.generate_many([], max_in_flight=0)
