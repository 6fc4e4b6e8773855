"""AsyncFlanClient."""

# ruff: noqa: ASYNC109 - `timeout` is sent to the server as the deadline; asyncio.timeout would only stop waiting for it

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Sequence
from types import TracebackType
from typing import Self, Unpack

from serve.client import wire
from serve.client.calls import DEFAULT_MAX_BODY_MIB, DEFAULT_MAX_RETRIES, Calls, parse_url
from serve.client.fields import GenerateFields, PromptFields
from serve.client.many import DEFAULT_MAX_IN_FLIGHT, AsyncManyResults, Fields, ManyPlan, check
from serve.client.rest import AsyncRestTransport
from serve.client.retries import Retries
from serve.client.rpc import AsyncRpcTransport
from serve.client.streams import AsyncCompletionStream
from serve.client.transport import AsyncTransport, TlsFiles
from serve.client.wire import Call, Json, ModelInfo
from serve.errors import EngineFailure
from serve.output import Completion, Scores, Tokenization


class AsyncFlanClient:
    """FlanClient for asyncio: the same arguments, results and errors.

    async with AsyncFlanClient("grpc://127.0.0.1:50051") as client:
        completion = await client.generate("Translate to German.", input="Good morning.")
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float | None = None,
        max_retries: int = DEFAULT_MAX_RETRIES,
        max_body_mib: float = DEFAULT_MAX_BODY_MIB,
        tls: TlsFiles | None = None,
    ) -> None:
        server, over_grpc = parse_url(url, api_key, max_body_mib, tls)
        self._transport: AsyncTransport = AsyncRpcTransport(server) if over_grpc else AsyncRestTransport(server)
        self._calls = Calls(timeout)
        self._retries = Retries(max_retries)

    async def generate(
        self, instruction: str | None = None, *, timeout: float | None = None, **fields: Unpack[GenerateFields]
    ) -> Completion:
        """As FlanClient.generate."""
        call = self._calls.generate(instruction, timeout, fields)
        return wire.to_completion(await self._send(call))

    def stream(
        self, instruction: str | None = None, *, timeout: float | None = None, **fields: Unpack[GenerateFields]
    ) -> AsyncCompletionStream:
        """As FlanClient.stream.

        async with client.stream("Write a poem about rain.") as stream:
            async for delta in stream:
                print(delta.text, end="")
        """
        call = self._calls.generate(instruction, timeout, fields)
        return AsyncCompletionStream(self._events(call))

    def generate_many(
        self,
        requests: Iterable[Fields] | AsyncIterable[Fields],
        *,
        max_in_flight: int = DEFAULT_MAX_IN_FLIGHT,
        timeout: float | None = None,
    ) -> AsyncManyResults:
        """As FlanClient.generate_many; the iterable may be asynchronous, and is read while results come.

        async with client.generate_many(requests) as results:
            async for result in results:
                print(result.request_id, result.error or result.completion.outputs[0].text)
        """
        check(requests, max_in_flight)
        expires = self._calls.expires(timeout)
        return AsyncManyResults(requests, ManyPlan(self._transport.open_many(), self._retries, expires, max_in_flight))

    async def score(
        self,
        instruction: str | None = None,
        candidates: Sequence[str] = (),
        *,
        timeout: float | None = None,
        **fields: Unpack[PromptFields],
    ) -> Scores:
        """As FlanClient.score."""
        call = self._calls.score(instruction, candidates, timeout, fields)
        return wire.to_scores(await self._send(call))

    async def tokenize(
        self, text: str, *, add_special_tokens: bool = True, model: str | None = None, timeout: float | None = None
    ) -> Tokenization:
        """As FlanClient.tokenize."""
        call = self._calls.tokenize(text, add_special_tokens, model, timeout)
        return wire.to_tokenization(await self._send(call))

    async def model(self, *, timeout: float | None = None) -> ModelInfo:
        """As FlanClient.model."""
        return wire.to_model_info(await self._send(self._calls.model(timeout)))

    async def health(self) -> bool:
        """As FlanClient.health."""
        return await self._transport.ready()

    async def close(self) -> None:
        self._calls.close()
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(self, call: Call) -> Json:
        return await self._retries.run_async(call, lambda: self._transport.send(call))

    async def _events(self, call: Call) -> AsyncGenerator[Json]:
        first, rest = await self._retries.run_async(call, lambda: self._open(call))
        try:
            yield first
            async for event in rest:
                yield event
        finally:
            await rest.aclose()

    async def _open(self, call: Call) -> tuple[Json, AsyncGenerator[Json]]:
        events = self._transport.stream(call)
        async for first in events:
            return first, events
        raise EngineFailure("the stream ended early")
