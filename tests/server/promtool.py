"""Prometheus' own linter, where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest


def promtool() -> str:
    """The program's path; without it the test is skipped, and fails in CI, which installs it."""
    found = shutil.which("promtool")
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail("promtool is missing: apt-get install prometheus")
        pytest.skip("promtool is missing (apt-get install prometheus): what it says is not tested")
    return found


def lint(exposition: str) -> tuple[int, list[str]]:
    """`promtool check metrics`: (exit code, complaints). 0 is none, 3 is lint, 1 a text that does not parse."""
    done = subprocess.run(
        [promtool(), "check", "metrics"], input=exposition, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, sorted(line for line in (done.stdout + done.stderr).splitlines() if line)
