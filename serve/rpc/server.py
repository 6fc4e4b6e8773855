"""The gRPC server: FlanService, health and reflection on one port."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.config import Settings
from serve.rpc.auth import KeyInterceptor
from serve.rpc.handlers import ROUTES, SERVICE_NAME, FlanHandlers
from serve.rpc.health import HealthServicer
from serve.rpc.reflection import reflection_handlers
from serve.service import Service

# Each name is checked by a live test, because grpc ignores one that it does not know.
_CHANNEL_OPTIONS = (
    # Clients and the balancers between ping idle connections, some every 10 s. No ping is ever answered by GOAWAY.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    # We ping too, so that a client that vanished without a word (a pulled cable) frees its slot.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Without it an unanswered ping counts for a minute, whatever the line above says. Longer than that line, because a
    # slow client's answer may stand behind what it sends.
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A port that is taken is an error, not a second server that gets every other connection.
    ("grpc.so_reuseport", 0),
)


class RpcServer:
    """Serves a Service over gRPC.

    server = RpcServer(service, settings=settings)
    port = await server.start()
    ...
    await server.stop(grace=30)
    """

    def __init__(self, service: Service, *, settings: Settings) -> None:
        self._service = service
        self._settings = settings
        self._stopping = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Listen and serve; health says NOT_SERVING until the service is ready.

        Returns:
            The port, which `grpc_port` 0 leaves to the system.

        Raises:
            OSError: the address cannot be listened on.
        """
        settings = self._settings
        max_message_bytes = int(settings.max_body_mib * 2**20)
        interceptors = []
        if settings.api_keys:
            routes = {f"/{SERVICE_NAME}/{name}": route for name, route in ROUTES.items()}
            interceptors.append(KeyInterceptor(settings.api_keys, routes, self._service.metrics))
        server = grpc.aio.server(
            interceptors=interceptors,
            options=(
                *_CHANNEL_OPTIONS,
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
            ),
        )
        handlers = FlanHandlers(
            self._service,
            max_message_bytes=max_message_bytes,
            # So many run at once; and as one call's requests never fill the queue, they are not refused for its sake.
            max_parallel=max(1, min(settings.max_running_sequences, settings.max_queued_requests)),
            stopping=self._stopping,
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE_NAME, handlers.method_handlers()),)
        )
        health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(self._service.readiness, self._stopping), server)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        server.add_generic_rpc_handlers(reflection_handlers((SERVICE_NAME, health_name)))
        port = _listen(server, settings)
        await server.start()
        self._server = server
        return port

    async def stop(self, grace: float) -> None:
        """Take no more calls, let the running ones finish for `grace` seconds, then end them."""
        self._stopping.set()
        if self._server is not None:
            await self._server.stop(grace)


def _listen(server: grpc.aio.Server, settings: Settings) -> int:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.grpc_port}"
    try:
        if settings.tls_cert is None or settings.tls_key is None:
            return server.add_insecure_port(address)
        authority = None if settings.tls_client_ca is None else Path(settings.tls_client_ca).read_bytes()
        credentials = grpc.ssl_server_credentials(
            [(Path(settings.tls_key).read_bytes(), Path(settings.tls_cert).read_bytes())],
            root_certificates=authority,
            require_client_auth=authority is not None,
        )
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address} for gRPC: {error}") from error
