"""The meters over a real wire, in processes of their own: locust patches the process that it runs in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loadtests import selftest, smoke

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_meters_tell_the_truth(tmp_path: Path) -> None:
    checks = selftest.run(tmp_path, requests=80)
    assert len(checks) >= 60
    assert [str(check) for check in checks if not check.passed] == []


def test_a_false_meter_is_found() -> None:
    """What a client that reads in blocks would report: the first token with the last one, and no gaps."""
    last = selftest.FIRST_MS + selftest.GAP_MS * (selftest.TOKENS - 1)
    metrics = {
        name: {"p50": value} for name, value in (("ttft_ms", last), ("tpot_ms", 0), ("itl_ms", 0), ("e2e_ms", last))
    }
    row = {"protocol": "rest", "shape": "stream", "mode": "raw", "metrics": metrics}
    failed = [check.what for check in selftest.check_times({"rows": [row]}) if not check.passed]
    assert len(failed) == 4, "the row count, TTFT, TPOT and ITL"


@pytest.mark.parametrize("target", [("--rest", "http://192.0.2.1:8000"), ("--grpc", "example.org:50051")])
def test_other_machines_are_not_loaded(tmp_path: Path, target: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "loadtests", "smoke", "--seconds", "1", "--out", str(tmp_path), *target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "is not a loopback address" in done.stderr


def test_runs_are_bounded_by_requests(tmp_path: Path) -> None:
    with selftest.running_stub("--first-ms", "1", "--gap-ms", "1", "--tokens", "2") as (rest, grpc):
        load = smoke.Load(rest, grpc, seconds=20, users=3, max_requests=25, protocols="rest")
        result = smoke.run(load, tmp_path)
    assert result["totals"]["requests"] == 25
    assert result["totals"]["metrics"]["e2e_ms"]["p50"] < 1000
