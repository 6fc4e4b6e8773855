"""`vllm bench serve`'s two OpenAI backends (vLLM 0.32): the bodies that they send, and how they read what comes.

Their reader is cruder than the standard of server-sent events, and that is the point of having it here: it strips white
space off each chunk of bytes as the network delivers it, and takes a rest that begins with `data: ` and is whole JSON
for an event.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}


@dataclass
class Result:
    """One request. `first_token_seconds` and `gaps` are times of chunks with choices, as the benchmark counts them."""

    success: bool = False
    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token_seconds: float = 0.0
    gaps: list[float] = field(default_factory=list)
    error: str = ""


def body_of(backend: str, prompt: Any, *, model: str, output_tokens: int, **extra: Any) -> dict[str, Any]:
    """The request's JSON; `extra` is `ignore_eos` and whatever --extra-body and the sampling flags add."""
    body: dict[str, Any] = {"model": model}
    if backend == "openai":
        body |= {"prompt": prompt, "repetition_penalty": 1.0, "max_tokens": output_tokens, "logprobs": None}
    else:
        content = [{"type": "text", "text": prompt}]
        body |= {"messages": [{"role": "user", "content": content}], "max_completion_tokens": output_tokens}
    return body | {"stream": True, "stream_options": {"include_usage": True}} | extra


class Messages:
    """Chunks of bytes in, events out."""

    def __init__(self) -> None:
        self._rest = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def feed(self, chunk: bytes) -> list[str]:
        self._rest += self._decoder.decode(chunk)
        *whole, self._rest = self._rest.split("\n\n")
        found = [event.strip() for event in whole if event.strip()]
        if self._rest.startswith("data: ") and _is_whole(self._rest.removeprefix("data: ").strip()):
            found.append(self._rest.strip())
            self._rest = ""
        return found


def _is_whole(data: str) -> bool:
    if data == "[DONE]":
        return True
    try:
        json.loads(data)
    except json.JSONDecodeError:
        return False
    return True


async def ask(
    client: httpx.AsyncClient, backend: str, body: dict[str, Any], *, request_id: str | None = None
) -> Result:
    headers = {} if request_id is None else {"x-request-id": request_id}
    began = last = time.perf_counter()
    result = Result()
    async with client.stream("POST", ENDPOINTS[backend], json=body, headers=headers) as response:
        if response.status_code != 200:
            return Result(error=response.reason_phrase)
        async for data in _events(response.aiter_raw()):
            if choices := data.get("choices"):
                now = time.perf_counter()
                if result.success:
                    result.gaps.append(now - last)
                else:
                    result.success, result.first_token_seconds = True, now - began
                last = now
                text = choices[0].get("text") if backend == "openai" else choices[0]["delta"].get("content")
                result.text += text or ""
            elif usage := data.get("usage"):
                result.output_tokens = usage.get("completion_tokens")
                result.prompt_tokens = usage.get("prompt_tokens")
    if not result.success:
        result.error = "Never received a valid chunk to calculate TTFT."
    return result


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    messages = Messages()
    async for chunk in chunks:
        for message in messages.feed(chunk.strip()):
            data = message.removeprefix("data: ")
            if not message.startswith(":") and data != "[DONE]":
                yield json.loads(data)


async def wait_for_endpoint(
    client: httpx.AsyncClient, backend: str, body: dict[str, Any], *, seconds: float, interval: float
) -> Result:
    """--ready-check-timeout-sec: the first prompt of the benchmark, again and again until it succeeds."""
    deadline = time.perf_counter() + seconds
    result = Result(error="never asked")
    while time.perf_counter() < deadline:
        try:
            result = await ask(client, backend, body)
        except httpx.TransportError as error:
            result = Result(error=repr(error))
        if result.success:
            break
        await asyncio.sleep(interval)
    return result
