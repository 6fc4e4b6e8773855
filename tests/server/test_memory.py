"""The server's memory after many short requests, a third of them left in the middle, is what it was after a few."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.metrics import Outcome
from tests.server.process import ServerProcess

REQUESTS, WARM, AT_ONCE = 2000, 500, 16


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def ask(http: httpx.AsyncClient, number: int) -> None:
    """Request `number`: of one of several lengths and routes; each third is left after its first piece."""
    body: dict[str, Any] = {"instruction": "the cat " * (1 + number % 40), "max_tokens": 2 + number % 7, "seed": number}
    if number % 3:
        response = await http.post("/v1/generate", json={**body, "n": 1 + number % 2, "temperature": 1.0})
        assert response.status_code == 200
        return
    body |= {"stream": True, "ignore_eos": True, "max_tokens": 400}
    async with http.stream("POST", "/v1/generate", json=body) as response:
        async for _ in response.aiter_lines():
            return


async def ask_all(http: httpx.AsyncClient, numbers: range) -> None:
    waiting = iter(numbers)

    async def work() -> None:
        for number in waiting:
            await ask(http, number)

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
async def test_memory_is_flat_and_nothing_is_held_at_idle(checkpoint_folder: Path) -> None:
    with ServerProcess("--model", str(checkpoint_folder)) as process:
        async with httpx.AsyncClient(base_url=process.rest_url, timeout=60, trust_env=False) as http:
            await ask_all(http, range(WARM))
            before = resident_bytes(process.process.pid)
            await ask_all(http, range(WARM, REQUESTS))
            after = resident_bytes(process.process.pid)
            assert after < before * 1.05, f"{before >> 20} MiB after {WARM} requests, {after >> 20} after {REQUESTS}"
            for _ in range(200):  # the last that left are noticed within moments
                lines = (await http.get("/metrics")).text.splitlines()
                samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
                held = [
                    samples[f"flan_{name}"] for name in ("requests_running", "requests_waiting", "sequences_running")
                ]
                if set(held) == {"0.0"}:
                    break
                await asyncio.sleep(0.02)
            assert set(held) == {"0.0"}
    counted = {name: float(value) for name, value in samples.items() if name.startswith("flan_requests_total")}
    assert sum(counted.values()) == REQUESTS
    cancelled = sum(value for name, value in counted.items() if f'outcome="{Outcome.CANCELLED.value}"' in name)
    assert cancelled >= REQUESTS // 3 * 0.9  # the shortest may have ended before their client was gone
