"""What goes wrong, and what is given up: the same classes of serve.errors over both transports."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from serve.client import AsyncFlanClient, FlanClient, TlsFiles
from serve.client.wire import Call, Json
from serve.errors import (
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    NotFound,
    QueueFull,
    ServeError,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from serve.metrics import Metrics
from serve.output import FinishReason, TextDelta
from serve.service import Service, ServiceSettings
from tests.client.harness import TRANSPORTS, async_client, is_idle, served
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("fields", "error", "field"),
    [
        ({"instruction": None}, InvalidRequest, "instruction"),
        ({"instruction": " "}, InvalidRequest, "instruction"),
        ({"temperature": 3.0}, InvalidRequest, "temperature"),
        ({"temperature": math.nan}, InvalidRequest, "temperature"),
        ({"temperature": "hot"}, InvalidRequest, "temperature"),
        ({"n": 65}, InvalidRequest, "n"),
        ({"n": 2**40}, InvalidRequest, "n"),
        ({"seed": 2**63}, InvalidRequest, "seed"),
        ({"stop": ["x", ""]}, InvalidRequest, "stop"),
        ({"stop": [1]}, InvalidRequest, "stop"),
        ({"mode": "chain"}, InvalidRequest, "mode"),
        ({"mode": "few_shot", "exemplars": [{"input": "x"}]}, InvalidRequest, "exemplars"),
        ({"mode": "few_shot", "exemplars": [{"input": "x", "output": 3}]}, InvalidRequest, "exemplars"),
        ({"mode": "few_shot", "exemplars": [{"in": "x"}]}, InvalidRequest, "exemplars"),
        ({"instruction": "lone \ud800"}, InvalidRequest, "instruction"),
        ({"instruction": b"bytes"}, InvalidRequest, "instruction"),
        ({"logit_bias": {-1: 1.0}}, InvalidRequest, "logit_bias"),
        ({"logit_bias": {3: 101.0}}, InvalidRequest, "logit_bias"),
        ({"request_id": "a b"}, InvalidRequest, "request_id"),
        ({"model": "other"}, NotFound, "model"),
    ],
    ids=str,
)
async def test_errors_are_the_same_classes_with_the_same_field(
    transport: str, fields: dict[str, Any], error: type[ServeError], field: str
) -> None:
    async with served("yes") as s, async_client(s, transport) as client:
        with pytest.raises(error) as caught:
            await client.generate(**({"instruction": "x"} | fields))
        assert (type(caught.value), caught.value.field) == (error, field)
        assert caught.value.message
        with pytest.raises(error):
            await anext(client.stream(**({"instruction": "x"} | fields)))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_unknown_argument_is_a_type_error(transport: str) -> None:
    async with served("yes") as s, async_client(s, transport) as client:
        with pytest.raises(TypeError, match="'max_new_tokens'; did you mean 'max_tokens'"):
            await client.generate("x", max_new_tokens=3)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="temperature"):
            await client.score("x", ["a"], temperature=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_keys(transport: str) -> None:
    async with served("yes", api_keys=("secret",)) as s:
        async with async_client(s, transport, api_key="secret") as client:
            assert (await client.generate("x")).outputs[0].text == "yes"
        for key in (None, "wrong"):
            async with async_client(s, transport, api_key=key) as client:
                with pytest.raises(Unauthorized):
                    await client.generate("x")
                assert await client.health()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_the_timeout_is_the_requests_deadline(transport: str) -> None:
    runtime = ScriptedRuntime([5], pace_seconds=0.02)
    async with served(runtime=runtime) as s, async_client(s, transport, timeout=0.2) as client:
        with pytest.raises(DeadlineExceeded):
            await client.generate("x", max_tokens=500)
        with pytest.raises(DeadlineExceeded):
            async for _ in client.stream("x", max_tokens=500):
                pass
        with pytest.raises(DeadlineExceeded):
            await client.generate("x", timeout=-1.0)
        assert len((await client.generate("x", max_tokens=15, timeout=30)).outputs[0].text) > 0
        await is_idle(s)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_leaving_a_stream_cancels_it(transport: str) -> None:
    runtime = ScriptedRuntime([5], pace_seconds=0.01)
    async with served(runtime=runtime) as s:
        async with async_client(s, transport) as client, client.stream("x", max_tokens=500) as stream:
            assert isinstance(await anext(stream), TextDelta)
            with pytest.raises(RuntimeError, match="not ended"):
                _ = stream.completion
        await is_idle(s)
        made = runtime.tokens_made

        def synchronous() -> None:
            with FlanClient(s.urls[transport]) as client, client.stream("x", max_tokens=500) as stream:
                next(stream)

        await asyncio.to_thread(synchronous)
        await is_idle(s)
        assert runtime.tokens_made < made + 100


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_cancelling_the_task_cancels_the_call(transport: str) -> None:
    runtime = ScriptedRuntime([5], pace_seconds=0.01)
    async with served(runtime=runtime) as s, async_client(s, transport) as client:
        task = asyncio.ensure_future(client.generate("x", max_tokens=500))
        while not runtime.tokens_made:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        await is_idle(s)
        assert runtime.tokens_made < 500


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_failure_in_the_middle_of_a_stream(transport: str) -> None:
    runtime = ScriptedRuntime(fail_at_step=2)
    async with served("hello world yes no", runtime=runtime) as s, async_client(s, transport) as client:
        stream = client.stream("x")
        assert (await anext(stream)).text
        with pytest.raises(EngineFailure):
            async for _ in stream:
                pass


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_faulty_sequence(transport: str) -> None:
    runtime = ScriptedRuntime(fail_sequences={1: 1})
    async with served("hello world", runtime=runtime) as s, async_client(s, transport) as client:
        completion = await client.generate("x", n=2)
        assert [output.finish_reason for output in completion.outputs] == [FinishReason.STOP, FinishReason.ERROR]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_messages_over_the_limit(transport: str) -> None:
    async with served("yes") as s, async_client(s, transport) as client:
        with pytest.raises(TooLarge):
            await client.tokenize("x" * (8 * 2**20 + 1))
        assert (await client.tokenize("x " * 2**17)).num_tokens > 2**17
    async with served("yes", max_body_mib=0.05) as s, async_client(s, transport) as client:
        with pytest.raises(TooLarge):  # the server's own refusal
            await client.tokenize("x" * 60_000)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_the_limit_is_the_clients_to_choose(transport: str) -> None:
    """Both twins refuse by themselves what is larger, and take what grpc alone (4 MiB) would not."""
    async with served("yes", max_body_mib=6) as s:
        async with async_client(s, transport, max_body_mib=0.001) as client:
            with pytest.raises(TooLarge, match="limit is 1048"):
                await client.generate("x " * 1000)
            (result,) = [r async for r in client.generate_many([{"instruction": "x " * 1000}])]
            assert isinstance(result.error, TooLarge)
        assert s.runtime.requests == []
        large: dict[str, Any] = {"instruction": "x", "input": "x" * (5 * 2**20), "temperature": 9}
        async with async_client(s, transport, max_body_mib=6) as client:
            with pytest.raises(InvalidRequest, match="temperature"):
                await client.generate(**large)
            (result,) = [r async for r in client.generate_many([large])]
            assert isinstance(result.error, InvalidRequest)

        def synchronous() -> None:
            with FlanClient(s.urls[transport], max_body_mib=6) as client:
                client.generate(**large)

        with pytest.raises(InvalidRequest, match="temperature"):
            await asyncio.to_thread(synchronous)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_loading_then_ready(transport: str) -> None:
    service = Service(ServiceSettings(), Metrics())
    async with served(service=service) as s, async_client(s, transport, max_retries=0) as client:
        assert not await client.health()
        with pytest.raises(Unavailable) as caught:
            await client.generate("x")
        assert caught.value.retry_after_seconds == 5.0


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_nobody_there(transport: str) -> None:
    async with served("yes") as s:
        pass
    async with async_client(s, transport, max_retries=1, timeout=10) as client:
        assert not await client.health()
        with pytest.raises(Unavailable):
            await client.generate("x")


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_full_queue_is_tried_again(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.client.retries._MAX_DELAY_SECONDS", 0.05)
    runtime = ScriptedRuntime([5], pace_seconds=0.01)
    settings = ServiceSettings(served_model_names=("m",), max_running_sequences=1, max_queued_requests=0)
    service = scripted_service(runtime=runtime, settings=settings)
    async with served(service=service, runtime=runtime) as s, async_client(s, transport, max_retries=0) as client:
        first = asyncio.ensure_future(client.generate("x", max_tokens=40))
        while not runtime.tokens_made:
            await asyncio.sleep(0.01)
        with pytest.raises(QueueFull) as caught:
            await client.generate("x")
        assert caught.value.retry_after_seconds == 1.0
        async with async_client(s, transport, max_retries=100) as patient:
            assert (await patient.generate("x", max_tokens=1)).usage.completion_tokens == 1
        assert (await first).usage.completion_tokens == 40
        second = asyncio.ensure_future(client.generate("x", max_tokens=40))
        while runtime.tokens_made < 50:
            await asyncio.sleep(0.01)

        def synchronous() -> int:
            with FlanClient(s.urls[transport], max_retries=100) as patient:
                stream = patient.stream("x", max_tokens=1)
                return len(list(stream)) + stream.completion.usage.completion_tokens

        assert await asyncio.to_thread(synchronous) == 2
        await second


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host/v1", "grpc://host/x"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="none of"):
        FlanClient(url)


@pytest.mark.parametrize("url", ["http://host", "grpc://host"])
def test_tls_files_without_tls(url: str) -> None:
    with pytest.raises(ValueError, match="not TLS"):
        FlanClient(url, tls=TlsFiles(ca="ca.pem"))
    FlanClient(url, tls=TlsFiles()).close()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_closed_client(transport: str) -> None:
    client, twin = AsyncFlanClient(f"{transport}://host"), FlanClient(f"{transport}://host")
    for _ in range(2):
        await client.close()
        twin.close()
    for call in (
        lambda: twin.generate("x"),
        lambda: twin.stream("x"),
        lambda: twin.generate_many([]),
        lambda: twin.score("x", ["a"]),
        lambda: twin.tokenize("x"),
        twin.model,
        lambda: client.stream("x"),
        lambda: client.generate_many([]),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    for later in (client.generate("x"), client.score("x", ["a"]), client.tokenize("x"), client.model()):
        with pytest.raises(RuntimeError, match="closed"):
            await later


class Broken:
    """A transport whose streams end with Unavailable after so many events, for a client with retries."""

    def __init__(self, events: int) -> None:
        self.events, self.calls = events, 0

    def stream(self, call: Call) -> Iterator[Json]:
        self.calls += 1
        for _ in range(self.events):
            yield {"delta": {"index": 0, "text": "a"}}
        raise Unavailable("gone", retry_after_seconds=0.01)

    def close(self) -> None: ...


class AsyncBroken(Broken):
    async def stream(self, call: Call) -> AsyncIterator[Json]:  # type: ignore[override]
        for event in super().stream(call):
            yield event

    async def close(self) -> None: ...  # type: ignore[override]


@pytest.mark.parametrize(("events", "calls"), [(0, 4), (1, 1), (3, 1)])
async def test_a_stream_is_tried_again_only_before_its_first_piece(events: int, calls: int) -> None:
    transport: Any = Broken(events)
    with FlanClient("http://host", max_retries=3) as client:
        client._transport = transport
        pieces: list[TextDelta] = []
        with pytest.raises(Unavailable):
            pieces.extend(client.stream("x"))
        assert (transport.calls, len(pieces)) == (calls, events)
    transport = AsyncBroken(events)
    async with AsyncFlanClient("http://host", max_retries=3) as twin:
        twin._transport = transport
        pieces = []
        stream = twin.stream("x")
        for _ in range(events):
            pieces.append(await anext(stream))
        with pytest.raises(Unavailable):
            await anext(stream)
        assert (transport.calls, len(pieces)) == (calls, events)


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines", "nul\0"])
def test_a_key_that_cannot_be_sent(key: str) -> None:
    with pytest.raises(ValueError, match="ASCII"):
        FlanClient("http://host", api_key=key)
