"""One locust run: its options, its deck of requests, its recorder, and the report at its end.

Imported by the locustfile only: importing locust or gevent patches the whole process.
"""

from __future__ import annotations

import json
import subprocess
import time
from argparse import Namespace
from collections.abc import Iterator
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent
from locust.env import Environment

from loadtests import objectives, workload
from loadtests.machine import machine
from loadtests.meters import Client, Measurement, RequestFailed, measure
from loadtests.recorder import Recorder
from loadtests.rest_client import RestClient
from loadtests.rpc_client import RpcClient
from loadtests.workload import Case

DEFAULT_HOST = "http://127.0.0.1:8000"
LAG_PROBE_SECONDS = 0.05
BACKOFF_SECONDS = 0.1  # after a failure; a closed loop against a dead server would spin


def check_target(address: str, allow_remote: bool) -> None:
    """Raises ValueError for a target that is not this machine, unless that was allowed."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    try:
        is_local = ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not is_local and not allow_remote:
        raise ValueError(f"{address} is not a loopback address; --allow-remote, if that server is yours to load")


class Session:
    """What the users of one run share. Greenlets switch only while waiting, so plain attributes are safe."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.options: Namespace = environment.parsed_options
        self.workload = workload.load(self.options.workload)
        self.objectives = objectives.load(self.options.objectives) if self.options.objectives else None
        self.protocols = tuple(self.options.protocols.split(","))
        self.shapes = tuple(self.options.shapes.split(","))
        if not set(self.protocols) <= {"rest", "grpc"}:
            raise ValueError(f"--protocols: rest, grpc or both with a comma, not {self.options.protocols!r}")
        if not set(self.shapes) <= set(workload.SHAPES):
            raise ValueError(f"--shapes: stream, unary or both with a comma, not {self.options.shapes!r}")
        for address in self._targets().values():
            check_target(address, self.options.allow_remote)
        self._reset()

    def _targets(self) -> dict[str, str]:
        return {"rest": self.environment.host or DEFAULT_HOST, "grpc": self.options.grpc_target}

    def _reset(self) -> None:
        self.recorder = Recorder() if self.objectives is None else Recorder(self.objectives.goodput)
        # Each protocol deals from its own copy of the deck: both send the same requests.
        self._decks: dict[str, Iterator[tuple[str, Case]]] = {
            protocol: self.workload.deck(self.options.workload_seed, self.shapes) for protocol in self.protocols
        }
        self._sent = 0
        self._stopping = False

    def start(self) -> None:
        """A run begins (on locust's page there may be several in one process)."""
        self._reset()
        gevent.spawn(self._probe_lag)
        gevent.spawn_later(self.options.max_seconds, self._stop, "--max-seconds")

    def make_client(self, protocol: str) -> Client:
        target = self._targets()[protocol]
        check_target(target, self.options.allow_remote)
        kind = RestClient if protocol == "rest" else RpcClient
        return kind(target, self.options.api_key or None, self.options.request_timeout)

    def send(self, client: Client, scheduled: float | None = None) -> None:
        """One request off the deck, measured, recorded and shown in locust's rows."""
        if self._stopping or self._sent >= self.options.max_requests:
            self._stop("--max-requests")
            gevent.sleep(BACKOFF_SECONDS)
            return
        self._sent += 1
        shape, case = next(self._decks[client.protocol])
        measurement = measure(client, case.fields, shape, scheduled)
        self.recorder.add(client.protocol, shape, case, measurement)
        self._fire(client.protocol, shape, case, measurement)
        if measurement.error is not None and scheduled is None:
            gevent.sleep(BACKOFF_SECONDS)

    def _fire(self, protocol: str, shape: str, case: Case, measurement: Measurement) -> None:
        def fire(kind: str, name: str, milliseconds: float, error: str | None = None) -> None:
            self.environment.events.request.fire(
                request_type=kind,
                name=name,
                response_time=milliseconds,
                response_length=measurement.completion_tokens,
                exception=None if error is None else RequestFailed(error),
                context={},
            )

        fire(protocol.upper(), f"{shape} {case.mode}", measurement.e2e_ms, measurement.error)
        if measurement.error is not None:
            return
        for kind, value in (
            ("TTFT", measurement.ttft_ms),
            ("TPOT", measurement.tpot_ms),
            ("QUEUE", measurement.queue_ms),
        ):
            if value is not None:
                fire(kind, f"{protocol} {case.mode}", value)
        for gap in measurement.itl_ms:
            fire("ITL", f"{protocol} {case.mode}", gap)

    def _probe_lag(self) -> None:
        recorder = self.recorder
        while recorder is self.recorder and not self._stopping:
            asked = time.perf_counter()
            gevent.sleep(LAG_PROBE_SECONDS)
            recorder.lags_ms.append((time.perf_counter() - asked - LAG_PROBE_SECONDS) * 1000)

    def _stop(self, why: str) -> None:
        if self._stopping:
            return
        self._stopping = True
        print(f"stopping: {why}", flush=True)
        runner = self.environment.runner
        gevent.spawn(runner.quit if self.options.headless else runner.stop)

    def build_report(self) -> dict[str, Any]:
        return self.recorder.build(
            {
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "commit": _commit(),
                "machine": machine(),
                "server": self._server(),
                "config": {
                    "workload": self.workload.name,
                    "workload_seed": self.options.workload_seed,
                    "load": self._describe_load(),
                    "protocols": ",".join(self.protocols),
                    "shapes": ",".join(self.shapes),
                    **self._targets(),
                },
            },
            {
                (protocol, shape, family.mode)
                for protocol in self.protocols
                for shape in self.shapes
                for family in self.workload.families
            },
        )

    def _describe_load(self) -> str:
        if self.options.arrival_rate > 0:
            return f"open loop, {self.options.arrival_rate:g} arrivals/s"
        return f"closed loop, {self.options.num_users} users"

    def _server(self) -> dict[str, Any] | None:
        try:
            model = RestClient(self._targets()["rest"], self.options.api_key or None, 5.0).model()
        except RequestFailed:
            return None  # gRPC alone was loaded, or the server is gone; the failures say so
        return {key: value for key, value in model.items() if isinstance(value, str | int | float)}

    def finish(self) -> None:
        """The run ends: write the report, and let the objectives decide the exit code where there are any."""
        report = self.build_report()
        if self.options.report_json:
            Path(self.options.report_json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if self.objectives is not None:
            missed = [verdict for verdict in objectives.check(report, self.objectives) if not verdict.kept]
            for verdict in missed:
                print(f"missed: {verdict.what} = {verdict.value}, must be {verdict.limit}", flush=True)
            self.environment.process_exit_code = 1 if missed else 0


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
