"""FlanClient over gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from functools import cache
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from protos.flan.v1 import generation_pb2 as pb
from serve.client.messages import fill, to_json, to_serve_error
from serve.client.rpc_many import METHOD as MANY
from serve.client.rpc_many import RpcExchange, Stream
from serve.client.transport import CONNECT_TIMEOUT_SECONDS, Exchange, Server
from serve.client.wire import Call, Json
from serve.errors import TooLarge

_SERVICE = pb.DESCRIPTOR.services_by_name["FlanService"]
_METHODS = {"generate": "Generate", "score": "Score", "tokenize": "Tokenize", "model": "GetModel"}
_STREAM = "GenerateStream"
_HEALTH_CHECK = "/grpc.health.v1.Health/Check"


class RpcTransport:
    def __init__(self, server: Server) -> None:
        self._server = server
        self._channel = _open_channel(server)

    def send(self, call: Call) -> Json:
        name = _METHODS[call.method]
        request = _to_request(name, call, self._server)
        method = self._channel.unary_unary(_path(name), *_codec(name))
        try:
            return to_json(method(request, call.remaining_seconds(), tuple(self._server.headers.items())))
        except grpc.RpcError as error:
            raise to_serve_error(error) from error

    def stream(self, call: Call) -> Generator[Json]:
        request = _to_request(_STREAM, call, self._server)
        method = self._channel.unary_stream(_path(_STREAM), *_codec(_STREAM))
        events = method(request, call.remaining_seconds(), tuple(self._server.headers.items()))
        try:
            for event in events:
                yield to_json(event)
        except grpc.RpcError as error:
            raise to_serve_error(error) from error
        finally:
            events.cancel()

    def open_many(self) -> Exchange:
        return _to_exchange(self._channel, self._server)

    def ready(self) -> bool:
        check = self._channel.unary_unary(_HEALTH_CHECK, *_HEALTH_CODEC)
        try:
            return _is_serving(check(health_pb2.HealthCheckRequest(), CONNECT_TIMEOUT_SECONDS))
        except grpc.RpcError:
            return False

    def close(self) -> None:
        self._channel.close()


class AsyncRpcTransport:
    """The channel is made at the first call, because it belongs to the loop that runs then."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._opened: grpc.aio.Channel | None = None
        self._many_channel: grpc.Channel | None = None

    @property
    def _channel(self) -> grpc.aio.Channel:
        if self._opened is None:
            server, options = self._server, _options(self._server)
            self._opened = (
                grpc.aio.secure_channel(server.address, _credentials(server), options)
                if server.secure
                else grpc.aio.insecure_channel(server.address, options)
            )
        return self._opened

    async def send(self, call: Call) -> Json:
        name = _METHODS[call.method]
        request = _to_request(name, call, self._server)
        method = self._channel.unary_unary(_path(name), *_codec(name))
        metadata = grpc.aio.Metadata(*self._server.headers.items())
        try:
            return to_json(await method(request, timeout=call.remaining_seconds(), metadata=metadata))
        except grpc.RpcError as error:
            raise to_serve_error(error) from error

    async def stream(self, call: Call) -> AsyncGenerator[Json]:
        request = _to_request(_STREAM, call, self._server)
        method = self._channel.unary_stream(_path(_STREAM), *_codec(_STREAM))
        metadata = grpc.aio.Metadata(*self._server.headers.items())
        events = method(request, timeout=call.remaining_seconds(), metadata=metadata)
        try:
            async for event in events:
                yield to_json(event)
        except grpc.RpcError as error:
            raise to_serve_error(error) from error
        finally:
            events.cancel()

    def open_many(self) -> Exchange:
        if self._many_channel is None:
            self._many_channel = _open_channel(self._server)
        return _to_exchange(self._many_channel, self._server)

    async def ready(self) -> bool:
        check = self._channel.unary_unary(_HEALTH_CHECK, *_HEALTH_CODEC)
        try:
            return _is_serving(await check(health_pb2.HealthCheckRequest(), timeout=CONNECT_TIMEOUT_SECONDS))
        except grpc.RpcError:
            return False

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()
        if self._many_channel is not None:
            self._many_channel.close()


def _open_channel(server: Server) -> grpc.Channel:
    options = _options(server)
    if server.secure:
        return grpc.secure_channel(server.address, _credentials(server), options)
    return grpc.insecure_channel(server.address, options)


def _to_exchange(channel: grpc.Channel, server: Server) -> Exchange:
    """GenerateMany over a channel."""
    method = channel.stream_stream(_path(MANY), *_codec(MANY))
    metadata = tuple(server.headers.items())

    def open_stream(seconds: float | None) -> Stream:
        return Stream(lambda requests: method(requests, seconds, metadata))

    return RpcExchange(open_stream, lambda call: _to_request(MANY, call, server))


def _options(server: Server) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_receive_message_length", server.max_body_bytes),
        ("grpc.max_send_message_length", server.max_body_bytes),
        # A server that vanished without a word is noticed during a long call; ours takes any number of pings.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
    )


def _credentials(server: Server) -> grpc.ChannelCredentials:
    def read(path: str | None) -> bytes | None:
        return None if path is None else Path(path).read_bytes()

    tls = server.tls
    key = tls.cert if tls.key is None else tls.key  # one file may hold both
    return grpc.ssl_channel_credentials(read(tls.ca), read(key), read(tls.cert))


def _path(method: str) -> str:
    return f"/{_SERVICE.full_name}/{method}"


@cache
def _codec(method: str) -> tuple[Callable[[Message], bytes], Callable[[bytes], Message]]:
    """A method's request serializer and response deserializer."""
    response: type[Message] = getattr(pb, _SERVICE.methods_by_name[method].output_type.name)
    return _serialize, response.FromString


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


_HEALTH_CODEC = (_serialize, health_pb2.HealthCheckResponse.FromString)


def _is_serving(response: Any) -> bool:
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def _to_request(method: str, call: Call, server: Server) -> Message:
    request: Message = getattr(pb, _SERVICE.methods_by_name[method].input_type.name)()
    fill(request, call.body)
    if (size := request.ByteSize()) > server.max_body_bytes:
        raise TooLarge(f"the request has {size} bytes, the limit is {server.max_body_bytes}")
    return request
