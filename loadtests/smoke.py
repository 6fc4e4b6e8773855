"""Run locust headless in a process of its own and turn what it wrote into a report folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests import objectives, report

API_KEY_VARIABLE = "FLAN_LOADTESTS_API_KEY"  # not a flag of the child process: others can read those
LOCUSTFILE = Path(__file__).parent / "locustfile.py"
STOP_SECONDS = 60  # what running requests get to end, and the longest that the process may outlive its run


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent where; see the options of the same names in locustfile.py."""

    rest: str
    grpc: str
    seconds: float
    users: int = 4
    workload: str = "flan"
    workload_seed: int = 1
    protocols: str = "rest,grpc"
    shapes: str = "stream,unary"
    arrival_rate: float = 0.0
    max_in_flight: int = 256
    max_requests: int = 20_000
    api_key: str = ""
    allow_remote: bool = False

    def to_arguments(self) -> list[str]:
        arguments = ["--host", self.rest, "--grpc-target", self.grpc, "-t", f"{self.seconds:g}s"]
        arguments += ["--users", str(self.users), "--spawn-rate", str(self.users)]
        for name in (
            "workload",
            "workload_seed",
            "protocols",
            "shapes",
            "arrival_rate",
            "max_in_flight",
            "max_requests",
        ):
            arguments += [f"--{name.replace('_', '-')}", str(getattr(self, name))]
        return [*arguments, "--allow-remote"] if self.allow_remote else arguments


def run(load: Load, folder: Path) -> dict[str, Any]:
    """Send the load; write report.json and locust's own locust.html, locust.log to `folder`; return the report.

    Raises:
        RuntimeError: locust ended without a report; the end of its log is in the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"]
    command += ["--stop-timeout", f"{STOP_SECONDS}s", "--html", str(folder / "locust.html")]
    command += ["--report-json", str(path), *load.to_arguments()]
    log = folder / "locust.log"
    with log.open("w", encoding="utf-8") as output:
        subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {API_KEY_VARIABLE: load.api_key},
            timeout=load.seconds + 2 * STOP_SECONDS,
            check=False,
        )
    if not path.is_file():
        raise RuntimeError(f"locust wrote no report; {log} ends with:\n{log.read_text(encoding='utf-8')[-2000:]}")
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def write_pages(result: dict[str, Any], folder: Path, verdicts: Sequence[objectives.Verdict] = ()) -> str:
    """Write report.md and report.png; returns the Markdown."""
    report.draw(result, folder / "report.png")
    text = report.to_markdown(result, verdicts, "report.png")
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text
