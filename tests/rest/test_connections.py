"""What happens on the connection: clients that leave, that stall, that speak no HTTP; a server that stops."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest

from serve.config import Settings
from serve.rest import RestServer
from serve.service import ServiceSettings
from tests.rest.harness import Served, error_of, frames, http_post, served
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service

BODIES: dict[str, dict[str, Any]] = {
    "/v1/generate": {"instruction": "hello"},
    "/v1/completions": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
async def test_a_client_that_leaves_frees_its_room(path: str, stream: bool) -> None:
    async with served(runtime=ScriptedRuntime(script=[5], pace_seconds=0.01)) as server:
        writer = await server.raw_open({**BODIES[path], "ignore_eos": True, "max_tokens": 512, "stream": stream}, path)
        writer.close()
        await server.until_idle(1.0)
        made = server.runtime.tokens_made
        assert made < 100
        await asyncio.sleep(0.1)
        assert server.runtime.tokens_made == made
        assert await server.outcomes() == {"cancelled": 1}


async def test_a_client_that_leaves_the_queue_never_runs() -> None:
    runtime = ScriptedRuntime(script=[5], pace_seconds=0.01, max_running_sequences=1)
    service = scripted_service(runtime=runtime, settings=ServiceSettings(max_running_sequences=1))
    async with served(service=service, runtime=runtime) as server:
        first = await server.raw_open({"instruction": "hello", "ignore_eos": True})
        _, second = await asyncio.open_connection("127.0.0.1", server.port)
        second.write(http_post("/v1/generate", b'{"instruction": "hello"}'))
        async with asyncio.timeout(2):
            while server.service.requests_waiting < 1:
                await asyncio.sleep(0.005)
            second.close()
            while server.service.requests_waiting > 0:
                await asyncio.sleep(0.005)
        first.close()
        await server.until_idle()
        assert len(runtime.requests) == 1
        assert await server.outcomes() == {"cancelled": 2}


async def test_a_client_that_leaves_while_scoring() -> None:
    async with served(runtime=ScriptedRuntime(score_seconds=30)) as server:
        writer = await server.raw_open({"instruction": "hello", "candidates": ["yes"]}, "/v1/score")
        writer.close()
        await server.until_idle(1.0)
        assert await server.outcomes() == {"cancelled": 1}


async def test_a_client_that_leaves_in_the_middle_of_its_body() -> None:
    async with served("yes") as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(http_post("/v1/generate", b'{"instruction": "hello"}')[:-5])
        await asyncio.sleep(0.05)
        writer.close()
        async with asyncio.timeout(1):
            while await server.outcomes() != {"cancelled": 1}:
                await asyncio.sleep(0.005)


async def test_a_client_that_does_not_read_holds_up_nobody() -> None:
    script = [5, 6, 7] * 170
    async with served(runtime=ScriptedRuntime(script=script)) as server:
        small = socket.socket()
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.setblocking(False)
        await asyncio.get_running_loop().sock_connect(small, ("127.0.0.1", server.port))
        body = {"instruction": "hello", "n": 32, "logprobs": 20, "stream": True, "ignore_eos": True, "max_tokens": 512}
        await asyncio.get_running_loop().sock_sendall(small, http_post("/v1/generate", json.dumps(body).encode()))
        await server.until_running()
        made = -1
        async with asyncio.timeout(10):  # until all buffers between are full, and the request waits for its client
            while made != server.runtime.tokens_made:
                made = server.runtime.tokens_made
                await asyncio.sleep(0.4)
        assert 0 < made < 32 * 512
        begun = time.monotonic()
        assert (await server.generate(max_tokens=3))["outputs"][0]["finish_reason"] == "length"
        assert time.monotonic() - begun < 1
        small.close()
        await server.until_idle()


async def test_requests_of_one_connection_in_a_row_and_at_once() -> None:
    async with served("yes") as server:
        one = http_post("/v1/generate", b'{"instruction": "hello", "request_id": "A"}')
        two = http_post("/v1/generate", b'{"instruction": "hello", "request_id": "B"}', "Connection: close")
        answer = await server.raw(one + two)
        assert answer.count(b"HTTP/1.1 200 OK") == 2
        assert answer.index(b'"request_id":"A"') < answer.index(b'"request_id":"B"')


async def test_a_refused_body_leaves_the_connection_usable() -> None:
    async with served("yes", settings=Settings(port=0, max_body_mib=0.1, api_keys=("k",))) as server:
        good = http_post("/v1/generate", b'{"instruction": "hello"}', "Authorization: Bearer k")
        big = b'{"instruction": "' + b"x" * 1_000_000 + b'"}'
        chunked = b"".join(
            b"%x\r\n%s\r\n" % (len(big[i : i + 9000]), big[i : i + 9000]) for i in range(0, len(big), 9000)
        )
        head = b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\nTransfer-Encoding: chunked\r\n\r\n"
        for bad, status in [
            (http_post("/v1/generate", big, "Authorization: Bearer k"), b"413"),
            (head + chunked + b"0\r\n\r\n", b"413"),
            (http_post("/v1/generate", big), b"401"),
            (http_post("/nope", big, "Authorization: Bearer k"), b"404"),
            (http_post("/livez", big), b"405"),
        ]:
            answer = await server.raw(bad + good, until=b'"finish_reason":"stop"')
            assert answer.startswith(b"HTTP/1.1 " + status)
            assert b"HTTP/1.1 200 OK" in answer, status


@pytest.mark.parametrize(
    ("path", "key", "status"), [("/v1/generate", "k", b"413"), ("/v1/generate", "", b"401"), ("/x", "k", b"404")]
)
@pytest.mark.parametrize("version", [b"HTTP/1.1\r\nConnection: close", b"HTTP/1.0"])
async def test_a_refused_body_on_a_connection_that_closes_still_brings_the_reason(
    path: str, key: str, status: bytes, version: bytes
) -> None:
    async with served("yes", settings=Settings(port=0, max_body_mib=0.1, api_keys=("k",))) as server:
        post = http_post(path, b"x" * 6_000_000, f"Authorization: Bearer {key}").replace(b"HTTP/1.1", version, 1)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        server.writers.append(writer)
        writer.write(post[:200_000])
        await asyncio.sleep(0.1)  # by now it was refused
        writer.write(post[200_000:])
        answer = await asyncio.wait_for(reader.read(), 5)  # no reset, and the end
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert answer.count(b"HTTP/1.1") == 1
        assert await server.outcomes() in ({}, {"invalid": 1}, {"unauthorized": 1})


async def test_a_client_that_never_ends_its_refused_body_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.rest.middleware._UNREAD_SECONDS", 0.2)
    async with served("yes", settings=Settings(port=0, max_body_mib=0.1)) as server:
        head = b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 999999999\r\n\r\nx"
        begun = time.monotonic()
        answer = await server.raw(head, seconds=5)
        assert answer.startswith(b"HTTP/1.1 413")
        assert answer.endswith(b"<closed>")
        assert 0.2 <= time.monotonic() - begun < 2


async def test_leave_to_send_a_body_is_not_given_where_it_would_be_refused() -> None:
    async with served("yes", settings=Settings(port=0, max_body_mib=0.1)) as server:
        head = b"POST %s HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        answer = await server.raw(head % (b"/v1/generate", 10**9))
        assert answer.startswith(b"HTTP/1.1 413")
        assert answer.endswith(b"<closed>")
        body = b'{"instruction": "hello"}'
        answer = await server.raw(head % (b"/v1/generate", len(body)), until=b"100 Continue")
        assert answer.startswith(b"HTTP/1.1 100 Continue")


NO_HTTP: dict[str, bytes] = {
    "a word": b"HELLO\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "Latin-1 in the path": b"GET /caf\xe9 HTTP/1.1\r\nHost: x\r\n\r\n",
    "two lengths": b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    "a length that is none": b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: five\r\n\r\n{}",
    "a negative length": b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n{}",
    "length and chunks": b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bad chunks": b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    "a large head": b"GET /livez HTTP/1.1\r\nHost: x\r\nx-large: " + b"a" * 66_000 + b"\r\n\r\n",
    "many headers": b"GET /livez HTTP/1.1\r\n" + b"x: y\r\n" * 33_000 + b"\r\n",
    "a long path": b"GET /" + b"a" * 66_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("name", NO_HTTP)
async def test_what_is_no_http(name: str) -> None:
    async with served("yes") as server:
        answer = await server.raw(NO_HTTP[name])
        head, _, body = answer.removesuffix(b"<closed>").partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"x-request-id: req-" in head
        assert json.loads(body)["error"]["code"] == "invalid"
        assert answer.endswith(b"<closed>")
        assert (await server.generate())["outputs"][0]["text"] == "yes"


async def test_an_offer_of_http_2_does_not_cost_the_body() -> None:
    async with served("yes") as server:
        offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk")
        body = b'{"instruction": "hello"}'
        answer = await server.raw(http_post("/v1/generate", body, *offer), until=b'"finish_reason"')
        assert answer.startswith(b"HTTP/1.1 200 OK")


async def test_small_replies_do_not_wait_for_an_acknowledgement() -> None:
    async with served("yes") as server:
        times = []
        for _ in range(20):
            begun = time.monotonic()
            await server.generate()
            times.append(time.monotonic() - begun)
        assert min(times) < 0.035  # without TCP_NODELAY on the socket each takes 0.04


async def slowest_probe(server: Served, work: Sequence[asyncio.Task[httpx.Response]]) -> float:
    """The most processor time, in seconds, between a probe and its answer while `work` goes on.

    Processor time, because a busy machine stretches any other.
    """
    slowest = 0.0
    while not all(task.done() for task in work):
        begun = time.process_time()
        assert (await server.http.get("/livez")).status_code == 200
        slowest = max(slowest, time.process_time() - begun)
        await asyncio.sleep(0.01)
    return slowest


@pytest.fixture
def _small_heap() -> Iterator[None]:
    """The collector does not walk what other tests left: a server's process holds nothing of it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_small_heap")
async def test_probes_answer_while_large_bodies_are_read() -> None:
    exemplars = [{"input": "a", "output": "b"}] * 30_000
    bodies = {
        "ids": ("/v1/completions", json.dumps({"prompt": [5] * 900_000}).encode()),
        "exemplars": ("/v1/generate", json.dumps({"mode": "cot", "instruction": "x", "exemplars": exemplars}).encode()),
        "lists": ("/v1/generate", b'{"x": [' + b"[]," * 2_000_000 + b"[]]}"),
        "strings": ("/v1/generate", json.dumps({"options": ["a"] * 1_200_000}).encode()),
        "text": ("/v1/tokenize", json.dumps({"text": '["a, b", {"c"}]' * 200_000, "model": "none"}).encode()),
    }
    async with (
        served("yes") as server,
        httpx.AsyncClient(base_url=server.http.base_url, timeout=60, trust_env=False) as other,
    ):
        posts = [asyncio.create_task(other.post(path, content=body)) for path, body in bodies.values()]
        assert await slowest_probe(server, posts) < 0.5
        assert [(await post).status_code for post in posts] == [400, 400, 400, 400, 404]


@pytest.mark.usefixtures("_small_heap")
async def test_a_large_response_does_not_hold_up_the_probes() -> None:
    async with served(runtime=ScriptedRuntime(script=[5], tokens_per_delta=64)) as server:
        body = {"instruction": "hello", "n": 64, "logprobs": 20, "max_tokens": 64, "ignore_eos": True}
        post = asyncio.create_task(server.post("/v1/generate", body))
        assert await slowest_probe(server, [post]) < 0.5
        assert len((await post).json()["outputs"][63]["logprobs"]) == 64


class TestStop:
    async def start(self, runtime: ScriptedRuntime, **settings: Any) -> tuple[RestServer, int, Any]:
        service = scripted_service(runtime=runtime)
        server = RestServer(service, settings=Settings(port=0, **settings))
        return server, await server.start(), service

    async def test_running_requests_finish_within_the_grace(self) -> None:
        server, port, service = await self.start(ScriptedRuntime([5, 6, 7, 1], pace_seconds=0.05))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            body = {"instruction": "hello", "stream": True}
            post = asyncio.create_task(http.post("/v1/generate", json=body))
            await asyncio.sleep(0.1)
            begun = time.monotonic()
            await server.stop(5)
            assert time.monotonic() - begun < 1
            assert frames((await post).content)[-1] == "[DONE]"
            with pytest.raises(httpx.ConnectError):
                await http.post("/v1/generate", json=body)
        await service.close()

    @pytest.mark.parametrize("stream", [False, True])
    async def test_what_is_longer_is_told_so(self, stream: bool) -> None:
        runtime = ScriptedRuntime([5], pace_seconds=0.05)
        server, port, service = await self.start(runtime)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            body = {"instruction": "hello", "ignore_eos": True, "stream": stream}
            post = asyncio.create_task(http.post("/v1/generate", json=body))
            await asyncio.sleep(0.1)
            begun = time.monotonic()
            await server.stop(0.3)
            assert time.monotonic() - begun < 2
            response = await post
            if stream:
                assert frames(response.content)[-1]["error"]["code"] == "unavailable"
            else:
                assert (response.status_code, error_of(response)["code"]) == (503, "unavailable")
            assert runtime.num_running == 0
        await service.close()

    async def test_a_client_that_never_reads_does_not_hold_the_exit(self) -> None:
        server, port, service = await self.start(ScriptedRuntime([5, 6, 7] * 200))
        stuck = socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(("127.0.0.1", port))
        body = {"instruction": "hello", "n": 64, "logprobs": 20, "stream": True, "ignore_eos": True, "max_tokens": 512}
        stuck.sendall(http_post("/v1/generate", json.dumps(body).encode()))
        half = socket.create_connection(("127.0.0.1", port))
        half.sendall(http_post("/v1/generate", b'{"instruction": "hello"}')[:-5])
        idle = socket.create_connection(("127.0.0.1", port))
        await asyncio.sleep(0.3)
        begun = time.monotonic()
        await server.stop(0.2)
        assert time.monotonic() - begun < 2.2
        for connection in (stuck, half, idle):
            connection.close()
        await service.close()

    async def test_twice_and_before_the_start(self) -> None:
        server, _, service = await self.start(ScriptedRuntime())
        await server.stop(1)
        await server.stop(1)
        await RestServer(service, settings=Settings(port=0)).stop(1)
        await service.close()


async def test_a_port_that_is_taken() -> None:
    async with served("yes") as server:
        second = RestServer(server.service, settings=Settings(port=server.port))
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{server.port}"):
            await second.start()


async def test_ipv6() -> None:
    service = scripted_service("yes")
    server = RestServer(service, settings=Settings(port=0, host="::1"))
    try:
        port = await server.start()
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with httpx.AsyncClient(base_url=f"http://[::1]:{port}", trust_env=False) as http:
        assert (await http.get("/livez")).status_code == 200
    await server.stop(1)
    await service.close()
