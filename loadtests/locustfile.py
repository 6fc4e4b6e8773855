"""Load over REST and gRPC with token timings in locust's rows (TTFT, TPOT, ITL, QUEUE):

    locust -f loadtests/locustfile.py                                  # locust's page on port 8089
    locust -f loadtests/locustfile.py --headless -u 8 -r 8 -t 60s      # closed loop, 8 users
    locust -f loadtests/locustfile.py --headless -u 1 -t 60s --arrival-rate 20

The server is `--host` (http://127.0.0.1:8000) and `--grpc-target` (127.0.0.1:50051).

Closed loop (default): each user sends its next request when the last one has ended. Open loop: Poisson arrivals that do
not wait for anything, latencies counted from when a request was due.
"""

from __future__ import annotations

import random
import time
from typing import Any

import gevent
import gevent.pool
import grpc.experimental.gevent

# Locust has patched the process by now; gRPC's core is told to wait through gevent too, before any channel exists.
# Each running gRPC stream then holds a thread of gevent's pool while it waits. The pool's default of 10 made the
# eleventh stream's tokens look seconds late, and name look-ups of REST wait behind them.
gevent.get_hub().threadpool.maxsize = 2048
grpc.experimental.gevent.init_gevent()

from locust import User, constant, events  # noqa: E402
from locust.runners import LocalRunner  # noqa: E402

from loadtests.meters import Client  # noqa: E402
from loadtests.session import Session  # noqa: E402
from loadtests.smoke import API_KEY_VARIABLE  # noqa: E402


def _send(user: Any) -> None:
    user.session.send(user.client)


class _ClosedLoopUser(User):  # type: ignore[misc]
    abstract = True
    wait_time = constant(0)
    tasks = [_send]  # noqa: RUF012  (locust reads a plain list)
    protocol: str

    def on_start(self) -> None:
        self.session: Session = self.environment.flan_session
        self.client: Client = self.session.make_client(self.protocol)

    def on_stop(self) -> None:
        self.client.close()


class RestUser(_ClosedLoopUser):
    protocol = "rest"


class GrpcUser(_ClosedLoopUser):
    protocol = "grpc"


def _arrive(user: Any) -> None:
    user.arrive()


class ArrivalUser(User):  # type: ignore[misc]
    """The open loop: one user that sleeps until the next arrival and lets each request run by itself."""

    fixed_count = 1
    wait_time = constant(0)
    tasks = [_arrive]  # noqa: RUF012

    def on_start(self) -> None:
        self.session: Session = self.environment.flan_session
        options = self.session.options
        self._rate: float = options.arrival_rate
        self._rng = random.Random(options.workload_seed)
        self._running = gevent.pool.Pool(options.max_in_flight)
        self._idle: dict[str, list[Client]] = {protocol: [] for protocol in self.session.protocols}
        self._due = time.perf_counter()

    def arrive(self) -> None:
        self._due += self._rng.expovariate(self._rate)
        gevent.sleep(max(0.0, self._due - time.perf_counter()))
        if self._running.full():
            self.session.recorder.skipped += 1  # said in the report: a bound that hides arrivals hides the queue
            return
        self._running.spawn(self._send, self._rng.choice(self.session.protocols), self._due)

    def _send(self, protocol: str, due: float) -> None:
        idle = self._idle[protocol]
        client = idle.pop() if idle else self.session.make_client(protocol)
        self.session.send(client, due)
        idle.append(client)

    def on_stop(self) -> None:
        self._running.join(timeout=self.session.options.request_timeout)
        for client in (client for idle in self._idle.values() for client in idle):
            client.close()


def _add_arguments(parser: Any) -> None:
    parser.add_argument("--grpc-target", default="127.0.0.1:50051", help="address of the gRPC port")
    parser.add_argument("--protocols", default="rest,grpc", help="rest, grpc or both")
    parser.add_argument("--shapes", default="stream,unary", help="stream, unary or both")
    parser.add_argument("--workload", default="flan", help="name of a workload that ships, or a .toml file")
    parser.add_argument("--workload-seed", type=int, default=1, help="equal seeds send equal requests")
    parser.add_argument("--arrival-rate", type=float, default=0.0, help="open loop: arrivals a second; 0 = closed loop")
    parser.add_argument("--max-in-flight", type=int, default=256, help="open loop: requests at a time")
    parser.add_argument("--max-requests", type=int, default=20_000, help="stop after so many requests")
    parser.add_argument("--max-seconds", type=float, default=600.0, help="stop after so long, whatever -t says")
    parser.add_argument("--request-timeout", type=float, default=60.0, help="seconds until a request is given up")
    parser.add_argument("--api-key", default="", is_secret=True, env_var=API_KEY_VARIABLE, help="bearer token")
    parser.add_argument("--objectives", default="", help="objective file (name or .toml); decides the exit code")
    parser.add_argument("--report-json", default="", help="write the report there at the end")
    parser.add_argument("--allow-remote", action="store_true", help="allow targets that are not this machine")


def _on_init(environment: Any, **_: Any) -> None:
    if not isinstance(environment.runner, LocalRunner):
        raise SystemExit("the token meters live in one process: run without --master, --worker and --processes")
    try:
        session = Session(environment)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    environment.flan_session = session
    closed = [kind for kind in (RestUser, GrpcUser) if kind.protocol in session.protocols]
    environment.user_classes = [ArrivalUser] if session.options.arrival_rate > 0 else closed


def _on_test_start(environment: Any, **_: Any) -> None:
    environment.flan_session.start()


def _on_quitting(environment: Any, **_: Any) -> None:
    environment.flan_session.finish()


events.init_command_line_parser.add_listener(_add_arguments)
events.init.add_listener(_on_init)
events.test_start.add_listener(_on_test_start)
events.quitting.add_listener(_on_quitting)
