"""The REST server: the application behind uvicorn, inside the process's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Generator

import uvicorn

from serve.config import Settings
from serve.rest.app import create_app
from serve.rest.protocol import RestProtocol
from serve.service import Service

_BACKLOG = 2048
_IDLE_CONNECTION_SECONDS = 75  # longer than the 60 s of usual load balancers, so that it is they who close
_DATE_SECONDS = 1.0  # how often the Date header is renewed
_LAST_WORDS_SECONDS = 1.0  # for the error of a request that the grace was too short for


class RestServer:
    """Serves a Service over HTTP.

    server = RestServer(service, settings=settings)
    port = await server.start()
    ...
    await server.stop(grace=30)
    """

    def __init__(self, service: Service, *, settings: Settings) -> None:
        self._settings = settings
        self._app = create_app(service, settings=settings)
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen and serve; `/readyz` says 503 until the service is ready.

        Returns:
            The port, which `port` 0 leaves to the system.

        Raises:
            OSError: the address cannot be listened on, or a TLS file cannot be read.
        """
        config = self._config()
        config.load()
        listener = await _listen(self._settings.host, self._settings.port)
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        await self._server.up.wait()
        port: int = listener.getsockname()[1]
        return port

    async def stop(self, grace: float) -> None:
        """Take no more connections, let running requests finish for `grace` seconds, then end them; idempotent."""
        if self._server is None or self._serving is None:
            return
        # The type says int, asyncio takes any number.
        self._server.config.timeout_graceful_shutdown = grace  # type: ignore[assignment]
        self._server.leave()
        await self._serving
        state = self._server.server_state
        if state.tasks:
            await asyncio.wait(tuple(state.tasks), timeout=_LAST_WORDS_SECONDS)
        for connection in tuple(state.connections):
            connection.transport.abort()  # a client that does not read would keep it open
        self._server = None

    def _config(self) -> uvicorn.Config:
        settings = self._settings
        return uvicorn.Config(
            self._app,
            http=RestProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_config=None,
            log_level="error",
            timeout_keep_alive=_IDLE_CONNECTION_SECONDS,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            ssl_ca_certs=settings.tls_client_ca,
            ssl_cert_reqs=ssl.CERT_NONE if settings.tls_client_ca is None else ssl.CERT_REQUIRED,
        )


class _Server(uvicorn.Server):
    """uvicorn's server without signal handlers, that tells when it is up and leaves without polling."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()
        self._leaving = asyncio.Event()

    def leave(self) -> None:
        self.should_exit = True
        self._leaving.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), _DATE_SECONDS)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield  # signals belong to the process


async def _listen(host: str, port: int) -> socket.socket:
    found = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
    )
    family, _, _, _, address = found[0]
    # The protocol has to be named: on a socket without one the event loop does not set TCP_NODELAY, and every small
    # reply then waits 40 ms for an acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port} for REST: {error.strerror}") from error
    return listener
