"""Random REST requests against a real server: none is a 5xx or a hang, each is counted, and nothing stays behind."""

from __future__ import annotations

from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.aftermath import check_counts, check_nothing_stayed
from tests.fuzz.exchange import Connection
from tests.fuzz.rest_cases import KEY, Case, cases
from tests.fuzz.rest_rules import ROUTES, Rules
from tests.fuzz.servers import MAX_BODY_BYTES, fill_caches, num_requests
from tests.fuzz.tally import ServerReadings, Tally
from tests.server.process import ServerProcess

USUAL_REQUESTS = 400
SHARES = {"t5": 0.5, "causal": 0.25}


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", SHARES)
def test_no_request_is_too_odd(kind: str, request: pytest.FixtureRequest) -> None:
    server: ServerProcess = request.getfixturevalue(kind)
    document = httpx.get(f"{server.rest_url}/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()
    rules = Rules(document, max_body_bytes=MAX_BODY_BYTES)
    readings = ServerReadings(server.rest_url, server.process.pid, "rest")
    tally = Tally(readings, num_requests(USUAL_REQUESTS, SHARES[kind]))
    if tally.is_long:
        fill_caches(server)
    before = readings.outcomes()
    where = urlsplit(server.rest_url)
    assert where.hostname is not None
    assert where.port is not None
    connection = Connection((where.hostname, where.port))

    @settings(
        max_examples=tally.expected,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(document))
    def ask(case: Case) -> None:
        route = f"{case.method} {case.path}" if case.path in ROUTES or case.path in document["paths"] else "elsewhere"
        if case.leaves and case.method == "POST" and case.path in ROUTES:
            connection.leave(case.to_bytes())
            tally.left[ROUTES[case.path]] += 1
            tally.count(route, "left")
            return
        try:
            answer = connection.exchange(case.method, case.to_bytes())
            seen = rules.check(case, answer)
            if seen.is_last:
                connection.expect_end()
        except BaseException:
            connection.close()
            raise
        if seen.route is not None:
            tally.outcomes[seen.route, seen.outcome] += 1
        tally.count(route, str(answer.status))

    try:
        ask()
    finally:
        connection.close()
        print(tally.report())
    check_counts(tally, readings, before)
    check_nothing_stayed(server, readings)
    tally.check_reach(ROUTES.values())
    tally.check_memory()
