"""Every method of FlanService, over a real connection."""

from __future__ import annotations

import pytest

from protos.flan.v1 import generation_pb2 as pb
from serve.request import Mode
from tests.rpc.harness import served
from tests.service.scripted_runtime import ScriptedRuntime


async def test_generate() -> None:
    async with served("Paris is it") as s:
        response = await s.stub.Generate(pb.GenerateRequest(instruction="Where?", request_id="mine"))
        assert (response.request_id, response.model, response.mode) == ("mine", "scripted", pb.MODE_INSTRUCTION)
        (output,) = response.outputs
        assert (output.index, output.text, output.finish_reason) == (0, "Paris is it", pb.FINISH_REASON_STOP)
        assert not output.HasField("stop_reason")
        assert not output.logprobs
        assert response.max_tokens == 256
        usage = response.usage
        assert usage.completion_tokens > 0
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert response.timings.total_ms >= response.timings.first_token_ms >= response.timings.queue_ms >= 0
        assert not response.HasField("prompt")
        assert s.requests() == {("grpc", "generate", "instruction", "stop"): 1}


async def test_every_sampling_field_arrives_and_zero_can_be_said() -> None:
    async with served("yes") as s:
        request = pb.GenerateRequest(
            instruction="x",
            mode=pb.MODE_RAW,
            max_tokens=5,
            min_tokens=0,
            temperature=0.0,
            top_p=0.5,
            top_k=0,
            repetition_penalty=1.5,
            seed=-(2**63),
            n=2,
            stop=["so", "and"],
            logprobs=0,
            ignore_eos=False,
            skip_special_tokens=False,
            logit_bias={3: -100.0, 4: 1.5},
        )
        response = await s.stub.Generate(request)
        (prepared,) = s.runtime.requests
        sampling = prepared.sampling
        assert (prepared.mode, sampling.max_tokens, sampling.top_p, sampling.top_k) == (Mode.RAW, 5, 0.5, 0)
        assert (sampling.temperature, sampling.repetition_penalty, sampling.seed) == (0.0, 1.5, -(2**63))
        assert (sampling.n, sampling.stop, sampling.logprobs) == (2, ("so", "and"), 0)
        assert (sampling.skip_special_tokens, sampling.logit_bias) == (False, {3: -100.0, 4: 1.5})
        assert [output.index for output in response.outputs] == [0, 1]
        assert all(output.logprobs for output in response.outputs)  # logprobs 0: the chosen tokens' only
        assert all(not entry.top for output in response.outputs for entry in output.logprobs)


async def test_prompt_fields_arrive() -> None:
    async with served("yes") as s:
        response = await s.stub.Generate(
            pb.GenerateRequest(
                instruction="Is it so?",
                mode=pb.MODE_FEW_SHOT,
                input="the cat",
                options=["yes", "no"],
                exemplars=[pb.Exemplar(input="the dog", output="no", rationale="so")],
                debug=True,
                stop=["three"],
            )
        )
        for text in ("Is it so?", "the cat", "yes", "no", "the dog"):
            assert text in response.prompt
        assert "three" in response.stop
        assert (response.exemplars_used, response.exemplars_dropped) == (1, 0)


async def test_chain_of_thought_with_votes() -> None:
    async with served("so 4 and 5. The answer is 4.", "The answer is 4.", "The answer is 7.") as s:
        request = pb.GenerateRequest(instruction="How many?", mode=pb.MODE_COT, samples=3)
        response = await s.stub.Generate(request)
        assert response.mode == pb.MODE_COT
        assert [output.answer for output in response.outputs] == ["4", "4", "7"]
        assert response.outputs[0].rationale.startswith("so 4 and 5")
        assert (response.answer, response.HasField("tie"), response.tie) == ("4", True, False)
        assert [(vote.answer, vote.count) for vote in response.votes] == [("4", 2), ("7", 1)]


@pytest.mark.parametrize(
    "request_",
    [
        pb.GenerateRequest(instruction="x"),
        pb.GenerateRequest(instruction="x", n=3, logprobs=2, stop=["is"]),
        pb.GenerateRequest(instruction="x", max_tokens=2, debug=True),
        pb.GenerateRequest(instruction="x", mode=pb.MODE_COT, samples=4),
    ],
    ids=["plain", "n, logprobs and stop", "length", "votes"],
)
async def test_stream_joined_equals_unary(request_: pb.GenerateRequest) -> None:
    async with served("hello world, the answer is 5.", "so: Paris") as s:
        request_.request_id = "same"
        whole = await s.stub.Generate(request_)
        events = [event async for event in s.stub.GenerateStream(request_)]
        *deltas, last = events
        assert [event.WhichOneof("event") for event in events] == ["delta"] * len(deltas) + ["final"]
        for output in whole.outputs:
            of_index = [event.delta for event in deltas if event.delta.index == output.index]
            assert "".join(delta.text for delta in of_index) == output.text
            assert [delta.HasField("finish_reason") for delta in of_index] == [False] * (len(of_index) - 1) + [True]
            assert of_index[-1].finish_reason == output.finish_reason
            assert of_index[-1].stop_reason == output.stop_reason
            assert [entry for delta in of_index for entry in delta.logprobs] == list(output.logprobs)
        for message in (whole, last.final):
            message.ClearField("timings")
            message.ClearField("created")
        assert last.final == whole


async def test_score() -> None:
    async with served() as s:
        response = await s.stub.Score(
            pb.ScoreRequest(instruction="x", candidates=["yes no yes", "no"], request_id="mine")
        )
        assert (response.request_id, response.model, response.best) == ("mine", "scripted", 1)
        long, short = response.candidates
        assert (long.text, short.text) == ("yes no yes", "no")
        assert long.logprob == pytest.approx(long.logprob_per_token * long.num_tokens)
        assert long.probability + short.probability == pytest.approx(1.0)
        assert response.usage.prompt_tokens > 0
        assert s.requests() == {("grpc", "score", "instruction", "stop"): 1}


async def test_tokenize() -> None:
    async with served("x") as s:
        whole = await s.stub.Tokenize(pb.TokenizeRequest(text="hello ~ world"))
        bare = await s.stub.Tokenize(pb.TokenizeRequest(text="hello ~ world", add_special_tokens=False))
        assert list(whole.token_ids) == [*bare.token_ids, 1]
        assert (whole.num_tokens, whole.unknown_tokens) == (len(whole.token_ids), 1)
        raw = await s.stub.Generate(pb.GenerateRequest(instruction="hello ~ world", mode=pb.MODE_RAW))
        assert raw.usage.prompt_tokens == whole.num_tokens
        empty = await s.stub.Tokenize(pb.TokenizeRequest(text=""))
        assert list(empty.token_ids) == [1]


async def test_get_model_is_no_request() -> None:
    async with served() as s:
        model = await s.stub.GetModel(pb.GetModelRequest())
        assert (model.id, model.runtime, model.dtype) == ("scripted", "scripted", "float32")
        assert (model.architecture, model.max_input_tokens) == ("T5ForConditionalGeneration", 2048)
        assert list(model.modes) == [pb.MODE_RAW, pb.MODE_INSTRUCTION, pb.MODE_FEW_SHOT, pb.MODE_COT]
        assert s.requests() == {}


@pytest.mark.parametrize(
    ("metadata", "field", "expected"),
    [("from.meta:1", None, "from.meta:1"), (None, "body_1", "body_1"), ("meta", "body", "meta"), ("a b", None, None)],
)
async def test_request_id(metadata: str | None, field: str | None, expected: str | None) -> None:
    async with served("yes") as s:
        sent = () if metadata is None else (("x-request-id", metadata),)
        for method in (s.stub.Generate, s.stub.GenerateStream):
            call = method(pb.GenerateRequest(instruction="x", request_id=field), metadata=sent)
            returned = dict(await call.initial_metadata())["x-request-id"]
            if expected is None:
                assert str(returned).startswith("req-")
            else:
                assert returned == expected
        assert (await s.stub.Generate(pb.GenerateRequest(instruction="x", request_id=field))).request_id


async def test_a_stream_tells_its_id_before_the_first_token() -> None:
    runtime = ScriptedRuntime()
    async with served("yes", runtime=runtime) as s:
        runtime.freeze()
        call = s.stub.GenerateStream(pb.GenerateRequest(instruction="x", request_id="early"))
        assert dict(await call.initial_metadata())["x-request-id"] == "early"
        call.cancel()
