"""After the storm: the server lives, answers as ever, and has nothing running or waiting."""

from __future__ import annotations

import time

import httpx

from tests.fuzz.rest_cases import KEY
from tests.fuzz.tally import Outcomes, ServerReadings, Tally
from tests.server.process import ServerProcess


def check_counts(tally: Tally, readings: ServerReadings, before: Outcomes, *, all_arrived: bool = True) -> None:
    """The server counted what was sent, each request once; one whose client left may take a moment.

    Raises:
        AssertionError: it did not.
    """
    deadline = time.monotonic() + 5
    while True:
        try:
            tally.check_outcomes(readings.outcomes() - before, all_arrived=all_arrived)
            return
        except AssertionError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def check_nothing_stayed(server: ServerProcess, readings: ServerReadings) -> None:
    """
    Raises:
        AssertionError: something did.
    """
    assert server.process.poll() is None
    deadline = time.monotonic() + 10
    while any(readings.gauges().values()):
        assert time.monotonic() < deadline, readings.gauges()
        time.sleep(0.05)
    body = {"mode": "raw", "instruction": "the cat", "max_tokens": 2}
    headers = {"authorization": f"Bearer {KEY}"}
    plain = httpx.post(f"{server.rest_url}/v1/generate", json=body, headers=headers, timeout=10)
    assert plain.status_code == 200
    assert [line for line in server.lines if "Traceback" in line] == []
