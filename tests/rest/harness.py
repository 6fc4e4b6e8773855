"""A real REST server on a free port over a scripted runtime, and what tests ask of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from serve.config import Settings
from serve.rest import RestServer
from serve.service import Service
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service


@dataclass
class Served:
    server: RestServer
    port: int
    service: Service
    runtime: ScriptedRuntime
    http: httpx.AsyncClient
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """Post JSON; header names with _ for -."""
        return await self.http.post(
            path, json=body, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )

    async def generate(self, **body: Any) -> Any:
        response = await self.post("/v1/generate", {"instruction": "hello", **body})
        assert response.status_code == 200, response.text
        return response.json()

    async def stream(self, path: str, **body: Any) -> list[Any]:
        """The frames of a whole stream; the last one is "[DONE]" where it came."""
        response = await self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        return frames(response.content)

    async def outcomes(self) -> dict[str, int]:
        """How often each outcome was counted, over all labels."""
        await asyncio.sleep(0)
        counts: dict[str, int] = {}
        for labels, count in self.requests().items():
            counts[labels[3]] = counts.get(labels[3], 0) + count
        return counts

    def requests(self) -> dict[tuple[str, str, str, str], int]:
        """`flan_requests_total` by (protocol, route, mode, outcome)."""
        return {
            (labels["protocol"], labels["route"], labels["mode"], labels["outcome"]): int(value)
            for family in self.service.metrics.registry.collect()
            for name, labels, value, *_ in family.samples
            if name == "flan_requests_total"
        }

    async def until_idle(self, seconds: float = 2.0) -> None:
        """Wait until nothing runs or waits any more."""
        async with asyncio.timeout(seconds):
            while self.runtime.num_running or self.service.requests_waiting or self.service.requests_running:
                await asyncio.sleep(0.005)

    async def until_running(self, requests: int = 1, seconds: float = 2.0) -> None:
        async with asyncio.timeout(seconds):
            while len(self.runtime.requests) + len(self.runtime.scores) < requests:
                await asyncio.sleep(0.005)

    async def raw_open(self, body: Any, path: str = "/v1/generate") -> asyncio.StreamWriter:
        """Post JSON and leave the connection open, unread; returns once the runtime has the request."""
        before = len(self.runtime.requests) + len(self.runtime.scores)
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        writer.write(http_post(path, json.dumps(body).encode()))
        await self.until_running(before + 1)
        return writer

    async def raw(self, data: bytes, *, until: bytes = b"", seconds: float = 2.0) -> bytes:
        """Send bytes; what came until the server closed, or `until` was there, or nothing came for `seconds`."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        received = b""
        try:
            writer.write(data)
            async with asyncio.timeout(seconds):
                while not (until and until in received):
                    chunk = await reader.read(65536)
                    if not chunk:
                        return received + b"<closed>"
                    received += chunk
        except TimeoutError:
            received += b"<open>"
        finally:
            writer.close()
        return received


def frames(content: bytes) -> list[Any]:
    """The data of server-sent events: parsed JSON, or "[DONE]"."""
    data = [event[5:].strip() for event in content.split(b"\n\n") if event.startswith(b"data:")]
    return ["[DONE]" if item == b"[DONE]" else json.loads(item) for item in data]


def text_of(events: list[Any], index: int = 0) -> str:
    return "".join(event["text"] for event in events if event != "[DONE]" and event.get("index") == index)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a refusal, after a look at its form."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert isinstance(error["type"], str)
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


def http_post(path: str, body: bytes, *headers: str) -> bytes:
    """A POST as it is on the wire."""
    head = [f"POST {path} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


@asynccontextmanager
async def served(
    *texts: str,
    runtime: ScriptedRuntime | None = None,
    service: Service | None = None,
    settings: Settings | None = None,
    key: str | None = None,
) -> AsyncIterator[Served]:
    """
    Args:
        texts: what the sequences say (cyclic).
        service: instead of one made from `texts` and `runtime`.
        key: the client's API key.
    """
    runtime = ScriptedRuntime() if runtime is None else runtime
    service = scripted_service(*texts, runtime=runtime) if service is None else service
    server = RestServer(service, settings=Settings(port=0) if settings is None else settings)
    port = await server.start()
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=20, headers=headers, trust_env=False
    ) as http:
        running = Served(server, port, service, runtime, http)
        try:
            yield running
        finally:
            for writer in running.writers:
                writer.transport.abort()
            await service.close()
            await server.stop(1)
