"""The real server as a child process, the way a user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from tests.engine.checkpoints import make_t5_checkpoint
from tests.service.toy_tokenizers import t5_like_spec

_READY = re.compile(r"^ready rest=(\S+) grpc=(\S+) model=(\S+) runtime=(\S+)$")
START_SECONDS = 60.0


def make_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """A small random T5 1.1 checkpoint with a T5-like tokenizer: 2 + 2 layers, 160 rows of vocabulary."""
    make_t5_checkpoint(folder, "t5_v1_1", vocab_size=160, seed=seed)
    (folder / "tokenizer.json").write_text(t5_like_spec(), encoding="utf-8")
    return folder


def own_environment() -> dict[str, str]:
    """Of a server in the tests: no settings from outside, no network, one thread."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("FLAN_SERVE_")}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class ServerProcess:
    """`python -m serve` on free ports; `with` waits for the ready line and ends it with SIGTERM.

    `lines` is everything it printed so far, on both streams; the ready line counts on standard output alone.
    `rest_url` and `grpc_target` are where it listens.
    """

    def __init__(
        self,
        *argv: str,
        env: dict[str, str] | None = None,
        wait: bool = True,
        start_seconds: float = START_SECONDS,
        stop_seconds: float = 10.0,
    ) -> None:
        self._wait = wait
        self._start_seconds, self._stop_seconds = start_seconds, stop_seconds
        self.lines: list[str] = []
        self.rest_url = self.grpc_target = self.model = ""
        self._ready = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serve", "--port", "0", "--grpc-port", "0", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=own_environment() | ({} if env is None else env),
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._pipes = (self.process.stdout, self.process.stderr)
        self._readers = [
            threading.Thread(target=read, args=(pipe,), daemon=True)
            for read, pipe in zip((self._read_output, self._read_errors), self._pipes, strict=True)
        ]
        for reader in self._readers:
            reader.start()

    def _read_output(self, pipe: IO[str]) -> None:
        for line in pipe:
            self.lines.append(line.rstrip("\n"))
            found = _READY.match(self.lines[-1])
            if found:
                self.rest_url, self.grpc_target, self.model, _ = found.groups()
                self._ready.set()
        self._ready.set()

    def _read_errors(self, pipe: IO[str]) -> None:
        for line in pipe:
            self.lines.append(line.rstrip("\n"))

    def __enter__(self) -> ServerProcess:
        if self._wait and not (self._ready.wait(self._start_seconds) and self.rest_url):
            self.__exit__(None, None, None)
            raise AssertionError("the server did not become ready:\n" + "\n".join(self.lines))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(self._stop_seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for reader, pipe in zip(self._readers, self._pipes, strict=True):
            reader.join(5)
            pipe.close()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_code(self, seconds: float) -> tuple[int, float]:
        """Wait for the end: (exit code, seconds it took)."""
        began = time.monotonic()
        return self.process.wait(seconds), time.monotonic() - began
