"""A client's pings never end the connection. Options are not read here: pings are sent, on a socket of our own."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass, field

import grpc
import pytest

from protos.flan.v1 import generation_pb2 as pb
from serve.rpc.server import _CHANNEL_OPTIONS
from tests.rpc.harness import served, until
from tests.service.scripted_runtime import ScriptedRuntime

DATA, HEADERS, SETTINGS, PING, GOAWAY = 0, 1, 4, 6, 7
ACK, END_STREAM, END_HEADERS = 1, 1, 4
PINGS, INTERVAL_SECONDS = 40, 0.05


@dataclass
class Http2:
    """Just enough of an HTTP/2 client: it sends frames and keeps those that come."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    frames: list[tuple[int, int, bytes]] = field(default_factory=list)  # (type, flags, payload)
    answers_pings: bool = False

    def send(self, kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> None:
        self.writer.write(struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload)

    async def receive(self) -> None:
        try:
            while True:
                head = await self.reader.readexactly(9)
                payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
                self.frames.append((head[3], head[4], payload))
                if self.answers_pings and head[3] == PING and not head[4] & ACK:
                    self.send(PING, ACK, payload=payload)
        except (asyncio.IncompleteReadError, ConnectionError):
            return

    def count(self, kind: int, flags: int = 0) -> int:
        return sum(1 for k, f, _ in self.frames if k == kind and f & flags == flags)


def call_headers(path: str) -> bytes:
    """HPACK without compression: static names, literal values."""

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode()

    fields = b"\x83\x86"  # :method POST, :scheme http
    fields += b"\x04" + text(path) + b"\x01" + text("localhost")  # :path, :authority
    return fields + b"\x0f\x10" + text("application/grpc") + b"\x00" + text("te") + text("trailers")


async def ping(port: int, request: bytes | None) -> Http2:
    """Ping for two seconds, on an idle connection or while the request runs; everything that came back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    client = Http2(reader, writer)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    client.send(SETTINGS)
    receiving = asyncio.ensure_future(client.receive())
    if request is not None:
        client.send(HEADERS, END_HEADERS, 1, call_headers("/flan.v1.FlanService/Generate"))
        client.send(DATA, END_STREAM, 1, b"\0" + struct.pack(">I", len(request)) + request)
    for number in range(PINGS):
        client.send(PING, payload=struct.pack(">Q", number))
        await asyncio.sleep(INTERVAL_SECONDS)
    await asyncio.wait([receiving], timeout=1.0)
    receiving.cancel()
    writer.close()
    return client


async def test_an_idle_connection_takes_any_number_of_pings() -> None:
    async with served("yes") as s:
        client = await ping(s.port, None)
        assert (client.count(PING, ACK), client.count(GOAWAY)) == (PINGS, 0)


async def test_a_long_unary_call_finishes_under_pings() -> None:
    """While it runs the server writes nothing, so nothing resets grpc's count of strikes."""
    async with served(runtime=ScriptedRuntime([5], pace_seconds=0.1)) as s:
        request = pb.GenerateRequest(instruction="x", max_tokens=20).SerializeToString()
        client = await ping(s.port, request)
        assert (client.count(PING, ACK), client.count(GOAWAY)) == (PINGS, 0)
        assert client.count(HEADERS, END_STREAM) == 1  # the trailers
        (data,) = [payload for kind, _, payload in client.frames if kind == DATA and payload]
        assert pb.GenerateResponse.FromString(data[5:]).usage.completion_tokens == 20


async def test_the_check_sees_a_goaway() -> None:
    """grpc's own defaults end such a connection; so does the test above notice."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        client = await ping(port, None)
        assert any(kind == GOAWAY and b"too_many_pings" in payload for kind, _, payload in client.frames)
    finally:
        await server.stop(0)


async def test_a_client_that_answers_no_ping_frees_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a pulled cable: nothing comes any more, not even an end."""
    assert (
        dict(_CHANNEL_OPTIONS)["grpc.keepalive_time_ms"] + dict(_CHANNEL_OPTIONS)["grpc.http2.ping_timeout_ms"]
        <= 60_000
    )
    options = {**dict(_CHANNEL_OPTIONS), "grpc.keepalive_time_ms": 1000, "grpc.http2.ping_timeout_ms": 500}
    monkeypatch.setattr("serve.rpc.server._CHANNEL_OPTIONS", tuple(options.items()))
    runtime = ScriptedRuntime()
    async with served(runtime=runtime) as s:
        runtime.freeze()  # so that the server writes nothing, either
        reader, writer = await asyncio.open_connection("127.0.0.1", s.port)
        client = Http2(reader, writer, answers_pings=True)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        client.send(SETTINGS)
        request = pb.GenerateRequest(instruction="x").SerializeToString()
        client.send(HEADERS, END_HEADERS, 1, call_headers("/flan.v1.FlanService/Generate"))
        client.send(DATA, END_STREAM, 1, b"\0" + struct.pack(">I", len(request)) + request)
        receiving = asyncio.ensure_future(client.receive())
        await until(lambda: len(runtime.requests) == 1)
        await until(lambda: client.count(PING) >= 3)  # grpc measures with the first, the others keep alive
        assert s.outcomes() == {}
        client.answers_pings = False
        await until(lambda: s.outcomes() == {"cancelled": 1})
        await until(lambda: any(kind == GOAWAY and b"ping_timeout" in payload for kind, _, payload in client.frames))
        assert runtime.num_running == s.service.requests_running == s.service.requests_waiting == 0
        receiving.cancel()
        writer.transport.abort()


@pytest.mark.parametrize("interval_ms", [100])
async def test_grpcs_own_pinging_client(interval_ms: int) -> None:
    options = (
        ("grpc.keepalive_time_ms", interval_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )
    async with served(runtime=ScriptedRuntime([5], pace_seconds=0.1), options=options) as s:
        response = await s.stub.Generate(pb.GenerateRequest(instruction="x", max_tokens=20))
        assert response.usage.completion_tokens == 20
        await asyncio.sleep(1.0)
        assert s.channel.get_state() is grpc.ChannelConnectivity.READY
