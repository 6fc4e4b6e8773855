"""lm-eval's API models against our engine: an encoder-decoder generates over the wire, and says where it scores."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.checkpoint import DEMO_FOLDER
from tests.server.lm_eval_runs import answers_of, run_lm_eval
from tests.server.process import ServerProcess

pytestmark = [
    pytest.mark.vllm,  # lm-eval lives in vLLM's environment
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (lm-eval[api])"),
]

KEY = "key-of-lm-eval"
REVIEWS = [
    {"text": "I loved the story, it was charming.", "label": "positive"},
    {"text": "I hated the dialogue, it was tedious.", "label": "negative"},
    {"text": "I loved the show, it was friendly.", "label": "positive"},
    {"text": "I hated the story, it was boring.", "label": "negative"},
    {"text": "I loved the music, it was lovely.", "label": "positive"},
]
QUESTION = "Is this review positive or negative? {{text}}"
WRITTEN: dict[str, Any] = {
    "task": "reviews", "output_type": "generate_until", "doc_to_text": QUESTION, "doc_to_target": "{{label}}",
    "generation_kwargs": {"until": ["\n\n", "Question:"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0},
    "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip
RANKED: dict[str, Any] = {
    "task": "reviews_ranked", "output_type": "multiple_choice", "doc_to_text": QUESTION, "doc_to_target": "{{label}}",
    "doc_to_choice": ["positive", "negative"], "metric_list": [{"metric": "acc"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def demo() -> Iterator[ServerProcess]:
    with ServerProcess("--api-key", KEY) as process:
        yield process


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(scope="module")
def expected(demo: ServerProcess) -> list[str]:
    """What a plain request answers."""
    headers = {"authorization": f"Bearer {KEY}"}
    texts = []
    for row in REVIEWS:
        body = {"prompt": QUESTION.replace("{{text}}", row["text"]), "max_tokens": 12, "temperature": 0}
        answer = httpx.post(f"{demo.rest_url}/v1/completions", json=body, headers=headers, timeout=60).json()
        texts.append(str(answer["choices"][0]["text"]))
    assert texts.count("positive") == 3
    return texts


def arguments(demo: ServerProcess, route: str, **more: Any) -> str:
    given = {"model": "flan-demo", "base_url": f"{demo.rest_url}{route}", "tokenizer": str(DEMO_FOLDER), **more}
    return ",".join(f"{name}={value}" for name, value in given.items())


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({"tokenized_requests": False}, ()),  # texts, one by one
        ({"tokenized_requests": True}, ("--batch_size", "3")),  # lists of lists of token ids
    ],
)
def test_local_completions_generates(
    demo: ServerProcess, expected: list[str], tmp_path: Path, more: dict[str, Any], options: tuple[str, ...]
) -> None:
    model_args = arguments(demo, "/v1/completions", **more)
    samples = run_lm_eval(
        tmp_path / "run", "local-completions", model_args, rows=REVIEWS, tasks=[WRITTEN], options=options
    )
    assert answers_of(samples)["reviews"] == expected
    assert [row["exact_match"] for row in samples["reviews"]] == [
        float(text == row["label"]) for text, row in zip(expected, REVIEWS, strict=True)
    ]


def test_local_chat_completions_generates(demo: ServerProcess, expected: list[str], tmp_path: Path) -> None:
    samples = run_lm_eval(
        tmp_path / "run",
        "local-chat-completions",
        arguments(demo, "/v1/chat/completions", num_concurrent=4),
        rows=REVIEWS,
        tasks=[WRITTEN],
        options=("--apply_chat_template",),
    )
    assert answers_of(samples)["reviews"] == expected


def test_ranking_is_refused_with_the_route_that_scores(demo: ServerProcess, tmp_path: Path) -> None:
    """Never numbers that mean nothing: an encoder-decoder cannot know where the context ends."""
    model_args = arguments(demo, "/v1/completions", tokenized_requests=True, max_retries=1)
    with pytest.raises(AssertionError, match="/v1/score"):
        run_lm_eval(tmp_path / "run", "local-completions", model_args, rows=REVIEWS, tasks=[RANKED])
