"""Random protobuf over gRPC against a real server: the status is the contract's, each call counts, nothing stays."""

from __future__ import annotations

import socket

import grpc
import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.aftermath import check_counts, check_nothing_stayed
from tests.fuzz.rpc_cases import RpcCase, call, rpc_cases
from tests.fuzz.rpc_rules import ROUTES, check
from tests.fuzz.servers import MAX_BODY_BYTES, fill_caches, num_requests
from tests.fuzz.tally import ServerReadings, Tally
from tests.server.process import ServerProcess

USUAL_CALLS = 400
SHARE = 0.25


@pytest.mark.timeout(7200)
def test_no_message_is_too_odd(t5: ServerProcess) -> None:
    readings = ServerReadings(t5.rest_url, t5.process.pid, "grpc")
    tally = Tally(readings, num_requests(USUAL_CALLS, SHARE))
    if tally.is_long:
        fill_caches(t5)
    before = readings.outcomes()

    @settings(
        max_examples=tally.expected,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(rpc_cases(MAX_BODY_BYTES))
    def ask(case: RpcCase) -> None:
        answer = call(channel, case)
        outcomes = check(case, answer, max_message_bytes=MAX_BODY_BYTES)
        route = ROUTES.get(case.method)
        if route is not None:
            tally.outcomes.update((route, outcome) for outcome in outcomes)
            if not outcomes:
                tally.left[route] += max(1, len(case.messages))
        tally.count(case.method, answer.code.name)

    with grpc.insecure_channel(t5.grpc_target) as channel:
        try:
            ask()
        finally:
            print(tally.report())
    check_counts(tally, readings, before, all_arrived=False)
    check_nothing_stayed(t5, readings)
    tally.check_reach(ROUTES.values())
    tally.check_memory()


@pytest.mark.parametrize(
    "data", [b"\0" * 64, b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 8], ids=["zeros", "http", "all"]
)
def test_what_is_no_grpc_ends_its_connection_alone(t5: ServerProcess, data: bytes) -> None:
    host, port = t5.grpc_target.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        while connection.recv(4096):
            pass
    check_nothing_stayed(t5, ServerReadings(t5.rest_url, t5.process.pid, "grpc"))
