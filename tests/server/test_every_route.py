"""What a prompt, a limit and an ending mean: told alike on every route of both protocols, counted alike by metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.client import FlanClient
from serve.output import FinishReason
from tests.server.process import ServerProcess, make_checkpoint


@pytest.fixture(scope="module")
def demo() -> Iterator[ServerProcess]:
    """The bundled demo: T5's own kind of tokenizer, and outputs that end by themselves."""
    with ServerProcess("--max-output-tokens", "400") as process:
        yield process


@pytest.fixture
def http(demo: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo.rest_url, timeout=60, trust_env=False) as client:
        yield client


# What a route says of a request: (text, ended by a limit, tokens of the prompt, tokens made).
Told = tuple[str, bool, int, int]
Route = Callable[[ServerProcess, str, dict[str, Any]], Told]


def post(server: ServerProcess, path: str, body: dict[str, Any]) -> Any:
    response = httpx.post(server.rest_url + path, json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def events(server: ServerProcess, path: str, body: dict[str, Any]) -> list[Any]:
    response = httpx.post(server.rest_url + path, json=body, timeout=60)
    assert response.status_code == 200, response.text
    data = [line[5:].strip() for line in response.text.split("\n") if line.startswith("data:")]
    return [json.loads(item) for item in data if item != "[DONE]"]


def native(server: ServerProcess, prompt: str, fields: dict[str, Any]) -> Told:
    answer = post(server, "/v1/generate", {"mode": "raw", "instruction": prompt, **fields})
    [output], usage = answer["outputs"], answer["usage"]
    return output["text"], output["finish_reason"] == "length", usage["prompt_tokens"], usage["completion_tokens"]


def native_stream(server: ServerProcess, prompt: str, fields: dict[str, Any]) -> Told:
    *frames, last = events(server, "/v1/generate", {"mode": "raw", "instruction": prompt, "stream": True, **fields})
    text, usage = "".join(frame["text"] for frame in frames), last["usage"]
    return text, frames[-1]["finish_reason"] == "length", usage["prompt_tokens"], usage["completion_tokens"]


def rpc(server: ServerProcess, prompt: str, fields: dict[str, Any]) -> Told:
    with FlanClient(f"grpc://{server.grpc_target}") as client:
        answer = client.generate(mode="raw", instruction=prompt, **fields)
    [output], usage = answer.outputs, answer.usage
    return output.text, output.finish_reason is FinishReason.LENGTH, usage.prompt_tokens, usage.completion_tokens


def rpc_stream(server: ServerProcess, prompt: str, fields: dict[str, Any]) -> Told:
    with FlanClient(f"grpc://{server.grpc_target}") as client:
        stream = client.stream(mode="raw", instruction=prompt, **fields)
        deltas = list(stream)
        usage = stream.completion.usage
    text = "".join(delta.text for delta in deltas)
    return text, deltas[-1].finish_reason is FinishReason.LENGTH, usage.prompt_tokens, usage.completion_tokens


def completions(server: ServerProcess, prompt: str, fields: dict[str, Any]) -> Told:
    answer = post(server, "/v1/completions", {"prompt": prompt, "temperature": 0, **fields})
    [choice], usage = answer["choices"], answer["usage"]
    return choice["text"], choice["finish_reason"] == "length", usage["prompt_tokens"], usage["completion_tokens"]


def chat(server: ServerProcess, prompt: str, fields: dict[str, Any]) -> Told:
    messages = [{"role": "user", "content": prompt}]
    answer = post(server, "/v1/chat/completions", {"messages": messages, "temperature": 0, **fields})
    [choice], usage = answer["choices"], answer["usage"]
    text = choice["message"]["content"]
    return text, choice["finish_reason"] == "length", usage["prompt_tokens"], usage["completion_tokens"]


def tgi(server: ServerProcess, prompt: str, fields: dict[str, Any]) -> Told:
    [last] = events(server, "/generate_stream", tgi_body(prompt, fields))[-1:]
    details = last["details"]
    length = details["finish_reason"] == "length"
    return last["generated_text"], length, details["input_length"], details["generated_tokens"]


def tgi_body(prompt: str, fields: dict[str, Any]) -> dict[str, Any]:
    names = {"max_tokens": "max_new_tokens"}
    return {"inputs": prompt, "parameters": {names.get(name, name): value for name, value in fields.items()}}


ROUTES: list[Route] = [native, native_stream, rpc, rpc_stream, completions, chat, tgi]


def told(server: ServerProcess, prompt: str, **fields: Any) -> Told:
    """What all routes say, which is one thing."""
    [answer, *others] = (route(server, prompt, fields) for route in ROUTES)
    assert others == [answer] * (len(ROUTES) - 1)
    return answer


def counter(http: httpx.Client, name: str) -> float:
    return sum(map(float, re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", http.get("/metrics").text, re.MULTILINE)))


def test_characters_without_a_piece_are_counted_and_never_shown(demo: ServerProcess, http: httpx.Client) -> None:
    prompt = 'Return {"a": 1} if x < 3'
    before = counter(http, "flan_unknown_tokens_total")
    text, *_ = told(demo, prompt)
    assert "⁇" not in text
    assert "<unk>" not in text
    assert counter(http, "flan_unknown_tokens_total") - before == 3 * len(ROUTES)
    assert post(demo, "/v1/tokenize", {"text": prompt})["unknown_tokens"] == 3
    assert post(demo, "/v1/generate", {"mode": "raw", "instruction": prompt})["usage"]["unknown_tokens"] == 3
    readme = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")
    assert "a Flan-T5 model cannot write JSON" in " ".join(readme.split())


def test_newlines_and_runs_of_spaces_are_one_space_and_end_nothing(demo: ServerProcess, http: httpx.Client) -> None:
    ids = [post(demo, "/v1/tokenize", {"text": text})["token_ids"] for text in ("a\n\nb", "a b", " a \t  b ")]
    assert ids[0] == ids[1] == ids[2]
    prompt = "Is this review positive or negative?\n\nI loved the story, it was charming."
    plain = told(demo, prompt)
    assert plain == told(demo, prompt.replace("\n\n", " "))
    assert plain == told(demo, prompt, stop=["\n", "\n\n"])


def test_a_prompt_ends_in_one_eos_however_it_comes(demo: ServerProcess, http: httpx.Client) -> None:
    prompt = "Where do cows live? " * 5
    ids = post(demo, "/v1/tokenize", {"text": prompt})["token_ids"]
    assert (ids[-1], ids.count(1)) == (1, 1)
    before = counter(http, "flan_prompt_tokens_total")
    text, _, prompt_tokens, _ = told(demo, prompt)
    assert prompt_tokens == len(ids)
    for given in (ids, ids[:-1], [*ids, 1]):
        answer = post(demo, "/v1/completions", {"prompt": given, "temperature": 0})
        assert (answer["choices"][0]["text"], answer["usage"]["prompt_tokens"]) == (text, len(ids))
    assert counter(http, "flan_prompt_tokens_total") - before == len(ids) * (len(ROUTES) + 3)
    cut = events(demo, "/generate_stream", tgi_body(prompt, {"truncate": 9, "max_tokens": 4}))[-1]
    alone = post(demo, "/v1/completions", {"prompt": ids[-9:], "temperature": 0, "max_tokens": 4})
    assert cut["details"]["input_length"] == alone["usage"]["prompt_tokens"] == 9
    assert cut["generated_text"] == alone["choices"][0]["text"]


def test_a_prompt_of_700_tokens_is_neither_cut_nor_warned_of(demo: ServerProcess, http: httpx.Client) -> None:
    prompt = "cow " * 699
    _, _, prompt_tokens, _ = told(demo, prompt, max_tokens=2)
    assert prompt_tokens == post(demo, "/v1/tokenize", {"text": prompt})["num_tokens"] >= 700
    [model] = http.get("/v1/models").json()["data"]
    assert model["max_input_tokens"] == 2048
    assert not [line for line in demo.lines if "longer than" in line or '"warning"' in line]


def test_without_a_limit_the_servers_default_cuts_and_says_so(demo: ServerProcess) -> None:
    _, is_cut, _, made = told(demo, "Where do cows live?")
    assert (is_cut, made < 20) == (False, True)
    for path, body in (
        ("/v1/generate", {"instruction": "Where do cows live?"}),
        ("/v1/completions", {"prompt": "Where do cows live?"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Where do cows live?"}]}),
    ):
        answer = post(demo, path, {**body, "ignore_eos": True})
        [output] = answer["outputs"] if path == "/v1/generate" else answer["choices"]
        assert (answer["usage"]["completion_tokens"], output["finish_reason"]) == (256, "length")
    with FlanClient(f"grpc://{demo.grpc_target}") as client:
        answer = client.generate("Where do cows live?", ignore_eos=True)
        assert (answer.usage.completion_tokens, answer.max_tokens) == (256, 256)


def test_the_end_is_told_alike_before_at_and_behind_a_limit(demo: ServerProcess) -> None:
    """k tokens before EOS: `length` up to max_tokens = k, for EOS was not made yet; `stop` from k + 1 on."""
    prompt = "Take the last letters of Paul Maria and join them. Let's think step by step."
    text, is_cut, _, made = told(demo, prompt)
    assert not is_cut
    for limit in (made - 2, made - 1, made, made + 1):
        shorter, is_cut, _, count = told(demo, prompt, max_tokens=limit)
        assert (is_cut, count) == (limit < made, min(limit, made))
        assert text.startswith(shorter)
    word = max(text.split()[1:], key=len)
    stopped, is_cut, _, _ = told(demo, prompt, stop=[word])
    assert (stopped.strip(), is_cut) == (text[: text.index(word)].strip(), False)


def test_one_process_serves_and_counters_never_fall(checkpoint_folder: Path) -> None:
    """More workers are refused by the option's name; the variable that makes some servers fork does nothing."""
    with ServerProcess("--workers", "2", wait=False) as process:
        assert process.exit_code(30)[0] == 2
    assert "--workers" in "\n".join(process.lines)
    with (
        ServerProcess("--model", str(checkpoint_folder), env={"WEB_CONCURRENCY": "4"}) as process,
        httpx.Client(base_url=process.rest_url, timeout=60) as http,
    ):
        for number in range(1, 11):
            post(process, "/v1/generate", {"instruction": "the cat", "max_tokens": 2})
            assert counter(http, "flan_requests_total") == number
            assert counter(http, "flan_requests_running") == 0


def test_a_checkpoint_keeps_its_spare_rows_to_itself(tmp_path: Path) -> None:
    """160 rows, fewer pieces: no id beyond the tokenizer is drawn, told as an alternative or taken as a bias."""
    with ServerProcess("--model", str(make_checkpoint(tmp_path / "toy"))) as process:
        asked = {"instruction": "the cat", "temperature": 2.0, "n": 16, "max_tokens": 60, "ignore_eos": True}
        answer = post(process, "/v1/generate", {**asked, "logprobs": 20})
        entries = [entry for output in answer["outputs"] for entry in output["logprobs"]]
        ids = {one["token_id"] for entry in entries for one in (entry, *entry["top"])}
        assert len(entries) == 16 * 60
        assert max(ids) < 139
        for path in ("/v1/generate", "/v1/completions"):
            body = {"instruction": "x"} if path == "/v1/generate" else {"prompt": "x"}
            refused = httpx.post(process.rest_url + path, json={**body, "logit_bias": {"139": 5}})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logit_bias")
