"""Scores, token ids and the model card over REST and gRPC, and what our own client makes of both: the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import grpc
import httpx
import pytest

from protos.flan.v1 import generation_pb2 as pb
from protos.flan.v1.generation_pb2_grpc import FlanServiceStub
from serve.client import FlanClient
from serve.errors import InvalidRequest
from serve.output import Completion, Timings
from tests.server.process import ServerProcess
from tests.server.protocol_cases import MAX_OUTPUT_TOKENS, REQUESTS, REVIEW, SCORE_MISTAKES, SCORES
from tests.server.protocol_edges import Json, Refused, close, from_message, post, refused, refused_call, to_message


def score_both(talking: ServerProcess, body: Json) -> tuple[Json | Refused, Json | Refused]:
    """The same scoring request over REST and over gRPC."""
    with httpx.Client(base_url=talking.rest_url, trust_env=False) as http:
        response = post(http, "/v1/score", body, None)
    rest: Json | Refused = response.json() if response.status_code == 200 else refused(response)
    with grpc.insecure_channel(talking.grpc_target) as channel:
        try:
            rpc: Json | Refused = from_message(FlanServiceStub(channel).Score(to_message(body, pb.ScoreRequest)))
        except grpc.RpcError as error:
            rpc = refused_call(error)
    for scores in (rest, rpc):
        if isinstance(scores, dict):
            del scores["request_id"], scores["timings"]
    return rest, rpc


@pytest.mark.parametrize("case", SCORES)
def test_scores_agree(talking: ServerProcess, case: str) -> None:
    rest, rpc = score_both(talking, SCORES[case])
    assert isinstance(rest, dict), rest
    assert rpc == close(rest)
    assert [item["text"] for item in rest["candidates"]] == SCORES[case]["candidates"]


@pytest.mark.parametrize("case", SCORE_MISTAKES)
def test_mistakes_in_scoring_agree(talking: ServerProcess, case: str) -> None:
    mistake = SCORE_MISTAKES[case]
    rest, rpc = score_both(talking, mistake.body)
    for error in (rest, rpc):
        assert isinstance(error, Refused)
        assert (error.kind, error.field) == (mistake.kind, mistake.field)
    # A message cannot tell an empty list from none.
    assert rest == rpc or "candidates" not in mistake.body


@pytest.fixture(scope="module")
def clients(talking: ServerProcess) -> Iterator[tuple[FlanClient, FlanClient]]:
    with FlanClient(talking.rest_url) as rest, FlanClient(f"grpc://{talking.grpc_target}") as rpc:
        yield rest, rpc


def comparable(completion: Completion) -> Completion:
    """Without what differs from call to call."""
    return replace(completion, request_id="", created=0, timings=Timings())


@pytest.mark.parametrize("case", ["temperature, seed and n", "stop with n", "few_shot, a set, one of it", "cot, a set"])
def test_our_client_sees_the_same_over_both(clients: tuple[FlanClient, FlanClient], case: str) -> None:
    body = REQUESTS[case]
    rest, rpc = (comparable(client.generate(**body)) for client in clients)
    assert rpc == rest
    for client in clients:
        stream = client.stream(**body)
        texts = [""] * len(rest.outputs)
        for delta in stream:
            texts[delta.index] += delta.text
        assert texts == [output.text for output in rest.outputs]
        assert replace(comparable(stream.completion), outputs=()) == replace(rest, outputs=())


def said(completion: Completion) -> Completion:
    """Comparable between batches: the last digits of log-probabilities depend on what else is in the batch."""
    outputs = tuple(replace(output, logprobs=None) for output in completion.outputs)
    votes = tuple(replace(vote, weight=0.0) for vote in completion.votes)
    return replace(comparable(completion), outputs=outputs, votes=votes)


def with_ids(body: Json) -> Json:
    """As Python says it: the keys of logit_bias are numbers."""
    bias = body.get("logit_bias")
    return body if bias is None else {**body, "logit_bias": {int(token): value for token, value in bias.items()}}


def test_many_at_a_time_have_the_answers_that_each_has_alone(clients: tuple[FlanClient, FlanClient]) -> None:
    """The whole table through generate_many of our client, with its mistakes in between."""
    bodies = [with_ids(body) for body in REQUESTS.values()]
    expected = [said(clients[0].generate(**body)) for body in bodies]
    mistakes = [({**REVIEW, **fields}, field) for fields, field in (({"top_p": 0}, "top_p"), ({"n": 65}, "n"))]
    requests = [*bodies, *(body for body, _ in mistakes)]
    for client in clients:
        results = sorted(client.generate_many(requests, max_in_flight=16), key=lambda result: result.index)
        for case, completion, result in zip(REQUESTS, expected, results, strict=False):
            assert result.error is None, case
            assert result.completion is not None
            assert result.completion.request_id == result.request_id
            assert said(result.completion) == completion, case
        for (_, field), result in zip(mistakes, results[len(REQUESTS) :], strict=True):
            assert isinstance(result.error, InvalidRequest)
            assert result.error.field == field


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
    assert (rest.id, rest.max_output_tokens, rest.runtime) == ("flan", MAX_OUTPUT_TOKENS, "torch")
