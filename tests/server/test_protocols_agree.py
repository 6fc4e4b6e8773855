"""One table of requests through REST, SSE, gRPC unary and gRPC stream: same texts, reasons, counts, answers, errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from serve.client import FlanClient
from serve.errors import InvalidRequest, NotFound, ServeError
from serve.output import Completion, Timings
from serve.request import Exemplar
from tests.server.process import ServerProcess

EXEMPLARS = [Exemplar("two and two", "4", "two and two is 4"), Exemplar("one and two", "3", "one and two is 3")]

REQUESTS: dict[str, dict[str, Any]] = {
    "raw": {"mode": "raw", "instruction": "the cat is"},
    "instruction": {"instruction": "Is the dog positive?", "input": "the dog", "options": ["yes", "no"]},
    "few_shot": {"mode": "few_shot", "instruction": "add", "input": "two and three", "exemplars": EXEMPLARS},
    "cot": {"mode": "cot", "instruction": "add two and three", "exemplars": EXEMPLARS},
    "cot zero-shot": {"mode": "cot", "instruction": "add two and three"},
    "self-consistency": {"mode": "cot", "instruction": "add one and one", "samples": 5, "seed": 7},
    "sampled": {"instruction": "hello", "temperature": 1.0, "top_p": 0.9, "top_k": 40, "seed": -3, "n": 3},
    "unknown pieces": {"instruction": "return {x} if y < 3"},
    "logprobs": {"instruction": "hello", "logprobs": 3},
    "logprobs of the chosen only": {"instruction": "hello", "logprobs": 0},
    "one token": {"instruction": "hello", "max_tokens": 1},
    "clamped": {"instruction": "hello", "max_tokens": 10_000},
    "min tokens": {"instruction": "hello", "min_tokens": 20},
    "logit bias": {"instruction": "hello", "logit_bias": {5: -100.0, 40: 4.5}, "max_tokens": 12},
    "repetition penalty": {"instruction": "hello", "repetition_penalty": 1.9, "max_tokens": 12},
    "ignore eos": {"instruction": "hello", "ignore_eos": True, "max_tokens": 16},
    "special tokens shown": {"instruction": "hello", "skip_special_tokens": False},
    "stop": {"instruction": "hello", "stop": ["e", "zz"]},
    "debug": {"mode": "few_shot", "instruction": "add", "input": "x", "exemplars": EXEMPLARS, "debug": True},
    "literal special tokens": {"mode": "raw", "instruction": "the </s> cat <pad> <extra_id_0>"},
    "the query among the exemplars": {
        "mode": "few_shot", "instruction": "add", "input": "Two  and two", "exemplars": EXEMPLARS,
    },
}  # fmt: skip

ERRORS: dict[str, tuple[dict[str, Any], type[ServeError], str | None]] = {
    "blank instruction": ({"instruction": "  "}, InvalidRequest, "instruction"),
    "no instruction": ({"input": "x"}, InvalidRequest, "instruction"),
    "temperature": ({"instruction": "x", "temperature": 2.5}, InvalidRequest, "temperature"),
    "top_p": ({"instruction": "x", "top_p": 0.0}, InvalidRequest, "top_p"),
    "top_k": ({"instruction": "x", "top_k": -1}, InvalidRequest, "top_k"),
    "repetition_penalty": ({"instruction": "x", "repetition_penalty": 0.0}, InvalidRequest, "repetition_penalty"),
    "max_tokens": ({"instruction": "x", "max_tokens": 0}, InvalidRequest, "max_tokens"),
    "min_tokens": ({"instruction": "x", "max_tokens": 2, "min_tokens": 3}, InvalidRequest, "min_tokens"),
    "n": ({"instruction": "x", "n": 65}, InvalidRequest, "n"),
    "samples outside cot": ({"instruction": "x", "samples": 3}, InvalidRequest, "samples"),
    "samples": ({"mode": "cot", "instruction": "x", "samples": 65}, InvalidRequest, "samples"),
    "empty stop": ({"instruction": "x", "stop": [""]}, InvalidRequest, "stop"),
    "17 stops": ({"instruction": "x", "stop": [str(n) for n in range(17)]}, InvalidRequest, "stop"),
    "logprobs": ({"instruction": "x", "logprobs": 21}, InvalidRequest, "logprobs"),
    "logit_bias id": ({"instruction": "x", "logit_bias": {139: 1.0}}, InvalidRequest, "logit_bias"),
    "logit_bias value": ({"instruction": "x", "logit_bias": {5: 101.0}}, InvalidRequest, "logit_bias"),
    "too long": ({"instruction": "cat " * 3000}, InvalidRequest, "instruction"),
    "NUL": ({"instruction": "x\0y"}, InvalidRequest, "instruction"),
    "exemplars in instruction mode": ({"instruction": "x", "exemplars": EXEMPLARS}, InvalidRequest, "exemplars"),
    "exemplar set": ({"mode": "cot", "instruction": "x", "exemplar_set": "none"}, InvalidRequest, "exemplar_set"),
    "model": ({"instruction": "x", "model": "gpt-4"}, NotFound, "model"),
}


@pytest.fixture(scope="module")
def clients(server: ServerProcess) -> Iterator[tuple[FlanClient, FlanClient]]:
    with FlanClient(server.rest_url) as rest, FlanClient(f"grpc://{server.grpc_target}") as rpc:
        yield rest, rpc


def comparable(completion: Completion) -> Completion:
    """Without what differs from call to call."""
    return replace(completion, request_id="", created=0, timings=Timings())


@pytest.mark.parametrize("name", REQUESTS)
def test_the_same_request_has_the_same_answer_everywhere(clients: tuple[FlanClient, FlanClient], name: str) -> None:
    fields = REQUESTS[name]
    answers = [client.generate(**fields) for client in clients]
    expected = comparable(answers[0])
    assert comparable(answers[1]) == expected
    for client in clients:
        stream = client.stream(**fields)
        texts = [""] * len(expected.outputs)
        reasons: dict[int, Any] = {}
        for delta in stream:
            assert delta.index not in reasons, "a delta after the output's last one"
            texts[delta.index] += delta.text
            assert "\ufffd" not in delta.text
            if delta.finish_reason is not None:
                reasons[delta.index] = delta.finish_reason
        assert texts == [output.text for output in expected.outputs]
        assert reasons == {output.index: output.finish_reason for output in expected.outputs}
        folded = comparable(stream.completion)
        assert replace(folded, outputs=()) == replace(expected, outputs=())


def without_logprobs(completion: Completion) -> Completion:
    """Comparable between batches: their last digits depend on what else is in the batch."""
    outputs = tuple(replace(output, logprobs=None) for output in completion.outputs)
    votes = tuple(replace(vote, weight=round(vote.weight, 3)) for vote in completion.votes)
    return replace(comparable(completion), outputs=outputs, votes=votes)


def test_many_at_a_time_have_the_answers_that_each_has_alone(clients: tuple[FlanClient, FlanClient]) -> None:
    expected = {name: comparable(clients[0].generate(**fields)) for name, fields in REQUESTS.items()}
    requests = [*REQUESTS.values(), *(fields for fields, _, _ in ERRORS.values())]
    for client in clients:
        results = sorted(client.generate_many(requests, max_in_flight=16), key=lambda result: result.index)
        answers, refusals = results[: len(REQUESTS)], results[len(REQUESTS) :]
        for (name, completion), result in zip(expected.items(), answers, strict=True):
            assert result.error is None, name
            assert result.completion is not None
            assert result.completion.request_id == result.request_id
            assert without_logprobs(result.completion) == without_logprobs(completion)
        for (name, (_, error, field)), result in zip(ERRORS.items(), refusals, strict=True):
            assert result.error is not None, name
            assert (type(result.error), result.error.field) == (error, field), name


@pytest.mark.parametrize("name", ERRORS)
def test_the_same_mistake_is_the_same_error_everywhere(clients: tuple[FlanClient, FlanClient], name: str) -> None:
    fields, kind, field = ERRORS[name]
    messages = set()
    for client in clients:
        with pytest.raises(kind) as caught:
            client.generate(**fields)
        assert caught.value.field == field
        messages.add(caught.value.message)
        with pytest.raises(kind) as caught:
            list(client.stream(**fields))
        assert caught.value.field == field
        messages.add(caught.value.message)
        assert client.generate(instruction="the cat", max_tokens=2).usage.completion_tokens in (1, 2)
    assert len(messages) == 1


def test_scores_agree_and_do_not_depend_on_order_or_number(clients: tuple[FlanClient, FlanClient]) -> None:
    candidates = ["yes", "no", "the answer is 4"]
    rest, rpc = (client.score(instruction="Is it?", input="the cat", candidates=candidates) for client in clients)
    assert rest.candidates == rpc.candidates
    assert rest.best == rpc.best == max(range(3), key=lambda i: rest.candidates[i].logprob)
    assert sum(candidate.probability for candidate in rest.candidates) == pytest.approx(1.0)
    backwards = clients[0].score(instruction="Is it?", input="the cat", candidates=candidates[::-1])
    for one, other in zip(rest.candidates, backwards.candidates[::-1], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    alone = clients[1].score(instruction="Is it?", input="the cat", candidates=["no"])
    assert alone.candidates[0].logprob == pytest.approx(rest.candidates[1].logprob, abs=1e-4)


def test_tokenize_equals_the_prompt_tokens_of_raw_mode(clients: tuple[FlanClient, FlanClient]) -> None:
    text = "the  cat\n\nis {here} </s>"
    rest, rpc = (client.tokenize(text) for client in clients)
    assert rest == rpc
    assert rest.token_ids[-1] == 1
    assert rest.token_ids.count(1) == 1
    usage = clients[0].generate(mode="raw", instruction=text, max_tokens=1).usage
    assert (usage.prompt_tokens, usage.unknown_tokens) == (rest.num_tokens, rest.unknown_tokens)
    assert rest.unknown_tokens >= 2


def test_the_model_card_agrees(clients: tuple[FlanClient, FlanClient]) -> None:
    rest, rpc = (client.model() for client in clients)
    assert rest == rpc
    assert (rest.id, rest.max_output_tokens, rest.runtime) == ("toy-t5", 64, "torch")
