"""OpenAI's two clients, blocking and asynchronous, asked in the same words by the same tests."""

from __future__ import annotations

import asyncio
from operator import attrgetter
from typing import Any

import openai


class Client:
    """`ask("completions.create", prompt=...)` of either client; `chunks` of a stream, read to its end.

    Args:
        kind: "sync" or "async".
        url: of the server, without `/v1`.
    """

    def __init__(self, kind: str, url: str, *, key: str = "none", max_retries: int = 0, timeout: float = 60) -> None:
        options: Any = {"base_url": f"{url}/v1", "api_key": key, "max_retries": max_retries, "timeout": timeout}
        self._is_async = kind == "async"
        self.openai: Any = openai.AsyncOpenAI(**options) if self._is_async else openai.OpenAI(**options)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close(self.openai)

    async def ask(self, method: str, *arguments: Any, **fields: Any) -> Any:
        function = attrgetter(method)(self.openai)
        if self._is_async:
            return await function(*arguments, **fields)
        return await asyncio.to_thread(function, *arguments, **fields)

    async def close(self, what: Any) -> None:
        """Close a stream, or the client."""
        if self._is_async:
            await what.close()
        else:
            await asyncio.to_thread(what.close)

    async def chunks(self, method: str, **fields: Any) -> list[Any]:
        stream = await self.ask(method, **fields, stream=True)
        return await self.rest(stream)

    async def rest(self, stream: Any) -> list[Any]:
        if self._is_async:
            return [chunk async for chunk in stream]
        return await asyncio.to_thread(list, stream)

    async def first(self, stream: Any) -> Any:
        if self._is_async:
            return await anext(stream)
        return await asyncio.to_thread(next, stream)
