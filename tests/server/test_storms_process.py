"""Storms over the really started server and its engine: clients that leave, that do not read, and a SIGTERM among them.

What became of each request is read from the server's own account: `/metrics`, or its log where it has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from protos.flan.v1 import generation_pb2 as pb
from protos.flan.v1.generation_pb2_grpc import FlanServiceStub
from tests.rest.harness import error_of, frames, http_post
from tests.rpc.statuses import read
from tests.server.process import ServerProcess
from tests.server.storm import GAUGES

CLIENTS = 300
GRACE_SECONDS = 8
ENDLESS: dict[str, Any] = {
    "mode": "raw",
    "instruction": "the cat",
    "ignore_eos": True,
    "max_tokens": 200_000,
    "logprobs": 20,
}
SHORT: dict[str, Any] = {"mode": "raw", "instruction": "the dog", "ignore_eos": True, "max_tokens": 150}


def scrape(server: ServerProcess) -> dict[str, float]:
    """Every series of /metrics, by name and labels."""
    lines = httpx.get(server.rest_url + "/metrics", timeout=30).text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def outcomes(series: dict[str, float]) -> Counter[str]:
    """`flan_requests_total` by outcome."""
    counts: Counter[str] = Counter()
    for name, value in series.items():
        found = re.fullmatch(r'flan_requests_total\{.*outcome="(\w+)".*\}', name)
        if found:
            counts[found.group(1)] += int(value)
    return counts


def logged(server: ServerProcess) -> Counter[str]:
    """The outcomes of the server's log."""
    records = [json.loads(line) for line in server.lines if line.startswith("{")]
    return Counter(record["outcome"] for record in records if record["message"] == "request")


def address(server: ServerProcess) -> tuple[str, int]:
    host, _, port = server.rest_url.removeprefix("http://").partition(":")
    return host, int(port)


@contextlib.contextmanager
def stuck_reader(server: ServerProcess, body: dict[str, Any]) -> Iterator[None]:
    """A REST client that sends a request for a stream, sees it begin and never reads again."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(address(server))
    with client:
        client.sendall(http_post("/v1/generate", json.dumps({**body, "stream": True}).encode()))
        assert client.recv(1024).startswith(b"HTTP/1.1 200")
        yield


async def visit(server: ServerProcess, stub: Any, chance: random.Random, number: int) -> None:
    """One client that leaves at a random moment, or stays; returns once the server must have heard of it."""
    await asyncio.sleep(chance.random() * 2)
    patience = chance.choice([0.0, chance.random() * 0.2, 10.0])
    fields = {**SHORT, "max_tokens": chance.randint(1, 40)}
    if number % 3 == 0:
        call = stub.GenerateStream(message(fields))
        await call.initial_metadata()
        reading = asyncio.ensure_future(drain(call))
        await asyncio.wait({reading}, timeout=patience)
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        return
    reader, writer = await asyncio.open_connection(*address(server))
    body = json.dumps({**fields, "stream": number % 3 == 1}).encode()
    writer.write(http_post("/v1/generate", body, "Connection: close"))
    await writer.drain()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(reader.read(), patience)
    writer.close()


async def drain(call: Any) -> list[Any]:
    return [event async for event in call]


async def test_clients_that_leave_a_real_engine(server: ServerProcess) -> None:
    before, chance = outcomes(scrape(server)), random.Random(2)
    async with grpc.aio.insecure_channel(server.grpc_target) as channel:
        stub = FlanServiceStub(channel)
        await asyncio.gather(*(visit(server, stub, chance, number) for number in range(CLIENTS)))
    deadline = time.monotonic() + 20
    while (seen := outcomes(scrape(server)) - before).total() < CLIENTS:
        assert time.monotonic() < deadline, seen
        await asyncio.sleep(0.05)
    assert seen.total() == CLIENTS
    assert set(seen) == {"length", "cancelled"}
    await asyncio.sleep(0.1)
    series = scrape(server)
    assert {name: series[name] for name in GAUGES} == dict.fromkeys(GAUGES, 0)
    made = series["flan_generation_tokens_total"]
    await asyncio.sleep(0.3)
    assert scrape(server)["flan_generation_tokens_total"] == made  # nobody is worked for any more


async def tokens_in_a_second(http: httpx.AsyncClient) -> int:
    """How many tokens the engine makes for one request in about a second of this machine."""
    begun = time.monotonic()
    response = await http.post("/v1/generate", json={**SHORT, "max_tokens": 200})
    assert response.status_code == 200
    return int(200 / (time.monotonic() - begun))


async def test_sigterm_under_load_with_clients_that_do_not_read(checkpoint_folder: Path) -> None:
    argv = ("--model", str(checkpoint_folder), "--max-output-tokens", "200000", "--log-format", "json")
    limits = ("--max-running-sequences", "6", "--max-queued-requests", "30")
    with (
        ServerProcess(*argv, *limits, "--shutdown-grace-seconds", str(GRACE_SECONDS)) as server,
        httpx.Client(base_url=server.rest_url, timeout=30, trust_env=False) as scraping,
    ):
        async with (
            httpx.AsyncClient(base_url=server.rest_url, timeout=30, trust_env=False) as http,
            grpc.aio.insecure_channel(server.grpc_target) as channel,
        ):
            stub = FlanServiceStub(channel)
            short = {**SHORT, "max_tokens": await tokens_in_a_second(http) // 2}
            endless = {**ENDLESS, "logprobs": 2}  # as many as 20 would take most of the processor
            with stuck_reader(server, endless), stuck_reader(server, endless):
                stuck = stub.GenerateStream(message(endless))
                await stuck.read()
                running = await ask_all(http, stub, short, 3)
                await until(scraping, "flan_requests_running", 6)
                queued = await ask_all(http, stub, SHORT, 30)
                await until(scraping, "flan_requests_waiting", 30)
                assert gauge(scraping, "flan_requests_running") == 6
                over = await asyncio.gather(*(await ask_all(http, stub, SHORT, 3)))
                server.signal(signal.SIGTERM)
                signalled = time.monotonic()
                while scraping.get("/readyz").status_code != 503:
                    assert time.monotonic() - signalled < 2
                late = await asyncio.gather(*(await ask_all(http, stub, SHORT, 6)))
                refused = await asyncio.gather(*queued)
                assert time.monotonic() - signalled < GRACE_SECONDS - 2  # at once, not at the end of the grace
                assert await asyncio.gather(*running) == ["length"] * 3
                assert scraping.get("/livez").status_code == 200
                code, _ = await asyncio.to_thread(server.exit_code, 10)
                seconds = time.monotonic() - signalled
                stuck.cancel()
    assert (code, over) == (0, ["queue_full"] * 3)
    assert GRACE_SECONDS <= seconds < GRACE_SECONDS + 2
    assert refused == ["unavailable"] * 30
    assert late == ["unavailable"] * 6
    # the first one and three that ran; in the queue, one too many, too late, and the three that nobody read
    assert logged(server) == {"length": 1 + 3, "refused": 30 + 3 + 6 + 3}


def message(fields: dict[str, Any]) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{**fields, "mode": pb.MODE_RAW})


def gauge(http: httpx.Client, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found.group(1))


async def until(http: httpx.Client, name: str, value: int) -> None:
    """Wait until the gauge has the value."""
    async with asyncio.timeout(10):
        while gauge(http, name) != value:
            await asyncio.sleep(0.02)


async def ask_all(http: httpx.AsyncClient, stub: Any, fields: dict[str, Any], count: int) -> list[asyncio.Task[str]]:
    """So many requests, in turn over REST, SSE and gRPC; each gives its finish reason or its error's kind."""
    return [asyncio.create_task(ask(http, stub, fields, number % 3)) for number in range(count)]


async def ask(http: httpx.AsyncClient, stub: Any, fields: dict[str, Any], way: int) -> str:
    if way == 2:
        try:
            response = await stub.Generate(message(fields))
        except grpc.aio.AioRpcError as error:
            return str(read(error).reason)
        return pb.FinishReason.Name(response.outputs[0].finish_reason).removeprefix("FINISH_REASON_").lower()
    answer = await http.post("/v1/generate", json={**fields, "stream": way == 1})
    if answer.status_code != 200:
        assert int(answer.headers["retry-after"]) >= 1
        return str(error_of(answer)["code"])
    if way == 0:
        return str(answer.json()["outputs"][0]["finish_reason"])
    events = frames(answer.content)
    if events[-1] != "[DONE]":
        return str(events[-1]["error"]["code"])
    return str(events[-3]["finish_reason"])


def resident_mib(server: ServerProcess) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found.group(1)) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
async def test_clients_that_do_not_read_cost_no_more_than_they_asked_for(checkpoint_folder: Path) -> None:
    argv = ("--model", str(checkpoint_folder), "--max-output-tokens", "256")
    heavy = {**ENDLESS, "n": 16, "max_tokens": 256}  # about 16 * 256 * 21 log-probabilities: 10 MiB
    with (
        ServerProcess(*argv) as server,
        httpx.Client(base_url=server.rest_url, timeout=30, trust_env=False) as scraping,
        contextlib.ExitStack() as stuck,
    ):
        async with (
            httpx.AsyncClient(base_url=server.rest_url, timeout=30, trust_env=False) as http,
            grpc.aio.insecure_channel(server.grpc_target) as channel,
        ):
            stub = FlanServiceStub(channel)
            assert await asyncio.gather(*(await ask_all(http, stub, SHORT, 3))) == ["length"] * 3
            before = resident_mib(server)
            for _ in range(2):
                stuck.enter_context(stuck_reader(server, heavy))
            calls = [stub.GenerateStream(message(heavy)) for _ in range(2)]
            for call in calls:
                await call.read()
            assert await asyncio.gather(*(await ask_all(http, stub, SHORT, 12))) == ["length"] * 12
            made = -1.0
            while made != (made := gauge(scraping, "flan_generation_tokens_total")):
                await asyncio.sleep(0.5)
            grown = resident_mib(server) - before
            assert grown < 4 * 40
            assert gauge(scraping, "flan_requests_running") >= 2  # what grpc takes off the server is more than this
            assert await asyncio.gather(*(await ask_all(http, stub, SHORT, 12))) == ["length"] * 12
            assert resident_mib(server) - before < grown + 20
            stuck.close()
            for call in calls:
                call.cancel()
            while gauge(scraping, "flan_sequences_running") > 0:
                await asyncio.sleep(0.02)
            series = scrape(server)
            assert {name: series[name] for name in GAUGES} == dict.fromkeys(GAUGES, 0)
            seen = outcomes(series)
            assert seen.total() == 27 + 4
            assert seen["length"] >= 27
            assert set(seen) <= {"length", "cancelled"}  # when they leave, all that they asked for has been made
