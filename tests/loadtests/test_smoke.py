"""The whole: a real server on the demo checkpoint, loaded over REST and gRPC, judged by the shipped objectives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests import objectives, smoke

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, str]]:
    """(REST URL, gRPC address) of a server with the bundled checkpoint."""
    command = [sys.executable, "-m", "serve", "--port", "0", "--grpc-port", "0", "--log-format", "json"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready "), "the server did not start: run `flan-serve` to see why"
        words = dict(word.split("=", 1) for word in line.split()[1:])
        yield words["rest"], words["grpc"]
        process.terminate()
        assert process.wait(timeout=40) == 0


@pytest.mark.slow
def test_smoke_on_the_demo_checkpoint(server: tuple[str, str], tmp_path: Path) -> None:
    rest, grpc = server
    # Two passes of the deck over each protocol, however slow the machine is; so times are shown and not judged here.
    result = smoke.run(smoke.Load(rest, grpc, seconds=90, users=4, max_requests=80), tmp_path)
    verdicts = objectives.check(result, objectives.load("smoke"))
    kept = {verdict.what: verdict.kept for verdict in verdicts}
    assert kept["failed_ratio"], result["failures"]
    assert kept["missing_rows"]
    assert result["totals"]["requests"] == 80
    assert result["server"]["runtime"] == "torch"
    totals = result["totals"]
    assert totals["answers_checked"] == totals["requests"], "every case of the workload has an answer"
    assert totals["answers_right"] >= 0.5 * totals["answers_checked"], "nonsense: is it the demo checkpoint?"
    text = smoke.write_pages(result, tmp_path, verdicts)
    assert "grpc stream cot" in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.json",
        "report.md",
        "report.png",
        "locust.html",
        "locust.log",
    }
