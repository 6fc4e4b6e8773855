"""Bare `vllm serve` with nothing but our package installed beside it: the OpenAI routes serve T5."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.vllm_t5.models import SPARE, Reference, random_prompts, reference, small, text_of
from tests.vllm_t5.processes import VllmServe

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("default")]

LONGEST = 128


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts([4, 9, 17, 26, 40, 55, 77, 110], size=1024 - SPARE, seed=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("served"), "t5_v1_1", seed=8)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServe]:
    log = tmp_path_factory.mktemp("serve") / "log"
    options = ("--max-model-len", str(LONGEST), "--max-num-seqs", "8", "--enforce-eager")
    with VllmServe(model, log, *options, "--max-num-batched-tokens", "512") as running:
        yield running


@pytest.fixture(scope="module")
def expected(model: Path, prompts: list[list[int]]) -> Reference:
    return reference(model, prompts, 100)


def ask(server: VllmServe, **fields: Any) -> httpx.Response:
    body = {"model": "t5", "temperature": 0, "max_tokens": 48, "ignore_eos": True, "return_token_ids": True, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def test_the_entry_point_is_announced() -> None:
    found = {entry.name: entry.value for entry in entry_points(group="vllm.general_plugins")}
    assert found.get("flan_t5") == "serve.vllm_t5:register"


def test_texts_at_once(server: VllmServe, prompts: list[list[int]], expected: Reference) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: ask(server, prompt=text_of(prompt)).json(), prompts))
    for prompt, answer, tokens in zip(prompts, answers, expected.tokens, strict=True):
        assert answer["choices"][0]["token_ids"] == tokens[:48]
        assert answer["choices"][0]["prompt_token_ids"] == prompt
        assert answer["usage"] == answer["usage"] | {
            "prompt_tokens": len(prompt),
            "completion_tokens": 48,
            "total_tokens": len(prompt) + 48,
        }


def test_ids_and_a_list_of_prompts(server: VllmServe, prompts: list[list[int]], expected: Reference) -> None:
    answer = ask(server, prompt=prompts[:3], max_tokens=16).json()
    assert [choice["token_ids"] for choice in answer["choices"]] == [tokens[:16] for tokens in expected.tokens[:3]]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts[:3]))


def test_the_encoders_length_does_not_cut_max_tokens(
    server: VllmServe, prompts: list[list[int]], expected: Reference
) -> None:
    """110 tokens in and 100 out, where the model length is 128."""
    answer = ask(server, prompt=text_of(prompts[-1]), max_tokens=100).json()
    assert answer["choices"][0]["token_ids"] == expected.tokens[-1]
    beyond = ask(server, prompt=text_of(prompts[-1]), max_tokens=LONGEST).json()
    assert beyond["usage"]["completion_tokens"] == LONGEST - 1  # the decoder's start token has a place too


def test_a_stream_tells_the_same(server: VllmServe, prompts: list[list[int]], expected: Reference) -> None:
    body = {"model": "t5", "prompt": text_of(prompts[4]), "temperature": 0, "max_tokens": 20, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    tokens: list[int] = []
    usage: dict[str, int] = {}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                usage = event.get("usage") or usage
                tokens += [token for choice in event["choices"] for token in choice["token_ids"]]
    assert tokens == expected.tokens[4][:20]
    assert usage["prompt_tokens"] == len(prompts[4])
    assert usage["completion_tokens"] == 20


def test_echo_is_refused_with_a_sentence(server: VllmServe, prompts: list[list[int]]) -> None:
    answer = ask(server, prompt=text_of(prompts[0]), echo=True, logprobs=1)
    assert answer.status_code == 400
    assert "encoder" in answer.json()["error"]["message"]


def test_bad_prompts_are_the_clients_fault(server: VllmServe, prompts: list[list[int]], expected: Reference) -> None:
    for prompt in ([3, 5_000, 1], [], [5] * 200, "w5 " * 300):
        assert ask(server, prompt=prompt).status_code == 400
    answer = ask(server, prompt=prompts[0], max_tokens=5).json()
    assert answer["choices"][0]["token_ids"] == expected.tokens[0][:5]


def test_truncation_is_vllms(server: VllmServe, prompts: list[list[int]]) -> None:
    """It keeps the last tokens, </s> among them; and usage tells what the encoder read."""
    answer = ask(server, prompt=text_of(prompts[5]), truncate_prompt_tokens=20, max_tokens=3).json()
    assert answer["choices"][0]["prompt_token_ids"] == prompts[5][-20:]
    assert answer["usage"]["prompt_tokens"] == 20


def test_several_seeded_choices(server: VllmServe, prompts: list[list[int]]) -> None:
    fields = {"prompt": text_of(prompts[2]), "n": 3, "seed": 7, "temperature": 1.0, "max_tokens": 12}
    first, second = (ask(server, **fields).json() for _ in range(2))
    texts = [choice["token_ids"] for choice in first["choices"]]
    assert texts == [choice["token_ids"] for choice in second["choices"]]
    assert len({tuple(text) for text in texts}) == 3
    assert first["usage"]["prompt_tokens"] == len(prompts[2])
