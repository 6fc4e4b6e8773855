"""The parent's side of a worker process: start it, call it, end it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from types import TracebackType
from typing import Any

from loadtests.bench.system import Place

_LOG_TAIL = 1500  # characters of a dead worker's log that are shown
_END_SECONDS = 30


def environment_of(threads: int) -> dict[str, str]:
    """The variables of a process that measures."""
    count = str(threads)
    # Threads that spin while they wait for each other: the best setting of every system, on a machine of its own.
    return {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OMP_WAIT_POLICY": "active", "HF_HUB_OFFLINE": "1"}


class Child:
    """One system in its own process. It is stopped while it is not called: threads that spin would take a core."""

    def __init__(self, name: str, setting: str, place: Place) -> None:
        self.name, self.setting = name, setting
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadtests.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | environment_of(place.threads),
        )
        try:
            self.loaded = self.call("load", name=name, setting=setting, place=asdict(place))
        except BaseException:
            self.close()
            raise

    @property
    def title(self) -> str:
        return f"{self.name} {self.setting}"

    def call(self, call: str, **arguments: Any) -> dict[str, Any]:
        """Raises RuntimeError with what went wrong there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"call": call, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            self._process.send_signal(signal.SIGSTOP)
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self.title} ended by itself; its log ends with:\n{self._log.read()[-_LOG_TAIL:]}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"{self.title}, {call}: {reply['error']}")
        result: dict[str, Any] = reply["result"]
        return result

    def close(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
